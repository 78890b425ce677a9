"""Small demands, machines and predictions drawn at random, for tests of the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from specmoe.offload.admission.registry import Admission
from specmoe.offload.capacity import all_units, units_L
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.cost import StepCost
from specmoe.offload.hardware.profile import Compute, Hardware, Link
from specmoe.offload.prefetchers.predictions import Predictions, demand_table
from specmoe.offload.simulator import Machine, Run, capacities
from specmoe.topology import Topology
from specmoe.trace.record import Phase

COST = StepCost(
    layer_seconds=1.0, token_layer_seconds=0.13, expert_seconds=0.37, token_seconds=0.07, other_seconds=0.23
)


# Bytes, of an expert of each layer where they differ.
SIZES = (1_000_000, 390_000, 1_700_000)


def topology_of(layers: int, experts: int, top_k: int) -> Topology:
    return Topology(model_id="small", layers=layers, experts=experts, top_k=top_k, hidden_size=0)


def hardware(*links: Link) -> Hardware:
    compute = Compute(memory_bandwidth=1e12, flops=1e12)
    return Hardware(name="small", description="", source="test", links=links, compute=compute)


def link(seconds: float, latency: float = 0.0, parallelism: int = 1, depth: int = 64) -> Link:
    """One over which an expert of a million bytes passes in ``seconds``."""
    return Link(name="link", bandwidth=1e6 / seconds, latency=latency, parallelism=parallelism, queue_depth=depth)


def machine(capacity: int, *links: Link, cost: StepCost = COST, **changes: Any) -> Machine:
    changes = {"expert_bytes": 1_000_000} | changes
    return Machine(hardware(*links), capacity=capacity, cost=cost, **changes)


def fits(demand: Demand, of: Machine) -> bool:
    """No event is larger than its cache."""
    taken_V = np.diff(demand.starts_V) * np.tile(units_L(demand.topology, of.expert_bytes), demand.steps)
    held_G = capacities(of, demand)
    return bool((taken_V <= np.tile(np.broadcast_to(held_G, demand.topology.layers), demand.steps)).all())


def demand_of(ids: Sequence[Any], topology: Topology, prompt: int = 0, **options: Any) -> Demand:
    """One document from lists [T][L][K]; its first ``prompt`` tokens are read."""
    ids_TLK = np.asarray(ids, dtype=np.int16)
    phase_T = np.where(np.arange(len(ids_TLK)) < prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8)
    return Demand.of_records(topology, [ids_TLK], [phase_T], replay="trace", **options)


def records_of(
    rng: np.random.Generator, topology: Topology, lengths: Sequence[int], skew: float = 1.0
) -> tuple[list[NDArray[np.int16]], list[NDArray[np.uint8]]]:
    """Documents of distinct experts a token; now and then an id stands for no expert."""
    ids, phases = [], []
    weight = np.arange(1, topology.experts + 1) ** -skew
    for length in lengths:
        noise = np.log(weight) + rng.gumbel(size=(length, topology.layers, topology.experts))
        chosen = np.argsort(-noise, -1)[..., : topology.top_k].astype(np.int16)
        gone = rng.random(chosen.shape)
        ids.append(np.where(gone < 0.04, -1, np.where(gone > 0.97, topology.experts, chosen)).astype(np.int16))
        phases.append((np.arange(length) >= rng.integers(0, length + 1)).astype(np.uint8))
    return ids, phases


def predictions_of(
    rng: np.random.Generator, demand: Demand, horizons: Sequence[int], budget: int, insight: float
) -> Predictions:
    """Experts in a random order that leans towards the truth by ``insight``; chances all different."""
    events, experts = demand.events, demand.topology.experts
    table = demand_table(demand)
    found = np.full((events, len(horizons), budget), -1, dtype=np.int16)
    chance = np.sort(rng.random(found.shape, dtype=np.float32), -1)[..., ::-1].copy()
    for row, horizon in enumerate(horizons):
        score = rng.random((events, experts))
        score[:-horizon] += insight * table[horizon:]
        found[:, row] = np.argsort(-score, 1)[:, :budget]
    ends = rng.integers(0, budget + 1, (events, len(horizons)))
    found[np.arange(budget) >= ends[..., None]] = -1
    chance[found < 0] = 0
    return Predictions("drawn", tuple(horizons), found, chance)


@st.composite
def demands(draw: st.DrawFn, largest_batch: int = 3) -> Demand:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    topology = topology_of(layers, experts, draw(st.integers(1, min(3, experts))))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    ids, phases = records_of(rng, topology, lengths, draw(st.sampled_from([0.0, 1.0, 2.0])))
    batch, chunk = draw(st.integers(1, largest_batch)), draw(st.sampled_from([1, 2, 5]))
    return Demand.of_records(topology, ids, phases, replay="trace", batch=batch, prefill_chunk=chunk)


@st.composite
def links(draw: st.DrawFn) -> Link:
    seconds = draw(st.sampled_from([0.011, 0.29, 0.83, 3.1]))
    latency = draw(st.sampled_from([0.0, 0.057, 0.71, 2.3]))
    return link(seconds, latency, draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 64])))


@st.composite
def machines(draw: st.DrawFn, demand: Demand, sized: bool = True, **changes: Any) -> Machine:
    """With ``sized``, every other one has experts of different sizes, and a capacity in bytes."""
    topology = demand.topology
    per_layer = draw(st.booleans())
    least = topology.top_k * (topology.layers if per_layer else 1)
    if sized and draw(st.booleans()):
        sizes = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=topology.layers, max_size=topology.layers)))
        # In equal parts of what each layer has, the share of one is that of all.
        least *= max(sizes) if not per_layer else 1
        everything = all_units(topology, sizes)
        if per_layer:
            least = -(-topology.top_k * everything // topology.experts)
        seconds = tuple(0.37 + 0.11 * layer for layer in range(topology.layers))
        cost = replace(COST, expert_seconds_by_layer=seconds, token_seconds_by_layer=seconds[::-1])
        changes |= {"expert_bytes": sizes, "cost": cost}
    else:
        everything = topology.layers * topology.experts
    return machine(draw(st.integers(least, everything)), draw(links()), per_layer=per_layer, **changes)


@st.composite
def runs(draw: st.DrawFn, demand: Demand, rules: Sequence[str] = ("top", "confidence", "expected-value")) -> Run:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    horizons = draw(st.sampled_from([(1,), (1, 2), (1, 2, 3), (2,), (1, 4)]))
    budget = draw(st.integers(1, demand.topology.experts))
    found = predictions_of(rng, demand, horizons, budget, draw(st.sampled_from([0.0, 0.5, 2.0])))
    rule = draw(st.sampled_from(list(rules)))
    parameter = {"top": draw(st.integers(1, 4)), "confidence": draw(st.sampled_from([0.0, 0.3, 0.7]))}.get(rule, 0.0)
    return Run("drawn", found, Admission(rule, float(parameter)), seconds=draw(st.sampled_from([0.0, 0.19])))
