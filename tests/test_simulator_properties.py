"""What must hold of every simulated run, whatever is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation_worlds import (
    demand_of,
    demands,
    fits,
    hardware,
    link,
    links,
    machine,
    machines,
    records_of,
    runs,
    topology_of,
)
from specmoe.offload import simulator
from specmoe.offload.admission.registry import Admission
from specmoe.offload.bound import fewest_loads
from specmoe.offload.cache import replay_cache
from specmoe.offload.capacity import units_L
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.profile import Hardware, Link
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.prefetchers.predictions import perfect
from specmoe.offload.simulation.state import COUNTS, Tier
from specmoe.offload.simulator import Machine, Outcome, Run, capacities, compute_seconds, least_seconds, simulate

TIMED = [name for name in POLICIES if name != "belady-bypass"]
ONLINE = [name for name in TIMED if POLICIES[name].needs == ""]


def any_run(data: st.DataObject, demand: Demand) -> Run:
    return data.draw(st.one_of(st.just(Run()), st.just(Run.oracle(demand)), runs(demand)))


def any_policy(data: st.DataObject, run: Run) -> str:
    return "belady" if run.reach else data.draw(st.sampled_from(TIMED))


@pytest.fixture(scope="module")
def tiers() -> Iterator[list[Tier]]:
    """The tiers of each run, as they were left."""
    made: list[Tier] = []
    original = simulator.make_tier

    def kept(*arguments: Any) -> Tier:
        made.append(original(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "make_tier", kept)
        yield made


def check_tier(tier: Tier, counts: dict[str, dict[str, int]]) -> None:
    total = {name: sum(phase[name] for phase in counts.values()) for name in counts["decode"]}
    resident = int(tier.cache.keys["resident"].sum())
    under_way = int(np.isfinite(tier.copies["arrival"]).sum())
    held, flights = int(tier.own["held"][0]), int(tier.own["flights"][0])
    assert flights == under_way
    assert held == resident + under_way
    there = tier.cache.keys["resident"][: tier.cache.experts] | np.isfinite(tier.copies["arrival"])
    units_N = tier.cache.keys["units"][: tier.cache.experts]
    assert units_N[there].sum() == tier.cache.caches["size"].sum()
    assert (tier.cache.caches["size"] <= tier.cache.caches["capacity"]).all()
    assert held <= tier.own["largest"][0] <= tier.cache.caches["capacity"].sum() // units_N.min()
    moved = total["misses"] + total["prefetched"]
    assert moved == total["evictions"] + held
    moved_L = tier.counts.sum(0)[:, [COUNTS.index("misses"), COUNTS.index("prefetched")]].sum(1)
    seconds_L = tier.copies["seconds"].reshape(len(moved_L), -1)[:, 0]
    assert tier.own["busy"][0] == pytest.approx(moved_L @ seconds_L)
    assert total["prefetched"] == total["used"] + total["late"] + total["wasted"]
    assert total["accesses"] == total["hits"] + total["misses"] + total["late"]
    assert total["used"] <= total["hits"]
    assert (np.sort(tier.flying[:flights]) == np.flatnonzero(np.isfinite(tier.copies["arrival"]))).all()
    waiting = tier.waiting["key"][: tier.own["waiting"][0]]
    assert (tier.copies["waits"][waiting] == np.arange(len(waiting))).all()
    assert (tier.copies["waits"] >= 0).sum() == len(waiting)


def check_times(demand: Demand, of: Machine, outcome: Outcome) -> None:
    assert of.cost is not None
    assert outcome.seconds == pytest.approx(outcome.compute + outcome.stall)
    assert outcome.compute == pytest.approx(compute_seconds(demand, of.cost))
    assert outcome.end_J[-1] == outcome.seconds
    assert (np.diff(outcome.end_J, prepend=0.0) > 0).all()
    assert (outcome.stall_J >= 0).all()
    # Bytes of a link pass one after the other, and those that count have passed before the end.
    spent = outcome.demand_bytes / of.hardware.links[-1].bandwidth
    assert outcome.seconds >= spent * (1 - 1e-12)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_is_lost_between_two_tiers(tiers: list[Tier], data: st.DataObject) -> None:
    demand = data.draw(demands())
    run = any_run(data, demand)
    of = data.draw(machines(demand, policy=any_policy(data, run)))
    tiers.clear()
    outcome = simulate(demand, of, run)
    (device,) = tiers
    check_tier(device, outcome.counts)
    check_times(demand, of, outcome)
    assert outcome.count("accesses") == demand.accesses
    assert outcome.capacity == capacities(of, demand).sum() <= of.capacity
    assert outcome.largest * units_L(demand.topology, of.expert_bytes).min() <= outcome.capacity


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_is_lost_between_three_tiers(tiers: list[Tier], data: st.DataObject) -> None:
    demand = data.draw(demands())
    run = any_run(data, demand)
    of = data.draw(machines(demand, policy=any_policy(data, run), host_policy=data.draw(st.sampled_from(ONLINE))))
    disk = data.draw(links())
    unit = int(units_L(demand.topology, of.expert_bytes).max())
    least = (demand.topology.top_k + disk.parallelism) * unit
    disk = disk.model_copy(update={"name": "disk"})
    held = data.draw(st.integers(least, 24 * unit))
    of = replace(of, hardware=hardware(disk, of.hardware.links[0]), host_capacity=held)
    tiers.clear()
    outcome = simulate(demand, of, run)
    device, host = tiers
    check_tier(device, outcome.counts)
    check_tier(host, outcome.host_counts)
    check_times(demand, of, outcome)
    # Whatever comes to the device passes the host.
    assert sum(phase["accesses"] for phase in outcome.host_counts.values()) == (
        outcome.count("misses") + outcome.count("prefetched")
    )


def usage_wanted(demand: Demand) -> np.ndarray:
    """What the simulator tells ``predicted`` where nothing is foreseen: how often an expert was used lately."""
    wanted_VE = np.zeros((demand.events, demand.topology.experts), dtype=np.float64)
    lately_LE = np.zeros((demand.topology.layers, demand.topology.experts))
    for event in range(demand.events):
        layer = event % demand.topology.layers
        own = demand.keys_M[demand.starts_V[event] : demand.starts_V[event + 1]] % demand.topology.experts
        lately_LE[layer] *= 1 - 0.02
        lately_LE[layer, own] += 0.02
        wanted_VE[event] = lately_LE[layer]
    return wanted_VE


@pytest.mark.parametrize("policy", TIMED)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_misses_are_those_of_the_cache_alone(policy: str, data: st.DataObject) -> None:
    """Shared and per layer, and also where events are larger than the cache."""
    demand = data.draw(demands(largest_batch=5))
    of = data.draw(machines(demand, policy=policy))
    wanted = usage_wanted(demand).astype(np.float32) if POLICIES[policy].needs == "predictor" else None
    held_G = capacities(of, demand)
    alone = replay_cache(demand, policy, held_G, per_layer=of.per_layer, wanted=wanted, expert_bytes=of.expert_bytes)
    outcome = simulate(demand, of)
    assert outcome.count("misses") == alone.misses
    assert outcome.count("evictions") == alone.evictions
    assert outcome.counts["prefill"]["misses"] == alone.prefill_misses


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_is_faster_than_the_bound(data: st.DataObject) -> None:
    demand = data.draw(demands())
    run = any_run(data, demand)
    of = data.draw(machines(demand, policy=any_policy(data, run)))
    loaded_V = fewest_loads(demand, capacities(of, demand), per_layer=of.per_layer, expert_bytes=of.expert_bytes)
    least = least_seconds(demand, of, loaded_V)
    assert of.cost is not None
    assert least >= compute_seconds(demand, of.cost) * (1 - 1e-12)
    assert simulate(demand, of, run).seconds >= least * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_bound_is_beladys_with_bypass_where_experts_are_alike(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand, sized=False))
    held_G = capacities(of, demand)
    best = replay_cache(demand, "belady-bypass", held_G, per_layer=of.per_layer, keep_misses=True)
    assert best.missed_M is not None
    event_M = np.repeat(np.arange(demand.events), np.diff(demand.starts_V))
    missed_V = np.bincount(event_M, weights=best.missed_M, minlength=demand.events)
    assert fewest_loads(demand, held_G, per_layer=of.per_layer).tolist() == missed_V.tolist()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_cache_loads_fewer_bytes_than_the_bound(data: st.DataObject) -> None:
    """At no event, under no policy, with sizes or without."""
    demand = data.draw(demands())
    of = data.draw(machines(demand))
    held_G, layout = capacities(of, demand), {"per_layer": of.per_layer, "expert_bytes": of.expert_bytes}
    least_V = fewest_loads(demand, held_G, **layout).cumsum()
    event_M = np.repeat(np.arange(demand.events), np.diff(demand.starts_V))
    taken_M = units_L(demand.topology, of.expert_bytes)[event_M % demand.topology.layers]
    for policy, info in POLICIES.items():
        if info.needs != "predictor":
            counts = replay_cache(demand, policy, held_G, keep_misses=True, **layout)
            loaded_V = np.bincount(event_M, weights=taken_M * counts.missed_M, minlength=demand.events).cumsum()
            assert (least_V <= loaded_V).all(), policy


def test_beladys_rule_is_not_the_best_where_sizes_differ() -> None:
    """Three small experts, all needed a little later than a large one: four misses to save or one."""
    small = [[-1, 0], [-1, 1], [-1, 2]]
    steps = [[0, -1], *small, *small, [1, -1], [0, -1], *small]
    demand = demand_of([[[layer] for layer in step] for step in steps], topology_of(2, 3, 1))
    misses = {name: replay_cache(demand, name, 6, expert_bytes=(3, 1)).misses for name in ("lfu", "belady")}
    # The seventh step's large one pushes out the first large one under LFU, and under Belady's rule all small ones.
    assert misses == {"lfu": 6, "belady": 8}
    assert fewest_loads(demand, 6, expert_bytes=(3, 1)).sum() <= 3 * 3 + 3


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_belady_has_the_fewest_misses(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand, sized=False))
    if fits(demand, of):
        best = simulate(demand, replace(of, policy="belady")).count("misses")
        assert all(best <= simulate(demand, replace(of, policy=policy)).count("misses") for policy in ONLINE)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_speedup_beyond_perfect_overlap(data: st.DataObject) -> None:
    demand = data.draw(demands())
    run = any_run(data, demand)
    of = data.draw(machines(demand, policy=any_policy(data, run)))
    of = replace(of, hardware=hardware(of.hardware.links[0].model_copy(update={"latency": 0.0})))
    none, outcome = simulate(demand, of), simulate(demand, of, run)
    computing, reading = none.compute, none.link_seconds[0]
    assert none.seconds == pytest.approx(computing + reading)  # demand alone overlaps with nothing
    limit = (computing + reading) / max(computing, min(reading, outcome.link_seconds[0]))
    assert none.seconds / outcome.seconds <= limit * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_link_that_takes_no_time_makes_all_equal(data: st.DataObject) -> None:
    demand = data.draw(demands())
    run = any_run(data, demand)
    of = data.draw(machines(demand, policy=any_policy(data, run)))
    of = replace(of, hardware=hardware(Link(name="free", bandwidth=1e24, latency=0.0, parallelism=2)))
    outcome = simulate(demand, of, run)
    assert of.cost is not None
    assert outcome.seconds == pytest.approx(compute_seconds(demand, of.cost), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_same_input_gives_the_same_bytes(data: st.DataObject) -> None:
    demand = data.draw(demands())
    run = any_run(data, demand)
    of = data.draw(machines(demand, policy=any_policy(data, run)))
    first, second = simulate(demand, of, run, spans=50), simulate(demand, of, run, spans=50)
    assert first.counts == second.counts
    assert first.link_seconds == second.link_seconds
    assert first.log is not None
    assert second.log is not None
    for one, other in (
        (first.end_J, second.end_J),
        (first.stall_J, second.stall_J),
        *zip(first.log, second.log, strict=False),
    ):
        assert one.tobytes() == other.tobytes()


def test_the_order_of_a_profiles_keys_does_not_matter() -> None:
    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(value)}
        return [backwards(item) for item in value] if isinstance(value, list) else value

    topology = topology_of(2, 6, 2)
    demand = Demand.of_records(topology, *records_of(np.random.default_rng(1), topology, [20, 9]), replay="trace")
    of = machine(5, link(0.3, 0.1))
    turned = Hardware.model_validate(backwards(of.hardware.model_dump(mode="json")))
    first, second = simulate(demand, of), simulate(demand, replace(of, hardware=turned))
    assert first.end_J.tobytes() == second.end_J.tobytes()
    assert first.counts == second.counts


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_slower_link_is_never_faster_without_prefetching(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand, policy=data.draw(st.sampled_from(TIMED))))
    (fast,) = of.hardware.links
    slow = fast.model_copy(
        update={
            "bandwidth": fast.bandwidth / data.draw(st.floats(1, 10)),
            "latency": fast.latency + data.draw(st.floats(0, 1)),
            "parallelism": data.draw(st.integers(1, fast.parallelism)),
        }
    )
    slower = simulate(demand, replace(of, hardware=hardware(slow)))
    assert slower.seconds >= simulate(demand, of).seconds * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_more_room_is_never_slower_for_lru_without_prefetching(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand))
    more = data.draw(st.integers(1, 8)) * int(units_L(demand.topology, of.expert_bytes).min())
    larger = replace(of, capacity=of.capacity + more)
    if fits(demand, of):
        assert simulate(demand, larger).seconds <= simulate(demand, of).seconds * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_never_admitted_changes_nothing(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand, policy=data.draw(st.sampled_from([*ONLINE, "belady"]))))
    run = data.draw(runs(demand))
    refused = replace(run, admission=Admission("expected-value", 1e5))
    for quiet in (refused, replace(run, admission=None)):
        outcome, none = simulate(demand, of, quiet), simulate(demand, of)
        assert outcome.counts == none.counts
        assert outcome.end_J.tobytes() == none.end_J.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_with_room_for_all_and_an_idle_link_perfect_prediction_leaves_only_the_start(data: st.DataObject) -> None:
    """Every expert is fetched once, and while the link keeps up only the first step's may be waited for."""
    demand = data.draw(demands(largest_batch=1))
    everything = demand.topology.layers * demand.topology.experts
    run = Run("perfect", perfect(demand, (1,)), Admission("top", 6.0))
    outcome = simulate(demand, machine(everything, link(0.01)), run)
    assert outcome.count("misses") + outcome.count("prefetched") == len(np.unique(demand.keys_M))
    assert outcome.count("wasted") == outcome.count("late") == 0
    assert outcome.count("misses") == demand.starts_V[1]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_bound_counts_what_no_schedule_can_avoid(data: st.DataObject) -> None:
    """Against all schedules there are: which experts to hold after each event, whatever is fetched when."""
    topology = topology_of(1, data.draw(st.integers(3, 6)), data.draw(st.integers(1, 2)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    demand = Demand.of_records(topology, *records_of(rng, topology, [9], 0.5), replay="decode")
    capacity = data.draw(st.integers(topology.top_k, 3))
    best = replay_cache(demand, "belady-bypass", capacity, keep_misses=True)
    assert best.missed_M is not None
    held = [frozenset(some) for size in range(capacity + 1) for some in combinations(range(topology.experts), size)]
    loads = {frozenset[int](): 0}
    for event in range(demand.events):
        start, stop = demand.starts_V[event : event + 2]
        needed = set(demand.keys_M[start:stop].tolist())
        loads = {
            after: min(count + len(after - before) for before, count in loads.items())
            for after in held
            if needed <= after
        }
        assert best.missed_M[:stop].sum() <= min(loads.values())
