"""Import MoE-Beyond's CSV files, one per prompt: layer, batch number, token as a string, list of expert ids.

Format: ``expert_activation_scripts/generate_deepseek_logs_eamc.py`` (and ``..._v2.py``, which adds the router's input)
of github.com/ngavhane/moe-beyond.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._rows import Entries, Survey, document_name
from specmoe.sources.importers._streams import open_text
from specmoe.sources.importers._text import bad_line, csv_reader, floats, head_of, integers
from specmoe.sources.importers.base import (
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.trace import RoutingRecord

__all__ = ["IMPORTER"]

_COLUMNS = ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"]
_HIDDEN = "Token Embedding Vector"
_TOKENIZER = "token strings, numbered in order of appearance"
_ROWS_AT_ONCE = 2000
_LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class _Chunk:
    """Some rows. Arrays are [R].

    Attributes:
        entries: with the number of the row in its chunk for a token. hidden_RD: float32, None if not read.
    """

    layer_R: np.ndarray
    batch_R: np.ndarray
    tokens: list[str]
    entries: Entries
    hidden_RD: np.ndarray | None


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open one prompt's file, or a folder of them.

    A document is one batch number of one file. Its tokens are the rows of each layer, in their order. Each distinct
    token string is numbered when it first appears, over the files in the order of their names.

    Raises:
        SpecmoeError: a file is no such CSV or damaged, two layers disagree about a token, or some files have the
            router's input and others not.
    """
    files = files_of(path, ".csv")
    survey, width, count = Survey(), None, 0
    for file in files:
        found = _hidden_size(file)
        if width not in {None, found}:
            raise SpecmoeError(f"{file} holds vectors of width {found}, {files[0]} of {width}; import them one by one")
        width = found
        batches: set[int] = set()
        for chunk in _chunks(file, 0):
            survey.add(chunk.entries)
            batches |= set(np.unique(chunk.batch_R).tolist())
        count += len(batches)
    layers_L = survey.layers_L(path)
    topology = topology_of(
        options, layers=len(layers_L), experts=survey.experts, top_k=survey.top_k, hidden_size=width or 0
    )
    warnings: list[str] = []
    return ForeignTrace(
        topology=topology,
        fields=("token_ids", "phase", "expert_ids") + (("hidden",) if width else ()),
        documents=_documents(path, files, layers_L, topology.top_k, width or 0, warnings),
        count=count,
        settings={"layers": layers_L.tolist()},
        warnings=warnings,
        tokenizer=_TOKENIZER,
    )


def _hidden_size(file: Path) -> int:
    """Width of the vectors in the file's first row, 0 if it has no column of them."""
    with open_text(file) as stream:
        head = stream.read(1 << 16).splitlines()
    names = head[0].decode(errors="replace").split(",") if head else []
    if names[: len(_COLUMNS)] != _COLUMNS or names[len(_COLUMNS) :] not in ([], [_HIDDEN]):
        raise bad_line(file, 1, f"expected {','.join(_COLUMNS)}")
    if len(names) == len(_COLUMNS):
        return 0
    return next((chunk.hidden_RD.shape[1] for chunk in _chunks(file, None, 1) if chunk.hidden_RD is not None), 0)


def _chunks(file: Path, width: int | None, at_once: int = _ROWS_AT_ONCE) -> Iterator[_Chunk]:
    """Rows, some at a time; vectors of ``width``, of any width if that is None, or none if it is 0."""
    with io.TextIOWrapper(open_text(file), encoding="utf-8", newline="") as stream, csv_reader(stream) as reader:
        try:
            columns = len(next(reader, []))
            while rows := list(islice(((reader.line_num, row) for row in reader if row), at_once)):
                yield _parse(file, [number for number, _ in rows], [row for _, row in rows], columns, width)
        except UnicodeDecodeError as error:
            raise SpecmoeError(f"{file} is not UTF-8 text") from error
        except csv.Error as error:
            raise bad_line(file, reader.line_num, str(error)) from error


def _parse(file: Path, numbers: list[int], rows: list[list[str]], columns: int, width: int | None) -> _Chunk:
    try:
        return _parse_rows(file, numbers, rows, columns, width)
    except (ValueError, TypeError, RecursionError, OverflowError):
        for number, row in zip(numbers, rows, strict=True):
            try:
                _parse_rows(file, [number], [row], columns, width)
            except (ValueError, TypeError, RecursionError, OverflowError) as error:
                shown = ascii(",".join(row)[:60])
                expected = f"layer,batch,token,[ids]{',[numbers]' if columns > 4 else ''}"
                raise bad_line(file, number, f"expected {expected}, found {shown}") from error
        raise bad_line(file, numbers[0], "vectors differ in width from here on") from None


