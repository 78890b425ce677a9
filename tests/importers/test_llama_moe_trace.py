"""llama-moe-trace in its three forms: the same routing comes out, and what a form cannot say is not made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from text_samples import LAYERS, TOP_K, Routing, llama_ranks, refused, routing, run

from specmoe.trace import Phase

PROMPT = 5


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def positions(source: Routing, batches: list[int]) -> str:
    """``pos,layer,ids``: prompt batches numbered from behind, the last layer for their last token only."""
    rows, done = [], 0
    for size in batches:
        for layer, name in enumerate(LAYERS):
            for token in range(size) if layer < len(LAYERS) - 1 else [size - 1]:
                ids = ",".join(map(str, source.ids_TLK[done + token, layer]))
                rows.append(f"{-(done + size - token)},{name},{ids}\n")
        done += size
    for token in range(done, len(source)):
        for layer, name in enumerate(LAYERS):
            rows.append(f"{token - done},{name},{','.join(map(str, source.ids_TLK[token, layer]))}\n")
    return "".join(rows)


def bare(source: Routing, batches: list[int]) -> str:
    """``layer,expert`` only."""
    rows, done = [], 0
    for size in [*batches, *[1] * (len(source) - sum(batches))]:
        for layer, name in enumerate(LAYERS):
            for token in range(size) if layer < len(LAYERS) - 1 else [size - 1]:
                rows += [f"{name},{expert}\n" for expert in source.ids_TLK[done + token, layer]]
        done += size
    return "".join(rows)


def test_ranks(tmp_path: Path) -> None:
    source = routing(9)
    trace, warnings = run(write(tmp_path / "moe.csv", llama_ranks(source, prompt=PROMPT)), tmp_path / "trace")
    record = trace.read(0)
    assert warnings == []
    assert trace.topology.layers == 3
    assert (trace.topology.experts, trace.topology.top_k) == (16, TOP_K)
    assert trace.documents[0].doc_id == "moe.csv"
    assert trace.manifest.fields == ("token_ids", "phase", "expert_ids")
    assert np.array_equal(record.expert_ids.numpy(), source.ids_TLK)
    assert record.phase.tolist() == [Phase.PREFILL] * PROMPT + [Phase.DECODE] * 4


def test_last_layer_of_a_prompt_under_a_wrong_number_is_left_out(tmp_path: Path) -> None:
    source = routing(9)
    rows = llama_ranks(source, prompt=PROMPT).splitlines(keepends=True)
    last = LAYERS[-1]
    # One row of the batch, counted from the batch's first token, as the tool does.
    rows = [row for row in rows if not (row.startswith("prefill") and row.split(",")[2] == str(last))]
    rows += [f"prefill,0,{last},{k},{e}\n" for k, e in enumerate(source.ids_TLK[PROMPT - 1, -1])]
    trace, warnings = run(write(tmp_path / "moe.csv", "".join(rows)), tmp_path / "trace")
    ids = source.ids_TLK.copy()
    ids[:PROMPT, -1] = -1
    assert np.array_equal(trace.read(0).expert_ids.numpy(), ids)
    assert "under wrong numbers; its 3 rows" in warnings[0]
    assert warnings[1].startswith("5 of 27 ")


def test_token_ids_come_from_the_file_beside(tmp_path: Path) -> None:
    source = routing(6)
    write(tmp_path / "in/agent-routing.csv", llama_ranks(source, prompt=4))
    ids = "".join(f"{'prefill' if n < 4 else 'decode'},{n},{1000 + n}\n" for n in range(5))
    write(tmp_path / "in/agent-tokens.csv", "phase,token,id\n" + ids)
    trace, _ = run(tmp_path / "in", tmp_path / "trace")
    assert len(trace) == 1
    assert trace.read(0).token_ids.tolist() == [1000, 1001, 1002, 1003, 1004, -1]
    (tmp_path / "in/agent-routing.csv").unlink()
    refused(tmp_path / "in", tmp_path / "other", "holds files of token ids, but no trace")


@pytest.mark.parametrize("batches", [[PROMPT], [3, 2], [1, 4]])
def test_positions(tmp_path: Path, batches: list[int]) -> None:
    source = routing(9)
    trace, _ = run(write(tmp_path / "moe.csv", positions(source, batches)), tmp_path / "trace")
    record = trace.read(0)
    ids = source.ids_TLK.copy()
    ends = np.cumsum(batches) - 1
    ids[[token for token in range(PROMPT) if token not in ends], -1] = -1
    assert np.array_equal(record.expert_ids.numpy(), ids)
    assert record.phase.tolist() == [Phase.PREFILL] * PROMPT + [Phase.DECODE] * 4


def test_positions_with_fewer_experts_in_some_rows(tmp_path: Path) -> None:
    text = "0,1,4,5,6\n0,3,7\n1,1,2,3\n1,3,4,5,8\n"
    trace, _ = run(write(tmp_path / "moe.csv", text), tmp_path / "trace")
    assert trace.read(0).expert_ids.tolist() == [[[4, 5, 6], [7, -1, -1]], [[2, 3, -1], [4, 5, 8]]]


def test_bare_rows_give_generated_tokens_only(tmp_path: Path) -> None:
    source = routing(9)
    trace, warnings = run(write(tmp_path / "moe.csv", bare(source, [3, 2])), tmp_path / "trace")
    record = trace.read(0)
    assert np.array_equal(record.expert_ids.numpy(), source.ids_TLK[PROMPT:])
    assert (record.phase == Phase.DECODE).all()
    lost = TOP_K * ((3 + 3 + 1) + (2 + 2 + 1))
    assert warnings == [
        f"{tmp_path}/moe.csv: {lost} rows are of prompts, whose tokens this form does not tell apart; left out"
    ]


def test_bare_rows_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "a.csv", bare(routing(4), [4])), tmp_path / "trace", "holds no token by itself")
    refused(write(tmp_path / "b.csv", "0,1\n0,2\n1,3\n1,4\n0,5\n0,6\n0,7\n1,1\n1,2\n"), tmp_path / "trace", "line 5")


def test_prompt_ids_that_were_misread_are_pointed_out(tmp_path: Path) -> None:
    # The second token shows the ranks after the first token's own, in all of many layers.
    def text(shared: bool) -> str:
        rows = [
            f"prefill,{token},{layer},{rank},{(layer + rank + 3 * token * (not shared)) % 16}\n"
            for layer in range(10)
            for token in range(2)
            for rank in range(3)
        ]
        return "phase,token,layer,rank,expert\n" + "".join(rows)

    _, warnings = run(write(tmp_path / "bad.csv", text(shared=False)), tmp_path / "bad")
    assert "share no expert in any layer" in warnings[0]
    _, warnings = run(write(tmp_path / "good.csv", text(shared=True)), tmp_path / "good")
    assert warnings == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,step,layer\n1,2,3\n", "line 1: neither"),
        ("", "line 1: neither"),
        ("phase,token,layer,rank,expert\n", "holds no routed expert"),
        ("phase,token,layer,rank,expert\nprefill,0,1\n", "line 2: expected 5 numbers"),
        ("phase,token,layer,rank,expert\nother,0,1,0,3\n", "line 2: expected 5 numbers, found 'other,0,1,0,3'"),
        ("phase,token,layer,rank,expert\ndecode,0,1,0,3\n\ndecode,0,1,0,3\n", "line 4: slot 0 of layer 1"),
        ("phase,token,layer,rank,expert\ndecode,-1,1,0,3\n", "line 2: token -1"),
        ("phase,token,layer,rank,expert\ndecode,0,1,0,32767\n", "line 2: expert id 32767"),
        ("phase,token,layer,rank,expert\ndecode,0,1,0,1e300\n", "line 2: expected 5 numbers"),
        ("0,1,4,5\n0,2\n", "line 2: expected pos,layer,id0"),
        ("0,1,4,5\n0,1,6,7\n", "line 2: slot 0 of layer 1"),
        ("0,1,4,5\n0,2,x,4\n", "line 2: expected pos"),
        ("0,1\n0,a\n", "line 2: expected layer,expert"),
    ],
)
def test_bad_files_are_described(tmp_path: Path, text: str, words: str) -> None:
    refused(write(tmp_path / "moe.csv", text), tmp_path / "trace", words, format="llama-moe-trace")


def test_line_ends_of_windows(tmp_path: Path) -> None:
    for name, text in {
        "a": llama_ranks(routing(6), prompt=3),
        "b": positions(routing(6), [3]),
        "c": bare(routing(6), [3]),
    }.items():
        plain, _ = run(write(tmp_path / f"{name}.csv", text), tmp_path / name)
        (tmp_path / "w" / name).mkdir(parents=True)
        (tmp_path / "w" / name / f"{name}.csv").write_bytes(text.replace("\n", "\r\n").encode())
        windows, _ = run(tmp_path / "w" / name / f"{name}.csv", tmp_path / f"{name}-windows")
        assert np.array_equal(plain.read(0).expert_ids, windows.read(0).expert_ids)
