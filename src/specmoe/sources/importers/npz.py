"""Import an ``.npz`` of flat arrays: all documents' tokens in a row, cut by offsets.

``specmoe export-trace --format npz`` writes the same layout, with everything that the trace keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import IdSurvey, float_rows, id_rows, no_more_than, opened, token_rows
from specmoe.sources.importers.axes import LAYERS_FIRST, TurnedRows, axes_doubt, layers_first, order_of
from specmoe.sources.importers.base import ForeignTrace, ImportedDocument, Importer, ImportOptions, topology_of
from specmoe.sources.importers.npy import NpzFile, RowReader, blocks
from specmoe.topology import Topology
from specmoe.trace import RoutingRecord
from specmoe.trace.record import field_shape
from specmoe.trace.writer import fields_of

__all__ = ["IMPORTER", "PROMPTS_PER_DOMAIN"]

# Neighbouring prompts may be turns of one conversation, so they share a domain, a block of this many.
PROMPTS_PER_DOMAIN = 100
# What a split keeps together: much longer than a conversation, much shorter than a part of the split.
PROMPTS_PER_GROUP = 20
Axes = tuple[str, ...] | None
_PER_TOKEN = ("token_ids", "phase", "gate_weights", "router_logits")
_KNOWN = {
    *_PER_TOKEN,
    "experts",
    "seq_offsets",
    "layers",
    "prompt_number",
    "doc_ids",
    "domains",
    "groups",
    "num_experts",
} | {
    "hidden",
    "hidden_bf16",
    "hidden_offsets",
}


@dataclass(frozen=True)
class _Cuts:
    """Where documents begin and end: rows [D+1] of the tokens, and of ``hidden`` where there is any."""

    rows: np.ndarray
    hidden: np.ndarray | None


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open an ``.npz`` of ``experts`` [N, L, K], ``token_ids`` [N] and ``seq_offsets`` [D+1].

    Document d is rows ``seq_offsets[d]`` to ``seq_offsets[d+1]``. See ``docs/trace-formats.md`` for the optional
    arrays. Members are decompressed as documents are read; the expert ids are read once more before, for their range.
    Arrays that are [layers, tokens, ·] by the number of tokens, or whose axes the user names, are held in memory whole.

    Raises:
        SpecmoeError: an array is missing, has an impossible shape or dtype, or the file is damaged.
    """
    warnings: list[str] = []
    with opened(path), NpzFile(path) as file:
        survey = IdSurvey()
        axes = _axes(file, options, warnings)
        experts = _open(file, "experts", axes)
        for block in blocks(experts):
            survey.add(block, "experts")
        if survey.shape is None or not survey.rows:
            raise SpecmoeError(f"experts has shape {experts.shape}: there is no token in it")
        cuts = _cuts(file, survey.rows, axes)
        if options.axes is None:
            warnings += axes_doubt(*experts.shape)
        fused = survey.fused_slots(warnings)
        topology = _topology(file, survey, options, axes)
        _check_unfolding(cuts, topology, path.stat().st_size)
        names, domains, groups = _names(file, len(cuts.rows) - 1)
        fields = _fields(file, survey, topology, axes)
        if unknown := [name for name in file.names if name not in _KNOWN]:
            warnings.append(f"arrays that no field of a trace stands for were left out: {', '.join(unknown)[:200]}")
        experts_known = "num_experts" in file
        settings = {"layers": _whole_numbers(file, "layers", topology.layers)} if "layers" in file else {}
    return ForeignTrace(
        topology=topology,
        fields=fields,
        documents=_documents(path, cuts, axes, names, domains, groups),
        count=len(names),
        experts_known=experts_known,
        settings=settings,
        warnings=warnings,
        fused=fused,
    )


def _axes(file: NpzFile, options: ImportOptions, warnings: list[str]) -> Axes:
    """The axes of the arrays of layers, None for [tokens, layers, ·]."""
    shape, ends = file.open("experts").shape, file.whole("seq_offsets")
    if options.axes is not None or ends.dtype.kind not in "iu" or ends.ndim != 1 or not len(ends):
        return options.axes
    tokens = int(ends[-1])
    if layers_first(shape, (tokens,)):
        warnings.append(f"experts {shape} is [layers, tokens, k] by its {tokens:,} tokens; arrays were turned")
        return LAYERS_FIRST
    if len(shape) == 3 and 0 not in shape and shape[0] != tokens:
        raise SpecmoeError(
            f"seq_offsets must rise from 0 to {shape[0]}, the number of rows, and ends at {tokens}: experts has shape "
            f"{shape}, read as tokens, layers, k; if its axes are others, name them with --axes"
        )
    return None


