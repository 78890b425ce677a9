"""Predictions of a whole demand: the same numbers as the predictor's own, and controls that are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from simulation_worlds import demand_of, records_of, topology_of
from specmoe.calibration import Calibration, fit_calibration
from specmoe.dataset import Windows
from specmoe.errors import SpecmoeError
from specmoe.offload.demand import Demand
from specmoe.offload.prefetchers import predictions as module
from specmoe.offload.prefetchers.predictions import Predictions, demand_table, perfect, predicted, shuffled, with_recall
from specmoe.predictors.base import Knowledge
from specmoe.predictors.markov import LayerMarkov
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

HORIZONS = (1, 2, 3, 5)
TOPOLOGY = Topology(model_id="small", layers=3, experts=6, top_k=2, hidden_size=4)


def write(
    path: Path, lengths: list[int], *, hidden: frozenset[int] | None = None, change_after: int | None = None
) -> Trace:
    """A trace of random routing. ``hidden``: documents with router inputs. ``change_after``: other tokens then."""
    fields = ("token_ids", "phase", "expert_ids", *(("hidden",) if hidden is not None else ()))
    manifest = Manifest(source=Source(kind="synthetic"), topology=TOPOLOGY, fields=fields)
    with TraceWriter(path, manifest) as writer:
        for number, length in enumerate(lengths):
            rng = np.random.default_rng(number)
            (ids,), (phases,) = records_of(rng, TOPOLOGY, [length])
            tokens = rng.integers(0, 50, length)
            if change_after is not None:
                other = np.random.default_rng(99 + number)
                (new,), _ = records_of(other, TOPOLOGY, [length])
                ids[change_after:], tokens[change_after:] = new[change_after:], 7
            record = RoutingRecord(
                token_ids=torch.from_numpy(tokens).int(),
                phase=torch.from_numpy(phases),
                expert_ids=torch.from_numpy(np.where(ids >= TOPOLOGY.experts, -1, ids)),
                hidden=torch.zeros(length, 3, 4, dtype=torch.float16)
                if hidden is not None and number in hidden
                else None,
            )
            writer.add(f"document {number}", "", f"{number}", record)
    return Trace.open(path)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return write(tmp_path_factory.mktemp("predictions") / "trace", [9, 1, 14, 6, 3, 11, 2])


@pytest.fixture(scope="module")
def fitted(trace: Trace) -> tuple[LayerMarkov, Calibration]:
    windows = Windows(trace, range(7), length=32)
    predictor = LayerMarkov(TOPOLOGY, HORIZONS)
    predictor.prepare(Knowledge(windows=lambda: windows.batches(4)))
    return predictor, fit_calibration(predictor, windows)


def chances_of(trace: Trace, fitted: tuple[LayerMarkov, Calibration], document: int) -> Tensor:
    """[T, S, H, E] of one document read as a whole."""
    predictor, calibration = fitted
    window = Windows(trace, [document], length=max(1, trace.documents[document].tokens)).batch(slice(0, 1))
    return calibration.apply(predictor(window))[0]


def dense(found: Predictions) -> NDArray[np.float32]:
    """[V, H, E]: what is not listed is 0."""
    events, rows, _ = found.experts_VHB.shape
    table = np.zeros((events, rows, TOPOLOGY.experts + 1), dtype=np.float32)
    np.put_along_axis(table, found.experts_VHB.astype(np.int64), found.chance_VHB, 2)
    return table[..., :-1]


def test_one_sequence_at_a_time_gives_what_the_predictor_says(
    trace: Trace, fitted: tuple[LayerMarkov, Calibration]
) -> None:
    documents = [4, 0, 1, 5]
    demand = Demand.of_trace(trace, documents, replay="decode")
    seen: list[int] = []
    found = predicted("LayerMarkov", *fitted, demand, trace, documents, on_tokens=seen.append)
    expected = torch.cat([chances_of(trace, fitted, document) for document in documents]).flatten(0, 1)
    listed, chance = found.experts_VHB.astype(np.int64), found.chance_VHB
    assert found.horizons == HORIZONS
    assert seen[-1] == demand.tokens
    assert listed.shape == (demand.events, len(HORIZONS), 4)
    values = expected.topk(4, -1).values.numpy()
    assert chance == pytest.approx(values, abs=1e-6)
    own = np.take_along_axis(expected.numpy(), listed.clip(0), 2)
    assert own[listed >= 0] == pytest.approx(chance[listed >= 0], abs=1e-6)
    assert ((listed >= 0) == (values >= 1e-3)).all()
    assert (np.diff(chance, axis=-1) <= 0).all()


@pytest.mark.parametrize(
    ("replay", "batch", "chunk"), [("decode", 3, 512), ("trace", 1, 4), ("trace", 2, 1), ("trace", 3, 5)]
)
def test_tokens_of_a_step_are_one_event(
    trace: Trace, fitted: tuple[LayerMarkov, Calibration], replay: str, batch: int, chunk: int
) -> None:
    """1 − Π(1 − p), and only the last token of a sequence in a step speaks of the next step."""
    documents = [2, 0, 1, 5, 6]
    demand = Demand.of_trace(
        trace, documents, replay="trace" if replay == "trace" else "decode", batch=batch, prefill_chunk=chunk
    )
    found = predicted("LayerMarkov", *fitted, demand, trace, documents)
    chances = [chances_of(trace, fitted, document).numpy().astype(np.float64) for document in documents]
    owner = [(number, place) for number, chance in enumerate(chances) for place in range(len(chance))]
    for step in range(demand.steps):
        tokens = [owner[n] for n in demand.order_N[demand.first_J[step] : demand.first_J[step + 1]]]
        for layer in range(3):
            for row, horizon in enumerate(HORIZONS):
                none = np.ones(TOPOLOGY.experts)
                for document, place in tokens:
                    if layer + horizon < 3 or (document, place + 1) not in tokens:
                        none *= 1 - chances[document][place, layer, row]
                listed = found.experts_VHB[step * 3 + layer, row]
                best = np.sort(1 - none)[::-1][: len(listed)]
                assert found.chance_VHB[step * 3 + layer, row] == pytest.approx(best, abs=3e-6)
                for expert, chance in zip(listed, found.chance_VHB[step * 3 + layer, row], strict=True):
                    assert (chance < 1e-3) == (expert < 0)
                    assert expert < 0 or 1 - none[expert] == pytest.approx(chance, abs=3e-6)


def test_steps_of_one_token_in_another_order(tmp_path: Path, fitted: tuple[LayerMarkov, Calibration]) -> None:
    """A text that is only written waits for its neighbour's prompt: as many steps as tokens, but not in their order."""
    trace = write(tmp_path / "trace", [3, 2])
    ids = [trace.read(index).expert_ids.numpy() for index in (0, 1)]
    phases = [np.ones(3, dtype=np.uint8), np.zeros(2, dtype=np.uint8)]
    demand = Demand.of_records(TOPOLOGY, ids, phases, replay="trace", batch=2, prefill_chunk=1)
    assert demand.steps == demand.tokens
    assert demand.order_N.tolist() == [3, 4, 0, 1, 2]
    found = predicted("LayerMarkov", *fitted, demand, trace, [0, 1])
    expected = torch.cat([chances_of(trace, fitted, index) for index in (1, 0)]).flatten(0, 1).topk(4, -1).values
    assert found.chance_VHB == pytest.approx(expected.numpy(), abs=3e-6)


