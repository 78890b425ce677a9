"""Rows of JSONL, CSV or TSV as columns, a block of lines at a time, and numbers and lists out of their cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._text import (
    Lines,
    bad_line,
    blocks,
    csv_reader,
    integers,
    no_search_for_cycles,
    objects,
    parsed,
    refuse_cut,
)

__all__ = ["Table", "first_table", "lists", "nested_values", "read_tables", "reals", "wholes"]

# Rows of JSON whose keys are looked at: a key that is missing from the first may be in a later one.
_ROWS_TO_LOOK_AT = 100
_LIST_MARKS = str.maketrans("[](){};|,", " " * 9)


@dataclass(frozen=True)
class Table:
    """Some rows of a file.

    Attributes:
        lines: one for each row; more than one line of the file where a quoted cell has breaks.
        names: the columns. rows: objects by column (JSON), or lists of text in the order of the columns (CSV).
        text: which of both.
    """

    lines: Lines
    names: Sequence[str]
    rows: list[Any]
    text: bool

    def __len__(self) -> int:
        return len(self.lines)

    def cells(self, name: str, count: int) -> list[Any]:
        """A column in the first ``count`` rows; None where an object lacks it."""
        if not self.text:
            return [row.get(name) for row in self.rows[:count]]
        at = self.names.index(name)
        return [row[at] for row in self.rows[:count]]


def read_tables(file: Path) -> Iterator[Table]:
    """A file's rows: JSON objects if it begins with ``{``, else CSV below a line that names the columns.

    Raises:
        SpecmoeError: a row is not of the form that the file begins with.
    """
    source = filter(len, blocks(file))
    first = next(source, None)
    if first is None:
        return
    if first.text[0].lstrip().startswith(b"["):
        raise SpecmoeError(f"{file} begins with a JSON list; write one JSON object per line")
    rest = chain([first], source)
    if first.text[0].lstrip().startswith(b"{"):
        yield from _json_tables(rest)
        return
    refuse_cut(file)
    yield from _csv_tables(file, rest)


def first_table(path: Path, head: bytes) -> Table | None:
    """The rows that the first bytes of a file hold whole, None if there are none.

    Raises:
        SpecmoeError: they are no such rows.
    """
    text = [row.removesuffix(b"\r") for row in head.split(b"\n")]
    # The last line may be cut; but a file of one row without an end, too, is one.
    text = [row for row in text[: max(1, len(text) - 1)] if row and not row.isspace()]
    if not text:
        return None
    numbers = np.arange(1, len(text) + 1)
    lines = Lines(path, text, numbers, numbers, 0)
    tables = _json_tables(iter([lines])) if text[0].lstrip().startswith(b"{") else _csv_tables(path, iter([lines]))
    return next((table for table in tables if len(table)), None)


def _json_tables(source: Iterator[Lines]) -> Iterator[Table]:
    for lines in source:
        rows = objects(lines)
        names = list(dict.fromkeys(chain.from_iterable(rows[:_ROWS_TO_LOOK_AT])))
        yield Table(lines, names, rows, text=False)


def _csv_tables(file: Path, source: Iterator[Lines]) -> Iterator[Table]:
    names: list[str] = []
    delimiter = ","
    for block in _whole_rows(file, source):
        lines = block
        if not names:
            skip = next((index for index, row in enumerate(block.text) if not row.startswith(b"#")), len(block))
            if skip == len(block):
                continue
            delimiter = _delimiter(block.text[skip])
            names = [name.strip() for name in _rows(block.part(skip, skip + 1), delimiter, None)[0]]
            if repeated := {name for name in names if names.count(name) > 1}:
                raise bad_line(file, int(block.number_N[skip]), f"two columns are named {min(repeated)!a}")
            lines = block.part(skip + 1, len(block))
        yield Table(lines, names, _rows(lines, delimiter, len(names)), text=True)
    if not names:
        raise SpecmoeError(f"{file} has no line that names its columns")


def _delimiter(header: bytes) -> str:
    """What separates the columns that a line names."""
    return max(",\t;", key=lambda mark: header.count(mark.encode()))


def _whole_rows(file: Path, source: Iterator[Lines]) -> Iterator[Lines]:
    """Blocks in which a row with line breaks in quotes is one line."""
    kept: Lines | None = None
    for block in source:
        lines = block if kept is None else _joined(kept, block)
        odd = np.fromiter((row.count(b'"') & 1 for row in lines.text), np.int64, len(lines))
        if not odd.any():
            kept = None
            yield lines
            continue
        inside_N = np.cumsum(odd) % 2  # whether a quote is open behind the line
        starts = np.flatnonzero(np.concatenate([[0], inside_N[:-1]]) == 0)
        end = len(lines) if not inside_N[-1] else int(starts[-1])
        kept = lines.part(end, len(lines)) if end < len(lines) else None
        if kept is not None and sum(map(len, kept.text)) > 1 << 28:
            break
        stops = [*starts[1:].tolist(), len(lines)]
        pairs = [(start, stop) for start, stop in zip(starts.tolist(), stops, strict=True) if stop <= end]
        if pairs:
            text = [b"\n".join(lines.text[start:stop]) for start, stop in pairs]
            chosen = [start for start, _ in pairs]
            until = int(kept.offset_N[0]) if kept is not None else lines.end
            yield Lines(file, text, lines.number_N[chosen], lines.offset_N[chosen], until)
    if kept is not None:
        raise bad_line(file, int(kept.number_N[0]), "a quote that begins there is never closed")


def _joined(first: Lines, second: Lines) -> Lines:
    return Lines(
        first.path,
        first.text + second.text,
        np.concatenate([first.number_N, second.number_N]),
        np.concatenate([first.offset_N, second.offset_N]),
        second.end,
    )


def _rows(lines: Lines, delimiter: str, width: int | None) -> list[list[str]]:
    def parse(text: list[bytes]) -> list[list[str]]:
        try:
            with no_search_for_cycles(), csv_reader(map(bytes.decode, text), delimiter) as reader:
                rows = list(reader)
        except Exception as error:  # csv.Error is of no kind that says so
            raise ValueError from error
        if len(rows) != len(text) or (width is not None and set(map(len, rows)) - {width}):
            raise ValueError
        return rows

    expected = "the columns' names" if width is None else f"{width} columns, as the first line names them"
    return parsed(lines, parse, expected)


# --- cells -----------------------------------------------------------------------------------------------


def _values(cells: list[Any], text: bool) -> list[Any]:
    """JSON values of cells; text is taken for JSON."""
    if not text:
        return cells
    with no_search_for_cycles():
        try:
            found = json.loads(f"[{','.join(cells)}]")
        except ValueError:  # perhaps for an empty cell
            found = json.loads(f"[{','.join([cell if cell and not cell.isspace() else 'null' for cell in cells])}]")
    if len(found) != len(cells):
        raise ValueError("a cell holds more than one value")
    return found


def wholes(cells: list[Any], text: bool, missing: int | None = None) -> np.ndarray:
    """Whole numbers as int64; ``3.0`` is one, too. An empty cell is ``missing``, unless that is None.

    Raises:
        ValueError: one of them is no such number.
    """
    values = _values(cells, text)
    if None in values:
        if missing is None:
            raise ValueError("an empty cell")
        values = [missing if value is None else value for value in values]
    array = np.asarray(values)
    if array.size and array.ndim == 1 and array.dtype.kind == "f":
        if not (array == np.floor(array)).all():  # a comparison with NaN is false
            raise ValueError("not whole numbers")
        if np.abs(array).max() > 1 << 53:
            raise ValueError("out of range")
        return array.astype(np.int64)
    return integers(values)


def reals(cells: list[Any], text: bool) -> np.ndarray:
    """Numbers as float64; an empty cell is NaN.

    Raises:
        ValueError: one of them is none.
    """
    array = np.asarray([np.nan if value is None else value for value in _values(cells, text)])
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        raise ValueError("not numbers")
    return array.astype(np.float64)


def lists(cells: list[Any], text: bool) -> list[list[Any]]:
    """A list of numbers from every cell; text may also separate them by spaces, ``;``, ``|`` or commas.

    Raises:
        ValueError: a cell is no such list.
    """
    try:
        found = [[] if value is None else value for value in _values(cells, text)]
        if not all(map(isinstance, found, repeat(list))):
            raise ValueError("not lists")
    except ValueError:
        if not text:
            raise
        if any(cell.count("[") + cell.count("(") + cell.count("{") > 1 for cell in cells):
            raise
        parts = [cell.translate(_LIST_MARKS).split() for cell in cells]
        numbers = iter(json.loads(f"[{','.join(chain.from_iterable(parts))}]"))
        found = [[next(numbers) for _ in part] for part in parts]
    return found


def nested_values(cells: list[Any], text: bool) -> list[Any]:
    """A list or an object from every cell.

    Raises:
        ValueError: a cell is neither.
    """
    found = _values(cells, text)
    if not all(isinstance(value, list | dict) for value in found):
        raise ValueError("neither lists nor objects")
    return found
