"""Checkpoints of a running training: one safetensors file that holds any nested state.

Optimizer states are nested dicts of tensors and numbers. The tensors go into the file as they are,
the nesting goes into its header as JSON, so that nothing has to be pickled and one rename makes the
whole checkpoint visible.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path, regular_file

__all__ = ["load_checkpoint", "save_checkpoint", "save_tensors"]


def save_checkpoint(path: Path, state: Any) -> None:
    """Save nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises:
        SpecmoeError: the file cannot be written (full disk, permissions).
        TypeError: ``state`` holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, tensors)
    text = json.dumps(tree)
    save_tensors(tensors, path, {"tree": text, "sha256": _digest(text, tensors)})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, facts: dict[str, str]) -> None:
    """Write tensors and facts about them as safetensors, by an atomic rename; equal content gives equal bytes.

    safetensors writes metadata in an order that changes from process to process, so it is put in order afterwards.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata=facts)
        with temporary.open("r+b") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            # Were safetensors to write another form of JSON than this, its own would stay.
            if len(text) <= length:
                stream.seek(8)
                stream.write(text.ljust(length))


def load_checkpoint(path: Path) -> Any:
    """Load what :func:`save_checkpoint` wrote (tuples come back as lists).

    Raises:
        SpecmoeError: the file is damaged or no regular one; delete it to start that run again.
    """
    regular_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            text, digest = file.metadata()["tree"], file.metadata()["sha256"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(text, tensors) != digest:
            raise ValueError("its checksum is wrong")
        return _decode(json.loads(text), tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SpecmoeError(f"checkpoint {path} is damaged ({error}); delete it to start that run again") from error


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A clone: safetensors refuses tensors that share memory, and buffers of compiled optimizers may.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(key is None or isinstance(key, bool | int | float | str) for key in value):
            raise TypeError("a checkpoint cannot hold a dict with keys other than numbers and strings")
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_encode(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    if kind == "list":
        return [_decode(item, tensors) for item in content]
    return content