def _open(file: NpzFile, name: str, axes: Axes) -> RowReader:
    """An array [tokens, ...], whatever the axes of those that have layers are."""
    if axes is None or len(file.open(name).shape) < len(axes):
        return file.open(name)
    return TurnedRows(file.whole(name), name, axes)


def _shape(file: NpzFile, name: str, axes: Axes) -> tuple[int, ...]:
    """The shape [tokens, ...] of an array."""
    shape = file.open(name).shape
    if axes is None or len(shape) < len(axes):
        return shape
    return tuple(shape[axis] for axis in order_of(shape, name, axes))


def _cuts(file: NpzFile, tokens: int, axes: Axes) -> _Cuts:
    rows = _offsets(file, "seq_offsets", tokens)
    kind = _hidden_name(file)
    if kind is None:
        return _Cuts(rows, None)
    held = _shape(file, kind, axes)[0]
    offsets = _offsets(file, "hidden_offsets", held) if "hidden_offsets" in file else rows
    if len(offsets) != len(rows) or offsets[-1] != held:
        raise SpecmoeError(f"{kind} has {held} rows, its offsets cover {offsets[-1]}")
    lengths = np.diff(offsets)
    if ((lengths != np.diff(rows)) & (lengths != 0)).any():
        raise SpecmoeError("hidden_offsets: a document has another number of hidden states than of tokens")
    return _Cuts(rows, offsets)


def _offsets(file: NpzFile, name: str, end: int) -> np.ndarray:
    offsets = file.whole(name)
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise SpecmoeError(f"{name} has shape {offsets.shape} and dtype {offsets.dtype}, expected [documents + 1]")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise SpecmoeError(f"{name} must rise from 0 to {end}, the number of rows")
    return offsets


def _topology(file: NpzFile, survey: IdSurvey, options: ImportOptions, axes: Axes) -> Topology:
    assert survey.shape is not None
    layers, top_k = survey.shape[0], survey.top_k
    experts, width = survey.experts, 0
    most = experts if top_k < survey.shape[1] else 1 << 15  # a shared expert's id bounds those of the others
    if "num_experts" in file:
        (experts,) = _whole_numbers(file, "num_experts", 1)  # larger ids are no experts, and stay as they are
    if "router_logits" in file:
        shape = _shape(file, "router_logits", axes)
        if len(shape) != 3 or shape[:2] != (survey.rows, layers):
            raise SpecmoeError(f"router_logits has shape {shape}, expected ({survey.rows}, {layers}, experts)")
        experts = min(shape[2], most)
        if options.experts is not None and options.experts != experts:
            raise SpecmoeError(f"--experts {options.experts}, but router_logits has {experts} columns")
    kind = _hidden_name(file)
    if kind is not None:
        shape = _shape(file, kind, axes)
        if len(shape) != 3 or shape[1] != layers or not shape[2]:
            raise SpecmoeError(f"{kind} has shape {shape}, expected (rows, {layers}, width)")
        width = shape[2]
    return topology_of(options, layers=layers, experts=min(experts, most), top_k=top_k, hidden_size=width)


def _hidden_name(file: NpzFile) -> str | None:
    return next((name for name in ("hidden", "hidden_bf16") if name in file), None)


def _fields(file: NpzFile, survey: IdSurvey, topology: Topology, axes: Axes) -> tuple[str, ...]:
    kept = [name for name in _PER_TOKEN if name in file]
    for name in kept:
        shape, expected = _shape(file, name, axes), (survey.rows, *field_shape(name, topology))
        if name == "gate_weights" and survey.shape is not None:
            expected = (survey.rows, *survey.shape)  # also those of slots that are left out
        # The logits have told the number of experts, or have a shared one's beside theirs.
        if shape != expected and name != "router_logits":
            raise SpecmoeError(f"{name} has shape {shape}, expected {expected}")
    return fields_of([*kept, *(["hidden"] if _hidden_name(file) else [])])


def _check_unfolding(cuts: _Cuts, topology: Topology, file_bytes: int) -> None:
    longest = int(np.diff(cuts.rows).max())
    width = topology.top_k * 8 + topology.experts * 4 + topology.hidden_size * 4
    no_more_than(file_bytes, longest * topology.layers * width, "one document")


