"""Text in blocks of whole lines, and numbers and objects out of them; an error names the file and the line."""

from __future__ import annotations

import csv
import gc
import json
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._streams import first_bytes, open_text
from specmoe.sources.importers.base import files_of

__all__ = [
    "Lines",
    "bad_line",
    "blocks",
    "csv_reader",
    "csv_table",
    "floats",
    "head_of",
    "integers",
    "no_search_for_cycles",
    "numbers",
    "objects",
    "parsed",
    "refuse_cut",
]

_BLOCK_BYTES = 4 << 20
_HEAD_BYTES = 64 << 10
_LONGEST_LINE = 256 << 20
_LARGEST = 1 << 53

# What parsers of a block raise when a row is not what they expect; anything else is a mistake of ours.
_UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, RecursionError, AttributeError, Warning)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Lines:
    """Some lines of a file that are not blank.

    Attributes:
        path: the file. text: the lines, without their ends.
        number_N: line numbers, from 1. offset_N: byte offsets in the plain text. end: byte offset behind the last.
    """

    path: Path
    text: list[bytes]
    number_N: np.ndarray
    offset_N: np.ndarray
    end: int

    def __len__(self) -> int:
        return len(self.text)

    def part(self, start: int, stop: int) -> Lines:
        """Lines ``start`` to ``stop`` of these."""
        end = int(self.offset_N[stop]) if stop < len(self) else self.end
        return Lines(self.path, self.text[start:stop], self.number_N[start:stop], self.offset_N[start:stop], end)


def blocks(path: Path, *, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[Lines]:
    """The lines of a file, some megabytes at a time; see :mod:`._streams` for what a file may be wrapped in.

    Args:
        path: the file. start: offset of a line's first byte. stop: offset behind the last line's last byte, None for
            the end of the file. line: number of the first line.

    Raises:
        SpecmoeError: a line is too long for a text file, or packed text is damaged.
    """
    with open_text(path, start) as stream:
        rest, offset, left = b"", start, None if stop is None else stop - start
        while True:
            chunk = stream.read(_BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left))
            left = None if left is None else left - len(chunk)
            cut = chunk.rfind(b"\n") + 1
            if chunk and not cut:
                rest += chunk
                if len(rest) > _LONGEST_LINE:
                    raise SpecmoeError(f"{path}, line {line}: longer than {_LONGEST_LINE >> 20} MiB; no text trace")
                continue
            whole, rest = rest + (chunk[:cut] if chunk else b""), chunk[cut:]
            if whole:
                text = whole.removesuffix(b"\n").split(b"\n")
                yield _without_blanks(path, text, line, offset)
                line, offset = line + len(text), offset + len(whole)
            if not chunk:
                return


def _without_blanks(path: Path, text: list[bytes], line: int, offset: int) -> Lines:
    size_N = np.fromiter(map(len, text), np.int64, len(text)) + 1
    offset_N = offset + np.cumsum(size_N) - size_N
    if any(row.endswith(b"\r") for row in text[:1]):
        text = [row.removesuffix(b"\r") for row in text]
    lines = Lines(path, text, np.arange(line, line + len(text)), offset_N, offset + int(size_N.sum()))
    if all(text) and not any(map(bytes.isspace, text)):
        return lines
    kept = [index for index, row in enumerate(text) if row and not row.isspace()]
    return Lines(path, [text[index] for index in kept], lines.number_N[kept], offset_N[kept], lines.end)


def bad_line(path: Path, line: int, what: str) -> SpecmoeError:
    """The error for a line of a file."""
    return SpecmoeError(f"{path}, line {line}: {what}")


def parsed(lines: Lines, parse: Callable[[list[bytes]], _Result], expected: str) -> _Result:
    """``parse`` applied to all lines at once.

    Raises:
        SpecmoeError: it failed; the error names the first line with which it does, and what was ``expected``.
    """
    try:
        return parse(lines.text)
    except _UNREADABLE:
        good, bad = 0, len(lines)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if _succeeds(parse, lines.text[:middle]) else (good, middle)
        shown = ascii(lines.text[bad - 1][:60].decode(errors="replace"))
        raise bad_line(lines.path, int(lines.number_N[bad - 1]), f"expected {expected}, found {shown}") from None


def _succeeds(parse: Callable[[list[bytes]], Any], text: list[bytes]) -> bool:
    try:
        parse(text)
    except _UNREADABLE:
        return False
    return True


