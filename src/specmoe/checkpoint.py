"""Checkpoints of a running training: one safetensors file that holds any nested state.

Optimizer states are nested dicts of tensors and numbers. The tensors go into the file as they are,
the nesting goes into its header as JSON, so that nothing has to be pickled and one rename makes the
whole checkpoint visible.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: Any) -> None:
    """Save nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises:
        SpecmoeError: the file cannot be written (full disk, permissions).
        TypeError: ``state`` holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"tree": json.dumps(tree)})


def load_checkpoint(path: Path) -> Any:
    """Load what :func:`save_checkpoint` wrote (tuples come back as lists).

    Raises:
        SpecmoeError: the file is damaged; delete it to start that run again.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
            return _decode(tree, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SpecmoeError(f"checkpoint {path} is damaged ({error}); delete it to start that run again") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A clone: safetensors refuses tensors that share memory, and buffers of compiled optimizers may.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
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
