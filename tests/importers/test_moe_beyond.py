"""MoE-Beyond's CSV: token strings become stable numbers, positions come from the order of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from text_samples import LAYERS, TOP_K, moe_beyond, refused, routing, run

from specmoe.errors import SpecmoeError
from specmoe.trace import Phase

TOKENS = ["<｜begin▁of▁sentence｜>", "I", ",", 'Ġ"quoted"', "Ċ", "two\nlines", "I", ","]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_everything_arrives(tmp_path: Path) -> None:
    source = routing(8)
    trace, warnings = run(write(tmp_path / "prompt_3_data.csv", moe_beyond(TOKENS, source)), tmp_path / "trace")
    record = trace.read(0)
    assert warnings == []
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (3, 16, TOP_K)
    assert trace.topology.hidden_size == 0
    assert trace.documents[0].doc_id == "prompt_3_data.csv"
    assert np.array_equal(record.expert_ids.numpy(), source.ids_TLK)
    assert record.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 1, 2]
    assert (record.phase == Phase.PREFILL).all()
    assert trace.manifest.source.tokenizer == "token strings, numbered in order of appearance"
    assert trace.manifest.fields == ("token_ids", "phase", "expert_ids")


def test_equal_strings_have_equal_numbers_in_all_files(tmp_path: Path) -> None:
    write(tmp_path / "in/prompt_1_data.csv", moe_beyond(["a", "b"], routing(2)))
    write(tmp_path / "in/prompt_2_data.csv", moe_beyond(["c", "b", "a"], routing(3, 1)))
    trace, _ = run(tmp_path / "in", tmp_path / "trace")
    assert [trace.read(n).token_ids.tolist() for n in range(2)] == [[0, 1], [2, 1, 0]]


def test_batches_of_one_file_are_documents(tmp_path: Path) -> None:
    first, second = routing(4), routing(3, 1)
    whole = moe_beyond(list("abcd"), first).splitlines(keepends=True)
    other = moe_beyond(list("bce"), second, batch=1).splitlines(keepends=True)[1:]
    mixed = [whole[0]]
    for layer in range(len(LAYERS)):
        mixed += whole[1 + 4 * layer : 5 + 4 * layer] + other[3 * layer : 3 * layer + 3]
    trace, _ = run(write(tmp_path / "p.csv", "".join(mixed)), tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["p.csv:0", "p.csv:1"]
    assert np.array_equal(trace.read(0).expert_ids.numpy(), first.ids_TLK)
    assert np.array_equal(trace.read(1).expert_ids.numpy(), second.ids_TLK)
    assert [trace.read(n).token_ids.tolist() for n in range(2)] == [[0, 1, 2, 3], [1, 2, 4]]


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_hidden_states(tmp_path: Path, scale: float) -> None:
    hidden = (np.random.default_rng(0).standard_normal((8, len(LAYERS), 6)) * scale).astype(
        np.float16 if scale == 1 else np.float32
    )
    text = moe_beyond(TOKENS, routing(8), hidden_TLD=hidden)
    trace, _ = run(write(tmp_path / "p.csv", text), tmp_path / "trace")
    record = trace.read(0)
    assert record.hidden is not None
    assert trace.topology.hidden_size == 6
    assert record.hidden.dtype == (torch.float16 if scale == 1 else torch.float32)
    assert torch.equal(record.hidden, torch.from_numpy(hidden))


def test_vectors_whose_text_is_longer_than_the_csv_module_takes_unasked(tmp_path: Path) -> None:
    hidden = np.random.default_rng(0).standard_normal((3, len(LAYERS), 7168))
    text = moe_beyond(list("abc"), routing(3), hidden_TLD=hidden)
    assert max(len(field) for field in text.split('"')) > 131_072
    trace, _ = run(write(tmp_path / "p.csv", text), tmp_path / "trace")
    assert torch.equal(trace.read(0).hidden, torch.from_numpy(hidden).float().half())


def test_a_file_that_was_cut_short_between_rows_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "in/a.csv", "".join(moe_beyond(list("abc"), routing(3)).splitlines(keepends=True)[:-1]))
    write(tmp_path / "in/b.csv", moe_beyond(list("abc"), routing(3)))
    trace, warnings = run(tmp_path / "in", tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["b.csv"]
    assert len(warnings) == 1
    assert "a.csv: its layers have different numbers of tokens" in warnings[0]


def test_hidden_states_that_are_no_numbers(tmp_path: Path) -> None:
    hidden = np.ones((3, len(LAYERS), 6))
    text = moe_beyond(list("abc"), routing(3), hidden_TLD=hidden)
    for number, (bad, words) in enumerate(
        (
            ("[1.0, 1.0]", "line 4: vectors differ|line 4: expected"),
            ("[1.0, 1.0, null, 1.0, 1.0, 1.0]", "line 4: expected layer"),
            ("[1.0, 1.0, NaN, 1.0, 1.0, 1.0]", "NaN or Inf at token 2"),
            ("[1.0, 1.0, 1e99, 1.0, 1.0, 1.0]", "NaN or Inf at token 2"),
        )
    ):
        lines = text.splitlines(keepends=True)
        lines[3] = lines[3].replace(str([1.0] * 6), bad)
        path = write(tmp_path / "p.csv", "".join(lines))
        if "NaN" in words:
            with pytest.raises(SpecmoeError, match=words):
                run(path, tmp_path / str(number))
        else:
            refused(path, tmp_path / str(number), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("Token,", "Tok,"), "line 1: expected Layer ID"),
        (lambda text: text.split("\n")[0] + "\r\n", "holds no routed expert"),
        (lambda text: "", "line 1: expected Layer ID"),
        (lambda text: text[:-4], "unexpected end of data"),
        (lambda text: text + "5,0,z\r\n", r"line 11: expected layer,batch,token,\[ids\], found '5,0,z'"),
        (lambda text: text + 'x,0,z,"[1, 2]"\r\n', "line 11: expected layer"),
        (lambda text: text + '5,0,z,"{1, 2}"\r\n', "line 11: expected layer"),
        (lambda text: text + '5,0,z,"[1, 2.5]"\r\n', "line 11: expected layer"),
        (lambda text: text + '5,0,z,"[1], [2]"\r\n', "line 11: expected layer"),
        (lambda text: text + '5,0,z,"[1, -2]"\r\n', "line 11: expert id -2"),
        (lambda text: text + '-5,0,z,"[1, 2]"\r\n', "line 11: layer -5"),
        (lambda text: text + '5,0,z,"[1, 99999]"\r\n', "line 11: expert id 99999"),
        (lambda text: text + "5,0,z," + "9" * 200_000 + "\r\n", "line 11: expected layer"),
        (lambda text: text.replace(",c,", ",d,", 1), "token 2 is 'd' in layer 1, but 'c' in layer 2"),
    ],
)
def test_bad_files_are_described(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    text = moe_beyond(list("abc"), routing(3))
    refused(write(tmp_path / "p.csv", change(text)), tmp_path / "trace", words, format="moe-beyond-csv")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(moe_beyond(list("abc"), routing(3)).encode() + b'5,0,\xff,"[1]"\r\n')
    refused(path, tmp_path / "trace", "not UTF-8")
