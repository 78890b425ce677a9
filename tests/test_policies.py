"""The compiled eviction policies against slow ones, against libCacheSim, and against what must hold for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demands import demand_of, single_accesses, write_requests
from golden_runs import golden_demand
from policy_references import fewest_misses, replay_reference
from specmoe.errors import SpecmoeError
from specmoe.offload.cache import empty_caches, replay_cache
from specmoe.offload.demand import Demand
from specmoe.offload.policies import dispatch
from specmoe.offload.policies.registry import POLICIES, policy_named
from specmoe.offload.simulation import verbs

LIBCACHESIM = {
    "lru": "LRU",
    "lfu": "LFU",
    "slru": "SLRU",
    "s3-fifo": "S3FIFO",
    "sieve": "Sieve",
    "belady": "Belady",
}


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    """Up to 24 forward passes of up to 3 layers and 6 experts, with events of any size."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    steps = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    largest = draw(st.integers(1, experts))
    weight = np.arange(1, experts + 1) ** -draw(st.sampled_from([0.0, 1.0, 2.0]))
    events = [
        (event % layers * experts + rng.choice(experts, rng.integers(1, largest + 1), False, weight / weight.sum()))
        for event in range(steps * layers)
    ]
    return demand_of([event.tolist() for event in events], layers, experts)


def largest_event(demand: Demand) -> int:
    return int(np.diff(demand.starts_V).max())


def wishes(demand: Demand, name: str) -> Any:
    """A predictor's wishes where a policy asks for them, with ties."""
    if POLICIES[name].needs != "predictor":
        return None
    shape = (demand.events, demand.topology.experts)
    return np.random.default_rng(5).integers(0, 4, shape).astype(np.float32)


@pytest.mark.parametrize("name", POLICIES)
@given(demand=demands(), capacity=st.integers(1, 18), per_layer=st.booleans())
@settings(deadline=None, max_examples=40)
def test_same_misses_as_a_slow_one(name: str, demand: Demand, capacity: int, per_layer: bool) -> None:
    wanted = wishes(demand, name)
    counts = replay_cache(demand, name, capacity, per_layer=per_layer, wanted=wanted, keep_misses=True)
    missed, evictions = replay_reference(demand, name, capacity, per_layer=per_layer, wanted=wanted)
    assert counts.missed_M is not None
    assert counts.missed_M.tolist() == missed
    assert counts.evictions == evictions


@pytest.mark.parametrize("name", POLICIES)
@given(
    demand=demands(),
    sizes=st.tuples(*[st.integers(1, 7)] * 3),
    more=st.integers(0, 60),
    per_layer=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_same_misses_as_a_slow_one_where_sizes_differ(
    name: str, demand: Demand, sizes: tuple[int, ...], more: int, per_layer: bool
) -> None:
    """Capacities are bytes, from the largest expert's size on: also events that run in waves."""
    sizes = sizes[: demand.topology.layers]
    wanted = wishes(demand, name)
    counts = replay_cache(
        demand, name, max(sizes) + more, per_layer=per_layer, wanted=wanted, keep_misses=True, expert_bytes=sizes
    )
    missed, evictions = replay_reference(
        demand, name, max(sizes) + more, per_layer=per_layer, wanted=wanted, sizes=sizes
    )
    assert counts.missed_M is not None
    assert counts.missed_M.tolist() == missed
    assert counts.evictions == evictions


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"slru", "s3-fifo"}))
@given(demand=demands(), capacity=st.integers(1, 18), per_layer=st.booleans(), size=st.integers(1, 9))
@settings(deadline=None, max_examples=20)
def test_equal_sizes_in_bytes_are_experts(name: str, demand: Demand, capacity: int, per_layer: bool, size: int) -> None:
    """All but those that share the capacity out among queues, whose parts need not be whole experts."""
    wanted = wishes(demand, name)
    sizes = (size,) * demand.topology.layers
    of_bytes = replay_cache(
        demand, name, capacity * size, per_layer=per_layer, wanted=wanted, keep_misses=True, expert_bytes=sizes
    )
    of_experts = replay_cache(demand, name, capacity, per_layer=per_layer, wanted=wanted, keep_misses=True)
    assert (of_bytes.missed_M == of_experts.missed_M).all()
    assert of_bytes.evictions == of_experts.evictions


