"""Import safetensors files of routing under names that are in common use, with hidden states and router logits.

A file is one document, or many cut by ``seq_offsets``. Tensors are [tokens, layers, ·], or [tokens, ·] with the
layer in their name. Nothing is derived: without the experts' ids a file is refused, as the largest logits are not the
route in several families of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import IdSurvey, UniqueNames, opened
from specmoe.sources.importers.axes import LAYERS_FIRST, axes_doubt, layers_first, order_of
from specmoe.sources.importers.base import (
    UNKNOWN_TOKEN,
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.trace import FIELDS, RoutingRecord
from specmoe.trace.manifest import MANIFEST_NAME
from specmoe.trace.writer import fields_of

__all__ = ["IMPORTER", "NAMES"]

# Ours, and what others call it.
NAMES: dict[str, tuple[str, ...]] = {
    "token_ids": ("token_ids", "input_ids", "tokens"),
    "phase": ("phase",),
    "expert_ids": ("expert_ids", "topk_ids", "top_k_ids", "topk_indices", "top_k_index", "selected_experts", "experts"),
    "gate_weights": ("gate_weights", "topk_weights", "top_k_weights", "routing_weights", "topk_scores"),
    "router_logits": ("router_logits", "gate_logits", "logits"),
    "hidden": ("hidden", "hidden_states", "router_inputs", "router_input"),
}
_OURS = {name: field for field, names in NAMES.items() for name in names}
# layers.3.mlp.router_logits, layer_3_hidden_states; router_logits_layer_3, hidden_states.3
_LAYER_FIRST = re.compile(r"(?:.*[._/])?(?:layers?|blocks?|h)[._]?(\d{1,4})[._/](.+)")
_LAYER_LAST = re.compile(r"(.+?)[._/](?:layers?[._]?)?(\d{1,4})")
_BLOCK_ROWS = 1 << 12
_LARGEST_ID = 32766


@dataclass(frozen=True)
class _Field:
    """Where a field lies: one stacked tensor, or one per layer in rising order, which may be a batch of one.

    Attributes:
        shape: without the layers. order: where a stacked tensor's axes of tokens, layers and the rest are, None for
            this order.
    """

    keys: tuple[str, ...]
    stacked: bool
    batched: bool
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _File:
    path: Path
    fields: dict[str, _Field]
    layers: int
    offsets: list[int]
    unknown: tuple[str, ...]
    turned: bool


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a file, or a folder of them; see ``docs/trace-formats.md`` for the names.

    Raises:
        SpecmoeError: a file is damaged, has no expert ids, or its tensors contradict each other or the other files'.
    """
    files: list[_File] = []
    survey = IdSurvey()
    warnings: list[str] = []
    for file in files_of(path, ".safetensors"):
        with opened(file):
            files.append(_survey(file, options.axes))
            if _kind(files[-1]) == _kind(files[0]):
                _take_ids(files[-1], survey)
    first = files[0]
    with opened(path):
        for file in files[1:]:
            if _kind(file) != _kind(first):
                raise SpecmoeError(f"{file.path.name} holds other tensors or shapes than {first.path.name}")
        if not any(file.offsets[-1] for file in files):
            raise SpecmoeError("there is no token in it")
        fused = survey.fused_slots(warnings)
        experts = survey.experts
        if "router_logits" in first.fields:
            columns = first.fields["router_logits"].shape[1]
            experts = columns if fused is None else min(columns, experts)
        width = first.fields["hidden"].shape[1] if "hidden" in first.fields else 0
        topology = topology_of(options, layers=first.layers, experts=experts, top_k=survey.top_k, hidden_size=width)
        if "router_logits" in first.fields and topology.experts != experts:
            raise SpecmoeError(f"--experts {topology.experts}, but the router's logits have {experts} columns")
    if turned := sum(file.turned for file in files):
        warnings.append(f"tensors of {turned} of {len(files)} files are [layers, tokens, ·] by their tokens; turned")
    if options.axes is None and first.fields["expert_ids"].stacked:
        warnings += axes_doubt(
            max(file.offsets[-1] for file in files), first.layers, *first.fields["expert_ids"].shape[1:]
        )
    unknown = sorted({name for file in files for name in file.unknown})
    return ForeignTrace(
        topology=topology,
        fields=fields_of(first.fields),
        documents=_documents(path, files),
        count=sum(len(file.offsets) - 1 for file in files),
        warnings=warnings
        + ([f"tensors under unknown names were left out: {', '.join(unknown)[:200]}"] if unknown else []),
        fused=fused,
    )


def _kind(file: _File) -> object:
    return file.layers, {name: field.shape[1:] for name, field in file.fields.items()}


