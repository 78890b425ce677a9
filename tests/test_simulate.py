"""``specmoe simulate``: what is run, what is kept, what the numbers mean, and that nothing of it is lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert

from specmoe.cli import run_verb
from specmoe.dataset import split_documents
from specmoe.errors import SpecmoeError
from specmoe.offload.cache import replay_cache
from specmoe.offload.capacity import parse_capacity
from specmoe.offload.charts import bandwidth_chart, curves_chart, recall_chart
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.profile import Compute, Hardware, Link
from specmoe.offload.jobs import SimulationJob
from specmoe.offload.page import render_simulation
from specmoe.offload.prefetchers.loading import candidates_of_trace, open_data, open_trace, recall_at_need
from specmoe.offload.prefetchers.predictions import with_recall
from specmoe.offload.results import RunResult, SimulationResults
from specmoe.offload.running import Simulator, scaled
from specmoe.offload.simulator import Run, simulate
from specmoe.offload.study import Settings, bound, chosen_documents, machine_of, simulate_trace
from specmoe.offload.words import found, run_table
from specmoe.report.theme import LIGHT, vega_config
from specmoe.sources.synthetic import synthetic_trace
from specmoe.suite.train import train_suite
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

TINY = "TinySpeculationModel"
SIZE = 1_000_000
# A transfer takes as long as a layer, so that there is something to hide and something to hide it behind.
HARDWARE = Hardware(
    name="test machine",
    description="made up",
    source="made up for tests",
    links=(Link(name="link <&>", bandwidth=1e10, latency=1e-5, source="made up"),),
    compute=Compute(memory_bandwidth=1e12, flops=1e13, kernel_seconds=1e-4),
)
SETTINGS = Settings(HARDWARE, expert_bytes=SIZE, policies=("lru", "lfu", "belady-bypass", "predicted"), horizons=(1, 2))


def simulated(trace: Path, out: Path, changes: dict[str, Any] | None = None, **options: Any) -> SimulationResults:
    settings = Settings(**{**vars(SETTINGS), **(changes or {})})
    return simulate_trace(trace, out, settings, **options)


@pytest.fixture(scope="module")
def run(synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one learned predictor and two training-free ones."""
    out = tmp_path_factory.mktemp("run")
    train_suite(synthetic_path, out, [TINY, "LayerMarkov", "TokenTable"], seeds=(0,), horizons=(1, 2), workers=1)
    return out


@pytest.fixture(scope="module")
def made(run: Path, synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SimulationResults, Path]:
    """A simulation with the run's predictors, and its folder."""
    out = tmp_path_factory.mktemp("simulation")
    return simulated(synthetic_path, out, {"prediction_seconds": 0.0}, run=run, timeline=3000), out


def test_what_is_simulated(made: tuple[SimulationResults, Path]) -> None:
    results, out = made
    assert SimulationResults.load(out / "simulation.json") == results
    assert results.complete
    assert {each.name for each in results.predictors} == {TINY, "LayerMarkov"}
    assert results.predictors[0].validation >= results.predictors[1].validation
    assert results.best == results.predictors[0].name
    keys = [each.key for each in results.runs]
    assert len(set(keys)) == len(keys)
    kinds = [(each.kind, each.policy, each.admission.split(":")[0]) for each in results.main]
    assert {("none", "lru", ""), ("none", "lfu", ""), ("none", "belady", ""), ("oracle", "belady", "")} <= set(kinds)
    for admission in ("top", "confidence", "expected-value"):
        assert ("perfect", "lru", admission) in kinds
        assert results.best in {r.predictor for r in results.main if r.admission.split(":")[0] == admission}
    assert ("shuffled", "lru", "expected-value") in kinds
    assert {("predictor", "predicted", ""), ("predictor", "predicted", "expected-value")} <= set(kinds)
    assert sum(each.group == "bandwidth" for each in results.runs) == 18
    assert [each.x for each in results.runs if each.group == "recall"] == [pytest.approx(i / 10) for i in range(1, 11)]
    assert [curve.policy for curve in results.curves] == ["lru", "lfu", "belady-bypass", "belady"]


