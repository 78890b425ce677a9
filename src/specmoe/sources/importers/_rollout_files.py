"""Samples of rollouts out of ``.pt``, ``.npz`` and ``.safetensors``, whatever frameworks call their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import no_more_than
from specmoe.sources.importers.npy import NpzFile
from specmoe.sources.importers.restricted_pickle import Array
from specmoe.sources.importers.torch_archive import is_torch_archive, load_torch, pickle_holds

__all__ = ["SUFFIXES", "holds_rollouts", "samples_of"]

SUFFIXES = (".pt", ".pth", ".npz", ".safetensors")
# Our word, and what frameworks call it, the surest name first.
_NAMES: dict[str, tuple[str, ...]] = {
    "experts": (
        "rollout_routed_experts",
        "routed_experts",
        "rollout_inference_indices",
        "expert_ids",
        "expert_indices",
        "topk_ids",
        "topk_indices",
        "selected_experts",
        "experts",
    ),
    "tokens": ("tokens", "input_ids", "token_ids", "sequences"),
    "prompts": ("prompts",),
    "responses": ("responses",),
    "attention": ("attention_mask", "attention_masks", "mask"),
    "written": ("response_mask", "response_masks", "loss_mask", "loss_masks", "action_mask"),
    "response_length": ("response_length", "response_lengths", "response_lens"),
    "prompt_length": ("prompt_length", "prompt_lengths", "prompt_lens"),
    "length": ("total_length", "total_lengths", "length", "lengths", "seqlens"),
    "group": ("group_index", "group_indices", "group_id", "group_ids", "uid", "uids", "prompt_index"),
    "index": ("index", "indices", "sample_index", "sample_indices"),
    "prompt": ("prompt",),
}
_OF_A_BATCH = {name for word in ("attention", "written", "response_length") for name in _NAMES[word]}
_WRAPPERS = ("rollout_data", "train_data", "batch", "samples")


def samples_of(file: Path, stem: str) -> Iterator[dict[str, Any]]:
    """Each sample's fields by our words; ``stem`` is what errors call the file's content.

    Raises:
        SpecmoeError: it holds no samples. Other exceptions: it is damaged.
    """
    suffix = file.suffix.lower()
    if suffix == ".npz":
        with NpzFile(file) as arrays:
            yield from _of_columns(arrays.names, lambda name: arrays.open(name).shape, _rows_of_npz(arrays), stem)
    elif suffix == ".safetensors":
        with safe_open(file, "numpy") as tensors:
            names = list(tensors.keys())
            shape = lambda name: tuple(tensors.get_slice(name).get_shape())  # noqa: E731
            yield from _of_columns(names, shape, lambda name, row: tensors.get_slice(name)[row], stem)
    else:
        total = 0
        for sample in _of_value(load_torch(file), stem):
            # Many samples may share one array: honest ones do not.
            total += sum(value.nbytes for value in sample.values() if isinstance(value, np.ndarray))
            no_more_than(file.stat().st_size, total, stem)
            yield sample


def _rows_of_npz(arrays: NpzFile) -> Callable[[str, int], Any]:
    readers = {name: arrays.open(name) for name in arrays.names}
    return lambda name, row: readers[name].read(row, row + 1)[0]


def _of_columns(
    names: list[str], shape: Callable[[str], tuple[int, ...]], row: Callable[[str, int], Any], stem: str
) -> Iterator[dict[str, Any]]:
    """Samples of arrays [batch, ...]."""
    columns = _by_word(dict.fromkeys(names, True))
    if "experts" not in columns:
        raise SpecmoeError(f"{stem} holds no {_NAMES['experts'][0]}; it has {', '.join(names)[:200]}")
    name = columns["experts"]
    if len(shape(name)) != 4:
        raise SpecmoeError(f"{name} has shape {shape(name)}, expected [batch, tokens, layers, k]")
    count = shape(name)[0]
    fitting = _fitting({column: shape(column)[0] if shape(column) else 0 for column in columns.values()}, count, stem)
    fitting = {word: column for word, column in columns.items() if column in fitting}
    for number in range(count):
        yield {word: _plain(row(column, number), column) for word, column in fitting.items()}


def _by_word(names: Mapping[str, Any]) -> dict[str, str]:
    """Word → the name that a mapping has for it."""
    found = {word: next((name for name in known if name in names), None) for word, known in _NAMES.items()}
    return {word: name for word, name in found.items() if name is not None}


def _of_value(value: Any, stem: str) -> Iterator[dict[str, Any]]:
    """Samples in what a ``.pt`` holds: a list of samples, perhaps in groups, or a dict of columns."""
    while isinstance(value, dict) and "experts" not in _by_word(value):
        inner = next((name for name in _WRAPPERS if name in value), None)
        if inner is None:
            break
        value = value[inner]
    if isinstance(value, list):
        for number, item in enumerate(value):
            for fields in item if isinstance(item, list) else [item]:
                if not isinstance(fields, dict):
                    raise SpecmoeError(f"{stem} holds a {type(fields).__name__} in place {number}, expected a sample")
                sample = _sample(fields)
                if isinstance(item, list) and sample.get("group") is None:
                    sample["group"] = f"{stem}:{number}"
                yield sample
        return
    names = _by_word(value) if isinstance(value, dict) else {}
    experts = value[names["experts"]] if "experts" in names else None
    if isinstance(experts, Array) and experts.stored.ndim == 3:
        yield _sample(value)
    elif isinstance(experts, list) or (isinstance(experts, Array) and experts.stored.ndim == 4):
        columns = {name: _column(value[name]) for name in names.values()}
        count = len(columns[names["experts"]])
        fitting = _fitting({name: len(column) for name, column in columns.items()}, count, stem)
        for number in range(count):
            yield _sample({name: columns[name][number] for name in fitting})
    else:
        raise SpecmoeError(f"{stem} holds no {_NAMES['experts'][0]}: neither a list of samples nor a dict of columns")


def _fitting(lengths: Mapping[str, int], count: int, stem: str) -> list[str]:
    """Columns that have an entry for each sample.

    Raises:
        SpecmoeError: tokens or a mask have not.
    """
    for word in ("tokens", "attention", "written", "response_length"):
        for name in _NAMES[word]:
            if lengths.get(name, count) != count:
                raise SpecmoeError(f"{stem}: {name} has {lengths[name]} entries for {count} samples")
    return [name for name, length in lengths.items() if length == count]


def _column(value: Any) -> Any:
    """What has one entry per sample; empty for what has none."""
    if isinstance(value, Array):
        return value.numpy() if value.stored.ndim else []
    return value if isinstance(value, list) else []


def _sample(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {word: _plain(fields[name], name) for word, name in _by_word(fields).items()}


def _plain(value: Any, name: str) -> Any:
    """An array of numbers, a number or a text."""
    if isinstance(value, Array):
        value = value.numpy()
    if isinstance(value, list) and name not in _NAMES["prompt"]:
        value = np.asarray(value) if value else np.zeros(0, np.int64)
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "iub" and (value.dtype.kind != "f" or (value != np.floor(value)).any()):
            raise SpecmoeError(f"{name} has dtype {value.dtype}, expected whole numbers")
        return value if value.ndim else value.item()
    return value


def holds_rollouts(file: Path, head: bytes) -> bool:
    """Whether a file that begins with ``head`` holds rollouts; may raise anything if it is damaged."""
    if is_torch_archive(file, head):
        return pickle_holds(file, "rollout_routed_experts", "rollout_inference_indices") or (
            pickle_holds(file, "routed_experts") and pickle_holds(file, *_OF_A_BATCH)
        )
    if file.suffix.lower() == ".npz" and head.startswith(b"PK"):
        with NpzFile(file) as arrays:
            name = _by_word(dict.fromkeys(arrays.names)).get("experts")
            return name is not None and len(arrays.open(name).shape) == 4
    if file.suffix.lower() == ".safetensors":
        with safe_open(file, "numpy") as tensors:
            name = _by_word(dict.fromkeys(tensors.keys())).get("experts")
            return name is not None and len(tensors.get_slice(name).get_shape()) == 4
    return False
