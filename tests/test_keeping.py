"""Training again into a folder: what lies there is taken over or stays as it is, and is replaced only if asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import Results
from specmoe.sources.synthetic import synthetic_trace
from specmoe.suite.run import JobEvent
from specmoe.suite.train import train_suite

TINY, FREE, MARKOV = "TinySpeculationModel", "LayerFrequency", "LayerMarkov"
ARGUMENTS: dict[str, Any] = {"seeds": (0,), "horizons": (1, 2), "workers": 1}


@pytest.fixture(scope="module")
def first(synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("keeping") / "first"
    train_suite(synthetic_path, out, [TINY, FREE], **ARGUMENTS)
    return out


@pytest.fixture
def out(first: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first, tmp_path / "out")


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def without_times(results: Results) -> dict[str, Any]:
    """What two runs of the same settings have in common: no clock and no command line."""
    plain = results.model_dump(mode="json")
    del plain["made"]
    for predictor in plain["predictors"]:
        del predictor["latency"]
        for seed in predictor["seeds"]:
            del seed["train_seconds"]
    return plain


def refused(synthetic_path: Path, out: Path, names: list[str], **changes: Any) -> str:
    """Training is refused, and no byte in the folder changes."""
    before = content(out)
    with pytest.raises(SpecmoeError) as caught:
        train_suite(changes.pop("trace", synthetic_path), out, names, **{**ARGUMENTS, **changes})
    assert content(out) == before
    message = str(caught.value)
    assert "\n" not in message
    assert "choose another --out, or give --replace" in message
    return message


def test_other_predictors_join_as_if_all_had_been_asked_for_at_once(
    synthetic_path: Path, out: Path, tmp_path: Path
) -> None:
    events: list[JobEvent] = []
    joined = train_suite(synthetic_path, out, [MARKOV], on_event=events.append, **ARGUMENTS)
    assert [event.job.predictor for event in events if event.result and not event.reused] == [MARKOV]
    names = [name for name in PREDICTORS if name in {TINY, FREE, MARKOV}]
    assert [predictor.name for predictor in joined.predictors] == names
    assert Results.load(out / "results.json") == joined
    at_once = train_suite(synthetic_path, tmp_path / "at once", names, **ARGUMENTS)
    assert without_times(joined) == without_times(at_once)


def test_a_part_of_the_predictors_leaves_the_others(synthetic_path: Path, out: Path) -> None:
    before = Results.load(out / "results.json")
    again = train_suite(synthetic_path, out, [FREE], **ARGUMENTS)
    assert without_times(again)["predictors"] == without_times(before)["predictors"]


def test_each_keeps_the_recipe_that_it_was_trained_by(synthetic_path: Path, tmp_path: Path) -> None:
    recipe = {TINY: {"epochs": 2}}
    train_suite(synthetic_path, tmp_path, [TINY], recipes=recipe, **ARGUMENTS)
    joined = train_suite(synthetic_path, tmp_path, [FREE], **ARGUMENTS)
    by_name = {predictor.name: predictor for predictor in joined.predictors}
    assert by_name[TINY].recipe == {"epochs": 2}
    assert len(by_name[TINY].seeds[0].curve) == 2
    message = refused(synthetic_path, tmp_path, [TINY])
    assert f'recipe of {TINY}: {{"epochs": 2}} there, {{}} here' in message
    # The same recipe again, among others.
    train_suite(synthetic_path, tmp_path, [TINY, FREE], recipes=recipe, **ARGUMENTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"horizons": (1, 3)}, "horizons: 1, 2 there, 1, 3 here"),
        ({"cache_experts": 5}, "experts in the cache: 2 there, 5 here"),
        ({"seeds": (1,)}, "seeds: 0 there, 1 here"),
    ],
)
@pytest.mark.parametrize("names", [[MARKOV], [TINY, FREE]], ids=["others", "the same"])
def test_other_settings_are_refused(
    synthetic_path: Path, out: Path, names: list[str], changes: dict[str, Any], words: str
) -> None:
    assert words in refused(synthetic_path, out, names, **changes)


def test_another_trace_is_refused(synthetic_path: Path, out: Path, tmp_path: Path) -> None:
    shape = Results.load(out / "results.json").trace.topology
    other = tmp_path / "other"
    synthetic_trace(other, topology=shape, documents=30, tokens=48, determinism=0.8, seed=4)
    assert "trace: " in refused(synthetic_path, out, [MARKOV], trace=other)


def test_another_torch_is_refused(synthetic_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert f"torch: {before} there, 9.9.9 here" in refused(synthetic_path, out, [TINY, FREE])


def test_more_seeds_of_the_same_predictors_are_no_loss(synthetic_path: Path, out: Path) -> None:
    assert "seeds: 0 there, 0, 1 here" in refused(synthetic_path, out, [MARKOV], seeds=(0, 1))
    more = train_suite(synthetic_path, out, [TINY, MARKOV], **{**ARGUMENTS, "seeds": (0, 1)})
    seeds = {predictor.name: len(predictor.seeds) for predictor in more.predictors}
    assert seeds == {TINY: 2, FREE: 1, MARKOV: 1}
    assert "seeds: 0, 1 there, 0 here" in refused(synthetic_path, out, [TINY, FREE, MARKOV])


def test_runs_without_results_are_not_overwritten(synthetic_path: Path, out: Path) -> None:
    # As a call leaves them that was killed before its last run.
    (out / "results.json").unlink()
    message = refused(synthetic_path, out, [TINY, FREE], horizons=(1, 3))
    assert "was trained under other settings" in message
    train_suite(synthetic_path, out, [TINY, FREE], **ARGUMENTS)


def test_results_whose_runs_are_gone(synthetic_path: Path, out: Path) -> None:
    shutil.rmtree(out / "jobs" / f"{FREE}-seed0")
    assert f"has results of {FREE}, whose run is no longer in jobs/" in refused(synthetic_path, out, [MARKOV])
    # Asked for, it is simply run again.
    again = train_suite(synthetic_path, out, [FREE], **ARGUMENTS)
    assert {predictor.name for predictor in again.predictors} == {TINY, FREE}


@pytest.mark.parametrize("text", ["", "{", '{"format": "specmoe-results"}'])
def test_results_that_cannot_be_read_are_not_replaced(synthetic_path: Path, out: Path, text: str) -> None:
    (out / "results.json").write_text(text)
    refused(synthetic_path, out, [MARKOV])


def test_results_of_a_predictor_that_is_no_more(synthetic_path: Path, out: Path) -> None:
    plain = json.loads((out / "results.json").read_text())
    plain["predictors"][0]["name"] = "ForgottenPredictor"
    (out / "results.json").write_text(json.dumps(plain))
    assert "results of ForgottenPredictor, which this specmoe lacks" in refused(synthetic_path, out, [MARKOV])


def test_replacing_is_asked_for(synthetic_path: Path, out: Path) -> None:
    new = train_suite(synthetic_path, out, [FREE], replace=True, **{**ARGUMENTS, "horizons": (1, 3)})
    assert Results.load(out / "results.json") == new
    assert [predictor.name for predictor in new.predictors] == [FREE]
    assert new.protocol.horizons == (1, 3)


def test_the_untrained_control_stays(synthetic_path: Path, tmp_path: Path) -> None:
    shape = train_suite(synthetic_path, tmp_path / "shape", [FREE], **ARGUMENTS).trace.topology
    controls = []
    for seed in (7, 8):
        controls.append(tmp_path / f"control-{seed}")
        synthetic_trace(controls[-1], topology=shape, documents=30, tokens=48, determinism=0.1, seed=seed)
    out = tmp_path / "out"
    before = train_suite(synthetic_path, out, [FREE], control=controls[0], **ARGUMENTS)
    after = train_suite(synthetic_path, out, [MARKOV], **ARGUMENTS)
    assert after.untrained == before.untrained
    assert set(after.untrained) == {FREE}
    assert after.control_trace == before.control_trace
    both = train_suite(synthetic_path, out, [MARKOV], control=controls[0], **ARGUMENTS)
    assert set(both.untrained) == {FREE, MARKOV}
    assert "control: " in refused(synthetic_path, out, [MARKOV], control=controls[1])


def test_the_verb(synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["train", str(synthetic_path), "--out", str(out), "--workers", "1", "--seeds", "1", "--json"]
    assert run_verb([*arguments, "--horizons", "1,2", "--only", FREE]) == 0
    assert "trained there before" not in capsys.readouterr().err
    assert run_verb([*arguments, "--horizons", "1,2", "--only", MARKOV]) == 0
    captured = capsys.readouterr()
    assert f"results also hold what was trained there before: {FREE}" in captured.err
    assert {p.name for p in Results.model_validate_json(captured.out).predictors} == {FREE, MARKOV}
    assert run_verb([*arguments, "--horizons", "1", "--only", MARKOV]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "horizons: 1, 2 there, 1 here" in captured.err
    assert "Traceback" not in captured.err
    assert run_verb([*arguments, "--horizons", "1", "--only", MARKOV, "--replace"]) == 0
    assert [p.name for p in Results.load(out / "results.json").predictors] == [MARKOV]
