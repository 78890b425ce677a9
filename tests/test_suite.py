"""Many runs: resumable, side by side, and a results file that says everything."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specmoe.errors import SpecmoeError
from specmoe.evaluation import Ratios, Tally, by_horizon, evaluate, paired_difference
from specmoe.predictors.registry import PREDICTORS
from specmoe.residency import cache_size
from specmoe.results import Results
from specmoe.sources.synthetic import optimal_recall, synthetic_trace
from specmoe.suite.assemble import MAIN_METRICS, per_domain, per_phase
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import Job, job_fingerprint, load_calibration, load_predictor, load_tally, run_job
from specmoe.suite.run import JobEvent, cost, jobs_of
from specmoe.suite.train import train_suite
from specmoe.topology import Topology

NAMES = ["TinySpeculationModel", "RegularizedSpeculationModel", "LayerFrequency", "LayerMarkov", "RandomGuess", "Ridge"]
HORIZONS = (1, 2, 5)


@pytest.fixture(scope="module")
def finished(synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    out = tmp_path_factory.mktemp("suite")
    return train_suite(synthetic_path, out, NAMES, seeds=(0, 1), horizons=HORIZONS, workers=1), out


def recalls(results: Results) -> dict[str, list[dict[str, dict[int, float]]]]:
    return {p.name: [seed.recall for seed in p.seeds] for p in results.predictors}


def test_results_describe_themselves(finished: tuple[Results, Path], synthetic_path: Path) -> None:
    results, out = finished
    assert Results.load(out / "results.json") == results
    content = json.loads((out / "results.json").read_text())
    assert content["format"] == "specmoe-results"
    assert results.trace.documents == 30
    assert sum(results.split.documents.values()) == 30
    assert results.protocol.horizons == HORIZONS
    assert set(results.made.versions) == {"specmoe", "torch", "python"}
    assert results.split.hash == SuiteData.load(synthetic_path, HORIZONS).split.hash
    assert [p.name for p in results.predictors] == NAMES
    assert all(p.status == "ok" for p in results.predictors)
    assert [len(p.seeds) for p in results.predictors] == [2, 2, 1, 1, 1, 1]
    assert all(p.latency is not None and p.latency.p50_us > 0 for p in results.predictors)


def test_a_results_file_holds_what_a_paired_bootstrap_needs(finished: tuple[Results, Path]) -> None:
    results, out = finished
    assert len(results.test_documents.ids) == results.split.documents["test"]
    # What was measured in memory and what the file says are the same intervals.
    read = Results.load(out / "results.json")
    ridge = next(p for p in read.predictors if p.name == "Ridge")
    for predictor in read.predictors:
        ratios = Ratios.of_result(read, predictor)
        for horizon, interval in by_horizon(ratios, HORIZONS).items():
            assert tuple(vars(interval).values()) == pytest.approx(
                tuple(vars(predictor.scores["recall@K"][horizon]).values()), abs=1e-6
            )
        if predictor is not ridge:
            for horizon, interval in paired_difference(ratios, Ratios.of_result(read, ridge), HORIZONS).items():
                assert tuple(vars(interval).values()) == pytest.approx(
                    tuple(vars(predictor.over_ridge[horizon]).values()), abs=1e-6
                )
    with pytest.raises(SpecmoeError, match="per document"):
        Ratios.of_result(read, ridge, "nothing")


def test_results_of_another_metric_version_are_refused(finished: tuple[Results, Path], tmp_path: Path) -> None:
    content = json.loads((finished[1] / "results.json").read_text())
    content["protocol"]["metric_version"] = 1
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(SpecmoeError, match=r"made under metric version 1.*specmoe train"):
        Results.load(tmp_path / "old.json")


def test_controls_hold(finished: tuple[Results, Path]) -> None:
    results, _ = finished
    assert len(results.controls) >= 2
    assert all(control.holds for control in results.controls), results.controls


def test_nothing_beats_the_known_optimum(finished: tuple[Results, Path]) -> None:
    results, _ = finished
    for predictor in results.predictors:
        for horizon, recall in predictor.scores["recall@K"].items():
            best = optimal_recall(results.trace.topology, 0.8, 3, horizon)
            assert recall.low <= best + 0.02, (predictor.name, horizon)
    ridge = next(p for p in results.predictors if p.name == "Ridge")
    assert ridge.scores["recall@K"][1].value > optimal_recall(results.trace.topology, 0.8, 3, 1) - 0.08


def test_lift_and_differences_are_paired(finished: tuple[Results, Path]) -> None:
    by_name = {p.name: p for p in finished[0].predictors}
    tiny, ridge = by_name["TinySpeculationModel"], by_name["Ridge"]
    for horizon in HORIZONS:
        difference = tiny.scores["recall@K"][horizon].value - ridge.scores["recall@K"][horizon].value
        assert tiny.over_ridge[horizon].value == pytest.approx(difference, abs=2e-6)
        assert tiny.over_ridge[horizon].low <= difference <= tiny.over_ridge[horizon].high
    assert ridge.over_ridge == {}
    assert ridge.lift[1].value <= 0 or ridge.lift[1].value == pytest.approx(0)


def test_the_journey_shows_what_was_foreseen_for_a_place(finished: tuple[Results, Path], synthetic_path: Path) -> None:
    results, out = finished
    journey, data = results.journey, SuiteData.load(synthetic_path, HORIZONS)
    assert journey is not None
    index, window = data.journey
    assert journey.document == data.trace.documents[index].doc_id
    assert journey.actual[3][1] == tuple(data.trace.read(index).expert_ids[3, 1].tolist())
    predictor = load_predictor(Job("Ridge", 0), out, data)
    with torch.no_grad():
        logits = predictor(window)[0]
    # Token 3, layer 1 of 4 is place 13: foreseen at horizon 5 from place 8, token 2, layer 0.
    assert journey.predictions["Ridge"][5][3][1] == tuple(logits[2, 0, HORIZONS.index(5)].topk(2).indices.tolist())
    assert journey.predictions["Ridge"][5][1][0] is None
    assert journey.predictions["Ridge"][5][1][1] is not None


def test_done_jobs_are_kept_and_others_added(finished: tuple[Results, Path], synthetic_path: Path) -> None:
    results, out = finished
    events: list[JobEvent] = []
    names = [*NAMES, "TokenTable"]
    again = train_suite(synthetic_path, out, names, seeds=(0, 1), horizons=HORIZONS, workers=1, on_event=events.append)
    assert [event.job.predictor for event in events if event.result and not event.reused] == ["TokenTable"]
    assert recalls(again).items() >= recalls(results).items()


def test_workers_give_the_same_as_one_process(
    finished: tuple[Results, Path], synthetic_path: Path, tmp_path: Path
) -> None:
    results, _ = finished
    side_by_side = train_suite(synthetic_path, tmp_path, NAMES[:3], seeds=(0, 1), horizons=HORIZONS, workers=2)
    assert recalls(side_by_side) == {name: recalls(results)[name] for name in NAMES[:3]}


def test_a_diverging_run_fails_by_itself(synthetic_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = PREDICTORS["TinySpeculationModel"]

    class Exploding(tiny):
        recipe = dataclasses.replace(tiny.recipe, learning_rate=1e38, clip=1e38)

    monkeypatch.setitem(PREDICTORS, "TinySpeculationModel", Exploding)
    results = train_suite(
        synthetic_path, tmp_path, ["TinySpeculationModel", "LayerMarkov"], seeds=(0,), horizons=(1,), workers=1
    )
    failed, fine = results.predictors
    assert (failed.status, fine.status) == ("failed", "ok")
    assert "not finite" in failed.reason
    assert "learning rate" in failed.reason


def test_a_trace_without_hidden_states_skips_who_needs_them(tmp_path: Path) -> None:
    from specmoe.trace import Manifest, Source, Trace, TraceWriter

    topology = Topology(model_id="ids", layers=3, experts=6, top_k=2, hidden_size=8)
    synthetic_trace(tmp_path / "full", topology=topology, documents=12, tokens=40, determinism=0.7, seed=1)
    full = Trace.open(tmp_path / "full")
    manifest = Manifest(topology=topology, source=Source(kind="test"), fields=("token_ids", "phase", "expert_ids"))
    with TraceWriter(tmp_path / "ids", manifest) as writer:
        for index, document in enumerate(full.documents):
            record = dataclasses.replace(full.read(index), gate_weights=None, router_logits=None, hidden=None)
            writer.add(document.doc_id, document.domain, document.text_sha256, record)
    names = ["TinySpeculationModel", "ContextualGatingPredictor", "LayerMarkov", "Ridge", "NextRouter"]
    results = train_suite(tmp_path / "ids", tmp_path / "out", names, seeds=(0,), horizons=(1, 2), workers=1)
    status = {p.name: p.status for p in results.predictors}
    assert status == {
        "TinySpeculationModel": "skipped",
        "ContextualGatingPredictor": "ok",
        "LayerMarkov": "ok",
        "Ridge": "skipped",
        "NextRouter": "skipped",
    }
    assert all("hidden" in p.reason for p in results.predictors if p.status == "skipped")
    with pytest.raises(SpecmoeError, match="no predictor can run"):
        train_suite(tmp_path / "ids", tmp_path / "none", ["Ridge"], seeds=(0,), workers=1)


def test_horizons_longer_than_the_documents_are_refused(synthetic_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="horizon"):
        SuiteData.load(synthetic_path, (48 * 4,))
    SuiteData.load(synthetic_path, (48 * 4 - 1,))


def test_a_damaged_checkpoint_starts_that_run_again(synthetic_path: Path, tmp_path: Path) -> None:
    data, job = SuiteData.load(synthetic_path, (1,)), Job("TinySpeculationModel", 0)
    expected = run_job(job, data, tmp_path / "a")

    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        # Stopped in the second epoch's report: the first epoch's checkpoint is there.
        run_job(job, data, tmp_path / "b", on_epoch=lambda r: stop(r) if r.epoch == 2 else None)
    (checkpoint,) = job.folder(tmp_path / "b").glob("checkpoint-*.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert run_job(job, data, tmp_path / "b").recall == expected.recall


def curves(results: Results) -> list[list[tuple[object, ...]]]:
    return [[seed.curve for seed in predictor.seeds] for predictor in results.predictors]


def train_command(trace: Path, out: Path) -> list[str]:
    names = [argument for name in ("Regular*", "LayerM*") for argument in ("--only", name)]
    return [sys.executable, "-m", "specmoe", "train", str(trace), "--out", str(out), "--seeds", "2", *names]


def wait_for_a_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(out.glob("jobs/*/checkpoint-*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.poll() is None, "it was done before it could be stopped"


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(),
    reason="who is left of a process group is read from /proc, which only Linux has",
)
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    topology = Topology(model_id="synthetic", layers=6, experts=16, top_k=2, hidden_size=64)
    synthetic_trace(tmp_path / "trace", topology=topology, documents=60, tokens=256, determinism=0.8, seed=5)
    process = subprocess.Popen(
        train_command(tmp_path / "trace", tmp_path / "out"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for_a_checkpoint(process, tmp_path / "out")
    process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while left := running_in_group(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


ORPHAN = """
import multiprocessing, os, sys, time
from pathlib import Path
from specmoe.suite.run import leave_with, parent_of_worker

