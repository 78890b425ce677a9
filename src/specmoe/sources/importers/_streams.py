"""Text files as UTF-8 bytes, whatever they are wrapped in: a byte order mark, UTF-16 or UTF-32, gzip.

Everything that reads text reads it here, so offsets count the bytes of the plain text. Nothing is unfolded into memory:
packed text is read again from its start for every pass, and where a pass jumps it is unpacked once, into a temporary
file that has no name and so is gone when the process is.
"""

from __future__ import annotations

import codecs
import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, cast

from specmoe.errors import SpecmoeError

__all__ = ["bare_name", "first_bytes", "open_text", "put", "scratch", "temporary_file"]

_GZIP = b"\x1f\x8b"
# The longest first: a UTF-32 mark begins with a UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHUNK_BYTES = 1 << 20
# Rows of routing shrink to a tenth or a thirtieth; the most that the method can do is a thousandth.
_MOST_UNFOLDING = 200
_UNFOLDING_SLACK = 1 << 28


@dataclass
class _Scratch:
    """Where temporary files go, and the texts that were unpacked into one."""

    folder: Path
    unpacked: dict[Path, BinaryIO] = field(default_factory=dict)


_current: ContextVar[_Scratch | None] = ContextVar("scratch", default=None)


@contextmanager
def scratch(near: Path) -> Iterator[None]:
    """Keep temporary files on the disk that holds ``near`` (which need not exist), and only until the end of this."""
    folder = next(place for place in (near.absolute(), *near.absolute().parents) if place.is_dir())
    found = _Scratch(folder)
    token = _current.set(found)
    try:
        yield
    finally:
        _current.reset(token)
        for file in found.unpacked.values():
            file.close()


def temporary_file() -> BinaryIO:
    """A file without a name, on the disk that :func:`scratch` was told; gone when it is closed.

    Raises:
        SpecmoeError: it cannot be made there.
    """
    current = _current.get()
    folder = None if current is None else current.folder
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))
    except OSError as error:
        raise SpecmoeError(f"no temporary file can be made in {folder}: {error.strerror or error}") from error


def put(file: BinaryIO, content: bytes, path: Path) -> None:
    """Write to a temporary file what comes from ``path``.

    Raises:
        SpecmoeError: the disk is full.
    """
    try:
        file.write(content)
    except OSError as error:
        current = _current.get()
        where = tempfile.gettempdir() if current is None else current.folder
        raise SpecmoeError(
            f"{path} needs a temporary file, which cannot be written in {where}: {error.strerror or error}"
        ) from error


def bare_name(path: Path) -> str:
    """A file's name without ``.gz``."""
    return path.name[:-3] if path.name.lower().endswith(".gz") else path.name


def open_text(path: Path, start: int = 0) -> BinaryIO:
    """A text file as a stream of UTF-8 bytes without a byte order mark, from byte ``start`` of that on.

    Raises:
        SpecmoeError: packed text is damaged, cut short, or unfolds to far more than text does; here or while reading.
        OSError: the file cannot be opened.
    """
    raw = path.open("rb")
    try:
        head = raw.read(4)
        mark, encoding = next(((mark, name) for mark, name in _MARKS if head.startswith(mark)), (b"", "utf-8"))
        if not head.startswith(_GZIP) and encoding == "utf-8":
            raw.seek(len(mark) + start)
            return raw
        raw.seek(0)
        if start:
            current = _current.get()
            if current is not None:
                raw.close()
                return _unpacked(path, current, start)
        stream = io.BufferedReader(_Decoded(path, raw), _CHUNK_BYTES)
        while start > 0 and (passed := stream.read(min(start, _CHUNK_BYTES))):
            start -= len(passed)
        return cast(BinaryIO, stream)
    except BaseException:
        raw.close()
        raise


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, of its text if that is packed; as many as can be had, and no more than ``count``.

    Raises:
        SpecmoeError: not one can be unpacked.
        OSError: the file cannot be read.
    """
    found = b""
    with open_text(path) as stream:
        try:
            # In small parts, so that those before a damage are seen.
            while len(found) < count and (part := stream.read(min(1 << 10, count - len(found)))):
                found += part
        except SpecmoeError:
            if not found:
                raise
    return found


class _Decoded(io.RawIOBase):
    """Packed text, read once from its start to its end."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        super().__init__()
        self._path, self._raw = path, raw
        self._size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        self._packed = raw.read(2) == _GZIP
        raw.seek(0)
        self._stream: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if self._packed else raw
        self._read = 0
        self._decoder: codecs.IncrementalDecoder | None = None
        self._rest = b""
        self._begun = self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(cast(bytearray, buffer))
        while not self._rest and not self._ended:
            self._fill(len(view))
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._raw.close()
        super().close()

    def _fill(self, count: int) -> None:
        chunk = self._plain(max(count, 4))
        self._ended = not chunk
        if not self._begun:
            self._begun = True
            while len(chunk) < 4 and (more := self._plain(4)):
                chunk += more
            mark, encoding = next(((mark, name) for mark, name in _MARKS if chunk.startswith(mark)), (b"", "utf-8"))
            if encoding == "utf-8":
                chunk = chunk[len(mark) :]
            else:
                self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        if self._decoder is None:
            self._rest = chunk
            return
        try:
            self._rest = self._decoder.decode(chunk, final=self._ended).encode()
        except UnicodeError as error:
            raise SpecmoeError(f"{self._path} begins like UTF-16 or UTF-32 text and is not: {error}") from error

    def _plain(self, count: int) -> bytes:
        try:
            # What one piece of the packed data gives: bytes before a damage are then seen before the error is.
            chunk = cast(io.BufferedReader, self._stream).read1(count)
        except EOFError as error:
            raise SpecmoeError(f"{self._path} was cut short: its gzip data have no end; fetch it again") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise SpecmoeError(f"{self._path} is damaged: its gzip data cannot be unpacked ({error})") from error
        self._read += len(chunk)
        if self._packed and self._read > _MOST_UNFOLDING * self._size + _UNFOLDING_SLACK:
            raise SpecmoeError(f"{self._path} unpacks to more than {self._read:,} bytes, far more than text does")
        return chunk


def _unpacked(path: Path, current: _Scratch, start: int) -> BinaryIO:
    if path not in current.unpacked:
        file = temporary_file()
        try:
            with open_text(path) as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    put(file, chunk, path)
        except BaseException:
            file.close()
            raise
        current.unpacked[path] = file
    return cast(BinaryIO, io.BufferedReader(_Shared(current.unpacked[path], start), _CHUNK_BYTES))


class _Shared(io.RawIOBase):
    """A place of its own in a file that others read, too."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        super().__init__()
        self._file, self._place = file, start

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: object, /) -> int:
        self._file.seek(self._place)
        chunk = self._file.read(len(memoryview(cast(bytearray, buffer))))
        memoryview(cast(bytearray, buffer))[: len(chunk)] = chunk
        self._place += len(chunk)
        return len(chunk)
