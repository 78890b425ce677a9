"""Import Megatron-LM's router trace: one JSON object per step, layer and rank, with all tokens' experts.

Format: ``megatron/core/transformer/moe/router_trace.py`` of github.com/NVIDIA/Megatron-LM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._rows import Entries, Placed, Survey, document_name
from specmoe.sources.importers._streams import bare_name
from specmoe.sources.importers._text import Lines, bad_line, blocks, head_of, integers, objects, parsed
from specmoe.sources.importers.base import (
    UNKNOWN_TOKEN,
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.sources.importers.grouping import Grouping, place_of, routing_words
from specmoe.trace import Phase, RoutingRecord

__all__ = ["IMPORTER"]

# Our field: the prefix of its keys in a record, and the file with its numbers beside the trace.
_SIDECARS = {"router_logits": ("logit", "logits_rank{}.bin"), "hidden": ("hs", "hidden_states_rank{}.bin")}


@dataclass(frozen=True)
class _Layer:
    """One record: all tokens of a pass through one layer."""

    step: int
    layer: int
    tokens: int
    entries: Entries
    source: dict[str, Any]
    line: int


@dataclass
class _Contents:
    """What the first pass learns of all files."""

    survey: Survey = field(default_factory=Survey)
    layers: set[int] = field(default_factory=set)
    records: int = 0
    drafts: int = 0
    generated: bool = False
    shapes: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in _SIDECARS})


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open one rank's trace, or a folder of several ranks' traces.

    A pass is everything that one step says of each layer once; micro-batches are passes of their own. A pass of more
    than one token begins a document, passes of one token continue it as generated tokens.

    Raises:
        SpecmoeError: a line is no such record, ranks hold different layers, or a file of logits or hidden states is
            shorter than the records say.
    """
    files = files_of(path, ".jsonl")
    contents = _Contents()
    for file in files:
        _survey(file, contents)
    layers_L = contents.survey.layers_L(path)
    warnings: list[str] = []
    if contents.drafts:
        warnings.append(f"{contents.drafts:,} records are of layers that draft tokens (MTP) and were left out")
    slots = contents.survey.top_k
    fused = contents.survey.fused_slots(layers_L, warnings)
    widths = {name: _width(files, contents, name, warnings) for name in _SIDECARS}
    topology = topology_of(
        options,
        layers=len(layers_L),
        experts=max(contents.survey.experts, widths["router_logits"]),
        top_k=contents.survey.top_k,
        hidden_size=widths["hidden"],
    )
    if widths["router_logits"] and topology.experts != widths["router_logits"]:
        raise SpecmoeError(f"{path} holds logits of {widths['router_logits']} experts, not of {topology.experts}")
    kept = {name: width for name, width in widths.items() if width}
    grouping = Grouping(options.group_by)
    # Micro-batches of a training run answer and continue nothing.
    if contents.generated or options.group_by is not None:
        _group(grouping, path, files, layers_L, topology.top_k)
    return ForeignTrace(
        topology=topology,
        fields=("token_ids", "phase", "expert_ids", *kept),
        documents=_documents(path, files, layers_L, slots, kept, iter(grouping.groups(warnings)), warnings),
        settings={"layers": layers_L.tolist(), "ranks": len(files)},
        warnings=warnings,
        fused=fused,
    )


def _survey(file: Path, contents: _Contents) -> None:
    layers: set[int] = set()
    for record in _records(file, contents):
        contents.records += 1
        contents.generated |= record.tokens == 1
        contents.survey.add(record.entries)
        layers.add(record.layer)
        for name, (prefix, _) in _SIDECARS.items():
            shape = record.source.get(f"{prefix}_shape")
            if isinstance(shape, list) and len(shape) == 2 and isinstance(shape[1], int):
                contents.shapes[name][shape[1]] += 1
    if contents.layers and layers and layers != contents.layers:
        raise SpecmoeError(
            f"{file} holds other layers than the files before it, as ranks of a pipeline do; import them one by one, "
            "or trace without pipeline parallelism"
        )
    contents.layers = contents.layers or layers