def late(path):
    Path(path).write_text(f"{os.getpid()} ")
    time.sleep(1)  # the parent is gone before anybody asks who it was
    leave_with(parent_of_worker())

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=late, args=(sys.argv[1],)).start()
    while not Path(sys.argv[1]).exists() or not Path(sys.argv[1]).read_text().endswith(" "):
        time.sleep(0.01)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="who still runs is read from /proc")
def test_a_worker_whose_parent_died_before_it_looked_ends_too(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    subprocess.run([sys.executable, str(tmp_path / "orphan.py"), str(tmp_path / "pid")], check=True, timeout=60)
    stat = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running_in_group(group: int) -> list[int]:
    """Processes of a group, without those that have ended and wait for somebody to read how."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, own_group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(own_group) == group and state not in "ZX":
                found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_killed_and_started_again_gives_the_same(how: signal.Signals, tmp_path: Path) -> None:
    topology = Topology(model_id="synthetic", layers=6, experts=16, top_k=2, hidden_size=64)
    trace, out = tmp_path / "trace", tmp_path / "out"
    synthetic_trace(trace, topology=topology, documents=60, tokens=128, determinism=0.8, seed=5)
    process = subprocess.Popen(
        train_command(trace, out),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As a user has it: results must not depend on threads.
        env={name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
        # A shell lets what it runs in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_a_checkpoint(process, out)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "run the same command again to continue" in errors
        assert "Traceback" not in errors
    assert not (out / "results.json").exists()
    names = ["RegularizedSpeculationModel", "LayerMarkov"]
    arguments = {"seeds": (0, 1), "horizons": (1, 2, 3, 4)}
    continued = train_suite(trace, out, names, workers=1, **arguments)
    uninterrupted = train_suite(trace, tmp_path / "other", names, workers=1, **arguments)
    assert recalls(continued) == recalls(uninterrupted)
    assert curves(continued) == curves(uninterrupted)
    assert not list(out.glob("jobs/*/checkpoint-*"))


def test_jobs_run_costly_ones_first(synthetic_path: Path) -> None:
    data = SuiteData.load(synthetic_path, (1,))
    jobs = jobs_of(list(PREDICTORS), (0, 1), data)
    costs = [cost(job, data) for job in jobs]
    assert costs == sorted(costs, reverse=True)
    assert PREDICTORS[jobs[0].predictor].recipe.epochs > 0
    learned = sum(kind.recipe.epochs > 0 for kind in PREDICTORS.values())
    # The synthetic trace keeps no router weights, which one of either kind needs.
    assert len(jobs) == (learned - 1) * 2 + len(PREDICTORS) - learned - 1


def test_the_cache_is_stated_and_decides_what_is_cold(
    finished: tuple[Results, Path], synthetic_path: Path, tmp_path: Path
) -> None:
    results, _ = finished
    # 8 experts, top-2: a quarter would be 2, and K is 2.
    assert results.protocol.cache_experts == cache_size(results.trace.topology)
    larger = train_suite(
        synthetic_path, tmp_path, ["LayerMarkov", "RandomGuess"], horizons=HORIZONS, workers=1, cache_experts=5
    )
    assert larger.protocol.cache_experts == 5
    for horizon in HORIZONS:
        assert 0 < larger.cold_share[horizon].value < results.cold_share[horizon].value < 1
    chance = results.trace.topology.top_k / results.trace.topology.experts
    guess = next(p for p in larger.predictors if p.name == "RandomGuess")
    assert guess.scores["cold_recall@K"][1].value == pytest.approx(chance, abs=0.05)
    # What a cache does not change is not changed.
    for predictor in larger.predictors:
        before = next(p for p in results.predictors if p.name == predictor.name)
        assert predictor.scores["recall@K"] == before.scores["recall@K"]
        assert predictor.scores["cold_recall@K"] != before.scores["cold_recall@K"]
    for predictor in results.predictors:
        for horizon in HORIZONS:
            cold = [predictor.scores[f"cold_recall@{label}"][horizon].value for label in ("K", "2K")]
            assert 0 <= cold[0] <= cold[1] <= 1
    job = Job("LayerMarkov", 0)
    data = [SuiteData.load(synthetic_path, HORIZONS, cache_experts=size) for size in (None, 5)]
    assert job_fingerprint(job, data[0]) != job_fingerprint(job, data[1])
    with pytest.raises(SpecmoeError, match="a cache of 1 experts"):
        SuiteData.load(synthetic_path, HORIZONS, cache_experts=1)


def test_cold_recall_from_the_file_is_that_of_the_run(finished: tuple[Results, Path]) -> None:
    read = Results.load(finished[1] / "results.json")
    for predictor in read.predictors:
        ratios = by_horizon(Ratios.of_result(read, predictor, "cold_recall@K"), HORIZONS)
        for horizon, interval in ratios.items():
            assert interval.value == pytest.approx(predictor.scores["cold_recall@K"][horizon].value, abs=2e-6)


def test_a_saved_predictor_says_how_to_read_its_logits(finished: tuple[Results, Path], synthetic_path: Path) -> None:
    _, out = finished
    data, job = SuiteData.load(synthetic_path, HORIZONS), Job("Ridge", 0)
    calibration = load_calibration(job.folder(out) / "model.safetensors")
    tally = evaluate(load_predictor(job, out, data), data.evaluated["test"], calibration=calibration)
    kept = load_tally(job, out, "test")
    assert kept is not None
    assert torch.equal(tally.sums["brier"], kept.sums["brier"])
    assert torch.equal(tally.bins, kept.bins)


def test_domains_and_phases_are_judged_apart_where_there_are_several() -> None:
    sums = torch.tensor([[3.0, 1.0], [8.0, 2.0]], dtype=torch.float64).view(2, 2, 1, 1)
    events = torch.tensor([[4.0, 4.0], [8.0, 4.0]], dtype=torch.float64).view(2, 2, 1, 1)
    tally = Tally(torch.tensor([0, 2]), dict.fromkeys(MAIN_METRICS, sums), events, cold=events / 2)
    domains = [SimpleNamespace(domain=name) for name in ("a", "b", "c")]
    data: Any = SimpleNamespace(horizons=(1,), trace=SimpleNamespace(documents=domains))
    by_phase, by_domain = per_phase([tally], data), per_domain([tally], data)
    assert {phase: scores["recall@K"][1].value for phase, scores in by_phase.items()} == {
        "prefill": pytest.approx(11 / 12, abs=1e-6),
        "decode": pytest.approx(3 / 8),
    }
    assert {domain: scores["recall@K"][1].value for domain, scores in by_domain.items()} == {
        "a": pytest.approx(0.5),
        "c": pytest.approx(10 / 12, abs=1e-6),
    }
    assert by_domain["a"]["cold_recall@K"][1].value == pytest.approx(1.0)
    tally.events = events * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert per_phase([tally], data) == {}
    data.trace.documents[2].domain = "a"
    assert per_domain([tally], data) == {}
