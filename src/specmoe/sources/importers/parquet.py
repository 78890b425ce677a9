"""Columns of Parquet files as numpy arrays, a given number of rows at a time; pyarrow is imported when first used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError

__all__ = ["column_maximum", "list_rows", "number_rows", "open_parquet"]

_BATCH_ROWS = 1 << 14
_LONGEST_LIST = 1 << 10


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``.

    Raises:
        SpecmoeError: pyarrow is not installed. Other exceptions: the file is damaged.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SpecmoeError("reading Parquet needs pyarrow; install it with: pip install 'specmoe[parquet]'") from error
    return ParquetFile(path, memory_map=True)


def list_rows(file: Any, column: str, rows: int) -> Iterator[np.ndarray]:
    """A column of lists of one length as arrays [rows, K]; the last may be shorter.

    Raises:
        SpecmoeError: there is no such column, or its lists are empty, of different lengths or missing.
    """
    yield from _regrouped((_matrix(part, column) for part in _parts(file, column)), rows)


def number_rows(files: Iterable[Path], column: str, rows: int) -> Iterator[np.ndarray]:
    """A column of numbers, across files, as arrays [rows]; the last may be shorter.

    Raises:
        SpecmoeError: there is no such column, or a number is missing.
    """
    parts = (part for file in files for part in _parts(open_parquet(file), column))
    yield from _regrouped((_numbers(part, column) for part in parts), rows)


def column_maximum(file: Any, column: str) -> int | None:
    """The largest number in a column (of lists) by the file's own statistics; None if it keeps none."""
    largest: int | None = None
    for group in range(file.metadata.num_row_groups):
        meta = file.metadata.row_group(group)
        chunk = next(
            (meta.column(i) for i in range(meta.num_columns) if meta.column(i).path_in_schema.split(".")[0] == column),
            None,
        )
        if chunk is None or chunk.statistics is None or not chunk.statistics.has_min_max:
            return None
        if type(chunk.statistics.max) is not int:
            return None
        largest = max(chunk.statistics.max, largest or 0)
    return largest


def _parts(file: Any, column: str) -> Iterator[Any]:
    if column not in file.schema_arrow.names:
        raise SpecmoeError(f"it has no column {column!r}; it has {', '.join(file.schema_arrow.names)[:200]}")
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column], use_threads=False):
        yield batch.column(0)


def _matrix(part: Any, column: str) -> np.ndarray:
    if not len(part):
        return np.zeros((0, 0))
    values = part.flatten() if hasattr(part, "flatten") else part
    width, rest = divmod(len(values), len(part))
    lengths = part.value_lengths() if hasattr(part, "value_lengths") else None
    equal = lengths is None or (lengths.null_count == 0 and bool((np.asarray(lengths) == width).all()))
    if part.null_count or rest or not width or width > _LONGEST_LIST or not equal:
        raise SpecmoeError(f"{column} must hold a list of one and the same length in every row")
    return _numbers(values, column).reshape(len(part), width)


def _numbers(part: Any, column: str) -> np.ndarray:
    if part.null_count:
        raise SpecmoeError(f"{column} lacks a number in some row")
    array = part.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "iuf":
        raise SpecmoeError(f"{column} has type {part.type}, expected numbers")
    return array


def _regrouped(parts: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in arrays of ``rows`` rows."""
    waiting: list[np.ndarray] = []
    count = 0
    for part in parts:
        if not len(part):
            continue
        if waiting and part.shape[1:] != waiting[0].shape[1:]:
            raise SpecmoeError(f"rows have {part.shape[1:]} numbers, those before them {waiting[0].shape[1:]}")
        waiting.append(part)
        count += len(part)
        while count >= rows:
            joined = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield joined[:rows]
            waiting = [joined[rows:]] if count > rows else []
            count -= rows
    if count:
        yield np.concatenate(waiting)