def _survey(path: Path, axes: tuple[str, ...] | None) -> _File:
    with safe_open(str(path), framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        stacked, layered, unknown = _sorted_out(shapes)
        if "expert_ids" not in stacked and "expert_ids" not in layered:
            held = ", ".join(list(shapes)[:8])[:200]
            raise SpecmoeError(
                f"it holds no expert ids ({' or '.join(NAMES['expert_ids'])}); it has {held}. The experts chosen "
                "cannot be told from logits"
            )
        turned = axes is None and _turned(file, stacked, shapes)
        chosen = LAYERS_FIRST if turned else axes
        fields = {name: _stacked(key, name, shapes[key], chosen) for name, key in stacked.items()}
        layers: set[int] = set()
        for name, keys in layered.items():
            if name in fields:
                raise SpecmoeError(f"it holds {name} twice: {fields[name].keys[0]} and {next(iter(keys.values()))}")
            fields[name] = _layered(name, keys, shapes)
            layers.add(len(keys))
        layers |= {_layers(fields[name], shapes) for name in fields if name in _LAYERED_FIELDS and name in stacked}
        if len(layers) != 1 or len({tuple(keys) for keys in layered.values()}) > 1:
            raise SpecmoeError("its fields have different layers")
        tokens = {field.shape[0] for field in fields.values()}
        if len(tokens) != 1:
            raise SpecmoeError(f"its fields have different numbers of tokens: {sorted(tokens)[:5]}")
        offsets = _offsets(file, shapes, tokens.pop())
    return _File(path, fields, layers.pop(), offsets, tuple(unknown), turned)


def _turned(file: Any, stacked: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the ids' tensor is [layers, tokens, k] by the number of tokens that another tensor tells."""
    told = next((shapes[stacked[name]] for name in ("token_ids", "phase") if name in stacked), ())
    if len(told) != 1 and len(shapes.get("seq_offsets", ())) == 1 and 0 not in shapes["seq_offsets"]:
        last = file.get_tensor("seq_offsets")[-1]
        told = () if last.is_floating_point() else (int(last),)
    return len(told) == 1 and "expert_ids" in stacked and layers_first(shapes[stacked["expert_ids"]], told)


def _layers(field: _Field, shapes: dict[str, tuple[int, ...]]) -> int:
    return shapes[field.keys[0]][1 if field.order is None else field.order[1]]


_LAYERED_FIELDS = {"expert_ids", "gate_weights", "router_logits", "hidden"}


def _sorted_out(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, dict[int, str]], list[str]]:
    """Tensors by field: stacked ones, those of one layer each, and names that mean nothing here."""
    stacked: dict[str, str] = {}
    layered: dict[str, dict[int, str]] = {}
    unknown: list[str] = []
    for key in shapes:
        field, layer = _meaning(key)
        if field is None or (layer is not None and field not in _LAYERED_FIELDS):
            if key != "seq_offsets":
                unknown.append(key)
        elif layer is not None:
            known = layered.setdefault(field, {}).setdefault(layer, key)
            if known != key:
                raise SpecmoeError(f"it holds {field} of layer {layer} twice: {known} and {key}")
        elif stacked.setdefault(field, key) != key:
            raise SpecmoeError(f"it holds {field} twice: {stacked[field]} and {key}")
    return stacked, {field: dict(sorted(keys.items())) for field, keys in layered.items()}, unknown


def _meaning(key: str) -> tuple[str | None, int | None]:
    """Our field, and the layer if the name has one."""
    if key in _OURS:
        return _OURS[key], None
    if first := _LAYER_FIRST.fullmatch(key):
        name, layer = first[2], int(first[1])
    elif last := _LAYER_LAST.fullmatch(key):
        name, layer = last[1], int(last[2])
    else:
        return None, None
    endings = [known for known in _OURS if re.fullmatch(rf"(?:.*[._/])?{known}", name)]
    return (_OURS[max(endings, key=len)] if endings else None), layer


def _stacked(key: str, name: str, shape: tuple[int, ...], axes: tuple[str, ...] | None) -> _Field:
    dimensions = 3 if name in _LAYERED_FIELDS else 1
    if dimensions == 3 and axes is not None:
        order = order_of(shape, key, axes)
        if 0 in (shape[order[1]], shape[order[2]]):
            raise SpecmoeError(f"{key} has shape {shape}: no layer, or nothing per token")
        return _Field((key,), True, False, (shape[order[0]], shape[order[2]]), order)
    if len(shape) != dimensions or 0 in shape[1:]:
        expected = "[tokens, layers, ·]" if dimensions == 3 else "[tokens]"
        raise SpecmoeError(f"{key} has shape {shape}, expected {expected}")
    return _Field((key,), True, False, (shape[0], *shape[2:]))


def _layered(name: str, keys: dict[int, str], shapes: dict[str, tuple[int, ...]]) -> _Field:
    found = {shapes[key] for key in keys.values()}
    shape = found.pop()
    batched = len(shape) == 3 and shape[0] == 1
    shape = shape[1:] if batched else shape
    if found or len(shape) != 2 or not shape[1]:
        raise SpecmoeError(
            f"{name}: its layers must all have one shape, [tokens, ·]; {next(iter(keys.values()))} has {shape}"
        )
    return _Field(tuple(keys.values()), False, batched, shape)


def _offsets(file: Any, shapes: dict[str, tuple[int, ...]], tokens: int) -> list[int]:
    if "seq_offsets" not in shapes:
        return [0, tokens]
    offsets = file.get_tensor("seq_offsets")
    if offsets.dim() != 1 or offsets.is_floating_point() or len(offsets) < 2:
        raise SpecmoeError(f"seq_offsets has shape {tuple(offsets.shape)}, expected [documents + 1]")
    numbers = offsets.tolist()
    if numbers[0] != 0 or numbers[-1] != tokens or sorted(numbers) != numbers:
        raise SpecmoeError(f"seq_offsets must rise from 0 to {tokens}, the number of tokens")
    return numbers


def _take_ids(file: _File, survey: IdSurvey) -> None:
    field = file.fields["expert_ids"]
    with safe_open(str(file.path), framework="pt") as tensors:
        for start in range(0, field.shape[0], _BLOCK_ROWS):
            ids = _rows(tensors, field, start, min(start + _BLOCK_ROWS, field.shape[0]))
            survey.add(_ids(ids, field.keys[0]).numpy(), field.keys[0])


def _rows(tensors: Any, field: _Field, start: int, stop: int) -> Tensor:
    """[T], [T, L, ·]: the rows of one field."""
    if field.order is not None:
        part = tensors.get_slice(field.keys[0])
        where = tuple(
            slice(start, stop) if axis == field.order[0] else slice(None) for axis in range(len(part.get_shape()))
        )
        rows = part[where]
        batch = [axis for axis in range(rows.dim()) if axis not in field.order]
        return rows.permute(*field.order, *batch).reshape([rows.shape[axis] for axis in field.order])
    if field.stacked:
        return tensors.get_slice(field.keys[0])[start:stop]
    parts = [tensors.get_slice(key) for key in field.keys]
    return torch.stack([part[0, start:stop] if field.batched else part[start:stop] for part in parts], 1)


def _ids(ids: Tensor, key: str) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise SpecmoeError(f"{key} has dtype {ids.dtype}, expected whole numbers")
    wide = ids.to(torch.int64)
    if wide.numel() and (int(wide.min()) < -1 or int(wide.max()) > _LARGEST_ID):
        raise SpecmoeError(f"{key} holds ids from {int(wide.min())} to {int(wide.max())}, expected -1 to {_LARGEST_ID}")
    return wide.to(torch.int16)


def _documents(path: Path, files: list[_File]) -> Iterator[ImportedDocument]:
    unique = UniqueNames()
    for file in files:
        stem = file.path.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.path.stem
        for number, (start, stop) in enumerate(zip(file.offsets, file.offsets[1:], strict=False)):
            name = stem if len(file.offsets) == 2 else f"{stem}/{number:06d}"
            # Opened again for each document: what is mapped counts as memory in use until the file is closed.
            with opened(file.path), safe_open(str(file.path), framework="pt") as tensors:
                rows = {field: _rows(tensors, place, start, stop) for field, place in file.fields.items()}
                record = _record(rows, stop - start)
            yield ImportedDocument(unique(name), record)


def _record(rows: dict[str, Tensor], length: int) -> RoutingRecord:
    tokens = rows.get("token_ids")
    if tokens is None:
        tokens = torch.full((length,), UNKNOWN_TOKEN)
    elif tokens.is_floating_point() or tokens.is_complex():
        raise SpecmoeError(f"the token ids have dtype {tokens.dtype}, expected whole numbers")
    elif length and (int(tokens.min()) < UNKNOWN_TOKEN or int(tokens.max()) >= 1 << 31):
        raise SpecmoeError(f"a token id lies outside of -1 to {(1 << 31) - 1}")
    phase = rows.get("phase", torch.zeros(length, dtype=torch.uint8))
    if phase.is_floating_point() or (length and not 0 <= int(phase.min()) <= int(phase.max()) <= 1):
        raise SpecmoeError("phase must hold a 0 (prefill) or 1 (decode) for every token")
    floats = {name: _floats(rows[name], name) for name in ("gate_weights", "router_logits", "hidden") if name in rows}
    return RoutingRecord(
        token_ids=tokens.to(torch.int32),
        phase=phase.to(torch.uint8),
        expert_ids=_ids(rows["expert_ids"], "expert_ids"),
        **floats,
    )


def _floats(rows: Tensor, name: str) -> Tensor:
    if not rows.is_floating_point():
        raise SpecmoeError(f"{name} has dtype {rows.dtype}, expected floating-point numbers")
    kept = rows if rows.dtype in FIELDS[name] else rows.to(torch.float32)
    return kept.contiguous()


def _recognises(path: Path, head: bytes) -> bool:
    if path.is_dir():
        if (path / MANIFEST_NAME).exists():  # a trace of ours
            return False
        return any(file.suffix == ".safetensors" for file in path.iterdir() if file.is_file())
    return path.suffix == ".safetensors"


IMPORTER = Importer(
    name="safetensors",
    about="safetensors of expert ids with gate weights, router logits and hidden states under common names",
    read=read,
    recognises=_recognises,
    takes_axes=True,
)
