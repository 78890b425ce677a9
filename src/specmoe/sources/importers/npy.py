"""Reading ``.npy`` and ``.npz`` by rows: nothing is unpickled, and no header is believed.

The format is numpy's own (its NEP 1): a magic string, a version, a Python literal with dtype, order and shape, then
the raw numbers. An ``.npz`` is a zip archive of such files.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import no_more_than

__all__ = ["NpzFile", "RowReader", "blocks", "open_npy", "parse_npy"]

_MOST_DIMENSIONS = 8
_BLOCK_BYTES = 8 << 20
_LARGEST_DEFLATION = 1032  # no deflate stream is denser


class RowReader(Protocol):
    """An array on disk whose rows are read from front to back."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``; going back is allowed and slow."""
        ...


def blocks(array: RowReader) -> Iterator[np.ndarray]:
    """All rows, a few MiB at a time."""
    row_bytes = max(1, math.prod(array.shape[1:]) * array.dtype.itemsize)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, array.shape[0], step):
        yield array.read(start, min(start + step, array.shape[0]))


class _Mapped:
    """An array in a file of its own, memory-mapped."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.shape, self.dtype = name, array.shape, array.dtype
        self._array = array

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._array[start:stop]


class _Member:
    """An array in an archive, decompressed as it is read."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.name = info.filename.removesuffix(".npy")
        self._archive, self._info = archive, info
        self._stream = archive.open(info)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the archive."""
        self._stream.close()

    def _read_header(self) -> None:
        info = self._info
        self.shape, self.dtype, self._data_start = _header(self._stream, self.name)
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._row = 0
        declared, held = math.prod(self.shape) * self.dtype.itemsize, info.file_size - self._data_start
        if declared != held:
            raise SpecmoeError(f"{self.name} declares shape {self.shape} and holds {held:,} bytes, not {declared:,}")
        if info.file_size > _LARGEST_DEFLATION * info.compress_size + 64:
            raise SpecmoeError(f"{self.name} claims {info.file_size:,} bytes in {info.compress_size:,} compressed ones")

    def read(self, start: int, stop: int) -> np.ndarray:
        if start < self._row:
            self._stream.close()
            self._stream = self._archive.open(self._info)
            self._skip(self._data_start)
            self._row = 0
        self._skip((start - self._row) * self._row_bytes)
        wanted = (stop - start) * self._row_bytes
        raw = self._stream.read(wanted)
        if len(raw) != wanted:
            raise SpecmoeError(f"{self.name} is truncated at row {start + len(raw) // max(1, self._row_bytes)}")
        self._row = stop
        if stop == self.shape[0]:
            self._stream.read(1)  # at its end the archive's checksum is compared
        return np.frombuffer(raw, self.dtype).reshape(stop - start, *self.shape[1:])

    def _skip(self, count: int) -> None:
        while count > 0:
            gone = len(self._stream.read(min(count, _BLOCK_BYTES)))
            if not gone:
                raise SpecmoeError(f"{self.name} is truncated")
            count -= gone


class NpzFile:
    """An ``.npz`` for reading by rows, open until the context is left."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        self._file_bytes = path.stat().st_size
        self._infos = {info.filename.removesuffix(".npy"): info for info in self._archive.infolist()}
        self._opened: list[_Member] = []
        if len(self._infos) < len(self._archive.infolist()):
            self._archive.close()
            raise SpecmoeError("two of its arrays have the same name")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for member in self._opened:
            member.close()
        self._archive.close()

    @property
    def names(self) -> list[str]:
        """The arrays' names, in file order."""
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def open(self, name: str) -> RowReader:
        """An array for reading by rows; a 0-d one has no rows: use :meth:`whole`.

        Raises:
            SpecmoeError: there is none of this name, its header is damaged, or it holds something other than numbers.
        """
        if name not in self._infos:
            raise SpecmoeError(f"it has no array {name!r}; it has {', '.join(self.names)[:200]}")
        self._opened.append(_Member(self._archive, self._infos[name]))
        return self._opened[-1]

    def whole(self, name: str) -> np.ndarray:
        """A small array at once, of any shape.

        Raises:
            SpecmoeError: as :meth:`open`, or it unfolds to far more than the file holds.
        """
        info = self._infos.get(name)
        if info is None:
            raise SpecmoeError(f"it has no array {name!r}; it has {', '.join(self.names)[:200]}")
        no_more_than(self._file_bytes, info.file_size, name)
        with self._archive.open(info) as stream:
            return parse_npy(stream.read(info.file_size + 1), name)


def parse_npy(content: bytes, name: str) -> np.ndarray:
    """An array from the bytes of a ``.npy`` file, as a view of them.

    Raises:
        SpecmoeError: they are none, or the header declares another size than there is.
    """
    stream = io.BytesIO(content)
    shape, dtype, start = _header(stream, name, text=True)
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise SpecmoeError(f"{name} declares shape {shape} and holds {len(content) - start:,} bytes")
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def open_npy(path: Path, name: str) -> RowReader:
    """A ``.npy`` file, memory-mapped.

    Raises:
        SpecmoeError: it is none, or is truncated, or holds something other than numbers.
    """
    with path.open("rb") as stream:
        shape, dtype, start = _header(stream, name)
    declared, held = math.prod(shape) * dtype.itemsize, path.stat().st_size - start
    if declared != held:
        raise SpecmoeError(f"{name} declares shape {shape} and holds {held:,} bytes, not {declared:,}")
    # An empty file cannot be mapped.
    array = np.memmap(path, dtype, "r", start, shape) if declared else np.zeros(shape, dtype)
    return _Mapped(name, array)


def _header(stream: IO[bytes], name: str, *, text: bool = False) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and the offset of the first number; numbers only, or text too."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # the header is a Python literal; a damaged one can raise anything
        raise SpecmoeError(f"{name} has no readable numpy header ({' '.join(str(error).split())[:120]})") from error
    if dtype.hasobject or dtype.fields is not None or dtype.subdtype is not None:
        raise SpecmoeError(f"{name} holds Python objects or records (dtype {dtype}); plain numbers are expected")
    if dtype.kind not in ("iufbU" if text else "iufb"):
        raise SpecmoeError(f"{name} has dtype {dtype}; plain numbers are expected")
    if len(shape) > _MOST_DIMENSIONS or not all(0 <= size < 1 << 48 for size in shape):
        raise SpecmoeError(f"{name} declares an impossible shape")
    if fortran and len(shape) > 1:
        raise SpecmoeError(f"{name} is stored column by column; write it with numpy.ascontiguousarray")
    if not shape and not text:
        raise SpecmoeError(f"{name} is a single number, not an array")
    return shape, dtype, stream.tell()
