"""Import colibri's ``ROUTE_TRACE`` text: one line per MoE call and row of it, ``call row layer id:gate id:gate ...``.

Format: ``c/route_trace.h`` of github.com/JustVugg/colibri.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._rows import Entries, Oddities, Survey, document_name, in_range
from specmoe.sources.importers._text import Lines, bad_line, blocks, head_of, numbers, refuse_cut
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

_SUFFIXES = (".txt", ".trace", ".log", ".route")
_ROW = re.compile(rb"\d+ \d+ \d+( -?\d+:-?\d+\.\d{4})+")
_MARK = re.compile(rb"#prompt (\S+) (\d+)")


@dataclass(frozen=True)
class _Rows:
    """Some lines. ``entries`` have the number of the line, from 0, for a token."""

    call_R: np.ndarray
    row_R: np.ndarray
    layer_R: np.ndarray
    entries: Entries

    def __len__(self) -> int:
        return len(self.call_R)


@dataclass
class _Prompt:
    """What lies between two ``#prompt`` lines, or a whole file without any.

    Attributes:
        name: as the line gives it, empty without one. tokens: how many tokens of it are given text, None if not said.
    """

    name: str = ""
    tokens: int | None = None
    parts: list[_Rows] = field(default_factory=list)


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a trace, or a folder of traces of one model.

    A file is a document, or what follows each ``#prompt`` line in it. A pass through the model ends where the layer
    no longer rises; row r of all its calls is one token. Layers that fewer than half as many rows have as the fullest
    one are left out: a layer that drafts tokens (MTP) is numbered behind the model's own.

    Raises:
        SpecmoeError: a line is of another form, or a place is claimed twice.
    """
    files = files_of(path, *_SUFFIXES)
    survey, prompts = Survey(), 0
    for file in files:
        refuse_cut(file)
        begun = False
        for mark, rows in _pieces(file):
            prompts += mark is not None or not begun
            begun = True
            survey.add(rows.entries)
    layers_L = survey.layers_L(path)
    most = max(survey.rows.values())
    full_L = np.array([layer for layer in layers_L.tolist() if 2 * survey.rows[layer] >= most])
    warnings: list[str] = []
    if len(full_L) < len(layers_L):
        left_out = ", ".join(str(layer) for layer in sorted(set(layers_L.tolist()) - set(full_L.tolist())))
        warnings.append(f"layers {left_out} have rows for fewer than half of the tokens and were left out")
    topology = topology_of(options, layers=len(full_L), experts=survey.experts, top_k=survey.top_k)
    return ForeignTrace(
        topology=topology,
        fields=("token_ids", "phase", "expert_ids", "gate_weights"),
        documents=_documents(path, files, full_L, topology.top_k, warnings),
        count=prompts,
        settings={"layers": full_L.tolist()},
        warnings=warnings,
    )


def _pieces(file: Path) -> Iterator[tuple[re.Match[bytes] | None, _Rows]]:
    """Rows, and the ``#prompt`` line right before them if there is one."""
    for block in filter(len, blocks(file)):
        marks = [index for index, line in enumerate(block.text) if line.startswith(b"#")]
        edges = [0, *marks, len(block)] if not marks or marks[0] else [*marks, len(block)]
        for start, stop in pairwise(edges):
            mark = None
            if block.text[start].startswith(b"#"):
                mark = _MARK.fullmatch(block.text[start].strip())
                if mark is None:
                    raise bad_line(file, int(block.number_N[start]), "expected '#prompt NAME TOKENS'")
                start += 1
            yield mark, _parse(block.part(start, stop))


