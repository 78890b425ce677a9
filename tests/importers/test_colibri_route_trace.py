"""colibri's ROUTE_TRACE: passes are told apart by the order of layers, prompts by their marks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from text_samples import TOP_K, colibri, refused, routing, run

from specmoe.trace import Phase

PROMPT = 5


def write(tmp_path: Path, text: str, name: str = "route.txt") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_everything_arrives(tmp_path: Path) -> None:
    source = routing(9)
    trace, warnings = run(write(tmp_path, colibri(source, prompt=PROMPT)), tmp_path / "trace")
    record = trace.read(0)
    assert record.gate_weights is not None
    assert warnings == []
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (3, 16, TOP_K)
    assert np.array_equal(record.expert_ids.numpy(), source.ids_TLK)
    torch.testing.assert_close(record.gate_weights, torch.from_numpy(source.weights_TLK).float())
    assert record.phase.tolist() == [Phase.PREFILL] * PROMPT + [Phase.DECODE] * 4
    assert (record.token_ids == -1).all()
    assert trace.manifest.source.settings["layers"] == [1, 2, 5]


def test_marks_cut_a_file_into_documents(tmp_path: Path) -> None:
    sources = [routing(9), routing(4, 1), routing(6, 2)]
    text = "".join(
        f"#prompt q{n} {prompt}\n" + colibri(source, prompt=prompt, call=100 * n)
        for n, (source, prompt) in enumerate(zip(sources, (5, 1, 6), strict=True))
    )
    trace, _ = run(write(tmp_path, text), tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == [f"route.txt:{n}:q{n}" for n in range(3)]
    for number, (source, prompt) in enumerate(zip(sources, (5, 1, 6), strict=True)):
        record = trace.read(number)
        assert np.array_equal(record.expert_ids.numpy(), source.ids_TLK)
        assert int((record.phase == Phase.PREFILL).sum()) == prompt


def test_a_layer_that_drafts_is_left_out(tmp_path: Path) -> None:
    source = routing(12)
    lines = colibri(source, prompt=8).splitlines(keepends=True)
    lines += ["999 0 6 3:0.5000 4:0.2500 5:0.1000\n", "1000 0 6 3:0.5000 4:0.2500 5:0.1000\n"]
    trace, warnings = run(write(tmp_path, "".join(lines)), tmp_path / "trace")
    assert np.array_equal(trace.read(0).expert_ids.numpy(), source.ids_TLK)
    assert warnings == ["layers 6 have rows for fewer than half of the tokens and were left out"]


def test_a_layer_called_in_pieces_is_one_pass(tmp_path: Path) -> None:
    text = "0 0 1 4:0.5\n0 1 1 5:0.5\n1 2 1 6:0.5\n2 0 2 7:0.5\n2 1 2 8:0.5\n3 2 2 9:0.5\n4 0 1 1:0.5\n5 0 2 2:0.5\n"
    trace, _ = run(write(tmp_path, text), tmp_path / "trace", format="colibri-route-trace")
    assert trace.read(0).expert_ids[..., 0].tolist() == [[4, 7], [5, 8], [6, 9], [1, 2]]
    assert trace.read(0).phase.tolist() == [0, 0, 0, 1]


def test_a_model_of_one_layer(tmp_path: Path) -> None:
    text = "".join(f"{call} 0 3 {call}:0.5000 9:0.2500\n" for call in range(4))
    trace, _ = run(write(tmp_path, text), tmp_path / "trace")
    assert trace.read(0).expert_ids.tolist() == [[[call, 9]] for call in range(4)]


def test_fewer_experts_in_some_rows(tmp_path: Path) -> None:
    text = "0 0 1 4:0.5000 5:0.2500\n1 0 2 6:0.7500\n2 0 1 7:0.5000\n3 0 2 8:0.1250 9:0.2500\n"
    trace, _ = run(write(tmp_path, text), tmp_path / "trace")
    record = trace.read(0)
    assert record.gate_weights is not None
    assert record.expert_ids.tolist() == [[[4, 5], [6, -1]], [[7, -1], [8, 9]]]
    assert record.gate_weights.tolist() == [[[0.5, 0.25], [0.75, 0]], [[0.5, 0], [0.125, 0.25]]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no routed expert"),
        ("0 0 1 4:0.5\n0 0 1 5:0.5\n", "line 2: slot 0 of layer 1"),
        ("0 0 1 4:0.5\n1 0 2 5:nan\n", "line 2: gate weight nan"),
        ("0 0 1 4:0.5\n\n1 0 2 5:0.5 6\n", "line 3: expected call row layer"),
        ("0 0 1 4:0.5\n1 0 2 5:0.5 6:\n", "line 2: expected call row layer"),
        ("0 0 1 4:0.5\nhello\n", "line 2: expected call row layer"),
        ("0 0 1 40000:0.5\n", "line 1: expert id 40000"),
        ("0 0 1 4:0.5\n0 -1 1 4:0.5\n", "line 2: row -1"),
        ("#prompt a\n0 0 1 4:0.5\n", "line 1: expected '#prompt NAME TOKENS'"),
        ("0 4503599627370000 1 4:0.5\n1 4503599627370000 1 4:0.5\n", "no possible row"),
    ],
)
def test_bad_files_are_described(tmp_path: Path, text: str, words: str) -> None:
    refused(write(tmp_path, text), tmp_path / "trace", words, format="colibri-route-trace")
