"""Import BigMoeOnEdge's ``route_trace v1``: a CSV file of one row per routed expert below a ``#`` preamble.

Format: ``docs/telemetry.md``, section "Route trace", of github.com/Helldez/BigMoeOnEdge.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._rows import Entries, Oddities, Survey, document_name, in_range
from specmoe.sources.importers._text import bad_line, blocks, csv_table, head_of, refuse_cut
from specmoe.sources.importers.base import (
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.trace import Phase

__all__ = ["IMPORTER"]

_REQUIRED = ("phase", "step", "layer", "slot", "expert")
_OPTIONAL = ("turn", "weight", "dropped")
_MODEL = re.compile(r"# model=(.*) arch=(\S*) n_layer=(\d+) n_expert=(\d+) n_expert_used=(\d+)")
_LAYER = re.compile(r"# layer=(\d+) expert_bytes=(\d+) dense_bytes=(\d+)")


@dataclass(frozen=True)
class _Preamble:
    """The model's static facts. Zero experts or slots: the writer did not know."""

    model: str
    arch: str
    experts: int
    top_k: int
    expert_bytes: dict[int, int]
    dense_bytes: dict[int, int]


@dataclass
class _Contents:
    """What the first pass learns of all files."""

    survey: Survey = field(default_factory=Survey)
    turns: int = 0
    weights: int = 0
    first_unknown_weight: SpecmoeError | None = None
    dropped: int = 0
    unplaced: int = 0
    entries: int = 0


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a route trace, or a folder of them from one model.

    A document is one turn of one file. MoE layers are those that occur, in rising order.

    Raises:
        SpecmoeError: a file is no route trace of version 1 or damaged, files are of different models, an expert is
            beyond what the preamble says, or some weights are known and others are not.
    """
    files = files_of(path, ".csv")
    preamble = _preamble_of(files)
    contents = _survey(path, files, preamble)
    layers_L = contents.survey.layers_L(path)
    if options.model_id == "unknown" and preamble.model:
        options = dataclasses.replace(options, model_id=preamble.model)
    sizes = [preamble.expert_bytes.get(layer, 0) for layer in layers_L.tolist()]
    warnings: list[str] = []
    if contents.unplaced:
        warnings.append(f"{contents.unplaced:,} rows have a negative step, so no token of theirs is known; left out")
    if contents.dropped:
        warnings.append(
            f"{contents.dropped:,} of {contents.entries:,} experts were chosen by the router and then dropped by the "
            "engine; they stay, as the router's choice"
        )
    topology = topology_of(
        options,
        layers=len(layers_L),
        experts=max(preamble.experts, contents.survey.experts),
        top_k=max(preamble.top_k, contents.survey.top_k),
        bytes_per_expert=tuple(sizes) if all(sizes) else None,
    )
    return ForeignTrace(
        topology=topology,
        fields=("token_ids", "phase", "expert_ids") + (("gate_weights",) if contents.weights else ()),
        documents=_documents(path, files, layers_L, topology.top_k, bool(contents.weights), warnings),
        count=contents.turns,
        experts_known=preamble.experts > 0,
        settings=_settings(preamble, layers_L),
        warnings=warnings,
    )


def _settings(preamble: _Preamble, layers_L: np.ndarray) -> dict[str, Any]:
    layers = layers_L.tolist()
    return {
        "model": preamble.model,
        "arch": preamble.arch,
        "layers": layers,
        "expert_bytes": [preamble.expert_bytes.get(layer, 0) for layer in layers],
        "dense_bytes": [preamble.dense_bytes[layer] for layer in sorted(preamble.dense_bytes)],
    }


def _preamble_of(files: list[Path]) -> _Preamble:
    first = _read_preamble(files[0])
    for file in files[1:]:
        if _read_preamble(file) != first:
            raise SpecmoeError(f"{files[0]} and {file} are of different models; import them one by one")
    return first


def _read_preamble(file: Path) -> _Preamble:
    head = next(iter(blocks(file)), None)
    lines = [] if head is None else [row.decode(errors="replace").strip() for row in head.text]
    lines = lines[: next((index for index, row in enumerate(lines) if not row.startswith("#")), len(lines))]
    if not lines or not re.fullmatch(r"# route_trace v\d+", lines[0]):
        raise SpecmoeError(f"{file} does not begin with '# route_trace v1'")
    if lines[0] != "# route_trace v1":
        raise SpecmoeError(f"{file} is a {lines[0][2:]}; only v1 is known")
    model = next((found for found in map(_MODEL.fullmatch, lines) if found), None)
    if model is None:
        raise SpecmoeError(f"{file} lacks the line '# model=... arch=... n_layer=... n_expert=... n_expert_used=...'")
    sizes = [tuple(map(int, found.groups())) for found in map(_LAYER.fullmatch, lines) if found]
    return _Preamble(
        # The name without the folder, which says nothing of the model; the writer may have been on any system.
        model=PureWindowsPath(model[1]).name,
        arch=model[2],
        experts=int(model[4]),
        top_k=int(model[5]),
        expert_bytes={layer: expert for layer, expert, _ in sizes},
        dense_bytes={layer: dense for layer, _, dense in sizes},
    )


def _turns(file: Path) -> Iterator[tuple[int, Entries, np.ndarray, dict[str, Any]]]:
    """Each block's rows by turn: the turn, its entries with tokens 2·step + phase, weights, and what is odd.

    Weights are kept out of the entries because NaN stands for "not known" here.
    """
    for lines, columns in csv_table(file, _REQUIRED, _OPTIONAL, real={"weight"}):
        phase_N = in_range(lines, columns["phase"], "phase", least=0, most=max(Phase))
        step_N = in_range(lines, columns["step"], "step", least=-1 << 31, most=1 << 40)
        turn_N = in_range(lines, columns.get("turn", np.zeros(len(lines), np.int64)), "turn", least=0)
        weight_N = columns.get("weight", np.full(len(lines), np.nan))
        dropped_N = columns.get("dropped", np.zeros(len(lines)))
        token_N = 2 * step_N + phase_N
        entries = Entries(file, token_N, columns["layer"], columns["slot"], columns["expert"], None, lines.number_N)
        edges = [0, *(np.flatnonzero(np.diff(turn_N)) + 1).tolist(), len(lines)]
        for start, stop in pairwise(edges):
            if start < stop:
                part = slice(start, stop)
                known = step_N[part] >= 0
                odd = {"dropped": int(np.count_nonzero(dropped_N[part])), "unplaced": int(np.count_nonzero(~known))}
                yield int(turn_N[start]), entries[part][known], weight_N[part][known], odd


def _survey(path: Path, files: list[Path], preamble: _Preamble) -> _Contents:
    contents = _Contents()
    for file in files:
        refuse_cut(file)
        seen: list[int] = []
        for turn, entries, weight_N, odd in _turns(file):
            if not seen or turn != seen[-1]:
                if turn in seen:
                    line = int(entries.line_N[0]) if len(entries) else 0
                    raise bad_line(file, line, f"turn {turn} begins a second time; keep each run in a file of its own")
                seen.append(turn)
            _check_preamble(entries, preamble)
            contents.survey.add(entries)
            contents.entries += len(entries)
            contents.dropped += odd["dropped"]
            contents.unplaced += odd["unplaced"]
            unknown = np.isnan(weight_N)
            contents.weights += int(np.count_nonzero(~unknown))
            if contents.first_unknown_weight is None and unknown.any():
                line = int(entries.line_N[unknown.argmax()])
                contents.first_unknown_weight = bad_line(file, line, "gate weight nan, but other rows have weights")
        contents.turns += len(seen)
    if contents.weights and contents.first_unknown_weight is not None:
        raise contents.first_unknown_weight
    return contents


def _check_preamble(entries: Entries, preamble: _Preamble) -> None:
    for what, values_N, limit in (
        ("expert", entries.expert_N, preamble.experts),
        ("slot", entries.slot_N, preamble.top_k),
    ):
        if limit and len(values_N) and values_N.max() >= limit:
            at = int((values_N >= limit).argmax())
            line = int(entries.line_N[at])
            raise bad_line(entries.path, line, f"{what} {values_N[at]}, but the preamble says there are {limit}")


def _documents(
    path: Path, files: list[Path], layers_L: np.ndarray, top_k: int, weighted: bool, warnings: list[str]
) -> Iterator[ImportedDocument]:
    oddities = Oddities()
    for file in files:
        turn, parts = -1, []
        for number, entries, weight_N, _ in _turns(file):
            if parts and number != turn:
                yield _document(path, turn, parts, layers_L, top_k, oddities)
                parts = []
            turn = number
            parts.append(dataclasses.replace(entries, weight_N=weight_N if weighted else None))
        if parts:
            yield _document(path, turn, parts, layers_L, top_k, oddities)
    warnings += oddities.warnings()


def _document(
    path: Path, turn: int, parts: list[Entries], layers_L: np.ndarray, top_k: int, oddities: Oddities
) -> ImportedDocument:
    placed = Entries.joined(parts).place(layers_L, top_k)
    phase_T = placed.token_T % 2
    steps = dataclasses.replace(placed, token_T=placed.token_T // 2)
    oddities.count(steps)
    file = document_name(path, parts[0].path)
    return ImportedDocument(f"{file}:turn-{turn}", steps.record(phase_T), group=file)


def _recognises(path: Path, head: bytes) -> bool:
    return head_of(path, head, ".csv").startswith(b"# route_trace v")


IMPORTER = Importer(
    name="bigmoeonedge-csv",
    about="BigMoeOnEdge --route-trace: experts and gate weights of prefill and decode, bytes per expert",
    read=read,
    recognises=_recognises,
)