def numbers(
    lines: Lines, expected: str, *, delimiter: str, width: int, use: Sequence[int], real: Container[int] = ()
) -> list[np.ndarray]:
    """Columns ``use`` of rows that have ``width`` fields, each [N]: float64 for those in ``real``, else int64."""
    # Columns are parsed as what they are: numpy takes four times as long for a float as for a whole number.
    dtype = np.dtype([(f"{column}", np.float64 if column in real else np.int64) for column in use])

    def parse(text: list[bytes]) -> np.ndarray:
        if set(map(methodcaller("count", delimiter.encode()), text)) != {width - 1}:
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # where numpy would cut the fraction off
            rows = np.loadtxt(text, dtype, comments=None, delimiter=delimiter, usecols=use, ndmin=1)
        if rows.shape != (len(text),):
            raise ValueError
        return rows

    rows = parsed(lines, parse, expected) if len(lines) else np.empty(0, dtype)
    return [np.ascontiguousarray(rows[name]) for name in dtype.names or ()]


def csv_table(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    real: Container[str] = (),
    words: Mapping[str, int] | None = None,
) -> Iterator[tuple[Lines, dict[str, np.ndarray]]]:
    """Columns of numbers, by name, from a CSV file whose first line that does not begin with ``#`` names them.

    Args:
        path: the file. required: columns to read. optional: columns to read if they are there.
        real: columns that hold fractions. words: what stands for a number in it.

    Yields:
        Lines, and each column's values at them: float64 for those in ``real``, else int64.

    Raises:
        SpecmoeError: there is no such header, or a row does not fit it.
    """
    names: list[str] | None = None
    for block in blocks(path):
        lines = block
        if names is None:
            skip = next((index for index, row in enumerate(block.text) if not row.startswith(b"#")), len(block))
            if skip == len(block):
                continue
            names = [name.strip() for name in block.text[skip].decode(errors="replace").split(",")]
            missing = [name for name in required if name not in names]
            if missing:
                raise bad_line(path, int(block.number_N[skip]), f"the column {missing[0]!r} is missing")
            lines = block.part(skip + 1, len(block))
        wanted = [name for name in (*required, *optional) if name in names]
        use = [names.index(name) for name in wanted]
        for word, number in (words or {}).items():
            text = [row.replace(word.encode(), b"%d" % number) for row in lines.text]
            lines = Lines(path, text, lines.number_N, lines.offset_N, lines.end)
        fractions = {names.index(name) for name in wanted if name in real}
        expected = f"{len(names)} numbers"
        columns = numbers(lines, expected, delimiter=",", width=len(names), use=use, real=fractions)
        yield lines, dict(zip(wanted, columns, strict=True))
    if names is None:
        raise SpecmoeError(f"{path} has no line that names its columns")


@contextmanager
def csv_reader(lines: Iterable[str], delimiter: str = ",") -> Iterator[Any]:
    """A ``csv.reader`` for fields of any length that a line may have; vectors of numbers exceed its own limit."""
    # The limit is the whole process's.
    before = csv.field_size_limit(_LONGEST_LINE)
    try:
        yield csv.reader(lines, delimiter=delimiter, strict=True)
    finally:
        csv.field_size_limit(before)


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Keep the collector from searching many new objects, which takes as long again as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def objects(lines: Lines) -> list[dict[str, Any]]:
    """The JSON object on each line.

    Raises:
        SpecmoeError: a line is no JSON object.
    """

    def parse(text: list[bytes]) -> list[dict[str, Any]]:
        # All at once takes half the time.
        with no_search_for_cycles():
            found = json.loads(b"[" + b",".join(text) + b"]")
        if len(found) != len(text) or not all(isinstance(entry, dict) for entry in found):
            raise ValueError
        return found

    return parsed(lines, parse, "a JSON object")


def integers(values: Sequence[Any]) -> np.ndarray:
    """Whole numbers from JSON as int64.

    Raises:
        ValueError: one of them is not.
    """
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError("not whole numbers")
    if array.max() > _LARGEST or array.min() < -_LARGEST:
        raise ValueError("out of range")
    return array.astype(np.int64)


def floats(values: Sequence[Any]) -> np.ndarray:
    """Numbers from JSON as float64.

    Raises:
        ValueError: one of them is not.
    """
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        raise ValueError("not numbers")
    return array.astype(np.float64)


def refuse_cut(path: Path) -> None:
    """Refuse a file whose last line has no end: a number in it may lack digits, and nothing else would tell.

    Raises:
        SpecmoeError: the file does not end with a line break.
    """
    with open_text(path) as stream:
        if stream.seekable():
            stream.seek(max(0, stream.seek(0, 2) - 1))
        last = b""
        while chunk := stream.read(_BLOCK_BYTES):
            last = chunk[-1:]
        if last not in {b"", b"\n"}:
            raise SpecmoeError(
                f"{path} was cut short: its last line has no end; delete that line, or end it if it is whole"
            )


def head_of(path: Path, head: bytes, *suffixes: str) -> bytes:
    """``head``, or for a folder the first bytes of its first file with one of ``suffixes``; empty if there is none."""
    if not path.is_dir():
        return head
    try:
        return first_bytes(files_of(path, *suffixes)[0], _HEAD_BYTES)
    except (SpecmoeError, OSError):
        return b""
