"""Import JSONL rows of dataset, problem_id, layer, token_idx, experts and gating_probs.

Format: ``routing_data_collected/README.md`` of github.com/Mario928/speculative-moe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._rows import Entries, Oddities, Survey, document_name
from specmoe.sources.importers._text import Lines, bad_line, blocks, floats, head_of, integers, objects, parsed
from specmoe.sources.importers.base import (
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.sources.importers.grouping import Grouping, facts_of, place_of
from specmoe.trace import Phase

__all__ = ["IMPORTER"]

_MOST_SEGMENTS = 1_000_000
# Fields that differ within a document, and so say nothing of it.
_OF_A_TOKEN = {"layer", "token_idx", "experts", "gating_probs"}


@dataclass(frozen=True)
class _Segment:
    """Neighbouring lines of one document: byte offsets and the first line's number."""

    file: Path
    start: int
    stop: int
    line: int


@dataclass
class _Document:
    domain: str
    facts: dict[str, str]
    segments: list[_Segment] = field(default_factory=list)


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open such a file, or a folder of them.

    A document is one (dataset, problem_id); where rows have neither, one file. Its rows may lie anywhere.

    Raises:
        SpecmoeError: a line is no such row, a place is claimed twice, or some rows have gating_probs and others not.
    """
    survey, documents = Survey(), dict[str, _Document]()
    weighted: bool | None = None
    segments = 0
    for file in files_of(path, ".jsonl"):
        for lines in blocks(file):
            rows = objects(lines)
            weighted = _has_weights(lines, rows, weighted)
            survey.add(_entries(lines, rows, weighted))
            segments += _index(lines, rows, documents, document_name(path, file), place_of(path, file))
            if segments > _MOST_SEGMENTS:
                raise SpecmoeError(f"{path}: its documents' rows lie mixed; sort the file by dataset and problem_id")
    layers_L = survey.layers_L(path)
    warnings: list[str] = []
    slots = survey.top_k
    fused = survey.fused_slots(layers_L, warnings)
    topology = topology_of(options, layers=len(layers_L), experts=survey.experts, top_k=survey.top_k)
    grouping = Grouping(options.group_by)
    for document in documents.values():
        grouping.add(np.zeros(0, np.int64), None, None, facts=document.facts)
    groups = dict(zip(documents, grouping.groups(warnings), strict=True))
    return ForeignTrace(
        topology=topology,
        fields=("token_ids", "phase", "expert_ids") + (("gate_weights",) if weighted else ()),
        documents=_documents(documents, groups, layers_L, slots, bool(weighted), warnings),
        count=len(documents),
        settings={"layers": layers_L.tolist()},
        warnings=warnings,
        fused=fused,
    )


def _has_weights(lines: Lines, rows: list[dict[str, Any]], before: bool | None) -> bool | None:
    found = ["gating_probs" in row for row in rows]
    if not found or (all(found) and before is not False) or not (any(found) or before):
        return before if not found else found[0]
    wrong = found.index(not (found[0] if before is None else before))
    raise bad_line(lines.path, int(lines.number_N[wrong]), "some rows have gating_probs and others have none")


def _entries(lines: Lines, rows: list[dict[str, Any]], weighted: bool | None) -> Entries:
    def columns(text: list[bytes]) -> tuple[np.ndarray, ...]:
        chosen = rows[: len(text)]
        token_R, layer_R = (integers([row[name] for row in chosen]) for name in ("token_idx", "layer"))
        experts = [row["experts"] for row in chosen]
        count_R = np.fromiter(map(len, experts), np.int64, len(experts))
        expert_N = integers(list(chain.from_iterable(experts)))
        if (token_R < 0).any():
            raise ValueError
        if not weighted:
            return token_R, layer_R, count_R, expert_N
        weights = [row["gating_probs"] for row in chosen]
        if list(map(len, weights)) != list(map(len, experts)):
            raise ValueError
        return token_R, layer_R, count_R, expert_N, floats(list(chain.from_iterable(weights)))

    expected = "whole numbers token_idx and layer, and equally long lists experts and gating_probs"
    token_R, layer_R, count_R, expert_N, *weight_N = parsed(lines, columns, expected)
    weights = weight_N[0] if weight_N else None
    return Entries.from_rows(lines.path, token_R, layer_R, count_R, expert_N, weights, lines.number_N)


def _index(
    lines: Lines, rows: list[dict[str, Any]], documents: dict[str, _Document], name: str, place: dict[str, str]
) -> int:
    """Note where each document's lines lie; returns how many segments that added."""
    added = position = 0
    for (dataset, problem), group in groupby(rows, key=lambda row: (row.get("dataset"), row.get("problem_id"))):
        count = sum(1 for _ in group)
        part, first = lines.part(position, position + count), rows[position]
        position += count
        doc_id = "/".join(str(key) for key in (dataset, problem) if key is not None) or name
        if (document := documents.get(doc_id)) is None:
            row = {key: value for key, value in first.items() if key not in _OF_A_TOKEN}
            document = _Document("" if dataset is None else str(dataset), {**facts_of(row), **place})
            documents[doc_id] = document
        segment = _Segment(part.path, int(part.offset_N[0]), part.end, int(part.number_N[0]))
        last = document.segments[-1] if document.segments else None
        if last is not None and last.file != segment.file:
            raise SpecmoeError(f"{last.file} and {segment.file} both hold {doc_id}; import them one by one")
        if last is not None and last.stop == segment.start:
            document.segments[-1] = _Segment(last.file, last.start, segment.stop, last.line)
        else:
            document.segments.append(segment)
            added += 1
    return added


def _documents(
    documents: dict[str, _Document],
    groups: dict[str, str],
    layers_L: np.ndarray,
    top_k: int,
    weighted: bool,
    warnings: list[str],
) -> Iterator[ImportedDocument]:
    oddities = Oddities()
    for doc_id, document in documents.items():
        parts = [
            _entries(lines, objects(lines), weighted)
            for segment in document.segments
            for lines in blocks(segment.file, start=segment.start, stop=segment.stop, line=segment.line)
        ]
        placed = Entries.joined(parts).place(layers_L, top_k)
        oddities.count(placed)
        record = placed.record(np.full(len(placed.token_T), Phase.DECODE))
        yield ImportedDocument(doc_id, record, document.domain, groups[doc_id])
    warnings += oddities.warnings()


def _recognises(path: Path, head: bytes) -> bool:
    line = head_of(path, head, ".jsonl").lstrip().split(b"\n", 1)[0]
    return line.startswith(b"{") and all(key in line for key in (b'"layer"', b'"token_idx"', b'"experts"'))


IMPORTER = Importer(
    name="problem-jsonl",
    about="JSONL rows of dataset, problem_id, layer, token_idx, experts, gating_probs: generated tokens of vLLM",
    read=read,
    recognises=_recognises,
    group_by="dataset; problem_id; any other field of a document's first row; file; folder",
)
