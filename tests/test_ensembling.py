"""Blending a run's predictors: what it learns from, what comes out, and that nothing of it is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import vl_convert
from torch import Tensor

from specmoe.cli import run_verb
from specmoe.dataset import Window
from specmoe.ensembling import Blend, EnsembleResult, ensemble, load_blend, load_ensemble
from specmoe.ensembling import student as student_module
from specmoe.ensembling.members import choose_members, load_member, open_run
from specmoe.ensembling.outcome import Contender
from specmoe.ensembling.page import against_time, member_shares, render_ensemble
from specmoe.ensembling.student import choose_student, teacher_of
from specmoe.ensembling.weights import Opinions, fit_weights, gather, log_loss, recall_of, select_greedily
from specmoe.ensembling.words import contender_table, found
from specmoe.errors import SpecmoeError
from specmoe.evaluation import evaluate
from specmoe.latency import observations_of
from specmoe.predictors.registry import PREDICTORS
from specmoe.report.theme import LIGHT, vega_config
from specmoe.results import Interval, Latency, Results
from specmoe.sources.synthetic import synthetic_trace
from specmoe.suite.causality import TOLERANCE, largest_leak, probed_events, stretch_of
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import Job
from specmoe.suite.train import train_suite
from specmoe.topology import Topology
from specmoe.trace import Manifest, Source, Trace, TraceWriter
from specmoe.training import fit

TINY = "TinySpeculationModel"
NAMES = [TINY, "Ridge", "TokenTable", "LayerMarkov", "RandomGuess"]
HORIZONS = (1, 2)


@pytest.fixture(scope="module")
def run(synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two seeds."""
    out = tmp_path_factory.mktemp("run")
    train_suite(synthetic_path, out, NAMES, seeds=(0, 1), horizons=HORIZONS, workers=1)
    return out


def blended(run: Path, trace: Path, out: Path, **options: Any) -> EnsembleResult:
    return ensemble(run, out, trace=trace, **{"top": 4, "picks": 4, "student": TINY, **options})