def _names(file: NpzFile, count: int) -> tuple[list[str], list[str], list[str]]:
    """Document ids, domains and groups."""
    groups = _texts(file, "groups", count) if "groups" in file else [""] * count
    domains = _texts(file, "domains", count) if "domains" in file else [""] * count
    if "doc_ids" in file:
        names = _texts(file, "doc_ids", count)
    elif "prompt_number" in file:
        numbers = _whole_numbers(file, "prompt_number", count)
        names = [f"prompt-{number}" for number in numbers]
        if "domains" not in file:
            domains = [_block(number, PROMPTS_PER_DOMAIN) for number in numbers]
        if "groups" not in file:
            groups = [_block(number, PROMPTS_PER_GROUP) for number in numbers]
    else:
        names = [f"sequence-{number:06d}" for number in range(count)]
    if len(set(names)) < count:
        raise SpecmoeError("two documents have the same name (doc_ids or prompt_number repeat)")
    return names, domains, groups


def _block(number: int, length: int) -> str:
    first = (number - 1) // length * length + 1
    return f"prompts-{first}-{first + length - 1}"


def _whole_numbers(file: NpzFile, name: str, count: int) -> list[int]:
    array = file.whole(name)
    if array.dtype.kind not in "iu" or array.size != count:
        raise SpecmoeError(f"{name} has shape {array.shape} and dtype {array.dtype}, expected {count} whole numbers")
    return array.reshape(-1).tolist()


def _texts(file: NpzFile, name: str, count: int) -> list[str]:
    array = file.whole(name)
    if array.dtype.kind != "U" or array.shape != (count,):
        raise SpecmoeError(f"{name} has shape {array.shape} and dtype {array.dtype}, expected {count} texts")
    try:
        texts: list[str] = array.tolist()
        for text in texts:
            text.encode()
    except ValueError as error:  # half a surrogate pair, or a number beyond Unicode
        raise SpecmoeError(f"{name} holds something that is no text") from error
    return texts


def _documents(
    path: Path, cuts: _Cuts, axes: Axes, names: list[str], domains: list[str], groups: list[str]
) -> Iterator[ImportedDocument]:
    with NpzFile(path) as file:
        with opened(path):
            experts = _open(file, "experts", axes)
            columns = {name: _open(file, name, axes) for name in _PER_TOKEN if name in file}
            kind = _hidden_name(file)
            hidden = _open(file, kind, axes) if kind else None
        for number, name in enumerate(names):
            start, stop = int(cuts.rows[number]), int(cuts.rows[number + 1])
            with opened(path):
                rows = {column: reader.read(start, stop) for column, reader in columns.items()}
                record = _record(experts.read(start, stop), rows)
                if hidden is not None and cuts.hidden is not None and cuts.hidden[number + 1] > cuts.hidden[number]:
                    raw = hidden.read(int(cuts.hidden[number]), int(cuts.hidden[number + 1]))
                    record = replace(record, hidden=_hidden_rows(raw, hidden.name))
            yield ImportedDocument(name, record, domains[number], groups[number])


def _record(ids_TLK: np.ndarray, rows: dict[str, np.ndarray]) -> RoutingRecord:
    gates, logits = rows.get("gate_weights"), rows.get("router_logits")
    return RoutingRecord(
        token_ids=token_rows(rows.get("token_ids"), len(ids_TLK)),
        phase=_phase_rows(rows.get("phase"), len(ids_TLK)),
        expert_ids=id_rows(ids_TLK, "experts"),
        gate_weights=None if gates is None else float_rows(gates, "gate_weights"),
        router_logits=None if logits is None else float_rows(logits, "router_logits"),
    )


def _phase_rows(phase: np.ndarray | None, length: int) -> Tensor:
    if phase is None:
        return torch.zeros(length, dtype=torch.uint8)
    if (
        phase.shape != (length,)
        or phase.dtype.kind not in "iub"
        or (phase.size and not 0 <= phase.min() <= phase.max() <= 1)
    ):
        raise SpecmoeError("phase must hold a 0 (prefill) or 1 (decode) for every token")
    return torch.from_numpy(phase.astype(np.uint8))


def _hidden_rows(raw: np.ndarray, name: str) -> Tensor:
    if name == "hidden":
        return float_rows(raw, name, keep_half=True)
    if raw.dtype != np.uint16:
        raise SpecmoeError(f"{name} has dtype {raw.dtype}, expected bfloat16 numbers as uint16")
    return torch.from_numpy(raw.astype(np.uint16)).view(torch.bfloat16)


def _recognises(path: Path, head: bytes) -> bool:
    if path.suffix != ".npz" or not head.startswith(b"PK\x03\x04"):
        return False
    try:
        with NpzFile(path) as file:
            return "experts" in file and "seq_offsets" in file
    except Exception:  # a damaged archive can raise anything
        return False


IMPORTER = Importer(
    name="npz",
    about="an .npz of experts [N, L, K], token_ids [N] and seq_offsets [D+1], as export-trace writes it",
    read=read,
    recognises=_recognises,
    takes_axes=True,
)
