"""BigMoeOnEdge's route trace: phases, weights and bytes arrive as they are; what contradicts itself is refused."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from text_samples import BIGMOEONEDGE_HEAD, TOP_K, bigmoeonedge, refused, routing, run

from specmoe.offload.cache import replay_cache
from specmoe.offload.capacity import parse_capacity
from specmoe.offload.demand import Demand
from specmoe.trace import Phase

PROMPT = 5


def write(tmp_path: Path, body: str, head: str = BIGMOEONEDGE_HEAD, name: str = "trace.csv") -> Path:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(head + body)
    return tmp_path / name


def test_everything_arrives(tmp_path: Path) -> None:
    first, second = routing(9), routing(7, 1)
    body = bigmoeonedge(first, prompt=PROMPT) + bigmoeonedge(second, prompt=PROMPT, turn=1)
    trace, warnings = run(write(tmp_path, body), tmp_path / "trace")
    topology = trace.topology
    assert (topology.layers, topology.experts, topology.top_k) == (3, 32, TOP_K)
    assert topology.model_id == "qwen3.gguf"
    assert topology.bytes_per_expert is None
    assert topology.bytes_per_expert_by_layer == (1001, 1002, 1005)
    settings = trace.manifest.source.settings
    assert settings["layers"] == [1, 2, 5]
    assert settings["expert_bytes"] == [1001, 1002, 1005]
    assert settings["dense_bytes"] == [50, 51, 52, 53, 54, 55]
    assert [document.doc_id for document in trace.documents] == ["trace.csv:turn-0", "trace.csv:turn-1"]
    for number, source in enumerate((first, second)):
        record = trace.read(number)
        assert record.gate_weights is not None
        assert (record.token_ids == -1).all()
        assert record.phase.tolist() == [Phase.PREFILL] * PROMPT + [Phase.DECODE] * (len(source) - PROMPT)
        ids, weights = source.ids_TLK.copy(), source.weights_TLK.copy()
        ids[: PROMPT - 1, -1], weights[: PROMPT - 1, -1] = -1, 0
        assert np.array_equal(record.expert_ids.numpy(), ids)
        torch.testing.assert_close(record.gate_weights, torch.from_numpy(weights).float())
    assert warnings == ["8 of 48 (token, layer) places have no row; they hold no expert (-1)"]


def test_unknown_weights_are_left_out(tmp_path: Path) -> None:
    trace, _ = run(write(tmp_path, bigmoeonedge(routing(9), prompt=1, weights=False)), tmp_path / "trace")
    assert trace.manifest.fields == ("token_ids", "phase", "expert_ids")


def test_columns_are_found_by_name_and_may_be_absent(tmp_path: Path) -> None:
    source = routing(4)
    rows = [
        f"{e},{t},0,{k},{layer}\n"
        for t in range(4)
        for layer in range(3)
        for k, e in enumerate(source.ids_TLK[t, layer])
    ]
    head = BIGMOEONEDGE_HEAD.rpartition("turn,")[0] + "expert,step,phase,slot,layer\n"
    trace, warnings = run(write(tmp_path, "".join(rows), head), tmp_path / "trace")
    assert np.array_equal(trace.read(0).expert_ids.numpy(), source.ids_TLK)
    assert warnings == []


def test_a_folder_and_a_model_name_of_the_users(tmp_path: Path) -> None:
    for name in ("b/two.csv", "a/one.csv"):
        write(tmp_path / "in", bigmoeonedge(routing(3), prompt=1), name=name)
    trace, _ = run(tmp_path / "in", tmp_path / "trace", model_id="mine", experts=64)
    assert [document.doc_id for document in trace.documents] == ["a/one.csv:turn-0", "b/two.csv:turn-0"]
    assert (trace.topology.model_id, trace.topology.experts) == ("mine", 64)


def test_what_the_engine_dropped_stays_and_what_has_no_step_goes(tmp_path: Path) -> None:
    source = routing(3)
    body = bigmoeonedge(source, prompt=1).replace(",0\n", ",1\n", 2) + "0,1,-1,1,0,3,0.5,0,0,0\n"
    trace, warnings = run(write(tmp_path, body), tmp_path / "trace")
    assert np.array_equal(trace.read(0).expert_ids.numpy(), source.ids_TLK)
    assert [warning.split()[0] for warning in warnings] == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("route_trace v1", "route_trace v2"), "only v1"),
        (lambda text: text.replace("# model", "# mode"), "lacks the line"),
        (lambda text: text.replace(",slot,", ",slut,"), "line 9: the column 'slot' is missing"),
        (lambda text: text + "0,1,99,1\n", r"line \d+: expected 10 numbers, found '0,1,99,1'"),
        (lambda text: text + "0,1,99,1,0,4,0.5,0,0,0,0\n", "expected 10 numbers"),
        (lambda text: text + "0,1,99,1,0,4,0.5,0,x,0\n0,2,3\n", "expected 10 numbers|found '0,2,3'"),
        (lambda text: text + "0,1,99,1,0,4,nan,0,0,0\n", r"line \d+: gate weight nan"),
        (lambda text: text + "0,1,99,1,0,4,inf,0,0,0\n", r"line \d+: gate weight inf"),
        (lambda text: text + "0,1,99,1,0,32,0.5,0,0,0\n", r"line \d+: expert 32"),
        (lambda text: text + "0,1,99,1,3,4,0.5,0,0,0\n", r"line \d+: slot 3"),
        (lambda text: text + "0,1,99,1,0,-2,0.5,0,0,0\n", r"line \d+: expert id -2"),
        (lambda text: text + "0,1,99,-1,0,2,0.5,0,0,0\n", r"line \d+: layer -1"),
        (lambda text: text + "0,2,99,1,0,2,0.5,0,0,0\n", r"line \d+: phase 2"),
        (lambda text: text + "0,1,99,1,0,2.5,0.5,0,0,0\n", r"line \d+: expected 10 numbers"),
        (lambda text: text + text.splitlines(keepends=True)[-1], r"line \d+: slot 2 of layer 5"),
        (lambda text: text + "1,1,0,1,0,2,0.5,0,0,0\n0,1,99,1,0,2,0.5,0,0,0\n", r"line \d+: turn 0 begins a second"),
        (lambda text: text[: text.index("turn,")], "no line that names its columns"),
        (lambda text: text[: text.index("turn,")] + "phase,step,layer,slot,expert\n", "holds no routed expert"),
        (lambda text: text + "".join(f"0,1,{99 + n},{1000 + n},0,2,0.5,0,0,0\n" for n in range(500)), "wrongly"),
    ],
)
def test_bad_files_are_described(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    text = BIGMOEONEDGE_HEAD + bigmoeonedge(routing(8), prompt=PROMPT)
    refused(write(tmp_path, change(text), head=""), tmp_path / "trace", words, format="bigmoeonedge-csv")


def test_files_of_different_models_are_not_mixed(tmp_path: Path) -> None:
    body = bigmoeonedge(routing(3), prompt=1)
    write(tmp_path / "in", body, name="a.csv")
    write(tmp_path / "in", body, BIGMOEONEDGE_HEAD.replace("n_expert=32", "n_expert=64"), name="b.csv")
    refused(tmp_path / "in", tmp_path / "trace", "different models")


def test_turns_of_a_file_are_one_group_and_files_are_not(tmp_path: Path) -> None:
    body = bigmoeonedge(routing(4), prompt=1) + bigmoeonedge(routing(3, 1), prompt=1, turn=1)
    write(tmp_path / "in", body, name="a.csv")
    write(tmp_path / "in", bigmoeonedge(routing(5, 2), prompt=1), name="b.csv")
    trace, _ = run(tmp_path / "in", tmp_path / "trace")
    assert [document.group for document in trace.documents] == ["a.csv", "a.csv", "b.csv"]


def test_one_size_is_one_number_and_an_unknown_size_is_none(tmp_path: Path) -> None:
    body = bigmoeonedge(routing(4), prompt=1)
    alike = re.sub(r"expert_bytes=10\d\d", "expert_bytes=1001", BIGMOEONEDGE_HEAD)
    topology = run(write(tmp_path, body, alike), tmp_path / "alike")[0].topology
    assert (topology.bytes_per_expert, topology.bytes_per_expert_by_layer) == (1001, None)
    gap = BIGMOEONEDGE_HEAD.replace("expert_bytes=1002", "expert_bytes=0")
    topology = run(write(tmp_path, body, gap), tmp_path / "gap")[0].topology
    assert topology.expert_bytes is None


# The engine's own cache, once more: least recently used, a budget in bytes, layers of two sizes

SMALL, LARGE = 2_654_208, 3_059_712
BY_LAYER = (LARGE, LARGE, SMALL, SMALL, LARGE, SMALL)
PROMPT_TOKENS, TOKENS, CHOSEN, BUDGET = 12, 160, 4, 100 << 20


def phone_trace() -> str:
    """As the engine writes it: the prompt by layers, of the last one only the last token; then token by token."""
    rng = np.random.default_rng(0)
    popular = rng.gumbel(size=(len(BY_LAYER), 32)) * 1.2
    head = f"# route_trace v1\n# model=/data/q.gguf arch=qwen3moe n_layer=6 n_expert=32 n_expert_used={CHOSEN}\n"
    head += "".join(f"# layer={n} expert_bytes={size} dense_bytes=11953152\n" for n, size in enumerate(BY_LAYER))
    head += "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
    noise = rng.gumbel(size=(TOKENS, len(BY_LAYER), 32))
    ids = np.argsort(-(popular + noise), -1)[..., :CHOSEN]
    prompt = [(token, layer) for layer in range(len(BY_LAYER)) for token in range(PROMPT_TOKENS)]
    written = [(token, layer) for token in range(PROMPT_TOKENS, TOKENS) for layer in range(len(BY_LAYER))]
    rows = []
    for token, layer in [*prompt, *written]:
        if token < PROMPT_TOKENS - 1 and layer == len(BY_LAYER) - 1:
            continue
        phase = int(token >= PROMPT_TOKENS)
        for slot, expert in enumerate(ids[token, layer].tolist()):
            rows.append(f"0,{phase},{token},{layer},{slot},{expert},{0.4 / (slot + 1):.6f},0,{BY_LAYER[layer]}\n")
    return head + "".join(rows)


def counted_by_hand(text: str, budget: float, sizes: Sequence[float]) -> tuple[int, int]:
    """Hits and accesses of an LRU in bytes, from the lines of the file alone.

    A layer is asked once for all that it needs, in the prompt for all tokens together. What it misses comes in, and
    then the oldest leave until the budget holds.
    """
    calls: dict[tuple[int, int, int], set[int]] = {}
    for line in text.splitlines():
        if line[0].isdigit():
            _, phase, step, layer, _, expert, *_ = line.split(",")
            place = (int(phase), int(step) if phase == "1" else 0, int(layer))
            calls.setdefault(place, set()).add(int(expert))
    cache: OrderedDict[tuple[int, int], float] = OrderedDict()
    hits = accesses = 0
    for (_, _, layer), experts in sorted(calls.items()):
        for expert in sorted(experts, reverse=True):
            accesses += 1
            hits += (layer, expert) in cache
            cache[layer, expert] = sizes[layer]
            cache.move_to_end((layer, expert))
        while sum(cache.values()) > budget:
            cache.popitem(last=False)
    return hits, accesses


def test_a_replay_counts_the_hits_of_the_engines_cache(tmp_path: Path) -> None:
    text = phone_trace()
    trace, _ = run(write(tmp_path, text, head=""), tmp_path / "trace")
    assert trace.topology.expert_bytes == BY_LAYER
    demand = Demand.of_trace(trace, [0])
    capacity = parse_capacity("100MiB", trace.topology, trace.topology.expert_bytes)
    assert capacity == BUDGET
    counts = replay_cache(demand, "lru", capacity, expert_bytes=trace.topology.expert_bytes)
    hits, accesses = counted_by_hand(text, BUDGET, BY_LAYER)
    assert (counts.hits, counts.accesses) == (hits, accesses)
    assert 0.4 < hits / accesses < 0.9
    # With the mean of both sizes another number comes out, so bytes by layer were really used.
    mean = sum(BY_LAYER) / len(BY_LAYER)
    of_one_size = replay_cache(demand, "lru", int(BUDGET // mean)).hits
    assert of_one_size == counted_by_hand(text, BUDGET, [mean] * len(BY_LAYER))[0]
    assert of_one_size != hits