@pytest.fixture(scope="module")
def made(
    run: Path, synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EnsembleResult, Path, list[Any]]:
    """An ensemble, its folder, and the validation windows its weights were learned from."""
    out, seen = tmp_path_factory.mktemp("ensemble"), []

    def watched(members: Any, windows: Any, **options: Any) -> Opinions:
        seen.append(windows)
        return gather(members, windows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specmoe.ensembling.run.gather", watched)
        return blended(run, synthetic_path, out), out, seen


def recalls(result: EnsembleResult) -> dict[str, dict[int, Interval]]:
    return {each.key: each.recall for each in result.contenders}


def test_what_an_ensemble_holds(made: tuple[EnsembleResult, Path, list[Any]], run: Path, synthetic_path: Path) -> None:
    result, out, seen = made
    assert load_ensemble(out / "ensemble.json") == result
    assert [each.key for each in result.contenders] == ["best", "blend", "greedy", "student", "taught"]
    results = Results.load(run / "results.json")
    by_validation = {
        p.name: sum(r for s in p.seeds for r in s.recall["validation"].values()) / (2 * len(p.seeds))
        for p in results.predictors
    }
    strongest = sorted(by_validation, key=lambda name: -by_validation[name])[:4]
    assert [member.name for member in result.members] == strongest
    assert result.best == strongest[0]
    assert [member.validation for member in result.members] == pytest.approx([by_validation[n] for n in strongest])
    best = result.contender("best")
    kept = next(p for p in results.predictors if p.name == result.best)
    assert best is not None
    for horizon, interval in best.recall.items():
        assert interval.value == pytest.approx(kept.scores["recall@K"][horizon].value, abs=1e-6)
    # Weights saw the validation documents and nothing else.
    data = SuiteData.load(synthetic_path, HORIZONS)
    assert len(seen) == 2
    assert all(set(w.documents.tolist()) == set(data.split.parts["validation"]) for w in seen)
    for each in result.contenders[1:]:
        assert each.gain is not None
        assert each.gain.value == pytest.approx(sum(d.value for d in each.difference.values()) / 2, abs=2e-6)
        for horizon in HORIZONS:
            difference = each.recall[horizon].value - best.recall[horizon].value
            assert each.difference[horizon].value == pytest.approx(difference, abs=2e-6)
    for horizon in HORIZONS:
        assert sum(member.weights[horizon] for member in result.members) == pytest.approx(1, abs=1e-3)
    assert sum(member.picks for member in result.members) == pytest.approx(1, abs=1e-3)
    assert [check.seed for check in result.checks] == [0, 1]
    assert all(check.share == 1 and check.documents >= 1 for check in result.checks)
    assert not list(out.rglob("checkpoint-*"))


def test_a_saved_blend_stands_alone(made: tuple[EnsembleResult, Path, list[Any]], synthetic_path: Path) -> None:
    result, out, _ = made
    data = SuiteData.load(synthetic_path, HORIZONS)
    saved = [load_blend(out / f"blend-seed{seed}.safetensors") for seed in (0, 1)]
    measured = [evaluate(each.blend, data.evaluated["test"], only_recall=True).recall() for each in saved]
    blend = result.contender("blend")
    assert blend is not None
    assert [blend.recall[h].value for h in HORIZONS] == pytest.approx(torch.tensor(measured).mean(0).tolist(), abs=1e-5)
    assert {seat.predictor for seat in saved[0].seats} == set(blend.members)
    # Every event of the test part through its calibration: probabilities.
    window = data.evaluated["test"].batch(slice(0, 2))
    probability = saved[0].calibration.apply(saved[0].blend(window))
    assert ((probability >= 0) & (probability <= 1)).all()
    torch.testing.assert_close(teacher_of(saved[0])(window).sum(-1), torch.ones(probability.shape[:-1]))


def test_a_blend_is_a_predictor(run: Path, synthetic_path: Path) -> None:
    opened = open_run(run, synthetic_path)
    members = [load_member(opened, Job(name, 0))[0] for name in (TINY, "Ridge", "TokenTable")]
    data = opened.data
    generator = torch.Generator().manual_seed(0)
    blend = Blend(members, torch.rand(3, data.topology.layers, len(HORIZONS), generator=generator))
    window = data.journey[1]
    with torch.no_grad():
        whole = blend(window)
        parts = [member(window) for member in members]
    torch.testing.assert_close(whole, sum(w[..., None] * p for w, p in zip(blend.weight_MSH, parts, strict=True)))
    state, layers = blend.start(), data.topology.layers
    for place, observation in enumerate(observations_of(window)[: 3 * layers]):
        step = blend.step(state, observation)
        torch.testing.assert_close(step, whole[0, place // layers, observation.layer], atol=1e-4, rtol=1e-4)
    stretch = stretch_of(data.evaluated["test"].batch(slice(0, 1)), 12)
    assert largest_leak(blend, stretch, probed_events(12, layers)) < TOLERANCE
    with pytest.raises(SpecmoeError, match="one topology"):
        Blend([members[0], PREDICTORS[TINY](data.topology, (1,))], blend.weight_MSH[:2])
    with pytest.raises(SpecmoeError, match="shape"):
        Blend(members, blend.weight_MSH[:2])


def opinions_of(logits_MNHE: Tensor, routed_NHE: Tensor, documents: int = 8) -> Opinions:
    """Made-up opinions; as many experts needed everywhere as in the first event."""
    top_k = int(routed_NHE[0, 0].sum())
    count, horizons = routed_NHE.shape[:2]
    ids = routed_NHE.topk(top_k, -1).indices
    known = torch.ones(count, horizons, dtype=torch.bool)
    return Opinions(logits_MNHE, ids, known, torch.arange(count) % documents, top_k, 1.0)


def noisy(seed: int, *noises: float, events: int = 400, experts: int = 8, top_k: int = 2) -> Opinions:
    """Members that see the truth through noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(events, 2, experts, generator=generator)
    routed = torch.zeros_like(truth).scatter_(-1, truth.topk(top_k, -1).indices, 1.0)
    said = [2 * truth + noise * torch.randn(truth.shape, generator=generator) for noise in noises]
    return opinions_of(torch.stack(said), routed)


def test_learned_weights_are_the_best_ones() -> None:
    opinions = noisy(0, 1.0, 2.0, 1e3)
    weight_MH = fit_weights(opinions)
    assert weight_MH.shape == (3, 2)
    assert (weight_MH >= 0).all()
    # The less noise the more weight, and none for noise alone.
    assert (weight_MH[0] > weight_MH[1]).all()
    assert (weight_MH[1] > 0).all()
    assert (weight_MH[2] == 0).all()
    least = log_loss(opinions, weight_MH)
    for member in range(3):
        for factor in (0.9, 1.1):
            moved = weight_MH.clone()
            moved[member] *= factor
            assert (log_loss(opinions, moved) >= least - 1e-5).all()
    others = noisy(1, 1.0, 2.0, 1e3)
    alone = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, 2)
    assert recall_of(others, weight_MH) > recall_of(others, alone) + 0.005


def test_weights_where_there_is_nothing_to_fit() -> None:
    everything = noisy(0, 1.0, 2.0, experts=4, top_k=4)
    assert torch.equal(fit_weights(everything), torch.full((2, 2), 0.5))
    nothing = dataclasses.replace(
        everything,
        logits_MNHE=everything.logits_MNHE[:, :0],
        expert_ids_NHK=everything.expert_ids_NHK[:0],
        known_NH=everything.known_NH[:0],
        document_N=everything.document_N[:0],
    )
    assert torch.equal(fit_weights(nothing), torch.full((2, 2), 0.5))
    assert nothing.halves() is None
    assert recall_of(nothing, torch.ones(2, 2)) == 0.0
    # A horizon beyond the documents has no event; the other one is fitted all the same.
    opinions = noisy(0, 1.0, 1e3)
    opinions.known_NH[:, 1] = False
    weight_MH = fit_weights(opinions)
    assert weight_MH.isfinite().all()
    assert weight_MH[0, 0] > 0
    assert weight_MH[1, 0] == 0


def test_halves_have_no_document_in_common() -> None:
    opinions = noisy(0, 1.0, 2.0)
    halves = opinions.halves()
    assert halves is not None
    documents = [set(half.document_N.tolist()) for half in halves]
    assert documents[0].isdisjoint(documents[1])
    assert [len(each) for each in documents] == [4, 4]
    assert sum(half.logits_MNHE.shape[1] for half in halves) == 400


def test_greedy_selection_starts_with_the_best_and_adds_what_helps() -> None:
    opinions = noisy(0, 3.0, 1.5, 1.5)
    alone = [recall_of(opinions, torch.eye(3)[:, m : m + 1].expand(3, 2)) for m in range(3)]
    selection = select_greedily(opinions, 6)
    assert len(selection.picks) == 6
    assert selection.picks[0].member == max(range(3), key=lambda m: alone[m])
    assert selection.picks[0].recall == max(alone)
    assert {pick.member for pick in selection.picks} >= {1, 2}
    weight_MH = selection.weights(3, 2)
    assert weight_MH.sum(0).tolist() == pytest.approx([1, 1])
    assert recall_of(opinions, weight_MH) == pytest.approx(selection.picks[-1].recall)
    assert selection.picks[-1].recall > max(alone) + 0.01


def test_greedy_selection_stops_when_the_held_back_half_no_longer_gains() -> None:
    # What helps where it is chosen, noise, harms elsewhere.
    fitted, held = noisy(0, 1.0, 1.0), noisy(1, 0.0, 1e3)
    selection = select_greedily(fitted, 8, held)
    assert fitted.logits_MNHE.shape == held.logits_MNHE.shape
    long = select_greedily(fitted, 8)
    assert len(long.picks) == 8
    assert len(selection.picks) < 8
    assert selection.picks == tuple(
        pick._replace(held_back=kept.held_back) for pick, kept in zip(long.picks, selection.picks, strict=False)
    )
    held_backs = [pick.held_back or 0.0 for pick in selection.picks]
    assert held_backs[-1] == max(held_backs)


def test_a_sample_is_seeded_and_of_every_document(run: Path, synthetic_path: Path) -> None:
    opened = open_run(run, synthetic_path)
    members = [load_member(opened, Job(name, 0)) for name in ("Ridge", "TokenTable")]
    whole, small, again = (
        gather(members, opened.data.validation, logits=logits) for logits in (1 << 24, 1 << 14, 1 << 14)
    )
    assert whole.share == 1
    assert 0 < small.share < 1
    assert small.logits_MNHE.numel() == pytest.approx(1 << 14, rel=0.2)
    assert torch.equal(small.logits_MNHE, again.logits_MNHE)
    assert small.documents == whole.documents


def test_a_teacher_is_asked_in_training_and_only_there(synthetic_path: Path) -> None:
    data = SuiteData.load(synthetic_path, HORIZONS)
    calls: list[int] = []

    def uniform(window: Window) -> Tensor:
        calls.append(len(window.token_ids_BT))
        shape = (*window.routed_BTLE.shape[:3], len(HORIZONS), data.topology.experts)
        return torch.full(shape, 1 / data.topology.experts)

    spread, curves = [], []
    for teacher in (None, uniform):
        torch.manual_seed(0)
        predictor = data.kind(TINY)(data.topology, HORIZONS)
        result = fit(predictor, data.train, data.validation, data.knowledge, seed=0, teacher=teacher)
        curves.append(result.curve)
        with torch.no_grad():
            spread.append(predictor(data.journey[1]).std(-1).mean().item())
    # Half of what it aims at says nothing.
    assert spread[1] < 0.95 * spread[0]
    assert sum(calls) == len(data.train) * len(curves[1])


def test_done_work_is_kept(
    made: tuple[EnsembleResult, Path, list[Any]],
    run: Path,
    synthetic_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result, out, _ = made
    shutil.copytree(out, tmp_path / "e")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this had been done")

    for name in ("specmoe.ensembling.run.gather", "specmoe.ensembling.run.evaluate"):
        monkeypatch.setattr(name, refuse)
    for name in ("fit", "run_job"):
        monkeypatch.setattr(student_module, name, refuse)
    again = blended(run, synthetic_path, tmp_path / "e")
    assert recalls(again) == recalls(result)
    assert again.checks == result.checks
    # The student without teacher is the run's own.
    student = again.contender("student")
    assert student is not None
    assert student.files == tuple(str(run / "jobs" / f"{TINY}-seed{seed}" / "model.safetensors") for seed in (0, 1))
    assert not (tmp_path / "e" / "jobs").exists()
    with pytest.raises(AssertionError, match="had been done"):
        blended(run, synthetic_path, tmp_path / "e", picks=3)


def test_killed_while_the_student_learns_it_goes_on(tmp_path: Path) -> None:
    topology = Topology(model_id="synthetic", layers=4, experts=8, top_k=2, hidden_size=32)
    trace, run = tmp_path / "run" / "trace", tmp_path / "run"
    synthetic_trace(trace, topology=topology, documents=30, tokens=48, determinism=0.8, seed=5)
    train_suite(trace, run, [TINY, "TokenTable", "LayerMarkov"], seeds=(0,), horizons=HORIZONS, workers=1)
    command = [sys.executable, "-m", "specmoe", "ensemble", str(run), "--student", TINY, "--out", str(tmp_path / "a")]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a").glob("taught/jobs/*/checkpoint-*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "a" / "ensemble.json").exists()
    epochs: list[int] = []
    continued = ensemble(
        run, tmp_path / "a", student=TINY, on_epoch=lambda title, report, _: epochs.append(report.epoch)
    )
    assert epochs[0] > 1
    whole = ensemble(run, tmp_path / "b", student=TINY)
    assert recalls(continued) == recalls(whole)
    assert continued.checks == whole.checks
    assert not list((tmp_path / "a").rglob("checkpoint-*"))


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command line is refused."""
    assert run_verb(["ensemble", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert "Traceback" not in error
    return line


def test_what_cannot_be_blended_is_refused(
    run: Path, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--trace", synthetic_path, "--out", tmp_path / "out", "--student", TINY)
    assert "does not exist" in refusal(capsys, tmp_path / "nowhere")
    assert "at least two members" in refusal(capsys, run, *options, "--members", "Ridge", "--members", "Ridge")
    assert "did you mean Ridge" in refusal(capsys, run, *options, "--members", "Ridg", "--members", TINY)
    assert "one of the two" in refusal(capsys, run, *options, "--members", "Ridge", "--top", 3)
    assert "not trained" in refusal(capsys, run, *options[:-1], "Ridge")
    assert "no routers" in refusal(capsys, run, *options[:-1], "RouterResidualPredictor")
    assert "say where with --trace" in refusal(capsys, run)
    (tmp_path / "only").mkdir()
    shutil.copy(run / "results.json", tmp_path / "only")
    assert "no trained models" in refusal(capsys, tmp_path / "only", *options)
    topology = Topology(model_id="other", layers=4, experts=8, top_k=2, hidden_size=16)
    synthetic_trace(tmp_path / "other", topology=topology, documents=30, tokens=48, determinism=0.8, seed=4)
    assert "is not the trace of this run" in refusal(capsys, run, "--trace", tmp_path / "other")
    for number, spoil in enumerate((lambda b: b[:-100], lambda b: b"x" * 100, lambda _: b"")):
        spoilt = copied(run, tmp_path / f"spoilt{number}")
        model = spoilt / "jobs" / "Ridge-seed0" / "model.safetensors"
        model.write_bytes(spoil(model.read_bytes()))
        said = refusal(capsys, spoilt, *options, "--members", "Ridge", "--members", TINY)
        assert str(model) in said
        assert "specmoe train" in said
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_members_that_failed_are_left_out(run: Path, synthetic_path: Path, tmp_path: Path) -> None:
    changed = copied(run, tmp_path / "run")
    content = json.loads((changed / "results.json").read_text())
    for predictor in content["predictors"]:
        if predictor["name"] == "Ridge":
            predictor.update(status="failed", reason="loss nan")
        if predictor["name"] == TINY:
            predictor["seeds"][0].update(status="failed", reason="loss nan")
    (changed / "results.json").write_text(json.dumps(content))
    shutil.rmtree(changed / "jobs" / "LayerMarkov-seed0")
    opened = open_run(changed, synthetic_path)
    members, left_out = choose_members(opened)
    assert {member.name for member in members} == {TINY, "TokenTable", "RandomGuess"}
    assert next(member for member in members if member.name == TINY).seeds == (1,)
    assert left_out["Ridge"] == "loss nan"
    assert "no longer" in left_out["LayerMarkov"]
    with pytest.raises(SpecmoeError, match="Ridge cannot be a member: loss nan"):
        choose_members(opened, [TINY, "Ridge"])


def test_a_trace_of_ids_only(tmp_path: Path) -> None:
    topology = Topology(model_id="ids", layers=3, experts=6, top_k=2, hidden_size=8)
    synthetic_trace(tmp_path / "full", topology=topology, documents=12, tokens=24, determinism=0.7, seed=1)
    full = Trace.open(tmp_path / "full")
    manifest = Manifest(topology=topology, source=Source(kind="test"), fields=("token_ids", "phase", "expert_ids"))
    with TraceWriter(tmp_path / "run" / "ids", manifest) as writer:
        for index, document in enumerate(full.documents):
            record = dataclasses.replace(full.read(index), gate_weights=None, router_logits=None, hidden=None)
            writer.add(document.doc_id, document.domain, document.text_sha256, record)
    names = ["LayerMarkov", "TokenTable", "Ridge"]
    train_suite(tmp_path / "run" / "ids", tmp_path / "run", names, seeds=(0,), horizons=(1,), workers=1)
    assert choose_student(SuiteData.load(tmp_path / "run" / "ids", (1,)), None) == "RouteHistoryPredictor"
    result = ensemble(tmp_path / "run", tmp_path / "out", student="ContextualGatingPredictor", picks=3)
    assert {member.name for member in result.members} == {"LayerMarkov", "TokenTable"}
    assert "hidden" in result.left_out["Ridge"]
    blend = result.contender("blend")
    assert blend is not None
    assert blend.recall[1].value > 1 / 3


def test_the_verb_and_its_page(
    made: tuple[EnsembleResult, Path, list[Any]], run: Path, synthetic_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, out, _ = made
    arguments = [str(run), "--trace", str(synthetic_path), "--out", str(out), "--top", "4", "--picks", "4"]
    assert run_verb(["ensemble", *arguments, "--student", TINY]) == 0
    said = capsys.readouterr().out
    for each in result.contenders:
        assert each.title in said
    page = (out / "ensemble.html").read_text()
    assert "Is a blend worth its time?" in page
    assert "http" not in page.split("<script", 1)[0].replace("http-equiv", "")
    for spec in (against_time(result), member_shares(result)):
        drawn = vl_convert.vegalite_to_svg({**spec, "width": 320, "config": vega_config(LIGHT)}, allowed_base_urls=[])
        assert "NaN" not in drawn
        assert drawn.count("<path") > 3


def interval(value: float, half: float) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (interval(0.02, 0.01), "foresees +2.00 [+1.00, +3.00] points more than"),
        (interval(0.001, 0.01), "not shown to foresee more"),
        (interval(-0.02, 0.01), "foresees less than"),
        (interval(0.02, 0.0), "no interval can be drawn"),
    ],
)
def test_the_verdict_weighs_gain_against_time(
    made: tuple[EnsembleResult, Path, list[Any]], gain: Interval, said: str
) -> None:
    result = made[0]
    best = result.contender("best")
    assert best is not None
    best = best.model_copy(update={"latency": Latency(p50_us=100.0, p99_us=200.0, events=9), "title": "<b>Best"})
    latency = Latency(p50_us=500.0, p99_us=900.0, events=9)
    blend = Contender(
        **{**dict(result.contenders[1]), "gain": gain, "latency": latency, "members": ("<b>Best", "Other")}
    )
    changed = result.model_copy(update={"contenders": (best, blend, *result.contenders[3:])})
    sentence = found(changed)[0]
    assert said in sentence
    assert "one step takes 500 µs, 400 µs more" in sentence
    assert ("200 µs for each point" in sentence) == (gain.low > 0 and gain.high > gain.low)
    assert ("not worth it" in sentence) == (gain.low <= 0)
    assert contender_table(changed)[1][1][-3] == "400 µs more"
    assert "<b>Best" not in render_ensemble(changed)
    alone = changed.model_copy(update={"contenders": (best, blend.model_copy(update={"members": best.members}))})
    assert "alone: no other member gained" in found(alone)[0]
