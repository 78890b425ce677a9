"""BigMoeOnEdge's route trace: phases, weights and bytes arrive as they are; what contradicts itself is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from text_samples import BIGMOEONEDGE_HEAD, TOP_K, bigmoeonedge, refused, routing, run

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
