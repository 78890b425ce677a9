"""Replays of whole streams: what is counted, events that are larger than the cache, curves, known counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_misses
from demands import demand_of
from golden_runs import golden_demand
from specmoe.errors import SpecmoeError
from specmoe.offload.cache import CacheCounts, miss_ratio_curves, replay_cache
from specmoe.offload.demand import Demand
from specmoe.offload.policies.registry import POLICIES
from specmoe.residency import cold_in_stream
from specmoe.topology import Topology

UNAIDED = [name for name, info in POLICIES.items() if info.needs != "predictor"]


def test_golden_misses() -> None:
    assert golden_misses.golden_misses() == json.loads(golden_misses.PATH.read_text())


def test_what_is_counted() -> None:
    # Two layers of two experts; the first forward pass is prefill and needs both of layer 0.
    demand = demand_of([[0, 1], [2], [0], [3], [1], [2]], 2, 2, prefill_steps=1)
    counts = replay_cache(demand, "lru", 3, keep_misses=True)
    # 0 1 2 come in; 0 hits; 3 pushes out 1 (used with 0 at first, but 0 again since); 1 pushes out 2, 2 pushes out 0.
    assert counts.missed_M is not None
    assert counts.missed_M.tolist() == [True, True, True, False, True, True, True]
    assert (counts.accesses, counts.misses, counts.hits, counts.cold) == (7, 6, 1, 4)
    assert (counts.prefill_accesses, counts.prefill_misses) == (3, 3)
    assert (counts.decode_accesses, counts.decode_misses) == (4, 3)
    assert counts.misses_L.tolist() == [3, 3]
    assert (counts.evictions, counts.bypassed) == (3, 0)
    assert counts.miss_ratio == pytest.approx(6 / 7)
    assert replay_cache(demand, "lru", 3).missed_M is None


def test_of_experts_used_together_the_larger_leaves_first() -> None:
    demand = demand_of([[0, 2, 4], [6], [0, 2], [4]], 1, 8)
    assert replay_cache(demand, "lru", 3).misses == 5  # 6 pushes out 4, and 0 and 2 stay


@pytest.mark.parametrize("policy", UNAIDED)
def test_an_event_larger_than_the_cache_runs_in_waves(policy: str) -> None:
    everything = list(range(6))
    demand = demand_of([everything, everything, [0]], 1, 6)
    counts = replay_cache(demand, policy, 4)
    # What is held when an event begins is there for it, and all else passes through.
    assert counts.cold == 6
    assert 6 + 2 <= counts.misses <= 6 + 2 + 1
    assert counts.evictions + counts.bypassed == counts.misses - 4


@pytest.mark.parametrize("policy", UNAIDED)
def test_everything_fits(policy: str) -> None:
    demand = golden_demand()
    counts = replay_cache(demand, policy, 10_000)
    assert counts.misses == counts.cold == len(np.unique(demand.keys_M))
    assert counts.evictions == counts.bypassed == 0


@given(seed=st.integers(0, 1 << 32), experts=st.integers(2, 10), layers=st.integers(1, 4), capacity=st.integers(1, 10))
@settings(deadline=None, max_examples=40)
def test_lru_per_layer_is_the_cache_that_cold_misses_are_counted_with(
    seed: int, experts: int, layers: int, capacity: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, min(experts, capacity) + 1))
    ids = np.argsort(rng.gumbel(size=(60, layers, experts)) + np.linspace(0, 3, experts), -1)[..., :top_k]
    ids = ids.astype(np.int16)
    topology = Topology(model_id="m", layers=layers, experts=experts, top_k=top_k, hidden_size=0)
    demand = Demand.of_records(topology, [ids], [np.zeros(60, dtype=np.uint8)], replay="decode")
    counts = replay_cache(demand, "lru", capacity, per_layer=True)
    cold = cold_in_stream(torch.from_numpy(ids), experts, capacity)[1]
    assert counts.misses_L.tolist() == cold.sum((0, 2)).tolist()


@given(seed=st.integers(0, 1 << 32), smaller=st.integers(1, 20), more=st.integers(0, 20))
@settings(deadline=None, max_examples=40)
def test_a_larger_lru_holds_what_a_smaller_one_holds(seed: int, smaller: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    events = [(rng.choice(12, rng.integers(1, 4), False) + 12 * (event % 2)).tolist() for event in range(80)]
    demand = demand_of(events, 2, 12)
    smaller += 2  # an event must fit
    missed, missed_less = (
        replay_cache(demand, "lru", capacity, keep_misses=True).missed_M for capacity in (smaller, smaller + more)
    )
    assert missed is not None
    assert missed_less is not None
    assert (missed | ~missed_less).all()


def as_numbers(counts: CacheCounts) -> tuple[object, ...]:
    return tuple(value.tolist() if isinstance(value, np.ndarray) else value for value in vars(counts).values())


def test_curves_are_the_single_replays_in_any_order_and_again() -> None:
    demand = golden_demand()
    capacities = [8, 32, 96]
    curves = miss_ratio_curves(demand, UNAIDED, capacities, workers=2)
    backwards = miss_ratio_curves(demand, UNAIDED[::-1], capacities[::-1], workers=2)
    for name in UNAIDED:
        alone = [as_numbers(replay_cache(demand, name, capacity)) for capacity in capacities]
        assert list(map(as_numbers, curves[name])) == alone
        assert list(map(as_numbers, backwards[name][::-1])) == alone


def test_curves_with_a_predictor() -> None:
    demand = golden_demand()
    wanted = golden_misses.often_used(demand)
    found = miss_ratio_curves(demand, ["predicted"], [16, 32], per_layer=False, wanted={"predicted": wanted})
    assert [point.misses for point in found["predicted"]] == [
        replay_cache(demand, "predicted", capacity, wanted=wanted).misses for capacity in (16, 32)
    ]


def test_a_predictor_that_knows_the_future_is_belady() -> None:
    """What it said of a layer stays true until that layer's next event."""
    demand = golden_demand()
    experts = demand.topology.experts
    layers = demand.topology.layers
    wanted = np.zeros((demand.events, experts), dtype=np.float32)
    upcoming = np.full((layers, experts), demand.events, dtype=np.float32)
    for event in range(demand.events - 1, -1, -1):
        wanted[event] = -upcoming[event % layers]
        own = demand.keys_M[demand.starts_V[event] : demand.starts_V[event + 1]]
        upcoming[event % layers, own % experts] = event
    for capacity in (16, 32, 64):
        told = replay_cache(demand, "predicted", capacity, wanted=wanted)
        assert told.misses == replay_cache(demand, "belady", capacity).misses


def test_what_is_refused() -> None:
    demand = golden_demand()
    wanted = golden_misses.often_used(demand)
    with pytest.raises(SpecmoeError, match="did you mean lru"):
        replay_cache(demand, "lru2", 8)
    with pytest.raises(SpecmoeError, match="holds nothing"):
        replay_cache(demand, "lru", 0)
    with pytest.raises(SpecmoeError, match="needs the wishes of a predictor"):
        replay_cache(demand, "predicted", 8)
    with pytest.raises(SpecmoeError, match="does not use the wishes"):
        replay_cache(demand, "lru", 8, wanted=wanted)
    with pytest.raises(SpecmoeError, match="the stream needs"):
        replay_cache(demand, "predicted", 8, wanted=wanted[:-1])
    with pytest.raises(SpecmoeError, match="not a number"):
        replay_cache(demand, "predicted", 8, wanted=np.full_like(wanted, np.nan))