def _width(files: list[Path], contents: _Contents, name: str, warnings: list[str]) -> int:
    """Width of the vectors that lie beside the trace; 0 if not every record has one."""
    shapes, (_, sidecar) = contents.shapes[name], _SIDECARS[name]
    if not shapes:
        return 0
    places = {file: _beside(file, sidecar) for file in files}
    if any(place is None for place in places.values()):
        warnings.append(f"{name} were not imported: {sidecar.format('*')} is not beside the trace")
        return 0
    if len(shapes) > 1 or shapes.total() < contents.records:
        warnings.append(f"{name} were not imported: not all records have them, of one width")
        return 0
    return next(iter(shapes))


def _beside(file: Path, sidecar: str) -> Path | None:
    rank = Path(bare_name(file)).stem.rpartition("rank")[2]
    place = file.with_name(sidecar.format(rank))
    return place if rank.isdigit() and place.is_file() else None


def _records(file: Path, contents: _Contents | None = None) -> Iterator[_Layer]:
    """All records of the model's own layers; those of drafting layers are counted in ``contents``."""
    for lines in blocks(file):
        rows = objects(lines)
        for index, row in enumerate(rows):
            if row.get("block", "decoder") != "decoder":
                if contents is not None:
                    contents.drafts += 1
                continue
            yield _record(lines.part(index, index + 1), row)


def _record(line: Lines, row: dict[str, Any]) -> _Layer:
    def columns(_: list[bytes]) -> tuple[int, int, int, np.ndarray, np.ndarray]:
        step, layer, tokens, top_k = integers([row[name] for name in ("step", "layer", "num_tokens", "topk")]).tolist()
        experts = row["top_indices"]
        count_R = np.fromiter(map(len, experts), np.int64, len(experts))
        expert_N = integers(list(chain.from_iterable(experts)))
        if min(step, layer, tokens, top_k - 1) < 0 or tokens != len(experts) or (count_R != top_k).any():
            raise ValueError
        return step, layer, tokens, count_R, expert_N

    expected = "step, layer, num_tokens, topk and top_indices of that shape"
    step, layer, tokens, count_R, expert_N = parsed(line, columns, expected)
    number, source = int(line.number_N[0]), {name: value for name, value in row.items() if name != "top_indices"}
    token_R, layer_R, line_R = np.arange(tokens), np.full(tokens, layer), np.full(tokens, number)
    entries = Entries.from_rows(line.path, token_R, layer_R, count_R, expert_N, None, line_R)
    return _Layer(step, layer, tokens, entries, source, number)


def _passes(file: Path, layers: set[int], lost: list[int]) -> Iterator[tuple[str, list[_Layer]]]:
    """Complete passes through all layers, with their names; ``lost[0]`` counts the others."""
    step, seen = -1, Counter[int]()
    pending: dict[int, dict[int, _Layer]] = {}
    for record in _records(file):
        if record.step != step:
            if record.step < step:
                raise bad_line(file, record.line, f"step {record.step} after {step}; keep each run in its own file")
            lost[0] += len(pending)
            step, seen, pending = record.step, Counter(), {}
        turn = seen[record.layer]
        seen[record.layer] += 1
        found = pending.setdefault(turn, {})
        found[record.layer] = record
        if found.keys() == layers:
            del pending[turn]
            if len({part.tokens for part in found.values()}) > 1:
                lost[0] += 1
            elif record.tokens:
                name = f"step-{step}" + (f".{turn}" if turn else "")
                yield name, [found[layer] for layer in sorted(found)]
    lost[0] += len(pending)


