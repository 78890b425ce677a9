"""Import arrays of routed experts, [tokens, layers, k] per request, that vLLM or SGLang returned and somebody saved.

vLLM's ``enable_return_routed_experts`` and SGLang's ``return_routed_experts`` hand out such an array per request; how
it is saved is up to the caller, so ``.npy``, ``.npz`` and ``.pt`` are read, alone or in a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import no_more_than, opened
from specmoe.sources.importers.base import ForeignTrace, Importer, ImportOptions, files_of
from specmoe.sources.importers.grouping import place_of
from specmoe.sources.importers.npy import NpzFile, open_npy
from specmoe.sources.importers.requests import REQUEST_FIELDS, Request, import_requests, request_of
from specmoe.sources.importers.restricted_pickle import Array
from specmoe.sources.importers.torch_archive import is_torch_archive, load_torch

__all__ = ["IMPORTER"]

_SUFFIXES = (".npy", ".npz", ".pt", ".pth")
Axes = tuple[str, ...] | None


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a file of one or many requests, or a folder of such files.

    A ``.npy`` is one request. An ``.npz`` or a dict in a ``.pt`` is one request if it has an array named
    ``routed_experts`` (and, optionally, vLLM's other names), else every array in it is one. A list in a ``.pt`` holds
    a request in each place.

    Raises:
        SpecmoeError: a file is damaged or holds something else, or requests have different shapes.
    """
    files = files_of(path, *_SUFFIXES)

    def requests() -> Iterator[Request]:
        for file in files:
            stem = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
            with opened(file):
                facts = place_of(path, file)
                yield from (replace(request, facts=facts) for request in _requests_of(file, stem, options.axes))

    return import_requests(path, requests, options)


def _requests_of(file: Path, stem: str, axes: Axes) -> Iterator[Request]:
    if file.suffix.lower() == ".npy":
        array = open_npy(file, stem)
        yield request_of(stem, {"routed_experts": array.read(0, array.shape[0])}, axes=axes)
    elif file.suffix.lower() == ".npz":
        with NpzFile(file) as arrays:
            yield from _requests_of_npz(arrays, stem, axes)
    else:
        value = load_torch(file)
        no_more_than(file.stat().st_size, _unfolded(value), stem)
        yield from _requests_of_value(value, stem, axes)


def _requests_of_npz(file: NpzFile, stem: str, axes: Axes) -> Iterator[Request]:
    if "routed_experts" in file:
        yield request_of(stem, {name: file.whole(name) for name in REQUEST_FIELDS if name in file}, axes=axes)
        return
    if not file.names:
        raise SpecmoeError("it holds no array")
    for name in file.names:
        yield request_of(f"{stem}/{name}", {"routed_experts": file.whole(name)}, axes=axes)


def _requests_of_value(value: Any, stem: str, axes: Axes) -> Iterator[Request]:
    if isinstance(value, Array):
        yield request_of(stem, {"routed_experts": value.numpy()}, axes=axes)
    elif isinstance(value, dict) and "routed_experts" in value:
        fields = {name: _array(value[name], name) for name in REQUEST_FIELDS if value.get(name) is not None}
        yield request_of(stem, fields, axes=axes)
    elif isinstance(value, dict | list) and value:
        named = value if isinstance(value, dict) else {f"{number:06d}": item for number, item in enumerate(value)}
        for name, item in named.items():
            if not isinstance(item, Array | dict) or (isinstance(item, Mapping) and "routed_experts" not in item):
                raise SpecmoeError(f"{stem}/{str(name)[:40]} is neither an array of ids nor a dict with routed_experts")
            yield from _requests_of_value(item, f"{stem}/{_label(name)}", axes)
    else:
        raise SpecmoeError(f"it holds a {type(value).__name__}, expected an array [tokens, layers, k] or several")


def _unfolded(value: Any) -> int:
    """Bytes of all arrays, shared ones counted as often as they appear."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    arrays = [part for item in items for part in (item.values() if isinstance(item, dict) else [item])]
    return sum(part.stored.nbytes for part in arrays if isinstance(part, Array))


def _array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, Array):
        return value.numpy()
    if isinstance(value, list) and all(type(number) is int for number in value):
        return np.asarray(value)
    raise SpecmoeError(f"{name} is a {type(value).__name__}, expected an array")


def _label(name: object) -> str:
    return str(name).encode("utf-8", "replace").decode()[:200]


def _recognises(path: Path, head: bytes) -> bool:
    suffix = path.suffix.lower()
    if path.is_dir():
        return any(file.suffix.lower() in _SUFFIXES for file in path.iterdir() if file.is_file())
    if suffix == ".npy":
        return head.startswith(b"\x93NUMPY")
    return (suffix == ".npz" and head.startswith(b"PK")) or is_torch_archive(path, head)


IMPORTER = Importer(
    name="routed-experts",
    about="arrays of routed experts per request, [tokens, layers, k], as vLLM and SGLang return them",
    read=read,
    recognises=_recognises,
    takes_axes=True,
    group_by="file; folder",
)