def test_chunks_change_nothing(
    trace: Trace, fitted: tuple[LayerMarkov, Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = list(range(7))
    for batch in (1, 3):
        demand = Demand.of_trace(trace, documents, batch=batch, prefill_chunk=3)
        whole = predicted("LayerMarkov", *fitted, demand, trace, documents)
        monkeypatch.setattr(module, "_TOKENS", 5)
        cut = predicted("LayerMarkov", *fitted, demand, trace, documents)
        monkeypatch.undo()
        assert dense(cut) == pytest.approx(dense(whole), abs=3e-6)


def test_later_tokens_change_nothing_before(tmp_path: Path, fitted: tuple[LayerMarkov, Calibration]) -> None:
    lengths = [12, 12]
    one, other = write(tmp_path / "one", lengths), write(tmp_path / "other", lengths, change_after=8)
    found = [
        dense(predicted("LayerMarkov", *fitted, Demand.of_trace(t, [0, 1], replay="decode"), t, [0, 1]))
        for t in (one, other)
    ]
    for document in range(2):
        first = document * 12 * 3
        assert (found[0][first : first + 24] == found[1][first : first + 24]).all()
    assert not (found[0] == found[1]).all()


def test_documents_without_what_is_predicted_from(tmp_path: Path, fitted: tuple[LayerMarkov, Calibration]) -> None:
    """They must not be passed over in silence: the others' predictions would move into their place."""
    trace = write(tmp_path / "trace", [5, 4, 6], hidden=frozenset({0, 2}))
    with pytest.raises(SpecmoeError, match="1 of 3 documents"):
        predicted("LayerMarkov", *fitted, Demand.of_trace(trace, [0, 1, 2]), trace, [0, 1, 2])
    demand = Demand.of_trace(trace, [0, 2])
    assert len(predicted("LayerMarkov", *fitted, demand, trace, [0, 2]).experts_VHB) == demand.events


def test_too_large_for_memory(
    trace: Trace, fitted: tuple[LayerMarkov, Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 1000)
    with pytest.raises(SpecmoeError, match="fewer documents"):
        predicted("LayerMarkov", *fitted, Demand.of_trace(trace, [0]), trace, [0])


def drawn_demand(experts: int = 16, tokens: int = 800, top_k: int = 2) -> Demand:
    topology = topology_of(4, experts, top_k)
    return Demand.of_records(topology, *records_of(np.random.default_rng(5), topology, [tokens]), replay="decode")


def test_perfect_is_what_comes() -> None:
    demand = drawn_demand(tokens=30)
    found = perfect(demand, (1, 3, 4))
    for event in range(demand.events):
        for row, horizon in enumerate(found.horizons):
            listed = found.experts_VHB[event, row]
            own = (
                demand.keys_M[slice(*demand.starts_V[event + horizon : event + horizon + 2])]
                if (event + horizon < demand.events)
                else np.zeros(0, dtype=np.int32)
            )
            assert sorted(listed[listed >= 0]) == sorted(own % 16)
            assert (found.chance_VHB[event, row] == (listed >= 0)).all()
    assert found.recall(demand) == [1.0] * 3


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.9])
def test_recall_is_as_asked(recall: float) -> None:
    demand = drawn_demand()
    found = with_recall(demand, (1, 4), recall, seed=1)
    spread = (recall * (1 - recall) / demand.accesses) ** 0.5
    assert found.recall(demand) == pytest.approx([recall] * 2, abs=4 * spread + 1e-9)
    listed = np.sort(found.experts_VHB, -1)
    assert ((np.diff(listed, axis=-1) > 0) | (listed[..., :-1] < 0)).all(), "an expert is listed twice"
    sizes = np.diff(demand.starts_V)
    assert ((found.experts_VHB[:-1, 0] >= 0).sum(-1) == sizes[1:]).all()
    assert (found.chance_VHB == np.where(found.experts_VHB >= 0, np.float32(recall), 0)).all()
    assert with_recall(demand, (1, 4), recall, seed=1).experts_VHB.tobytes() == found.experts_VHB.tobytes()
    assert (
        with_recall(demand, (1, 4), recall, seed=2).experts_VHB.tobytes() != found.experts_VHB.tobytes() or not recall
    )


def test_where_nearly_all_experts_are_needed_mistakes_run_out() -> None:
    """Three of four needed leave one other expert to be wrong with: the recall is above what was asked."""
    demand = drawn_demand(experts=4, tokens=200, top_k=3)
    found = with_recall(demand, (1,), 0.0)
    sizes = np.diff(demand.starts_V)[1:]
    assert found.recall(demand)[0] == pytest.approx(np.maximum(0, 2 * sizes - 4).sum() / sizes.sum())
    assert sizes.max() == 3
    listed = np.sort(found.experts_VHB, -1)
    assert ((np.diff(listed, axis=-1) > 0) | (listed[..., :-1] < 0)).all()


def test_shuffled_keeps_what_is_foreseen_in_each_layer() -> None:
    demand = drawn_demand(tokens=100)
    found = with_recall(demand, (1, 2), 0.8)
    null = shuffled(found, 4, seed=3)
    for layer in range(4):
        pairs = [
            sorted(map(bytes, np.ascontiguousarray(of.experts_VHB[layer::4]).reshape(100, -1).view(np.uint8)))
            for of in (found, null)
        ]
        assert pairs[0] == pairs[1]
    assert null.experts_VHB.tobytes() != found.experts_VHB.tobytes()
    assert max(null.recall(demand)) < 0.45
    assert shuffled(Predictions.none(), 4).experts_VHB.size == 0


def test_table_of_needs() -> None:
    demand = demand_of([[[0, 2], [1, 1]], [[3, -1], [2, 0]]], topology_of(2, 4, 2))
    assert demand_table(demand).astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]]
