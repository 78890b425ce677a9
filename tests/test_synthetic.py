"""The synthetic source keeps what it promises: its optimum is exact and its records are consistent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specmoe.dataset import split_documents
from specmoe.errors import SpecmoeError
from specmoe.sources.synthetic import optimal_recall, synthetic_process, synthetic_trace
from specmoe.topology import Topology
from specmoe.trace import Trace

TOPOLOGY = Topology(model_id="synthetic", layers=3, experts=12, top_k=2, hidden_size=24)
SETTINGS: dict[str, Any] = {"topology": TOPOLOGY, "documents": 40, "tokens": 120, "determinism": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    out = tmp_path_factory.mktemp("synthetic") / "trace"
    synthetic_trace(out, **SETTINGS)
    return Trace.open(out)


def test_trace_opens_verifies_and_splits(trace: Trace) -> None:
    trace.verify()
    assert len(trace) == 40
    assert trace.tokens == 40 * 120
    assert {document.domain for document in trace.documents} == {f"domain-{i}" for i in range(4)}
    assert len({document.text_sha256 for document in trace.documents}) == 40
    assert len(split_documents(trace.documents).parts["test"]) >= 10


def test_ids_logits_and_gates_agree(trace: Trace) -> None:
    record = trace.read(7)
    assert record.router_logits is not None
    assert record.gate_weights is not None
    top = record.router_logits.topk(TOPOLOGY.top_k, -1)
    assert torch.equal(top.indices, record.expert_ids.long())
    gates = record.router_logits.softmax(-1).gather(-1, top.indices)
    torch.testing.assert_close(record.gate_weights, gates)
    assert (top.values[..., 0] > top.values[..., 1]).all()


def test_hidden_is_a_function_of_the_layers_experts(trace: Trace) -> None:
    record = trace.read(0)
    assert record.hidden is not None
    for layer in range(TOPOLOGY.layers):
        ids = record.expert_ids[:, layer].sort(-1).values
        states, inverse = ids.unique(dim=0, return_inverse=True)
        for state in range(len(states)):
            rows = record.hidden[inverse == state, layer]
            assert (rows == rows[0]).all()
        assert len(record.hidden[:, layer].unique(dim=0)) == len(states)


def test_token_id_is_a_function_of_the_first_layers_experts(trace: Trace) -> None:
    seen: dict[tuple[int, ...], int] = {}
    for index in range(len(trace)):
        record = trace.read(index, fields=())
        for ids, token in zip(record.expert_ids[:, 0].sort(-1).values.tolist(), record.token_ids.tolist(), strict=True):
            assert seen.setdefault(tuple(ids), token) == token
    assert len(set(seen.values())) == 36


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
def test_the_bayes_predictor_reaches_the_stated_optimum(trace: Trace, horizon: int) -> None:
    process = synthetic_process(TOPOLOGY, 0.8, 3)
    favoured_LKG = process.ahead_LKGG(horizon).argmax(-1)
    slot_of = np.empty((TOPOLOGY.layers, TOPOLOGY.experts), int)
    state_of = np.empty_like(slot_of)
    for layer in range(TOPOLOGY.layers):
        for slot in range(TOPOLOGY.top_k):
            slot_of[layer, process.expert_LKG[layer, slot]] = slot
            state_of[layer, process.expert_LKG[layer, slot]] = np.arange(6)
    hits: list[float] = []
    for index in range(len(trace)):
        flat = trace.read(index, fields=()).expert_ids.long().numpy().reshape(-1, TOPOLOGY.top_k)
        layer = np.arange(len(flat)) % TOPOLOGY.layers
        slot, state = slot_of[layer[:, None], flat], state_of[layer[:, None], flat]
        guess_state = favoured_LKG[layer[:, None], slot, state]
        guess = process.expert_LKG[(layer[:, None] + horizon) % TOPOLOGY.layers, slot, guess_state]
        found = (guess[:-horizon, :, None] == flat[horizon:, None, :]).any(-1)
        hits.append(found.mean())
    expected = optimal_recall(TOPOLOGY, 0.8, 3, horizon)
    error = np.std(hits, ddof=1) / np.sqrt(len(hits))
    assert error < 0.01
    assert abs(np.mean(hits) - expected) < 4 * error


def test_optimum_follows_the_closed_form_and_falls_with_the_horizon() -> None:
    values = [optimal_recall(TOPOLOGY, 0.8, 3, horizon) for horizon in range(1, 9)]
    assert values == pytest.approx([0.8**h + (1 - 0.8**h) / 6 for h in range(1, 9)])
    assert optimal_recall(TOPOLOGY, 1.0, 0, 7) == pytest.approx(1.0)
    assert optimal_recall(TOPOLOGY, 0.0, 0, 1) == pytest.approx(1 / 6)


def test_states_are_uniform_so_the_optimum_needs_no_burn_in() -> None:
    states = synthetic_process(TOPOLOGY, 0.8, 3).sample(6000, 2, np.random.default_rng(0))
    for place in (states[:, 0, 0], states[:, 0, 2], states[:, 1, 2]):
        share = np.stack([np.bincount(place[:, slot], minlength=6) for slot in range(2)]) / 6000
        assert np.abs(share - 1 / 6).max() < 4 * np.sqrt(1 / 6 * 5 / 6 / 6000)


def test_nothing_but_the_current_state_helps() -> None:
    # Given the state at the source, an earlier state must not change what comes next (Markov property).
    process = synthetic_process(Topology(model_id="s", layers=1, experts=3, top_k=1, hidden_size=2), 0.5, 1)
    states = process.sample(1, 60_000, np.random.default_rng(0))[0, :, 0, 0]
    counts = np.zeros((3, 3, 3))
    np.add.at(counts, (states[:-2], states[1:-1], states[2:]), 1)
    conditional = counts / counts.sum(-1, keepdims=True)
    expected = process.transition_LKGG()[0, 0]
    assert np.abs(conditional - expected).max() < 0.03


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path: Path) -> None:
    small: dict[str, Any] = {**SETTINGS, "documents": 3, "tokens": 10}
    synthetic_trace(tmp_path / "a", **small)
    synthetic_trace(tmp_path / "b", **small)
    synthetic_trace(tmp_path / "c", **{**small, "seed": 4})
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["manifest.json", "shard-00000.safetensors"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not torch.equal(Trace.open(tmp_path / "a").read(0).expert_ids, Trace.open(tmp_path / "c").read(0).expert_ids)


def test_more_slots_and_large_groups_stay_distinct(tmp_path: Path) -> None:
    topology = Topology(model_id="wide", layers=2, experts=64, top_k=8, hidden_size=4)
    synthetic_trace(tmp_path / "wide", topology=topology, documents=1, tokens=50, determinism=0.5, seed=0)
    record = Trace.open(tmp_path / "wide").read(0)
    assert (record.expert_ids.sort(-1).values.diff(dim=-1) > 0).all()


def test_out_of_range_arguments_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"determinism": 1.5}, "between 0 and 1"),
        ({"documents": 0}, "at least one document"),
        ({"topology": TOPOLOGY.model_copy(update={"experts": 13})}, "multiple of top-k"),
    ]
    for change, words in cases:
        with pytest.raises(SpecmoeError, match=words):
            synthetic_trace(tmp_path / "bad", **{**SETTINGS, **change})
    assert not (tmp_path / "bad").exists()
    with pytest.raises(SpecmoeError, match="1 or more"):
        optimal_recall(TOPOLOGY, 0.5, 0, 0)