def test_every_byte_of_a_run_is_accounted_for(made: tuple[SimulationResults, Path]) -> None:
    results, _ = made
    for each in results.runs:
        counts = {name: sum(phase[name] for phase in each.counts.values()) for name in each.counts["decode"]}
        assert counts["hits"] + counts["misses"] + counts["late"] == counts["accesses"] == results.demand.accesses
        assert each.demand_bytes == counts["misses"] * SIZE
        assert each.prefetch_bytes == each.used_bytes + each.late_bytes + each.wasted_bytes
        assert each.largest <= results.machine.capacity
        assert each.hit_rate == pytest.approx(counts["hits"] / counts["accesses"])
        assert sum(each.group_seconds) == pytest.approx(each.seconds)
        lacking = counts["used"] + counts["late"] + counts["misses"]
        assert each.cold_recall == (pytest.approx(counts["used"] / lacking) if counts["prefetched"] else None)
        assert results.machine.bound is not None
        if each.group != "bandwidth":
            assert each.seconds >= results.machine.bound * (1 - 1e-9)


def test_comparisons_are_what_they_say(made: tuple[SimulationResults, Path]) -> None:
    results, _ = made
    base = results.baseline
    oracle = next(each for each in results.main if each.kind == "oracle")
    # With one transfer at a time nothing overlaps on demand, so the whole time is C + F.
    assert base.seconds == pytest.approx(base.compute + base.loading)
    assert base.against is not None
    assert base.against.gain.value == 0
    for each in results.main:
        against = each.against
        assert against is not None
        assert against.gain.value == pytest.approx(each.tokens_per_second / base.tokens_per_second - 1, abs=1e-5)
        assert against.gain.low is not None
        assert against.gain.high is not None
        assert against.gain.low <= against.gain.value <= against.gain.high
        assert each.seconds >= oracle.seconds * 0.99
        expected = (base.seconds - each.seconds) / (base.seconds - oracle.seconds)
        assert against.share_of_oracle == pytest.approx(expected)
    best = results.run(f"{results.best}/lru/expected-value")
    assert best.against is not None
    assert best.against.bytes_saved == base.demand_bytes - best.demand_bytes
    shuffled = next(each for each in results.main if each.kind == "shuffled")
    assert shuffled.against is not None
    assert shuffled.against.gain.value < best.against.gain.value
    # Eviction by the predictor is held against itself without prefetching.
    alone, informed = results.run(f"{results.best}/predicted"), results.run(f"{results.best}/predicted/expected-value")
    assert informed.against is not None
    assert informed.against.bytes_saved == alone.demand_bytes - informed.demand_bytes


def test_made_up_predictions_have_their_recall_and_gain_by_it(made: tuple[SimulationResults, Path]) -> None:
    results, _ = made
    sweep = [each for each in results.runs if each.group == "recall"]
    for each in sweep:
        assert each.x is not None
        assert list(each.recall) == [1, 2]
        assert all(value == pytest.approx(each.x, abs=0.03) for value in each.recall.values())
    gains = [each.against.gain.value for each in sweep if each.against]
    assert gains[-1] > 0.05
    assert gains[-1] > gains[0]


def test_recall_at_need_is_recall_at_k(synthetic_path: Path) -> None:
    trace = Trace.open(synthetic_path)
    demand = Demand.of_trace(trace, [0, 1])
    assert recall_at_need(with_recall(demand, (1, 3), 1.0), demand) == {1: 1.0, 3: 1.0}
    predictions = with_recall(demand, (2,), 0.5, seed=4)
    needed = demand.keys_M.reshape(-1, 2) % 8
    hits = [len(set(predictions.experts_VHB[v, 0]) & set(needed[v + 2])) for v in range(demand.events - 2)]
    assert recall_at_need(predictions, demand)[2] == pytest.approx(sum(hits) / (2 * len(hits)))