def _parse(lines: Lines) -> _Rows:
    """All rows; those with the same number of experts, nearly always all, are parsed at once."""
    heads, experts, weights, counts = [], [], [], []
    start = 0
    for count, group in groupby(row.count(b":") for row in lines.text):
        part = lines.part(start, start := start + sum(1 for _ in group))
        text = [row.strip().replace(b":", b" ") for row in part.text]
        plain = Lines(part.path, text, part.number_N, part.offset_N, part.end)
        width = 3 + 2 * count
        gates = range(4, width, 2)
        expected = "call row layer id:gate ..."
        values = numbers(plain, expected, delimiter=" ", width=width, use=range(width), real=gates)
        heads.append([in_range(part, values[at], name, least=0) for at, name in enumerate(("call", "row", "layer"))])
        experts.append(np.stack(values[3::2], 1).reshape(-1) if count else np.empty(0, np.int64))
        weights.append(np.stack(values[4::2], 1).reshape(-1) if count else np.empty(0))
        counts.append(np.full(len(part), count))
    if not heads:
        heads, experts, weights, counts = [[np.empty(0, np.int64)] * 3], *([np.empty(0, np.int64)] for _ in range(3))
    call_R, row_R, layer_R = (np.concatenate(column) for column in zip(*heads, strict=True))
    expert_N, weight_N, count_R = np.concatenate(experts), np.concatenate(weights), np.concatenate(counts)
    own_R = np.arange(len(call_R))
    entries = Entries.from_rows(lines.path, own_R, layer_R, count_R, expert_N, weight_N, lines.number_N)
    return _Rows(call_R, row_R, layer_R, entries)


def _documents(
    path: Path, files: list[Path], layers_L: np.ndarray, top_k: int, warnings: list[str]
) -> Iterator[ImportedDocument]:
    oddities = Oddities()
    for file in files:
        prompt, number = _Prompt(), 0
        for mark, rows in _pieces(file):
            if mark is not None:
                if any(map(len, prompt.parts)):
                    yield _document(path, file, prompt, number, layers_L, top_k, oddities)
                    number += 1
                prompt = _Prompt(mark[1].decode(errors="replace"), int(mark[2]))
            prompt.parts.append(rows)
        if any(map(len, prompt.parts)):
            yield _document(path, file, prompt, number, layers_L, top_k, oddities)
    warnings += oddities.warnings()


def _document(
    path: Path, file: Path, prompt: _Prompt, number: int, layers_L: np.ndarray, top_k: int, oddities: Oddities
) -> ImportedDocument:
    call_R, row_R, layer_R = (
        np.concatenate([getattr(part, name) for part in prompt.parts]) for name in ("call_R", "row_R", "layer_R")
    )
    pass_R = _passes(call_R, row_R, layer_R)
    widest = int(row_R.max()) + 1
    if widest * (int(pass_R[-1]) + 1) > 1 << 52:
        raise SpecmoeError(f"{file}: row {widest - 1} is no possible row of a batch")
    token_R = pass_R * widest + row_R
    entries, before = [], 0
    for part in prompt.parts:
        numbered = token_R[before : before + len(part)][part.entries.token_N]
        whole = part.entries
        entries.append(
            Entries(file, numbered, whole.layer_N, whole.slot_N, whole.expert_N, whole.weight_N, whole.line_N)
        )
        before += len(part)
    placed = Entries.joined(entries).place(layers_L, top_k)
    oddities.count(placed, numbered=False)
    pass_T = placed.token_T // widest
    if prompt.tokens is not None:
        given_T = np.arange(len(pass_T)) < prompt.tokens
    else:
        # Several tokens at once are a prompt, one at a time are generated.
        given_T = (np.bincount(pass_T, minlength=1)[pass_T] > 1) | (pass_T == 0)
    name = document_name(path, file) + (f":{number}:{prompt.name}" if prompt.name else "")
    return ImportedDocument(name, placed.record(np.where(given_T, Phase.PREFILL, Phase.DECODE)))


def _passes(call_R: np.ndarray, row_R: np.ndarray, layer_R: np.ndarray) -> np.ndarray:
    """Which pass through the model each line belongs to, from 0."""
    new_R = np.zeros(len(call_R), dtype=bool)
    repeats_R = (layer_R[1:] == layer_R[:-1]) & (row_R[1:] <= row_R[:-1])
    new_R[1:] = (call_R[1:] != call_R[:-1]) & ((layer_R[1:] < layer_R[:-1]) | repeats_R)
    return np.cumsum(new_R)


def _recognises(path: Path, head: bytes) -> bool:
    rows = [row.strip() for row in head_of(path, head, *_SUFFIXES).split(b"\n")[:20]]
    whole = [row for row in rows[:-1] if row and not _MARK.fullmatch(row)]
    return bool(whole) and all(_ROW.fullmatch(row) for row in whole)


IMPORTER = Importer(
    name="colibri-route-trace",
    about="colibri's ROUTE_TRACE: experts and gate weights of every call of a MoE layer",
    read=read,
    recognises=_recognises,
)
