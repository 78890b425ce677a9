"""A search for a recipe: what it may see, what it finds, and that nothing of it is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.files import write_json
from specmoe.predictors.recipes import values_of
from specmoe.predictors.registry import PREDICTORS
from specmoe.predictors.search import SHARED, Choice, Range
from specmoe.results import Interval, Results
from specmoe.suite.data import SuiteData
from specmoe.topology import Topology
from specmoe.trace import Trace
from specmoe.training import EpochReport, FitResult, TrainingFailed
from specmoe.tuning import (
    Search,
    TrialNews,
    apply_recipe,
    evidence_in_words,
    gain_in_words,
    load_tuning,
    tune,
    write_picture,
)
from specmoe.tuning import trial as trial_module
from specmoe.tuning.page import picture, summary
from specmoe.tuning.space import changes_of, space_of
from specmoe.tuning.storage import JOURNAL, mend, only_search, open_study

TINY = "TinySpeculationModel"
HORIZONS = (1, 2)
TRIALS = 8


class Stop(BaseException):
    """Ends a search from within, as Ctrl-C would."""


def search_for(trace: Path, out: Path, **options: Any) -> Search:
    return tune(trace, out, TINY, horizons=HORIZONS, **{"trials": TRIALS, **options})


@pytest.fixture(scope="module")
def searched(synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Path, set[int]]:
    """A search, its folder, and the documents that were read for it."""
    out, opened = tmp_path_factory.mktemp("tuning"), set()
    original = Trace.read

    def read(self: Trace, index: int, fields: tuple[str, ...] | None = None) -> Any:
        opened.add(index)
        return original(self, index, fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trace, "read", read)
        found = search_for(synthetic_path, out)
        write_picture(out, load_tuning(out))
    return found, out, opened


def test_the_test_part_is_never_read(searched: tuple[Search, Path, set[int]], synthetic_path: Path) -> None:
    parts = SuiteData.load(synthetic_path, HORIZONS).split.parts
    assert searched[2] == {*parts["train"], *parts["validation"]}
    assert searched[2].isdisjoint(parts["test"])
    assert parts["test"]


def test_what_a_search_finds(searched: tuple[Search, Path, set[int]]) -> None:
    found, out, _ = searched
    assert len(found.trials) == TRIALS
    first = found.trials[0]
    assert first.in_force
    assert first.state == "complete"
    assert first.values == {
        name: value for name, value in values_of(PREDICTORS[TINY].recipe).items() if name in found.space
    }
    best = found.best_trial
    assert best is not None
    assert best.recall == max(trial.recall or 0 for trial in found.trials if trial.state == "complete")
    assert best.recall == pytest.approx(sum(best.by_horizon.values()) / len(HORIZONS))
    assert found.gain is not None
    assert found.gain.value == pytest.approx((best.recall or 0) - (first.recall or 0), abs=2e-6)
    assert found.gain.low <= found.gain.value <= found.gain.high
    assert found.gain.value >= 0
    assert sum(interval.value for interval in found.gain_by_horizon.values()) / 2 == pytest.approx(
        found.gain.value, abs=2e-6
    )
    assert load_tuning(out) == {TINY: found}
    assert not list((out / "trials").glob("checkpoint-*"))
    assert all(trial.epochs == trial.values["epochs"] for trial in found.trials if trial.state == "complete")
    assert all(trial.seconds > 0 for trial in found.trials)


def test_a_gain_on_one_document_has_no_interval(searched: tuple[Search, Path, set[int]]) -> None:
    found, _, _ = searched
    one = found.model_copy(update={"documents": 1, "gain": Interval(value=0.0125, low=0.0125, high=0.0125)})
    assert one.gain is not None
    assert gain_in_words(one.gain) == "+1.25"
    assert evidence_in_words(one) == "no interval over 1 validation document"
    many = found.model_copy(update={"documents": 9, "gain": Interval(value=0.0125, low=-0.001, high=0.02)})
    assert many.gain is not None
    assert gain_in_words(many.gain) == "+1.25 [−0.10, +2.00]"
    assert evidence_in_words(many) == "95 % interval over 9 validation documents"


def test_going_on_keeps_what_there_is(
    searched: tuple[Search, Path, set[int]], synthetic_path: Path, tmp_path: Path
) -> None:
    found, out, _ = searched
    shutil.copytree(out, tmp_path / "s")
    news: list[TrialNews] = []
    assert search_for(synthetic_path, tmp_path / "s", on_news=news.append) == found
    assert news == []
    more = search_for(synthetic_path, tmp_path / "s", trials=TRIALS + 1, on_news=news.append)
    assert more.trials[:TRIALS] == found.trials
    assert len(more.trials) == TRIALS + 1
    assert {each.number for each in news} == {TRIALS}
    assert [each.share for each in news] == sorted(each.share for each in news)


def test_interrupted_in_a_trial_it_gives_the_same(
    searched: tuple[Search, Path, set[int]], synthetic_path: Path, tmp_path: Path
) -> None:
    def stop(news: TrialNews) -> None:
        if news.number == 2 and news.epoch is not None and news.epoch.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        search_for(synthetic_path, tmp_path, on_news=stop)
    assert len(load_tuning(tmp_path)[TINY].trials) == 2
    assert len(list((tmp_path / "trials").glob("checkpoint-*"))) == 1
    epochs: list[int] = []

    def note(news: TrialNews) -> None:
        if news.number == 3 and news.epoch is not None:
            epochs.append(news.epoch.epoch)

    found = search_for(synthetic_path, tmp_path, on_news=note)
    assert found.interrupted == 1
    assert epochs[0] == 2  # the epoch before had been saved
    expected = searched[0]
    assert [(t.values, t.recall, t.state, t.epochs) for t in found.trials] == [
        (t.values, t.recall, t.state, t.epochs) for t in expected.trials
    ]
    assert found.changes == expected.changes
    study = open_study(tmp_path, found.study)
    assert [t.state for t in study.trials].count(TrialState.FAIL) == 1
    assert not [t for t in study.trials if not t.state.is_finished()]


def spoil_test_documents(trace: Path) -> None:
    """Change the stored ids of every test document: reading one fails by its checksum."""
    opened = Trace.open(trace)
    for index in SuiteData.load(trace, HORIZONS).split.parts["test"]:
        place = opened._places[index]
        path = trace / opened.manifest.shards[place.shard].file
        content = bytearray(path.read_bytes())
        header = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + header])["expert_ids"]
        first, last = entry["data_offsets"]
        row = (last - first) // entry["shape"][0]
        content[8 + header + first + row * place.record.start] ^= 1
        path.write_bytes(content)


def test_killed_workers_lose_nothing_and_need_no_test_documents(synthetic_path: Path, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace", tmp_path / "out"
    shutil.copytree(synthetic_path, trace)
    spoil_test_documents(trace)
    with pytest.raises(SpecmoeError, match="checksum"):
        _ = SuiteData.load(trace, HORIZONS).evaluated
    command = [sys.executable, "-m", "specmoe", "tune", str(trace), "--out", str(out), "--only", TINY]
    command += ["--trials", "60", "--workers", "2", "--horizons", "1,2"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    try:
        # One trial has come to its end and another is at work.
        while not ((out / "tuning.json").exists() and list(out.glob("trials/checkpoint-*"))):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code":6,"worker')  # a line that was not written to its end
    found = search_for(trace, out, trials=0)
    ended = len(found.trials)
    assert ended >= 1
    assert 1 <= found.interrupted <= 2
    study = open_study(out, found.study)
    waiting = [t for t in study.trials if t.state == TrialState.WAITING]
    stale = [t for t in study.trials if t.user_attrs.get("interrupted")]
    assert {t.user_attrs["again_of"] for t in waiting} <= {t.number for t in stale}
    assert [t.system_attrs["fixed_params"] for t in waiting] == [
        t.params for t in stale if len(t.params) == len(found.space)
    ]
    more = search_for(trace, out, trials=ended + 1)
    assert len(more.trials) == ended + 1
    if waiting:
        assert more.trials[-1].number == waiting[0].number


@pytest.mark.parametrize("mode", ["prune", "fail", "fail first"])
def test_trials_that_fall_behind_or_diverge_do_not_end_the_search(
    mode: str, synthetic_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fit(predictor: Any, *arguments: Any, on_epoch: Callable[[EpochReport], None], **options: Any) -> FitResult:
        calls.append(len(calls))
        bad = calls[-1] == (0 if mode == "fail first" else 5)
        curve = []
        for epoch in range(1, predictor.recipe.epochs + 1):
            if bad and mode != "prune":
                raise TrainingFailed("loss nan")
            recall = 0.1 if bad else 0.5 + 0.001 * calls[-1]
            curve.append(EpochReport(epoch, 1.0, 1.0, recall, 0.1))
            on_epoch(curve[-1])
        return FitResult(curve, len(curve), "", 0.1)

    monkeypatch.setattr(trial_module, "fit", fit)
    found = search_for(synthetic_path, tmp_path, trials=7)
    states = [trial.state for trial in found.trials]
    assert len(calls) == 7
    odd = found.trials[0 if mode == "fail first" else 5]
    assert states.count("complete") == 6
    assert odd.state == ("pruned" if mode == "prune" else "failed")
    if mode == "prune":
        assert odd.recall == 0.1
        assert odd.values["epochs"] / 2 <= odd.epochs < odd.values["epochs"]
        assert "lowest quarter" in odd.reason
    else:
        assert (odd.recall, odd.reason) == (None, "loss nan")
    assert (found.gain is None) == (mode == "fail first")
    assert found.best is not None
    assert picture(found) is not None
    assert "failed" in summary(found) or mode == "prune"
    assert search_for(synthetic_path, tmp_path, trials=7) == found


def test_the_recipe_in_force_may_lie_outside_of_the_search(synthetic_path: Path, tmp_path: Path) -> None:
    start = {TINY: {"epochs": 1, "learning_rate": 0.1, "patience": 3}}
    found = search_for(synthetic_path, tmp_path, trials=1, recipes=start)
    assert (found.trials[0].values["epochs"], found.trials[0].values["learning_rate"]) == (1, 0.1)
    assert found.trials[0].epochs == 1
    assert (found.space["epochs"]["low"], found.space["learning_rate"]["high"]) == (1, 0.1)
    # Nothing beat it: what it starts from is what is applied.
    assert found.changes == start[TINY]


def test_the_space_leaves_out_what_has_no_effect() -> None:
    kind = PREDICTORS[TINY]
    soft, hard = space_of(kind, soft=True), space_of(kind, soft=False)
    assert "sharpness" in soft
    assert "label_smoothing" not in soft
    assert "sharpness" not in hard
    assert "label_smoothing" in hard
    changed = type("Other", (kind,), {"recipe": kind.recipe})
    changed.recipe = type(kind.recipe)(
        category="edge", sees="hidden", source="", epochs=3, scheduler="plateau",
        search=SHARED.but(warmup=Range(0.0, 0.3), scheduler=Choice(("plateau", "cosine"))),
    )  # fmt: skip
    assert "warmup" in space_of(changed, soft=True)
    changed.recipe = type(kind.recipe)(
        category="edge", sees="hidden", source="", epochs=3, search=SHARED.but(source=Choice(("a", "b")))
    )
    with pytest.raises(SpecmoeError, match="source"):
        space_of(changed, soft=True)
    assert changes_of({"learning_rate": 0.0123456, "epochs": 8, "clip": 1.0}, kind.recipe) == {"learning_rate": 0.01235}


# From a search to a trained predictor


def test_what_is_applied_is_what_was_found(
    searched: tuple[Search, Path, set[int]], synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    shutil.copytree(searched[1], out)
    other = {"SmallSpeculationModel": {"epochs": 2}}
    write_json(out / "recipes.json", {**other, TINY: {"clip": 3.0}})
    words = ["tune", str(synthetic_path), "--only", TINY, "--trials", str(TRIALS), "--horizons", "1,2"]
    assert run_verb([*words, "--out", str(out), "--workers", "1", "--apply"]) == 0
    printed = capsys.readouterr().out
    # Where nothing beat the recipe in force there is nothing to change.
    applied = {TINY: searched[0].changes} if searched[0].changes else {}
    assert json.loads((out / "recipes.json").read_text()) == {**other, **applied}
    best = searched[0].best_trial
    assert best is not None
    assert searched[0].changes == best.values
    line = next(line for line in printed.replace("\n", " ").split("with this recipe: ") if line.startswith("specmoe"))
    command = line.split("search:")[0].split()
    assert run_verb([*command[1:], "--seeds", "1", "--workers", "1"]) == 0
    (trained,) = Results.load(out / "train" / "results.json").predictors
    assert trained.recipe == searched[0].changes
    recall = trained.seeds[0].recall["validation"]
    assert recall == pytest.approx(best.by_horizon, abs=2e-6)
    assert len(trained.seeds[0].curve) == best.epochs


def test_nothing_is_applied_where_nothing_was_found(
    synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", str(synthetic_path), "--only", TINY, "--out", str(tmp_path), "--timeout", "0", "--workers", "1"]
    assert run_verb(words) == 0
    assert "0 trials" in capsys.readouterr().out
    assert run_verb([*words, "--apply"]) == 2
    assert "nothing to apply" in capsys.readouterr().err
    assert not (tmp_path / "recipes.json").exists()
    assert "No trial has a recall yet" in (tmp_path / "tuning.html").read_text()


def test_the_page_opens_offline_and_its_chart_is_drawn(searched: tuple[Search, Path, set[int]]) -> None:
    import vl_convert

    found, out, _ = searched
    page = (out / "tuning.html").read_text()
    assert "https://cdn" not in page
    assert page.count('id="chart-') == 1
    spec = picture(found)
    assert spec is not None
    drawing = vl_convert.vegalite_to_svg(spec)
    assert all(name in drawing for name in found.space)
    assert "recipe in force" in drawing


def test_json_and_progress(
    searched: tuple[Search, Path, set[int]], synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(searched[1], tmp_path / "s")
    words = ["tune", str(synthetic_path), "--only", "Tiny*", "--trials", str(TRIALS + 1), "--horizons", "1,2"]
    assert run_verb([*words, "--out", str(tmp_path / "s"), "--workers", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(Search.model_validate(json.loads(captured.out)[TINY]).trials) == TRIALS + 1
    assert f"trial {TRIALS + 1} of {TRIALS + 1}" in captured.err
    assert "s left" in captured.err


# What goes wrong


def test_ctrl_c_keeps_what_there_is(
    synthetic_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from specmoe.cli import tuning as cli_tuning

    def news(self: Any, news: TrialNews) -> None:
        if news.number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_tuning._View, "news", news)
    words = ["tune", str(synthetic_path), "--only", TINY, "--out", str(tmp_path), "--horizons", "1,2", "--workers", "1"]
    assert run_verb(words) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert len(load_tuning(tmp_path)[TINY].trials) == 1


def test_a_full_disk_ends_it_and_it_goes_on(
    synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", str(synthetic_path), "--only", TINY, "--out", str(tmp_path), "--trials", "1", "--horizons", "1,2"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel then refuses to write past this size, as it would on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = run_verb([*words, "--workers", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    captured = capsys.readouterr()
    assert "limit on file size" in captured.err
    assert "Traceback" not in captured.err
    found = search_for(synthetic_path, tmp_path, trials=1)
    assert [trial.state for trial in found.trials] == ["complete"]
    assert found.interrupted == 1


def test_a_journal_that_cannot_grow(synthetic_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = JournalFileBackend.append_logs, [0]

    def append(self: Any, logs: list[dict[str, Any]]) -> None:
        count[0] += 1
        if count[0] == 6:
            with Path(self._file_path).open("ab") as stream:
                stream.write(b'{"op')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", append)
    with pytest.raises(SpecmoeError, match="no space left"):
        search_for(synthetic_path, tmp_path, trials=1)
    found = search_for(synthetic_path, tmp_path, trials=1)
    assert [trial.state for trial in found.trials] == ["complete"]
    assert found.trials[0].in_force


def test_lines_that_were_cut_off_are_taken_out(tmp_path: Path) -> None:
    assert mend(tmp_path) == 0
    journal = tmp_path / JOURNAL
    journal.write_bytes(b'{"a":1}\n{"b"\n{"c":2}\n{"d":3}')
    assert mend(tmp_path) == 2
    assert journal.read_bytes() == b'{"a":1}\n{"c":2}\n'
    assert mend(tmp_path) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "Ridge"], "Ridge is not trained"),
        (["--only", "TinySpeculationModl"], "did you mean"),
        (["--only", TINY, "--preset", "sed"], "did you mean seed"),
        (["--only", TINY, "--horizons", "x"], "--horizons"),
        (["--only", TINY, "--device", "tpu"], "--device"),
        (["--only", TINY, "--trials", "0"], "--trials"),
        ([], "--only"),
    ],
)
def test_bad_command_lines(
    words: list[str], said: str, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(["tune", str(synthetic_path), "--out", str(tmp_path / "o"), *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_one_search_at_a_time_in_a_folder(synthetic_path: Path, tmp_path: Path) -> None:
    with only_search(tmp_path), pytest.raises(SpecmoeError, match="another search is at work"):
        search_for(synthetic_path, tmp_path)


def test_a_predictor_that_cannot_run_and_a_damaged_file(tmp_path: Path, synthetic_path: Path) -> None:
    from specmoe.sources.synthetic import synthetic_trace

    topology = Topology(model_id="t", layers=2, experts=4, top_k=1, hidden_size=8)
    synthetic_trace(tmp_path / "t", topology=topology, documents=8, tokens=12, determinism=0.5, seed=0)
    (tmp_path / "o").write_text("a file")
    with pytest.raises(SpecmoeError, match="cannot write to"):
        search_for(tmp_path / "t", tmp_path / "o", trials=1)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "tuning.json").write_text('{"searches": {"Tiny": {}}}')
    with pytest.raises(SpecmoeError, match=r"damaged at searches\.Tiny"):
        load_tuning(tmp_path / "s")
    found = search_for(synthetic_path, tmp_path / "n", trials=0)
    with pytest.raises(SpecmoeError, match="nothing to apply"):
        apply_recipe(tmp_path / "n", found)
