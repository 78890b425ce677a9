"""The demand stream against one that plain loops make from the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from simulation_worlds import demand_of, records_of, topology_of
from specmoe.errors import SpecmoeError
from specmoe.offload.demand import Demand, Replay
from specmoe.topology import Topology
from specmoe.trace import Trace
from specmoe.trace.record import Phase

Step = tuple[int, int, list[tuple[int, int]]]  # batch of sequences, phase, (document, token) in the order of documents


def plain_steps(phases: list[list[int]], replay: str, batch: int, chunk: int) -> list[Step]:
    """What an engine runs, step by step."""
    steps: list[Step] = []
    for group, first in enumerate(range(0, len(phases), batch)):
        documents = range(first, min(first + batch, len(phases)))
        prompt = {}
        for document in documents:
            reads = [place for place, phase in enumerate(phases[document]) if phase == Phase.PREFILL]
            prompt[document] = reads[-1] + 1 if reads and replay == "trace" else 0
        places = dict.fromkeys(documents, 0)
        while any(places[document] < prompt[document] for document in documents):
            tokens = []
            for document in documents:
                last = min(places[document] + chunk, prompt[document])
                tokens += [(document, place) for place in range(places[document], last)]
                places[document] = max(last, places[document])
            steps.append((group, Phase.PREFILL, tokens))
        while any(places[document] < len(phases[document]) for document in documents):
            tokens = [
                (document, places[document]) for document in documents if places[document] < len(phases[document])
            ]
            for document, _ in tokens:
                places[document] += 1
            steps.append((group, Phase.DECODE, tokens))
    return steps


def check(
    topology: Topology, ids: list[Any], phases: list[Any], replay: Replay, batch: int, chunk: int, demand: Demand
) -> None:
    steps = plain_steps([list(map(int, phase)) for phase in phases], replay, batch, chunk)
    starts = np.cumsum([0, *map(len, ids)])
    accesses: list[tuple[int, int, int]] = []  # event, key, tokens
    sizes: list[int] = []
    for step, (_, _, tokens) in enumerate(steps):
        for layer in range(topology.layers):
            routed: dict[int, int] = {}
            for document, place in tokens:
                for expert in map(int, ids[document][place, layer]):
                    if 0 <= expert < topology.experts:
                        routed[expert] = routed.get(expert, 0) + 1
            for expert in sorted(routed):
                accesses.append((step * topology.layers + layer, layer * topology.experts + expert, routed[expert]))
            sizes.append(len(routed))
    assert demand.steps == len(steps)
    assert demand.events == len(steps) * topology.layers
    assert demand.keys_M.tolist() == [key for _, key, _ in accesses]
    assert demand.tokens_M.tolist() == [tokens for _, _, tokens in accesses]
    assert demand.starts_V.tolist() == [0, *np.cumsum(sizes).tolist()]
    assert demand.phase_J.tolist() == [phase for _, phase, _ in steps]
    assert demand.group_J.tolist() == [group for group, _, _ in steps]
    assert demand.order_N.tolist() == [starts[document] + place for *_, tokens in steps for document, place in tokens]
    assert demand.first_J.tolist() == [0, *np.cumsum([len(tokens) for *_, tokens in steps]).tolist()]
    assert (demand.accesses, demand.tokens) == (len(accesses), sum(map(len, ids)))
    for access, (event, key, _) in enumerate(accesses):
        later = [other for other, same, _ in accesses[access + 1 :] if same == key and other > event]
        assert demand.next_use_M[access] == min(later, default=demand.events)
    for key in range(topology.layers * topology.experts):
        assert demand.first_use[key] == min(
            (event for event, same, _ in accesses if same == key), default=demand.events
        )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 2)),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    replay=st.sampled_from(["trace", "decode"]),
    batch=st.integers(1, 5),
    chunk=st.integers(1, 4),
    mixed=st.booleans(),
)
def test_equals_plain_loops(
    seed: int, shape: tuple[int, int, int], lengths: list[int], replay: Replay, batch: int, chunk: int, mixed: bool
) -> None:
    """Empty documents, single tokens, ids of no expert, batches larger than the number of documents."""
    topology, rng = topology_of(*shape), np.random.default_rng(seed)
    ids, phases = records_of(rng, topology, lengths)
    if mixed:  # the earlier turns of a chat: written tokens before what is read
        phases = [rng.integers(0, 2, len(phase)).astype(np.uint8) for phase in phases]
    kept = [phase.copy() for phase in phases]
    demand = Demand.of_records(topology, ids, phases, replay=replay, batch=batch, prefill_chunk=chunk)
    check(topology, ids, phases, replay, batch, chunk, demand)
    assert all((one == other).all() for one, other in zip(kept, phases, strict=True)), "it changed what it was given"


def test_by_hand() -> None:
    """Two documents side by side: prompts of 3 and 1, chunks of 2; they begin to write together."""
    topology = topology_of(1, 4, 2)
    ids: list[NDArray[np.int16]] = [
        np.array([[[0, 1]], [[1, 2]], [[3, 0]], [[0, 1]]], dtype=np.int16),
        np.array([[[1, 3]], [[0, 2]], [[2, 3]]], dtype=np.int16),
    ]
    phases = [np.array([0, 0, 0, 1], dtype=np.uint8), np.array([0, 1, 1], dtype=np.uint8)]
    demand = Demand.of_records(topology, ids, phases, batch=2, prefill_chunk=2)
    events = [
        list(zip(demand.keys_M[a:b].tolist(), demand.tokens_M[a:b].tolist(), strict=True))
        for a, b in zip(demand.starts_V[:-1], demand.starts_V[1:], strict=True)
    ]
    assert events == [
        [(0, 1), (1, 3), (2, 1), (3, 1)],  # tokens 0 and 1 of the first, 0 of the second
        [(0, 1), (3, 1)],  # what is left of the first one's prompt
        [(0, 2), (1, 1), (2, 1)],
        [(2, 1), (3, 1)],
    ]
    assert demand.phase_J.tolist() == [0, 0, 1, 1]
    assert demand.order_N.tolist() == [0, 1, 4, 2, 3, 5, 6]
    assert demand.replay == "trace"


def test_replay_follows_the_trace_unless_told() -> None:
    topology = topology_of(1, 4, 1)
    ids = [np.zeros((3, 1, 1), dtype=np.int16)]
    read, mixed = np.zeros(3, dtype=np.uint8), np.array([0, 0, 1], dtype=np.uint8)
    assert Demand.of_records(topology, ids, [read]).replay == "decode"
    assert Demand.of_records(topology, ids, [read]).steps == 3
    assert Demand.of_records(topology, ids, [mixed]).replay == "trace"
    assert Demand.of_records(topology, ids, [mixed]).steps == 2
    assert Demand.of_records(topology, ids, [read], replay="trace").steps == 1


def test_no_expert_at_all_is_an_event_of_nothing() -> None:
    demand = demand_of([[[-1], [4]], [[4], [-1]]], topology_of(2, 4, 1))
    assert demand.accesses == 0
    assert demand.events == 4
    assert demand.starts_V.tolist() == [0] * 5
    assert (demand.first_use == demand.events).all()
    assert len(demand.next_use_M) == 0


def test_next_use_across_batches() -> None:
    demand = demand_of([[[0]], [[1]], [[0]], [[0]]], topology_of(1, 2, 1))
    assert demand.next_use_M.tolist() == [2, 4, 3, 4]
    assert demand.first_use.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("lengths", "options"),
    [([], {}), ([0, 0], {}), ([2], {"batch": 0}), ([2], {"batch": 5000}), ([2], {"prefill_chunk": 0})],
)
def test_what_cannot_be_replayed(lengths: list[int], options: dict[str, Any]) -> None:
    topology = topology_of(1, 4, 1)
    ids = [np.zeros((length, 1, 1), dtype=np.int16) for length in lengths]
    with pytest.raises(SpecmoeError):
        Demand.of_records(topology, ids, [np.zeros(length, dtype=np.uint8) for length in lengths], **options)


def test_of_a_trace_equals_of_its_records(synthetic_path: Path) -> None:
    trace, documents = Trace.open(synthetic_path), [3, 0, 7]
    demand = Demand.of_trace(trace, documents, batch=2)
    records = [trace.read(index) for index in documents]
    ids, phases = [r.expert_ids.numpy() for r in records], [r.phase.numpy() for r in records]
    check(trace.topology, ids, phases, demand.replay, 2, 512, demand)