def _group(grouping: Grouping, path: Path, files: list[Path], layers_L: np.ndarray, top_k: int) -> None:
    """Take all documents in by their routing, as no token is known."""
    for file in files:
        words: list[np.ndarray] = []
        facts = place_of(path, file)
        for _, records in chain(_passes(file, set(layers_L.tolist()), [0]), [("", [])]):
            if words and (not records or records[0].tokens > 1):
                words_T = np.concatenate(words)
                grouping.add(np.full(len(words_T), UNKNOWN_TOKEN), words_T, len(words[0]), facts=facts)
                words = []
            if records:
                words.append(routing_words(_placed(records, layers_L, top_k).ids_TLK))


def _documents(
    path: Path,
    files: list[Path],
    layers_L: np.ndarray,
    top_k: int,
    kept: dict[str, int],
    groups: Iterator[str],
    warnings: list[str],
) -> Iterator[ImportedDocument]:
    lost = [0]
    for file in files:
        name, parts = "", []
        for step, records in _passes(file, set(layers_L.tolist()), lost):
            part = _routing(records, layers_L, top_k, kept, generated=bool(parts) and records[0].tokens == 1)
            if parts and records[0].tokens > 1:
                yield ImportedDocument(name, _joined(parts), group=next(groups, ""))
                parts = []
            name = name if parts else f"{document_name(path, file)}:{step}"
            parts.append(part)
        if parts:
            yield ImportedDocument(name, _joined(parts), group=next(groups, ""))
    if lost[0]:
        warnings.append(f"{lost[0]:,} passes lack a layer, or its layers have different numbers of tokens; left out")


def _placed(records: list[_Layer], layers_L: np.ndarray, top_k: int) -> Placed:
    return Entries.joined([record.entries for record in records]).place(layers_L, top_k)


def _routing(
    records: list[_Layer], layers_L: np.ndarray, top_k: int, kept: dict[str, int], *, generated: bool
) -> RoutingRecord:
    placed = _placed(records, layers_L, top_k)
    phase = Phase.DECODE if generated else Phase.PREFILL
    routing = placed.record(np.full(len(placed.token_T), phase))
    vectors = {
        name: torch.stack([_vectors(record, name, width) for record in records], 1) for name, width in kept.items()
    }
    if "router_logits" in vectors:
        vectors["router_logits"] = vectors["router_logits"].float()
    return replace(routing, **vectors)


def _vectors(record: _Layer, name: str, width: int) -> Tensor:
    """[T, width] bfloat16, from the file beside the trace."""
    prefix, sidecar = _SIDECARS[name]
    place = _beside(record.entries.path, sidecar)
    offset, size = record.source.get(f"{prefix}_offset"), record.source.get(f"{prefix}_bytes")
    shape = record.source.get(f"{prefix}_shape")
    if place is None or not isinstance(offset, int) or offset < 0 or shape != [record.tokens, width]:
        raise bad_line(record.entries.path, record.line, f"{prefix}_offset and {prefix}_shape do not fit the record")
    needed = 2 * record.tokens * width
    if size != needed or offset + needed > place.stat().st_size:
        raise bad_line(record.entries.path, record.line, f"{place.name} does not hold {needed} bytes at {offset}")
    with place.open("rb") as stream:
        stream.seek(offset)
        data = bytearray(stream.read(needed))
    return torch.frombuffer(data, dtype=torch.bfloat16).reshape(record.tokens, width)


def _joined(parts: list[RoutingRecord]) -> RoutingRecord:
    if len(parts) == 1:
        return parts[0]
    return RoutingRecord(**{name: torch.cat([getattr(part, name) for part in parts]) for name, _ in parts[0].tensors()})


def _recognises(path: Path, head: bytes) -> bool:
    start = head_of(path, head, ".jsonl").lstrip()
    return start.startswith(b"{") and all(key in start for key in (b'"step"', b'"layer"', b'"num_tokens"', b'"topk"'))


IMPORTER = Importer(
    name="megatron-jsonl",
    about="Megatron-LM's router trace: experts of whole batches, perhaps logits and hidden states",
    read=read,
    recognises=_recognises,
    group_by="file; folder",
)
