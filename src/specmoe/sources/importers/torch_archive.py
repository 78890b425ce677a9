"""Reading what ``torch.save`` writes without torch's own reader: nothing runs, and tensors stay on disk until used.

Since torch 1.6 such a file is a zip archive: ``<name>/data.pkl`` is a pickle in which a tensor stands as the key of
its storage, ``<name>/data/<key>`` are the numbers, uncompressed. The pickle is read by
:mod:`specmoe.sources.importers.restricted_pickle`, the numbers are mapped into memory.
"""

from __future__ import annotations

import io
import mmap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.restricted_pickle import load_with_storages

__all__ = ["is_torch_archive", "load_torch", "pickle_holds"]

# Names of fields stand where they are first used, so near the front.
_SEARCHED_BYTES = 64 << 20
_LOCAL_HEADER_BYTES = 30


def is_torch_archive(path: Path, head: bytes) -> bool:
    """Whether a file looks like one that ``torch.save`` wrote, by its name and first bytes."""
    return path.suffix.lower() in {".pt", ".pth"} and head.startswith(b"PK\x03\x04")


def pickle_holds(path: Path, *words: str) -> bool:
    """Whether the pickle in a file of ``torch.save`` mentions one of ``words``; false for a damaged file.

    It is not unpickled: arrays of numpy are part of it, so it may be as large as the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = info.header_offset + min(info.file_size + (1 << 10), _SEARCHED_BYTES)
            return any(content.find(word.encode(), info.header_offset, end) >= 0 for word in words)
    except Exception:  # a damaged archive can raise anything
        return False


def load_torch(path: Path) -> Any:
    """Load builtins, numpy arrays and tensors.

    Returns:
        The saved value; arrays and tensors as :class:`~specmoe.sources.importers.restricted_pickle.Array`, whose
        numbers are views of the file.

    Raises:
        SpecmoeError: the file is of torch's older layout, or asks for anything else to be built or run.
        Exception: the file is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise SpecmoeError("it is no zip archive as torch.save writes it; load it with torch and save it again")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in infos if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise SpecmoeError("it holds no data.pkl, so torch.save did not write it")
    order = infos.get(f"{roots[0]}byteorder")
    if order is not None and _bytes_of(content, order)[:8] not in (b"little", b""):
        raise SpecmoeError("it was written on a big-endian machine; load it there and save it with numpy")

    def storage(key: str, code: str, count: int) -> np.ndarray:
        info = infos.get(f"{roots[0]}data/{key}")
        if info is None:
            raise SpecmoeError(f"the numbers of a tensor are missing (data/{key[:40]})")
        raw, dtype = _bytes_of(content, info), np.dtype("<u2" if code == "bf16" else f"<{code}")
        if len(raw) != count * dtype.itemsize:
            raise SpecmoeError(f"a tensor declares {count} numbers of type {code} and has {len(raw)} bytes")
        return np.frombuffer(raw, dtype)

    return load_with_storages(io.BytesIO(_bytes_of(content, infos[f"{roots[0]}data.pkl"])), storage)


def _bytes_of(content: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """A member's bytes, where they lie."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise SpecmoeError(f"{info.filename[:80]} is compressed, which torch.save does not do")
    local = content[info.header_offset : info.header_offset + _LOCAL_HEADER_BYTES]
    if len(local) != _LOCAL_HEADER_BYTES or not local.startswith(b"PK\x03\x04"):
        raise SpecmoeError(f"{info.filename[:80]} does not lie where the archive says")
    start = info.header_offset + _LOCAL_HEADER_BYTES
    start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if start + info.file_size > len(content):
        raise SpecmoeError(f"{info.filename[:80]} is truncated")
    return memoryview(content)[start : start + info.file_size]