def _parse_rows(file: Path, numbers: list[int], rows: list[list[str]], columns: int, width: int | None) -> _Chunk:
    if any(len(row) != columns for row in rows):
        raise ValueError
    layer_R, batch_R = (integers([int(row[column]) for row in rows]) for column in (0, 1))
    experts = _lists(rows, 3)
    count_R = np.fromiter(map(len, experts), np.int64, len(experts))
    expert_N = integers(list(chain.from_iterable(experts)))
    line_R = np.array(numbers)
    entries = Entries.from_rows(file, np.arange(len(rows)), layer_R, count_R, expert_N, None, line_R)
    hidden_RD = None
    if columns > len(_COLUMNS) and width != 0:
        vectors = _lists(rows, len(_COLUMNS))
        with np.errstate(over="ignore"):  # a record with infinite numbers is refused later
            hidden_RD = floats(list(chain.from_iterable(vectors))).reshape(len(rows), -1).astype(np.float32)
        if {len(vector) for vector in vectors} != {width or len(vectors[0])}:
            raise ValueError
    return _Chunk(layer_R, batch_R, [row[2] for row in rows], entries, hidden_RD)


def _lists(rows: list[list[str]], column: int) -> list[list[Any]]:
    found = json.loads(f"[{','.join(row[column] for row in rows)}]")
    if len(found) != len(rows) or not all(isinstance(entry, list) for entry in found):
        raise ValueError
    return found


def _documents(
    path: Path, files: list[Path], layers_L: np.ndarray, top_k: int, width: int, warnings: list[str]
) -> Iterator[ImportedDocument]:
    vocabulary: dict[str, int] = {}
    for file in files:
        chunks = list(_chunks(file, width))
        batch_R = np.concatenate([chunk.batch_R for chunk in chunks]) if chunks else np.empty(0)
        for batch in np.unique(batch_R).tolist():
            name = document_name(path, file) + (f":{batch}" if (batch_R != batch_R[0]).any() else "")
            record = _record([_of_batch(chunk, batch) for chunk in chunks], layers_L, top_k, vocabulary)
            if record is None:
                warnings.append(f"{file}: its layers have different numbers of tokens, it was cut short; left out")
            else:
                yield ImportedDocument(name, record)


def _of_batch(chunk: _Chunk, batch: int) -> _Chunk:
    chosen_R = chunk.batch_R == batch
    if chosen_R.all():
        return chunk
    entries = chunk.entries[chosen_R[chunk.entries.token_N]]
    return _Chunk(
        chunk.layer_R[chosen_R],
        chunk.batch_R[chosen_R],
        [token for token, chosen in zip(chunk.tokens, chosen_R.tolist(), strict=True) if chosen],
        # Rows are numbered anew, without those of other batches.
        replace(entries, token_N=(np.cumsum(chosen_R) - 1)[entries.token_N]),
        None if chunk.hidden_RD is None else chunk.hidden_RD[chosen_R],
    )


def _record(chunks: list[_Chunk], layers_L: np.ndarray, top_k: int, vocabulary: dict[str, int]) -> RoutingRecord | None:
    """One document's record, or None if layers differ in their numbers of tokens."""
    layer_R = np.concatenate([chunk.layer_R for chunk in chunks])
    tokens = [token for chunk in chunks for token in chunk.tokens]
    order_R = np.argsort(layer_R, kind="stable")
    present, counts = np.unique(layer_R, return_counts=True)
    if not np.array_equal(present, layers_L) or (counts != counts[0]).any():
        return None
    length = int(counts[0])
    position_R = np.empty(len(layer_R), np.int64)
    position_R[order_R] = np.tile(np.arange(length), len(layers_L))
    token_R = np.array([vocabulary.setdefault(token, len(vocabulary)) for token in tokens])
    entries, before = [], 0
    for chunk in chunks:
        numbered = position_R[before : before + len(chunk.layer_R)][chunk.entries.token_N]
        entries.append(replace(chunk.entries, token_N=numbered))
        before += len(chunk.layer_R)
    joined = Entries.joined(entries)
    token_LT = token_R[order_R].reshape(len(layers_L), length)
    if (token_LT != token_LT[0]).any():
        layer, position = np.argwhere(token_LT != token_LT[0])[0]
        here, first = tokens[order_R[layer * length + position]], tokens[order_R[position]]
        raise SpecmoeError(
            f"{joined.path}: token {position} is {first!a} in layer {layers_L[0]}, but {here!a} in layer "
            f"{layers_L[layer]}"
        )
    placed = joined.place(layers_L, top_k)
    if len(placed.token_T) != length:
        return None
    record = placed.record(np.zeros(length), token_LT[0])
    if chunks[0].hidden_RD is None:
        return record
    hidden_RD = np.concatenate([chunk.hidden_RD for chunk in chunks if chunk.hidden_RD is not None])
    hidden_TLD = torch.from_numpy(hidden_RD[order_R].reshape(len(layers_L), length, -1).swapaxes(0, 1).copy())
    fits = bool(hidden_TLD.isfinite().all()) and float(hidden_TLD.abs().max()) <= _LARGEST_FLOAT16
    return replace(record, hidden=hidden_TLD.half() if fits else hidden_TLD)


def _recognises(path: Path, head: bytes) -> bool:
    return head_of(path, head, ".csv").startswith(",".join(_COLUMNS).encode())


IMPORTER = Importer(
    name="moe-beyond-csv",
    about="MoE-Beyond's CSV per prompt: experts and token strings, perhaps hidden states",
    read=read,
    recognises=_recognises,
)
