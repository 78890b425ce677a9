"""Reading from a disk as an engine reads experts: random places of a large file, past the page cache."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.files import disk_errors
from specmoe.offload.hardware.measure.points import Point, point_of

__all__ = ["PAGE", "SIZES", "DiskReads", "measure_disk"]

# O_DIRECT wants sizes, places and memory in whole pages.
PAGE = 4096
SIZES = tuple((1 << 10) * kib for kib in (256, 512, 1024, 2048, 4096, 8192, 16384))
_DEPTHS = (1, 2, 4)
_CHUNK = 4 << 20
# Room that is left to everybody else on the disk.
_SPARE = 256 << 20
_LEAST_READS = 5


@dataclass(frozen=True)
class DiskReads:
    """What was measured, and how past the page cache: ``O_DIRECT``, ``posix_fadvise``, ``F_NOCACHE`` or ``none``."""

    points: list[Point]
    how: str
    file_bytes: int


def measure_disk(
    folder: Path,
    sizes: Sequence[int] = SIZES,
    depths: Sequence[int] = _DEPTHS,
    *,
    seconds: float = 0.8,
    file_bytes: int = 512 << 20,
    on_progress: Callable[[float, float, str], None] | None = None,
) -> DiskReads:
    """Time random reads of several sizes, alone and several at once, from a scratch file in ``folder``.

    The file is unlinked before it is filled, so nothing is left behind whatever happens. Each depth is that many
    threads, each with memory of its own; ``preadv`` lets go of the interpreter's lock.

    Args:
        folder: on the disk in question. sizes: bytes of a read, rounded up to whole pages. depths: reads at once.
        seconds: time for each size and depth. file_bytes: size of the scratch file, at least 8 of the largest reads.
        on_progress: takes (done, total, what) after each size and depth.

    Raises:
        SpecmoeError: the folder is missing or cannot be written to, or the disk has not enough room.
    """
    sizes = sorted({-(-size // PAGE) * PAGE for size in sizes})
    file_bytes = -(-max(file_bytes, 8 * sizes[-1]) // _CHUNK) * _CHUNK
    _need_room(folder, file_bytes)
    points = []
    with _scratch(folder, file_bytes) as (descriptor, how):
        for done, (size, depth) in enumerate((s, d) for s in sizes for d in depths):
            points.append(_point(descriptor, how, file_bytes, size, depth, seconds))
            if on_progress is not None:
                on_progress(done + 1, len(sizes) * len(depths), f"reads of {size >> 10:,} KiB, {depth} at once")
    return DiskReads(points, how, file_bytes)


def _need_room(folder: Path, file_bytes: int) -> None:
    if not folder.is_dir():
        raise SpecmoeError(f"{folder} is not a folder; name one on the disk to be measured with --folder")
    free = shutil.disk_usage(folder).free
    if free < file_bytes + _SPARE:
        raise SpecmoeError(
            f"not enough room in {folder}: {file_bytes / 1e6:,.0f} MB and {_SPARE / 1e6:,.0f} MB to spare are needed, "
            f"{free / 1e6:,.0f} MB are free; name another folder with --folder, or measure with --quick"
        )


@contextmanager
def _scratch(folder: Path, file_bytes: int) -> Iterator[tuple[int, str]]:
    """A file of random bytes that has no name any more: a descriptor to read it by, and how that passes the cache."""
    path: Path | None = None
    descriptors = []
    try:
        with disk_errors(folder):
            writer, name = tempfile.mkstemp(".tmp", ".specmoe-disk-", folder)
            descriptors.append(writer)
            path = Path(name)
            reader, how = _open_past_cache(path)
            descriptors.append(reader)
            path.unlink()
            generator = np.random.default_rng(0)
            for _ in range(file_bytes // _CHUNK):
                _write(writer, generator.bytes(_CHUNK))
            os.fsync(writer)
        # Some file systems open a file with O_DIRECT and refuse the first read.
        if how == "O_DIRECT" and not _can_read(reader):
            reader, how = os.dup(writer), _cached_how(writer)
            descriptors.append(reader)
        yield reader, how
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        if path is not None:
            path.unlink(missing_ok=True)


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _open_past_cache(path: Path) -> tuple[int, str]:
    direct = getattr(os, "O_DIRECT", None)
    if direct is not None:
        try:
            return os.open(path, os.O_RDONLY | direct), "O_DIRECT"
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
    descriptor = os.open(path, os.O_RDONLY)
    return descriptor, _cached_how(descriptor)


def _cached_how(descriptor: int) -> str:
    if hasattr(os, "posix_fadvise"):
        return "posix_fadvise"
    try:  # macOS has neither, but can be told not to keep a file's pages.
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)  # pyright: ignore[reportAttributeAccessIssue]
        return "F_NOCACHE"
    except (ImportError, AttributeError, OSError):
        return "none"


def _can_read(descriptor: int) -> bool:
    with mmap.mmap(-1, PAGE) as memory:
        try:
            return os.preadv(descriptor, [memory], 0) == PAGE
        except OSError:
            return False


def _point(descriptor: int, how: str, file_bytes: int, size: int, depth: int, seconds: float) -> Point:
    places = np.random.default_rng(size + depth).permutation(file_bytes // size) * size
    times: list[list[float]] = [[] for _ in range(depth)]
    errors: list[BaseException] = []
    barrier = threading.Barrier(depth + 1)
    least = -(-_LEAST_READS // depth)

    def read(lane: int) -> None:
        with mmap.mmap(-1, size) as memory:
            memory.write(bytes(size))  # Page faults are paid here.
            barrier.wait()
            until = time.perf_counter() + seconds
            turn = lane
            try:
                while len(times[lane]) < least or time.perf_counter() < until:
                    place = int(places[turn % len(places)])
                    turn += depth
                    if how == "posix_fadvise":
                        os.posix_fadvise(descriptor, place, size, os.POSIX_FADV_DONTNEED)
                    begun = time.perf_counter()
                    got = os.preadv(descriptor, [memory], place)
                    times[lane].append(time.perf_counter() - begun)
                    if got != size:
                        raise OSError(errno.EIO, f"{got} bytes instead of {size}")
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=read, args=(lane,), daemon=True) for lane in range(depth)]
    for thread in threads:
        thread.start()
    barrier.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begun
    if errors:
        raise SpecmoeError(f"the scratch file cannot be read back: {errors[0]}; name another folder with --folder")
    return point_of(size, depth, [each for lane in times for each in lane], wall)