@pytest.mark.parametrize("name", POLICIES)
@given(demand=demands(), capacity=st.integers(1, 18), per_layer=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=12)
def test_what_is_in_use_stays_and_the_capacity_holds(
    name: str, demand: Demand, capacity: int, per_layer: bool, seed: int
) -> None:
    """The verbs one by one, with experts that are brought in between the events as a prefetch does."""
    number = POLICIES[name].number
    state = empty_caches(demand.topology, capacity, per_layer=per_layer)
    keys, rng = state.keys, np.random.default_rng(seed)

    def bring(key: int, event: int) -> None:
        group = int(keys["group"][key])
        if state.caches["size"][group] == capacity:
            if not dispatch.admit(number, state, key, event):
                return
            leaves = verbs.victim(number, state, group, event)
            in_cache = keys["resident"][: state.experts] & (keys["group"][: state.experts] == group)
            free = (
                in_cache
                if name == "belady-bypass"
                else in_cache & (keys["pinned"][: state.experts] != state.clock["stamp"][0])
            )
            assert (leaves >= 0) == free.any()
            if leaves < 0:
                return
            assert free[leaves]
            keys["resident"][leaves] = False
            state.caches["size"][group] -= 1
        keys["resident"][key] = True
        keys["pinned"][key] = state.clock["stamp"][0]
        state.caches["size"][group] += 1
        verbs.insert(number, state, key, event)

    for event in range(demand.events):
        state.clock["stamp"][0] += 1
        own = slice(demand.starts_V[event], demand.starts_V[event + 1])
        needed = demand.keys_M[own]
        keys["next_use"][needed] = demand.next_use_M[own]
        keys["wanted"][: state.experts] = rng.random(state.experts)
        there = keys["resident"][needed]
        keys["pinned"][needed[there]] = state.clock["stamp"][0]
        for key in needed[there][::-1].tolist():
            verbs.hit(number, state, key, event)
        for key in needed[~there][::-1].tolist():
            bring(key, event)
        absent = np.flatnonzero(~keys["resident"][: state.experts])
        if len(absent) and rng.random() < 0.5:
            bring(int(rng.choice(absent)), event)
        resident = keys["resident"][: state.experts]
        assert (np.bincount(keys["group"][: state.experts][resident], minlength=len(state.caches)) <= capacity).all()
        assert resident.sum() == state.caches["size"].sum()


@given(demand=demands(), extra=st.integers(0, 12), per_layer=st.booleans())
@settings(deadline=None, max_examples=60)
def test_nobody_misses_less_than_belady(demand: Demand, extra: int, per_layer: bool) -> None:
    capacity = largest_event(demand) + extra
    misses = {
        name: replay_cache(demand, name, capacity, per_layer=per_layer, wanted=wishes(demand, name)).misses
        for name in POLICIES
    }
    assert all(misses["belady"] <= count for name, count in misses.items() if name != "belady-bypass")
    assert misses["belady-bypass"] <= misses["belady"]


