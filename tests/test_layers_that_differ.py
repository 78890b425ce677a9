"""Models whose layers differ in the number or the size of their experts, from the manifest to the verdict."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from simulation_worlds import demand_of, hardware, link
from specmoe.cli import run_verb
from specmoe.dataset import Windows
from specmoe.diagnostics import validate_trace
from specmoe.errors import SpecmoeError
from specmoe.evaluation import evaluate
from specmoe.metrics import inclusion_probabilities
from specmoe.offload.capacity import all_units, bytes_L, held_at_share, parse_capacity, split_by_layer
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.cost import step_cost
from specmoe.offload.hardware.profile import Compute, Hardware, Link
from specmoe.offload.page import render_simulation
from specmoe.offload.prefetchers.predictions import with_recall
from specmoe.offload.simulator import Machine, capacities, simulate
from specmoe.offload.study import Settings, machine_of, simulate_trace
from specmoe.offload.verdict.decide import Answer
from specmoe.offload.words import found
from specmoe.predictors.layer_frequency import LayerFrequency
from specmoe.predictors.random_guess import RandomGuess
from specmoe.residency import cache_size, cold_in_stream, replay, sizes_by_layer
from specmoe.suite.assemble import chance_control
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

COUNTS, SIZES = (12, 8, 4), (3_000_000, 1_000_000, 2_000_000)
SHAPE: dict[str, Any] = {"model_id": "pruned", "layers": 3, "experts": 12, "top_k": 2, "hidden_size": 0}
PRUNED = Topology(**SHAPE, experts_per_layer=COUNTS, bytes_per_expert=1_000_000)
MIXED = Topology(**SHAPE, bytes_per_expert_by_layer=SIZES)
BOTH = Topology(**SHAPE, experts_per_layer=COUNTS, bytes_per_expert_by_layer=SIZES)


def records(topology: Topology, documents: int, tokens: int = 40) -> list[RoutingRecord]:
    """Skewed routing to what each layer has."""
    made = []
    for number in range(documents):
        rng = np.random.default_rng(number)
        ids = np.stack(
            [
                np.argsort(rng.gumbel(size=(tokens, count)) - 0.15 * np.arange(count), 1)[:, : topology.top_k]
                for count in topology.experts_L
            ],
            1,
        )
        made.append(
            RoutingRecord(
                token_ids=torch.from_numpy(rng.integers(0, 99, tokens)).int(),
                phase=(torch.arange(tokens) >= 10).to(torch.uint8),
                expert_ids=torch.from_numpy(ids.astype(np.int16)),
            )
        )
    return made


def write(path: Path, topology: Topology, documents: int = 30, routed_by: Topology | None = None) -> Path:
    manifest = Manifest(topology=topology, source=Source(kind="test"), fields=("token_ids", "phase", "expert_ids"))
    with TraceWriter(path, manifest) as writer:
        for number, record in enumerate(records(routed_by or topology, documents)):
            writer.add(f"{number}", f"domain {number % 3}", f"{number}", record)
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("both") / "trace", BOTH)


# The topology


def test_what_is_alike_is_written_as_before() -> None:
    plain = Topology(**SHAPE, bytes_per_expert=7)
    assert plain.model_dump_json() == (
        '{"model_id":"pruned","revision":"","layers":3,"experts":12,"top_k":2,"hidden_size":0,"zero_experts":0,'
        '"bytes_per_expert":7}'
    )
    assert Topology(**SHAPE, bytes_per_expert_by_layer=(7, 7, 7), experts_per_layer=[12, 12, 12]) == plain
    assert (plain.experts_L, plain.all_experts, plain.expert_bytes, plain.experts_text) == ((12,) * 3, 36, 7, "12")


def test_what_differs_is_kept() -> None:
    again = Topology.model_validate_json(BOTH.model_dump_json())
    assert again == BOTH
    assert (again.experts_L, again.all_experts, again.expert_bytes) == (COUNTS, 24, SIZES)
    assert again.bytes_per_expert is None  # no mean of them stands there
    assert again.experts_text == "4 to 12"
    assert json.loads(BOTH.model_dump_json())["experts_per_layer"] == list(COUNTS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts_per_layer": (12, 8)}, "2 numbers for 3 layers"),
        ({"bytes_per_expert_by_layer": (1, 2, 3, 4)}, "4 numbers for 3 layers"),
        ({"experts_per_layer": (11, 8, 4)}, "the largest must be experts"),
        ({"experts_per_layer": (13, 8, 4)}, "the largest must be experts"),
        ({"experts_per_layer": (4, 4, 4)}, "the largest must be experts"),
        ({"experts_per_layer": (12, 8, 1)}, r"none below top_k \(2\)"),
        ({"experts_per_layer": (12, 8, 0)}, "greater than or equal to 1"),
        ({"bytes_per_expert_by_layer": (1, 2, 0)}, "greater than or equal to 1"),
        ({"bytes_per_expert": 5, "bytes_per_expert_by_layer": (1, 2, 3)}, "not both"),
        ({"bytes_per_expert": 5, "bytes_per_expert_by_layer": (6, 6, 6)}, "not both"),
    ],
)
def test_what_no_model_is(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Topology(**SHAPE, **changes)


def test_no_record_names_an_expert_that_its_layer_lacks() -> None:
    record = records(PRUNED, 1)[0]
    record.check(PRUNED)
    record.expert_ids[5, 1, 0] = 8
    with pytest.raises(SpecmoeError, match="expert_ids holds 8 at token 5 in MoE layer 1, which has 8 experts"):
        record.check(PRUNED)
    record.expert_ids[5, 1, 0] = 12  # a zero or skip expert, as everywhere
    record.check(PRUNED)


def test_a_list_of_experts_can_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "# route_trace v1\n# model=m arch=a n_layer=3 n_expert=0 n_expert_used=0\nphase,step,layer,slot,expert\n"
    rows = [f"1,{t},{layer},0,{(11 - t * 5) % count}\n" for t in range(9) for layer, count in enumerate(COUNTS)]
    (tmp_path / "a.csv").write_text(head + "".join(rows))
    arguments = ["import", str(tmp_path / "a.csv"), "--out", str(tmp_path / "trace"), "--experts"]
    assert run_verb([*arguments, "12,8,4"]) == 0
    assert Trace.open(tmp_path / "trace").topology.experts_per_layer == COUNTS
    assert "3 MoE layers × 4 to 12 experts" in capsys.readouterr().out
    for wrong, says in (
        ("12,8", "--experts names 2 layers with at least 8 experts each, but there are 3 layers"),
        ("12,8,2", "expert_ids holds 3 at token 0 in MoE layer 2, which has 2 experts"),
        ("11,8,4", "--experts 11 is too few: expert id 11 occurs"),
        ("12,,4", "cannot be read; give a number like 64, or one for each layer: 56,40,28"),
        ("0", "cannot be read"),
        ("twelve", "cannot be read"),
    ):
        assert run_verb([*arguments[:3], str(tmp_path / wrong), "--experts", wrong]) == 2
        message = capsys.readouterr().err
        assert says in message
        assert "Traceback" not in message


# Capacities


@pytest.mark.parametrize(
    ("text", "topology", "units"),
    [
        ("25%", PRUNED, 6),
        ("100%", PRUNED, 24),
        ("10 experts", PRUNED, 10),
        ("9MB", PRUNED, 9),
        ("25%", MIXED, 18_000_000),
        ("50%", BOTH, 26_000_000),
        ("100%", BOTH, 52_000_000),
        ("9MB", BOTH, 9_000_000),
        ("1TB", BOTH, 52_000_000),
    ],
)
def test_a_capacity_is_of_what_there_is(text: str, topology: Topology, units: int) -> None:
    assert parse_capacity(text, topology, topology.expert_bytes) == units


def test_a_number_of_experts_says_nothing_where_sizes_differ() -> None:
    with pytest.raises(SpecmoeError, match=r"of different sizes .*1,000,000 to 3,000,000 bytes.*; give a share"):
        parse_capacity("10", BOTH, BOTH.expert_bytes)
    with pytest.raises(SpecmoeError, match="not even one expert of 3,000,000 bytes"):
        parse_capacity("2MB", BOTH, BOTH.expert_bytes)
    assert parse_capacity("10", BOTH, 5) == 10  # the user's own size, one for all
    with pytest.raises(SpecmoeError, match="2 sizes of experts do not go with 3 layers"):
        bytes_L(BOTH, (1, 2))


def test_layers_share_in_proportion() -> None:
    assert split_by_layer(PRUNED, 12, 5).tolist() == [6, 4, 2]
    assert split_by_layer(PRUNED, 13, 5).tolist() == [7, 4, 2]
    assert split_by_layer(PRUNED, 999, 5).tolist() == [12, 8, 4]
    assert split_by_layer(BOTH, 26_000_000, SIZES).tolist() == [18_000_000, 4_000_000, 4_000_000]
    alike = Topology(**SHAPE)
    assert split_by_layer(alike, 8, None).tolist() == [3, 3, 2]
    # Sizes of gigabytes: the products need more than 64 bits.
    large = (3 << 30, 2 << 30, 1 << 30)
    wide = Topology(**{**SHAPE, "experts": 4096})
    half = split_by_layer(wide, all_units(wide, large) // 2, large)
    assert half.tolist() == [4096 * size // 2 for size in large]
    assert held_at_share(BOTH, 0.5, SIZES, per_layer=True).tolist() == [18_000_000, 4_000_000, 4_000_000]
    assert held_at_share(BOTH, 0.5, SIZES, per_layer=False).tolist() == [26_000_000]
    assert held_at_share(BOTH, 0.01, SIZES, per_layer=False).tolist() == [6_000_000]  # a token of the largest layer


# Caches, links, computing


def machine(capacity: int, sizes: tuple[int, ...] = SIZES, **changes: Any) -> Machine:
    return Machine(hardware(link(1.0)), sizes, capacity, **changes)


def test_two_sizes_by_hand() -> None:
    """A megabyte passes in a second; 6 MB hold two large experts, or one and three small ones."""
    topology = Topology(model_id="m", layers=2, experts=4, top_k=1, hidden_size=0)
    demand = demand_of([[[0], [0]], [[1], [1]], [[0], [0]], [[1], [1]]], topology)
    outcome = simulate(demand, machine(6_000_000, (3_000_000, 1_000_000), cost=None))
    # 3 + 1 MB are there when the second large one comes: the first large one, the oldest, makes room for it and for the
    # second small one, 5 MB in all. From then on a large one takes the place of the oldest small one and a large one.
    assert outcome.count("misses") == 8
    assert outcome.count("evictions") == 1 + 2 + 2
    assert outcome.stall_J.round(6).tolist() == [4.0, 4.0, 4.0, 4.0]
    assert outcome.demand_bytes == 16_000_000
    assert outcome.link_seconds == pytest.approx((16.0,))
    assert outcome.largest == 3


def test_small_experts_that_make_room_by_hand() -> None:
    """One that is large pushes out as many small ones as it needs, and no more."""
    topology = Topology(model_id="m", layers=2, experts=4, top_k=1, hidden_size=0)
    small = [[[-1], [expert]] for expert in range(4)]
    demand = demand_of([*small, [[0], [-1]], *small[::-1]], topology)
    outcome = simulate(demand, machine(5_000_000, (3_000_000, 1_000_000)))
    # 0, 1, 2, 3 fill 4 of 5 MB; the large one needs two of them gone: 0 and 1. Then 3 and 2 hit; 1 pushes the large one
    # out, and 0 has room.
    assert outcome.count("misses") == 5 + 2
    assert outcome.count("evictions") == 2 + 1
    assert outcome.count("hits") == 2


def test_each_layer_computes_with_its_own_experts() -> None:
    fast = Hardware(
        name="h",
        description="",
        source="test",
        links=(Link(name="link", bandwidth=1e24, latency=0.0),),
        compute=Compute(memory_bandwidth=1e6, flops=1e24),
    )
    cost = step_cost(fast, MIXED, SIZES)
    assert cost.expert_seconds_by_layer == (3.0, 1.0, 2.0)
    assert cost.expert_seconds == 3.0
    demand = demand_of([[[0, 1], [0, -1], [0, -1]]], MIXED)
    outcome = simulate(demand, Machine(fast, SIZES, all_units(MIXED, SIZES)))
    assert outcome.seconds == outcome.compute == pytest.approx(2 * 3.0 + 1.0 + 2.0)
    assert step_cost(fast, MIXED, 1_000_000).expert_seconds_by_layer is None


def test_what_is_too_small_says_how_much_is_enough() -> None:
    demand = demand_of([[[0, 1], [0, 1], [0, 1]]], BOTH)
    with pytest.raises(SpecmoeError, match=r"5000000 bytes is too small: .* give at least 6000000 bytes"):
        simulate(demand, machine(5_000_000))
    for per_layer, least in ((False, 6_000_000), (True, 26_000_000)):
        of = machine(least, per_layer=per_layer)
        assert (capacities(of, demand) >= 2 * (bytes_L(BOTH, SIZES) if per_layer else 3_000_000)).all()
        with pytest.raises(SpecmoeError, match=f"give at least {least} bytes"):
            simulate(demand, machine(least - 1, per_layer=per_layer))
    disk = link(1.0, parallelism=2).model_copy(update={"name": "disk"})
    three = Machine(hardware(disk, link(1.0)), SIZES, 6_000_000, host_capacity=11_999_999)
    with pytest.raises(SpecmoeError, match="host cache of 11999999 bytes is too small; give at least 12000000"):
        simulate(demand, three)


def test_the_size_is_the_traces_or_the_users() -> None:
    settings = Settings(hardware(link(1.0)))
    assert machine_of(settings, BOTH).expert_bytes == SIZES
    assert machine_of(settings, BOTH).capacity == all_units(BOTH, SIZES) // 4
    mine = machine_of(dataclasses.replace(settings, expert_bytes=5), BOTH)
    assert (mine.expert_bytes, mine.capacity) == (5, 6)


# What is foreseen


def test_made_up_mistakes_exist() -> None:
    demand = Demand.of_records(BOTH, [r.expert_ids.numpy() for r in records(BOTH, 2)], [np.ones(40, np.uint8)] * 2)
    guesses = with_recall(demand, (1, 2), 0.2)
    for row, horizon in enumerate(guesses.horizons):
        limit_V = np.array(COUNTS)[(np.arange(demand.events) + horizon) % 3]
        assert (guesses.experts_VHB[:, row] < limit_V[:, None]).all()
    assert guesses.recall(demand)[0] < 0.45  # 2 of 4 are needed in the last layer, so half of the mistakes run out


@pytest.mark.parametrize("kind", [LayerFrequency, RandomGuess])
def test_no_predictor_foresees_what_its_layer_lacks(kind: type[Any], both: Path) -> None:
    trace = Trace.open(both)
    window = Windows(trace, [0], length=40).batch(slice(0, 1))
    predictor = kind(BOTH, (1, 2)).eval()
    logits_BTSHE = predictor(window)
    chance = inclusion_probabilities(logits_BTSHE, BOTH.top_k)
    for layer in range(3):
        for row, horizon in enumerate(predictor.horizons):
            count = COUNTS[(layer + horizon) % 3]
            # All that is there comes before what is not.
            best = logits_BTSHE[:, :, layer, row].topk(count, -1).indices
            assert int(best.max()) == count - 1
            assert float(chance[:, :, layer, row, count:].sum()) == 0
    assert torch.isfinite(logits_BTSHE.log_softmax(-1)).all()
    assert not kind(Topology(**SHAPE), (1, 2))._forward_hooks  # nothing is added where layers are alike


def test_random_guesses_are_judged_by_each_layers_chance(both: Path) -> None:
    trace = Trace.open(both)
    tally = evaluate(RandomGuess(BOTH, (1,)), Windows(trace, list(range(30)), length=40))
    expected = sum(2 / count for count in COUNTS) / 3
    assert tally.recall()[0] == pytest.approx(expected, abs=0.02)
    assert expected == pytest.approx(0.306, abs=1e-3)  # K / E of the largest layer would be 0.167

    for value, holds in ((tally.recall()[0], True), (2 / 12, False)):
        guess: Any = SimpleNamespace(
            name="RandomGuess", status="ok", scores={"recall@K": {1: SimpleNamespace(value=value)}}
        )
        data: Any = SimpleNamespace(topology=BOTH, horizons=(1,))
        (control,) = chance_control([guess], data)
        assert control.holds == holds


# Findings and stated caches


def test_an_expert_that_does_not_exist_is_not_dead(both: Path, tmp_path: Path) -> None:
    result = validate_trace(both)
    assert "dead-experts" not in {finding.code for finding in result.findings}
    assert [layer.dead for layer in result.layers] == [0, 0, 0]
    # The same routing, said to be that of twelve experts in every layer.
    widened = validate_trace(write(tmp_path / "wide", Topology(**SHAPE), routed_by=BOTH))
    (dead,) = [finding.message for finding in widened.findings if finding.code == "dead-experts"]
    assert "12 of 36 experts were never used, most in layer 2 (8 of 12)" in dead
    for layer, wide in zip(result.layers[1:], widened.layers[1:], strict=True):
        assert layer.entropy > wide.entropy
        assert layer.gini < wide.gini
    # And one that does exist is.
    fewer = Topology(**SHAPE, experts_per_layer=(12, 9, 4))
    (dead,) = [
        finding.message
        for finding in validate_trace(write(tmp_path / "fewer", fewer, routed_by=BOTH)).findings
        if finding.code == "dead-experts"
    ]
    assert "1 of 25 experts were never used, most in layer 1 (1 of 9)" in dead


def test_a_quarter_of_each_layer() -> None:
    assert cache_size(PRUNED) == 3
    assert sizes_by_layer(PRUNED, 3).tolist() == [3, 2, 2]  # of 4 a quarter is 1, but a token needs 2
    assert sizes_by_layer(PRUNED, 10).tolist() == [10, 8, 4]
    assert sizes_by_layer(Topology(**SHAPE), 3).tolist() == [3, 3, 3]


def plain_cold(stream_NLK: Tensor, sizes: list[int]) -> list[int]:
    """Misses of each layer, with ordered dictionaries."""
    missed = [0] * len(sizes)
    for layer, held in enumerate(sizes):
        cache: OrderedDict[int, None] = OrderedDict()
        for ids in stream_NLK[:, layer].tolist():
            missed[layer] += sum(expert not in cache for expert in ids)
            for expert in sorted(ids, reverse=True):
                cache[expert] = None
                cache.move_to_end(expert)
            while len(cache) > held:
                cache.popitem(last=False)
    return missed


def test_stated_caches_of_each_size(both: Path) -> None:
    trace = Trace.open(both)
    ids_NLK = torch.cat([trace.read(index).expert_ids for index in range(3)])
    sizes = sizes_by_layer(BOTH, cache_size(BOTH))
    assert cold_in_stream(ids_NLK, 12, sizes)[1].sum((0, 2)).tolist() == plain_cold(ids_NLK, sizes.tolist())
    replayed = replay(Windows(trace, [0, 1, 2], length=40), (1, 2), cache_size(BOTH))
    assert replayed.missed == sum(plain_cold(ids_NLK, sizes.tolist()))


# The verbs


LINK = Hardware(
    name="test machine",
    description="made up",
    source="made up for tests",
    links=(Link(name="link", bandwidth=1e10, latency=1e-5, source="made up"),),
    compute=Compute(memory_bandwidth=1e12, flops=1e13, kernel_seconds=1e-4),
)


def test_a_simulation_and_its_verdict(both: Path, tmp_path: Path) -> None:
    settings = Settings(LINK, policies=("lru", "predicted"), horizons=(1, 2), capacity="26MB", prediction_seconds=0.0)
    results = simulate_trace(both, tmp_path / "out", settings)
    assert results.machine.expert_bytes == SIZES
    assert (results.machine.capacity, results.machine.experts, results.machine.all_bytes) == (
        26_000_000,
        24,
        52_000_000,
    )
    assert (results.machine.held_bytes, results.machine.share) == (26_000_000, 0.5)
    for run in results.runs:
        assert run.prefetch_bytes == run.used_bytes + run.late_bytes + run.wasted_bytes
        moved = sum(phase["misses"] for phase in run.counts.values())
        assert moved * min(SIZES) <= run.demand_bytes <= moved * max(SIZES)
        assert results.machine.bound is not None
        if run.group != "bandwidth":
            assert run.seconds >= results.machine.bound * (1 - 1e-9)
    base = results.baseline
    assert base.demand_bytes / 1e10 == pytest.approx(base.link_seconds[0])
    assert "a cache of 26 MB of 52 MB in 24 experts: without prefetching" in found(results)[0]
    page = render_simulation(results)
    assert "1 MB to 3 MB, by layer" in page
    assert "26 MB of 52 MB in 24 experts (asked: 26MB)" in page


def test_a_verdict_speaks_of_bytes(both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "machine.json"
    LINK.save(profile)
    arguments = ["verdict", str(both), "--out", str(tmp_path / "out"), "--hardware", str(profile), "--capacity", "50%"]
    assert run_verb([*arguments, "--predictor", "LayerMarkov"]) in {answer.value for answer in Answer}
    text, progress = capsys.readouterr()
    assert "26 MB of 52 MB in 24 experts held" in text
    assert "26 MB (50%)" in text
    assert "bandwidth, 13 MB" in progress