def test_a_simulation_that_was_stopped_goes_on(
    run: Path,
    synthetic_path: Path,
    tmp_path: Path,
    made: tuple[SimulationResults, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    whole = Simulator.result

    def stops(self: Simulator, job: Any, fingerprint: str) -> RunResult:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(job.key)
        return whole(self, job, fingerprint)

    monkeypatch.setattr(Simulator, "result", stops)
    with pytest.raises(KeyboardInterrupt):
        simulated(synthetic_path, tmp_path, {"prediction_seconds": 0.0}, run=run)
    half = SimulationResults.load(tmp_path / "simulation.json")
    assert not half.complete
    assert [each.key for each in half.runs] == done

    def goes_on(self: Simulator, job: Any, fingerprint: str) -> RunResult:
        done.append(job.key)
        return whole(self, job, fingerprint)

    monkeypatch.setattr(Simulator, "result", goes_on)
    finished = simulated(synthetic_path, tmp_path, {"prediction_seconds": 0.0}, run=run)
    assert len(done) == len(set(done)) == len(finished.runs)
    # The same as in one go, but for date and duration.
    assert finished.model_copy(update={"made": made[0].made}) == made[0]
    again = simulated(synthetic_path, tmp_path, {"prediction_seconds": 0.0}, run=run)
    assert len(done) == len(finished.runs)
    assert again.runs == finished.runs
    # Whatever a run depends on makes it another run.
    simulated(synthetic_path, tmp_path, {"prediction_seconds": 0.0, "capacity": "50%"}, run=run)
    assert len(done) == 2 * len(finished.runs)


def test_only_documents_that_no_predictor_has_seen(made: tuple[SimulationResults, Path], synthetic_path: Path) -> None:
    trace = Trace.open(synthetic_path)
    split = split_documents(trace.documents)
    seen = {trace.documents[i].doc_id for part in ("train", "validation") for i in split.parts[part]}
    assert made[0].demand.documents
    assert not seen & set(made[0].demand.documents)
    opened = open_trace(synthetic_path, patterns=("LayerMarkov",))
    assert opened.part == "test"
    assert chosen_documents(opened, None) == split.parts["test"]
    assert len(chosen_documents(dataclasses.replace(opened, part="all"), None)) == 30
    assert chosen_documents(opened, 100) == split.parts["test"][:2]
    assert chosen_documents(opened, 1) == split.parts["test"][:1]
    with pytest.raises(SpecmoeError, match="use test or all"):
        open_trace(synthetic_path, part="train")


def test_without_a_run_training_free_predictors_are_prepared(synthetic_path: Path, tmp_path: Path) -> None:
    chosen = {"predictors": ("TokenM*", "Tiny*"), "admissions": ("top:2",), "batch": 4, "max_tokens": 200}
    results = simulated(synthetic_path, tmp_path, chosen)
    assert [each.name for each in results.predictors] == ["TokenMarkov"]
    assert results.predictors[0].timed == "unknown"
    assert results.admission == "top:2"
    assert results.demand.batch == 4
    assert results.demand.groups == 1
    assert "not measured and counts as nothing for: TokenMarkov" in " ".join(found(results))
    data, _, _ = open_data(synthetic_path, None, (1, 2))
    names = [each.name for each in candidates_of_trace(data)]
    assert "Ridge" in names
    assert "NextRouter" not in names


def test_the_control_is_held_against_layer_frequency(made: tuple[SimulationResults, Path]) -> None:
    results, _ = made
    runs = {each.kind: each for each in results.main if each.kind in {"shuffled", "frequency"}}
    best = results.run(f"{results.best}/lru/expected-value")
    assert runs["frequency"].predictor == "LayerFrequency"
    for each in runs.values():
        assert (each.policy, each.admission) == ("lru", "expected-value")
        assert each.prediction_seconds == best.prediction_seconds
    assert "LayerFrequency with the same admission" in " ".join(found(results))
    # It is no candidate, and foresees the same wherever it is asked.
    assert "LayerFrequency" not in {each.name for each in results.predictors}
    assert runs["frequency"].recall != best.recall


def test_layer_frequency_that_was_asked_for_is_its_own_control(synthetic_path: Path, tmp_path: Path) -> None:
    chosen = {"predictors": ("LayerFrequency",), "max_tokens": 100, "prediction_seconds": 0.0, "policies": ("lru",)}
    results = simulated(synthetic_path, tmp_path, chosen)
    own, control = (
        results.run("LayerFrequency/lru/expected-value"),
        results.run("LayerFrequency/control/lru/expected-value"),
    )
    assert own.group_seconds == control.group_seconds
    assert own.recall == control.recall


def short_trace(path: Path, documents: int, tokens: int = 40) -> Path:
    """Markov routing without hidden states, as public traces of caches are."""
    topology = Topology(model_id="m", layers=4, experts=8, top_k=2, hidden_size=4, bytes_per_expert=SIZE)
    synthetic_trace(path / "made", topology=topology, documents=documents, tokens=tokens, determinism=0.9, seed=1)
    made = Trace.open(path / "made")
    fields = ("token_ids", "phase", "expert_ids")
    with TraceWriter(path / "trace", Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        for number, each in enumerate(made.documents):
            record = made.read(number, ())
            plain = RoutingRecord(token_ids=record.token_ids, phase=record.phase, expert_ids=record.expert_ids)
            writer.add(each.doc_id, "d", each.text_sha256, plain)
    return path / "trace"


@pytest.mark.parametrize("part", [None, "all"])
def test_one_text_is_enough_for_a_cache(part: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = short_trace(tmp_path, 1)
    stages: list[str] = []
    results = simulated(trace, tmp_path / "out", {"part": part}, on_stage=stages.append)
    assert any("without a predictor: the trace has 1 distinct document" in stage for stage in stages)
    assert (results.demand.part, results.demand.tokens, results.demand.units) == ("all", 40, (0,))
    assert (results.best, results.predictors, results.split_hash) == ("", (), "")
    assert "TokenMarkov" in results.left_out
    # What needs nobody to foresee is all there, and is what any replay of these tokens gives.
    demand = Demand.of_trace(Trace.open(trace), [0])
    lru = replay_cache(demand, "lru", 8)
    assert results.baseline.hit_rate == pytest.approx(1 - lru.misses / lru.accesses)
    assert {run.kind for run in results.runs} == {"none", "oracle", "perfect", "recall"}
    assert len(results.curves) == 4
    assert "NaN" not in (tmp_path / "out" / "simulation.json").read_text()
    said = " ".join(found(results))
    assert "No predictor was simulated: the trace has 1 distinct document(s)" in said
    assert "(no interval: one document)" in said
    assert "not split" in render_simulation(results)
    verb = ["simulate", str(trace), "--out", str(tmp_path / "verb"), "--policies", "lru"]
    assert run_verb([*verb, *(["--documents", part] if part else [])]) == 0
    assert "no interval: one document" in capsys.readouterr().out


def test_all_documents_need_no_split_and_no_predictor(synthetic_path: Path, tmp_path: Path) -> None:
    results = simulated(synthetic_path, tmp_path, {"part": "all", "policies": ("lru",), "max_tokens": 300})
    assert results.split_hash == ""
    assert results.predictors == ()
    assert results.demand.learned == 0
    assert "all documents are replayed, so none is left to prepare a predictor from" in " ".join(found(results))
    # One that is named is prepared from documents that are then replayed, which is said.
    named = {"part": "all", "policies": ("lru",), "predictors": ("LayerMarkov",), "max_tokens": 480}
    results = simulated(synthetic_path, tmp_path, named)
    parts = split_documents(Trace.open(synthetic_path).documents).parts
    learned = [i for i in range(10) if i in {*parts["train"], *parts["validation"]}]
    assert len(results.demand.documents) == 10
    assert {*learned} & {*parts["validation"]}
    assert {*learned} & {*parts["train"]}
    assert results.demand.learned == len(learned) < 10
    assert f"{len(learned)} of the 10 documents are ones that the predictors learned from" in " ".join(found(results))


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        (1, ["--documents", "test"], "or use --documents all"),
        (2, ["--predictor", "LayerMarkov"], "must be prepared and calibrated on documents other than those"),
        (2, ["--predictor", "LayerMarkov", "--documents", "all"], "leave --predictor out"),
        (1, ["--documents", "al"], "use test or all"),
        (0, [], "no token to replay"),
    ],
)
def test_what_needs_a_split_says_so(
    documents: int, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = short_trace(tmp_path, max(1, documents))
    if not documents:
        fields = ("token_ids", "phase", "expert_ids")
        topology, trace = Trace.open(trace).topology, tmp_path / "none"
        with TraceWriter(trace, Manifest(topology=topology, source=Source(kind="test"), fields=fields)):
            pass
    assert run_verb(["simulate", str(trace), "--out", str(tmp_path / "out"), *arguments]) == 2
    written = capsys.readouterr().err.strip().splitlines()[-1]
    assert written.startswith("error:")
    assert message in written
    assert not (tmp_path / "out" / "simulation.json").exists()


def test_the_timeline_opens_in_a_trace_viewer(made: tuple[SimulationResults, Path]) -> None:
    _results, out = made
    content = json.loads((out / "timeline.json").read_text())
    events = content["traceEvents"]
    spans = [each for each in events if each["ph"] == "X"]
    assert len(spans) == 3000
    assert {each["ph"] for each in events} == {"X", "M"}
    lanes = {each["tid"]: each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert {"computing", "waiting for experts", "link <&>"} <= set(lanes.values())
    assert {each["cat"] for each in spans} == {"compute", "stall", "demand", "prefetch"}
    for lane in {each["tid"] for each in spans}:
        assert lane in lanes
        mine = sorted((each["ts"], each["ts"] + each["dur"]) for each in spans if each["tid"] == lane)
        # Spans of a lane follow one another: a viewer nests what overlaps.
        assert all(after[0] >= before[1] - 1e-6 for before, after in itertools.pairwise(mine))
    first = next(each for each in spans if each["cat"] == "demand")
    layer, expert = map(int, first["name"].removeprefix("expert ").split("/"))
    assert layer == first["args"]["event"] % 4
    assert 0 <= expert < 8
    transfer = SIZE / 1e10 + 1e-5
    assert first["dur"] == pytest.approx(1e6 * transfer)


def test_the_page_has_its_plots_and_escapes_names(made: tuple[SimulationResults, Path]) -> None:
    results, _ = made
    page = render_simulation(results)
    for name in ("misses", "bandwidth", "recall"):
        assert f'id="chart-{name}"' in page
    assert "link &lt;&amp;&gt;" in page
    assert "link <&>" not in page
    for sentence in ("made up for tests", "What does prefetching bring?", results.best):
        assert sentence in page
    for src in ("http://", "https://"):
        assert f'src="{src}' not in page
    config = vega_config(LIGHT)
    for spec in (curves_chart(results), bandwidth_chart(results), recall_chart(results)):
        assert spec is not None
        assert "<svg" in vl_convert.vegalite_to_svg({**spec, "width": 400, "config": config})


def test_table_and_sentences(made: tuple[SimulationResults, Path]) -> None:
    results, _ = made
    columns, rows = run_table(results)
    assert len(rows) == len(results.main)
    assert all(len(row) == len(columns) for row in rows)
    said = " ".join(found(results))
    assert "8 of 32 experts" in said
    assert results.best in said
    assert "The oracle" in said


def test_prompts_have_a_time_to_first_token(synthetic_path: Path, tmp_path: Path) -> None:
    # Traces of plain text are read token by token unless prompts were recorded; these are all prompt.
    chosen = {"replay": "trace", "prefill_chunk": 16, "predictors": ("LayerMarkov",), "admissions": ("top",)}
    results = simulated(synthetic_path, tmp_path, chosen)
    assert results.demand.prefill_steps == results.demand.steps
    assert results.baseline.first_token is not None
    assert results.baseline.output_token is None
    assert run_table(results)[0][-1].startswith("first token")


def test_the_oracle_looks_as_far_ahead_as_is_good(synthetic_path: Path) -> None:
    trace = Trace.open(synthetic_path)
    demand = Demand.of_trace(trace, list(range(4)))
    disk = Link(name="disk", bandwidth=2e9, latency=1e-5)
    three = HARDWARE.model_copy(update={"links": (disk, *HARDWARE.links)})
    machine = machine_of(Settings(three, expert_bytes=SIZE, host_capacity="50%", policy="belady"), trace.topology)
    farthest = simulate(demand, machine, Run.oracle(demand)).seconds
    job = SimulationJob("oracle", "belady")
    found = Simulator(trace, list(range(4)), demand, machine, (1, 2), []).result(job, "").seconds
    assert bound(demand, machine) <= found < farthest


def test_a_faster_link_changes_nothing_else() -> None:
    topology = Topology(model_id="m", layers=2, experts=4, top_k=1, hidden_size=8, bytes_per_expert=100)
    machine = machine_of(Settings(HARDWARE), topology)
    assert machine.expert_bytes == 100
    assert machine.capacity == 2
    faster = scaled(machine, 4.0)
    assert faster.hardware.links[0].bandwidth == 4e10
    assert faster.hardware.links[0].latency == machine.hardware.links[0].latency
    assert faster.cost == machine.cost


@pytest.mark.parametrize(
    ("text", "experts"), [("25%", 32), ("100 %", 128), ("8GiB", 8), ("1.5 GB", 1), ("17", 17), ("900GB", 128)]
)
def test_capacities(text: str, experts: int) -> None:
    topology = Topology(model_id="m", layers=8, experts=16, top_k=2, hidden_size=0)
    assert parse_capacity(text, topology, 1 << 30) == experts


@pytest.mark.parametrize("text", ["", "much", "25 percent", "-3", "0", "0.1%", "101%", "3.5", "10MB", "1e3"])
def test_capacities_that_are_none(text: str) -> None:
    topology = Topology(model_id="m", layers=8, experts=16, top_k=2, hidden_size=0)
    with pytest.raises(SpecmoeError, match="capacity"):
        parse_capacity(text, topology, 1 << 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --expert-bytes"),
        (["--expert-bytes", "1000", "--predictor", "Tiny*"], "must be trained; give the folder"),
        (["--expert-bytes", "1000", "--predictor", "Nobody"], "Nobody"),
        (["--expert-bytes", "1000", "--predictor", "NextRouter"], "routers"),
        (["--expert-bytes", "1000", "--hardware", "rtx-4091"], "rtx-4090"),
        (["--expert-bytes", "1000", "--policy", "lro"], "lru"),
        (["--expert-bytes", "1000", "--policies", "lru,lro"], "lru"),
        (["--expert-bytes", "1000", "--capacity", "much"], "capacity 'much'"),
        (["--expert-bytes", "1000", "--capacity", "1"], "too small"),
        (["--expert-bytes", "1000", "--admission", "some"], "some"),
        (["--expert-bytes", "1000", "--host-capacity", "50%"], "no tier between"),
        (["--expert-bytes", "1000", "--documents", "train"], "test or all"),
        (["--expert-bytes", "1000", "--replay", "backwards"], "trace or decode"),
        (["--expert-bytes", "1000", "--bandwidth", "0"], "GB/s"),
        (["--expert-bytes", "1000", "--run", "nowhere"], "does not exist"),
        (["--expert-bytes", "1000", "--figures", "gif"], "svg or png"),
        (["--expert-bytes", "1000", "--horizons", "0"], "--horizons"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_verb(["simulate", str(synthetic_path), "--out", str(tmp_path / "out"), *arguments])
    written = capsys.readouterr().err
    assert code == 2
    last = written.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert message in last, written
    assert not (tmp_path / "out" / "simulation.json").exists()


def test_a_run_of_another_trace_or_horizon_is_refused(run: Path, synthetic_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="choose --horizons among its own"):
        simulated(synthetic_path, tmp_path, {"horizons": (1, 7)}, run=run)
    with pytest.raises(SpecmoeError, match="Ridge: not in the run"):
        simulated(synthetic_path, tmp_path, {"predictors": ("Ridge",)}, run=run)
    (tmp_path / "simulation.json").write_text("{}")
    with pytest.raises(SpecmoeError, match="not the file of a simulation"):
        simulated(synthetic_path, tmp_path, run=run)


def test_the_verb_and_its_json(
    run: Path, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(synthetic_path), "--out", str(tmp_path), "--run", str(run), "--expert-bytes", "65536"]
    arguments += ["--horizons", "2", "--bandwidth", "12.5", "--latency", "0", "--capacity", "40%", "--per-layer"]
    arguments += ["--policies", "lru,sieve", "--timeline", "50", "--figures", "svg"]
    assert run_verb([*arguments, "--json"]) == 0
    printed = SimulationResults.model_validate(json.loads(capsys.readouterr().out))
    assert printed.machine.hardware.links[0].bandwidth == 12.5e9
    assert printed.machine.changed
    assert printed.machine.per_layer
    assert printed.horizons == (2,)
    # Measured when the run was trained.
    assert {each.timed for each in printed.predictors} == {"measured"}
    best = printed.run(f"{printed.best}/lru/expected-value")
    assert list(best.recall) == [2]
    assert best.prediction_seconds > 0
    # The control knows nothing, and knows it as late.
    control = printed.run("LayerFrequency/control/lru/expected-value")
    assert control.prediction_seconds == best.prediction_seconds
    for name in ("simulation.json", "simulation.html", "timeline.json", "misses.svg", "bandwidth.svg", "recall.svg"):
        assert (tmp_path / name).stat().st_size > 1000, name
    assert run_verb(arguments) == 0
    assert "prefetches by" in capsys.readouterr().out


def test_numbers_do_not_depend_on_what_else_is_run(
    made: tuple[SimulationResults, Path], run: Path, synthetic_path: Path, tmp_path: Path
) -> None:
    alone = simulated(
        synthetic_path,
        tmp_path,
        {"prediction_seconds": 0.0, "predictors": (made[0].best,), "policies": ("lru",)},
        run=run,
    )
    for each in alone.runs:
        assert each == made[0].run(each.key)
    assert np.isfinite([each.seconds for each in alone.runs]).all()