@given(demand=demands(), capacity=st.integers(1, 6), per_layer=st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_bound_holds_for_events_of_any_size(demand: Demand, capacity: int, per_layer: bool) -> None:
    misses = [
        replay_cache(demand, name, capacity, per_layer=per_layer, wanted=wishes(demand, name)).misses
        for name in POLICIES
    ]
    assert misses[list(POLICIES).index("belady-bypass")] == min(misses)


@given(seed=st.integers(0, 1 << 32), capacity=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_no_choice_at_all_is_better(seed: int, capacity: int) -> None:
    rng = np.random.default_rng(seed)
    events = [rng.choice(6, rng.integers(1, 4), False).tolist() for _ in range(12)]
    demand = demand_of(events, 1, 6)
    assert replay_cache(demand, "belady-bypass", capacity).misses == fewest_misses(demand, capacity, forced=False)
    if capacity >= largest_event(demand):
        assert replay_cache(demand, "belady", capacity).misses == fewest_misses(demand, capacity, forced=True)


def test_belady_on_a_stream_worked_out_by_hand() -> None:
    # Capacity 2. Forced: a b c(-b) a b(-c or a); with bypass c is used and not kept.
    stream = single_accesses(np.array([0, 1, 2, 0, 1], dtype=np.int32), 3)
    forced, free = replay_cache(stream, "belady", 2), replay_cache(stream, "belady-bypass", 2)
    assert (forced.misses, forced.evictions, forced.bypassed) == (4, 2, 0)
    assert (free.misses, free.evictions, free.bypassed) == (3, 0, 1)


def test_least_stale_goes_back_through_the_layers() -> None:
    # Two experts in each of three layers, all held after two passes but one; then layer 1 needs its other expert.
    events = [[0], [2], [4], [1], [2], [4], [0], [3], [5], [1], [2], [4]]
    demand = demand_of(events, 3, 2)
    counts = replay_cache(demand, "least-stale", 4, keep_misses=True)
    # At event 7 (layer 1) 0, 1, 2 and 4 are held. 2 is stale and of the layer that has just been: it leaves, and not 1,
    # which LRU would let go. At event 8 (layer 2) 4 leaves, and so on.
    assert counts.missed_M is not None
    assert counts.missed_M.tolist() == [True] * 4 + [False] * 3 + [True] * 2 + [False] + [True] * 2


def test_what_the_registry_says() -> None:
    assert sorted(info.number for info in POLICIES.values()) == list(range(len(POLICIES)))
    assert {name for name, info in POLICIES.items() if info.needs == "future"} == {"belady", "belady-bypass"}
    assert all(info.title and info.doc for info in POLICIES.values())
    assert all(info.source or info.needs == "predictor" for info in POLICIES.values())
    with pytest.raises(SpecmoeError, match="did you mean s3-fifo"):
        policy_named("s3fifo")


def zipf(accesses: int, universe: int, seed: int) -> np.ndarray[Any, Any]:
    weight = np.arange(1, universe + 1) ** -0.9
    return np.random.default_rng(seed).choice(universe, accesses, p=weight / weight.sum()).astype(np.int32)


def streams() -> dict[str, Demand]:
    real = golden_demand()
    loop = np.tile(np.arange(90, dtype=np.int32), 60)
    return {
        "zipf": single_accesses(zipf(30_000, 250, 0), 250),
        "loop": single_accesses(np.where(np.random.default_rng(1).random(len(loop)) < 0.1, 0, loop), 90),
        "real": single_accesses(real.keys_M, 128),
    }


def theirs(name: str, path: Path, accesses: int, capacity: int) -> int:
    """Misses as libCacheSim counts them."""
    library = pytest.importorskip("libcachesim")
    reader = library.TraceReader(str(path), library.TraceType.ORACLE_GENERAL_TRACE)
    ratio, _ = getattr(library, name)(capacity, hashpower=10).process_trace(reader)
    return round(ratio * accesses)


@pytest.mark.parametrize("stream", ["zipf", "loop", "real"])
def test_same_misses_as_libcachesim(stream: str, tmp_path: Path) -> None:
    demand = streams()[stream]
    write_requests(demand, tmp_path / "requests")
    # Below 20 libCacheSim's S3-FIFO takes nothing in, and its SLRU is another one unless four divides the capacity.
    for capacity in (20, 32, 48, 64, 100):
        for name, other in LIBCACHESIM.items():
            ours = replay_cache(demand, name, capacity).misses
            assert ours == theirs(other, tmp_path / "requests", demand.accesses, capacity), (name, capacity)
    for capacity in (21, 33, 50, 75):
        for name in sorted(LIBCACHESIM.keys() - {"slru"}):
            ours = replay_cache(demand, name, capacity).misses
            other = theirs(LIBCACHESIM[name], tmp_path / "requests", demand.accesses, capacity)
            assert ours == other, (name, capacity)


def lfuda_as_libcachesim(keys: Sequence[int], capacity: int) -> int:
    """Ageing as libCacheSim has it: each hit adds the smallest value held, instead of one use to the age."""
    value: dict[int, int] = {}
    last: dict[int, int] = {}
    smallest = misses = 0

    def rest(gone: int) -> int:
        """The smallest value above one that nobody has any more."""
        above = [each for each in value.values() if each > gone]
        return smallest if smallest in value.values() or not above else min(above)

    for tick, key in enumerate(keys):
        if key in value:
            old = value[key]
            value[key] += smallest
            last[key] = tick
            if old == smallest:
                smallest = rest(old)
            continue
        misses += 1
        if len(value) >= capacity:
            smallest = min(value.values())
            leaves = min((each for each in value if value[each] == smallest), key=last.__getitem__)
            del value[leaves], last[leaves]
            smallest = rest(smallest)
        value[key], last[key] = smallest + 1, tick
    return misses


def test_why_libcachesim_ages_otherwise(tmp_path: Path) -> None:
    """The only policy that is not theirs; on long streams their values grow beyond bounds and the search for them."""
    for seed in range(3):
        keys = zipf(1500, 40, seed)
        write_requests(single_accesses(keys, 40), tmp_path / "requests")
        assert theirs("LFUDA", tmp_path / "requests", 1500, 20) == lfuda_as_libcachesim(keys.tolist(), 20)


def slru_as_libcachesim(keys: Sequence[int], capacity: int) -> int:
    """Segments as libCacheSim has them: one that is pushed down into a full lowest segment makes its oldest leave."""
    segments: list[list[int]] = [[], [], [], []]
    most, misses = capacity // 4, 0
    for key in keys:
        place = next((i for i, segment in enumerate(segments) if key in segment), None)
        if place is None:
            misses += 1
            if sum(map(len, segments)) == capacity:
                next(filter(None, segments)).pop(0)
            segments[next((i for i, segment in enumerate(segments) if len(segment) < most), 0)].append(key)
            continue
        segments[place].remove(key)
        place = min(place + 1, 3)
        segments[place].append(key)
        while len(segments[place]) > most:
            pushed = segments[place].pop(0)
            if place == 0:
                continue
            place -= 1
            segments[place].append(pushed)
    return misses


@pytest.mark.parametrize("stream", ["zipf", "real"])
def test_why_libcachesim_segments_otherwise(stream: str, tmp_path: Path) -> None:
    """Where four does not divide the capacity, its SLRU lets an expert go although the cache has room."""
    demand = streams()[stream]
    write_requests(demand, tmp_path / "requests")
    different = 0
    for capacity in (21, 33, 50, 75):
        other = theirs("SLRU", tmp_path / "requests", demand.accesses, capacity)
        assert other == slru_as_libcachesim(demand.keys_M.tolist(), capacity)
        different += other != replay_cache(demand, "slru", capacity).misses
    assert different > 0
