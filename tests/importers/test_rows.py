"""What the text importers share: lines in blocks, numbers in columns, rows put in their places."""

from __future__ import annotations

import codecs
import gc
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import _text
from specmoe.sources.importers._rows import Entries, Oddities, Survey
from specmoe.sources.importers._text import blocks, csv_table, numbers, objects, refuse_cut

WRAPPINGS = (b"\x1f\x8b", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
LINE = st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"x").replace(b"\r", b"y"))


@given(st.lists(LINE, max_size=30), st.booleans(), st.integers(1, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_blocks_give_every_line_its_number_and_offset(
    tmp_path: Path, lines: list[bytes], ended: bool, block: int
) -> None:
    content = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    # These say that the text is wrapped: test_packed_text.py.
    assume(not content.startswith(WRAPPINGS))
    path = tmp_path / "lines"
    path.write_bytes(content)
    with patch.object(_text, "_BLOCK_BYTES", block):
        found = list(blocks(path))
        expected = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line and not line.isspace()]
        assert [
            (n, row) for part in found for n, row in zip(part.number_N.tolist(), part.text, strict=True)
        ] == expected
        for part in found:
            for index, row in enumerate(part.text):
                offset = int(part.offset_N[index])
                assert content[offset : offset + len(row)] == row
                own = part.part(index, index + 1)
                again = list(blocks(path, start=offset, stop=own.end, line=int(own.number_N[0])))
                assert [(x.text, x.number_N.tolist()) for x in again if len(x)] == [([row], own.number_N.tolist())]


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"short\n" + b"x" * 1000)
    small = patch.multiple(_text, _BLOCK_BYTES=10, _LONGEST_LINE=500)
    with small, pytest.raises(SpecmoeError, match="line 2: longer than"):
        list(blocks(path))
    with pytest.raises(SpecmoeError, match="cut short"):
        refuse_cut(path)


@pytest.mark.parametrize(
    "bad", [b"1,x", b"1", b"1,2,3", b"1,", b",1", b"1.5,2", b"1e3,2", b"9" * 30 + b",1", b"\xff,1", b'"1",2']
)
@pytest.mark.parametrize("position", [0, 1, 70, 99])
def test_the_first_bad_row_is_found(tmp_path: Path, bad: bytes, position: int) -> None:
    rows = [b"%d,%d" % (n, n) for n in range(100)]
    rows[position] = bad
    path = tmp_path / "rows"
    path.write_bytes(b"\n".join(rows) + b"\n")
    with pytest.raises(SpecmoeError, match=f"rows, line {position + 1}: expected two numbers"):
        numbers(next(blocks(path)), "two numbers", delimiter=",", width=2, use=(0, 1))


def test_columns_come_as_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("# a remark\nname, weight,id\none,0.25,9007199254740993\ntwo,nan,-4\n")
    ((lines, columns),) = csv_table(path, ("id",), ("weight", "absent"), real={"weight"}, words={"one": 1, "two": 2})
    assert lines.number_N.tolist() == [3, 4]
    assert columns["id"].tolist() == [9007199254740993, -4]
    assert np.array_equal(columns["weight"], [0.25, np.nan], equal_nan=True)
    assert columns.keys() == {"id", "weight"}


def test_garbage_collection_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "objects"
    path.write_text('{"a": 1}\n{"a": \n')
    for enabled in (True, False):
        gc.enable() if enabled else gc.disable()
        try:
            with pytest.raises(SpecmoeError, match="line 2"):
                objects(next(blocks(path)))
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


@given(st.data())
@settings(deadline=None)
def test_rows_in_any_order_find_their_places(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(-5, 10**9), min_size=1, max_size=6, unique=True).map(sorted))
    layers = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=4, unique=True).map(sorted))
    top_k = data.draw(st.integers(1, 4))
    present = np.array(
        data.draw(st.lists(st.booleans(), min_size=(n := len(tokens) * len(layers) * top_k), max_size=n))
    )
    shape = (len(tokens), len(layers), top_k)
    # Every token has something, or the file could not know of it.
    present.reshape(shape)[:, 0, 0] = True
    token, layer, slot = (part.reshape(-1) for part in np.meshgrid(tokens, layers, range(top_k), indexing="ij"))
    chosen = np.array(data.draw(st.permutations(np.flatnonzero(present).tolist())))
    expert, weight = np.arange(n) % 300, np.arange(n) / 8
    entries = Entries(Path("f"), token[chosen], layer[chosen], slot[chosen], expert[chosen], weight[chosen], chosen)
    survey, oddities = Survey(), Oddities()
    survey.add(entries)
    assert survey.experts == expert[chosen].max() + 1
    placed = Entries.joined([entries[: n // 2], entries[n // 2 :]]).place(np.array(layers), top_k)
    oddities.count(placed, numbered=False)
    assert placed.token_T.tolist() == tokens
    assert placed.weights_TLK is not None
    assert np.array_equal(placed.ids_TLK.reshape(-1), np.where(present, expert, -1))
    assert np.array_equal(placed.weights_TLK.reshape(-1), np.where(present, weight, 0))
    assert np.array_equal(placed.present_TL, present.reshape(shape).any(-1))
    assert oddities.holes == int((~present.reshape(shape).any(-1)).sum())


def test_no_memory_is_asked_for_that_the_rows_do_not_justify() -> None:
    n = 4000
    own = np.arange(n)
    entries = Entries(Path("f"), own, own, np.zeros(n, int), own % 8, None, own)
    with pytest.raises(SpecmoeError, match="numbered wrongly"):
        entries.place(own, 30_000)
