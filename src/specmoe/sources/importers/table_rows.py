"""Import JSONL, CSV or TSV rows of anybody's: a token with its layers, a layer of a token, or one expert of it.

What the columns hold is told by their names, or by the user with ``--map``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._columns import AmbiguousColumns
from specmoe.sources.importers._layout import Layout, layout_of
from specmoe.sources.importers._rows import Entries, Oddities, Placed, Survey, document_name, in_range
from specmoe.sources.importers._streams import put, temporary_file
from specmoe.sources.importers._tables import Table, first_table, read_tables
from specmoe.sources.importers._text import bad_line, head_of, parsed
from specmoe.sources.importers.base import (
    UNKNOWN_TOKEN,
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.trace import Phase

__all__ = ["IMPORTER"]

_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
_LARGEST_SLOT = 32766
# One expert of a token in a layer. slot: -1 where the order of rows is that of the slots.
_ENTRY = np.dtype(
    [
        ("document", "i8"),
        ("token", "i8"),
        ("layer", "i4"),
        ("slot", "i2"),
        ("expert", "i2"),
        ("weight", "f4"),
        ("line", "i8"),
        ("token_id", "i4"),
        ("phase", "i1"),
    ]
)


@dataclass(frozen=True)
class _Document:
    """What rows say of a document as a whole."""

    number: int
    file: Path
    name: str
    domain: str
    group: str


@dataclass
class _Source:
    """The files, and what reading them tells.

    Attributes:
        documents: by file, domain and own name, numbered in the order in which they appear.
        weighted: whether rows have gate weights. phased: whether they have a phase. used: field → column.
        unused: columns that nothing is made of.
    """

    path: Path
    files: list[Path]
    given: Mapping[str, str]
    documents: dict[tuple[Path, str, str], _Document] = field(default_factory=dict)
    weighted: bool | None = None
    phased: bool = False
    used: dict[str, str] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[Entries, np.ndarray]]:
        """All rows in the order of the files, as entries and as an array of :data:`_ENTRY`."""
        for file in self.files:
            layout: Layout | None = None
            lengths: dict[int, int] = {}
            for table in filter(len, read_tables(file)):
                if layout is None:
                    layout = layout_of(table, self.given, str(file))
                    self._note(layout, table)
                yield self._part(table, layout, lengths)

    def file_of(self, part: np.ndarray) -> Path:
        """The file that a document's rows are from."""
        return list(self.documents.values())[int(part["document"][0])].file

    def _note(self, layout: Layout, table: Table) -> None:
        if self.weighted not in {None, layout.weighted}:
            raise bad_line(table.lines.path, 1, "this file has gate weights and others have none, or the reverse")
        self.weighted = layout.weighted
        self.phased |= layout.phase is not None
        for name, column in layout.used().items():
            self.used.setdefault(name, column)
        known = {*layout.experts, *layout.weights, *layout.used().values()}
        self.unused |= dict.fromkeys(name for name in table.names if name not in known)

    def _part(self, table: Table, layout: Layout, lengths: dict[int, int]) -> tuple[Entries, np.ndarray]:
        lines = table.lines
        rows = parsed(lines, lambda text: layout.read(table, len(text)), layout.expected)
        document_R = self._documents(table, layout)
        token_R = rows.token_R if rows.token_R is not None else _counted(document_R, lengths)
        in_range(lines, rows.token_id_R, "token id", least=UNKNOWN_TOKEN, most=(1 << 31) - 1)
        line_P = lines.number_N[rows.row_P]
        entries = Entries.from_rows(
            lines.path, token_R[rows.row_P], rows.layer_P, rows.count_P, rows.expert_N, rows.weight_N, line_P
        )
        row_N = np.repeat(rows.row_P, rows.count_P)
        slot_N: np.ndarray | int = entries.slot_N
        if layout.single:
            slot_N = -1
            if rows.slot_R is not None:
                slot_N = in_range(lines, rows.slot_R, "slot", least=0, most=_LARGEST_SLOT)[row_N]
        found = np.empty(len(entries), _ENTRY)
        for name, values_N in (
            ("document", document_R[row_N]),
            ("token", entries.token_N),
            ("layer", entries.layer_N),
            ("slot", slot_N),
            ("expert", entries.expert_N),
            ("weight", 0 if entries.weight_N is None else entries.weight_N),
            ("line", entries.line_N),
            ("token_id", rows.token_id_R[row_N]),
            ("phase", rows.phase_R[row_N]),
        ):
            found[name] = values_N
        return entries, found

    def _documents(self, table: Table, layout: Layout) -> np.ndarray:
        """Each row's document, by number."""
        names = (layout.domain, layout.document, layout.group)
        columns = [None if name is None else _labels(table.cells(name, len(table))) for name in names]
        several = [column for column in columns if isinstance(column, list)]
        keys: list[Any] = several[0] if len(several) == 1 else list(zip(*several, strict=True))
        if not several:
            return np.full(len(table), self._document(table, *(str(column or "") for column in columns)))
        known: dict[Any, int] = {}
        for key in dict.fromkeys(keys):
            parts = iter((key,) if len(several) == 1 else key)
            labels = (str(next(parts) if isinstance(column, list) else column or "") for column in columns)
            known[key] = self._document(table, *labels)
        return np.fromiter(map(known.__getitem__, keys), np.int64, len(table))

    def _document(self, table: Table, domain: str, own: str, group: str) -> int:
        file = table.lines.path
        label, base = "/".join(filter(None, (domain, own))), document_name(self.path, file)
        name = base if not label else f"{base}:{label}" if self.path.is_dir() else label
        new = _Document(len(self.documents), file, name, domain, group)
        known = self.documents.setdefault((file, domain, own), new)
        if known.group != group:
            raise bad_line(
                file,
                int(table.lines.number_N[0]),
                f"about here rows of {name} are of the group {group!a}, before of {known.group!a}; if these are "
                "documents of their own, say what tells them apart with --map document=COLUMN",
            )
        return known.number


def _labels(cells: list[Any]) -> str | list[str]:
    """Each cell as text; once if all are the same."""
    if cells.count(cells[0]) == len(cells):
        return _label(cells[0])
    try:
        known = {cell: _label(cell) for cell in set(cells)}
    except TypeError:  # of JSON, not everything can be a key
        return list(map(_label, cells))
    return [known[cell] for cell in cells]


def _label(cell: Any) -> str:
    return "" if cell is None else str(cell).encode("utf-8", "replace").decode()[:500]


def _counted(document_R: np.ndarray, lengths: dict[int, int]) -> np.ndarray:
    """Numbers of tokens that have none: the rows of each document in turn, ``lengths`` of them before."""
    token_R = np.empty(len(document_R), np.int64)
    for number in np.unique(document_R).tolist():
        rows = np.flatnonzero(document_R == number)
        token_R[rows] = np.arange(len(rows)) + lengths.get(number, 0)
        lengths[number] = lengths.get(number, 0) + len(rows)
    return token_R


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a table of rows, or a folder of them.

    A document is what a column names it, within one domain of one file; without such a column, a file is one. Memory
    holds the longest document if documents lie one after the other; else rows are sorted by way of a temporary file
    beside the trace.

    Raises:
        SpecmoeError: a column is missing, or several may be one; a row does not fit the columns; a place is claimed
            twice; or some files have gate weights and others not.
    """
    source = _Source(path, files_of(path, *_SUFFIXES), options.columns)
    survey, found = Survey(), set[int]()
    last, together, least_slot = -1, True, _LARGEST_SLOT
    for entries, part in source.parts():
        survey.add(entries)
        if len(part):
            numbers = part["document"]
            together = together and int(numbers[0]) >= last and bool((np.diff(numbers) >= 0).all())
            last = int(numbers[-1])
            found.update(np.unique(numbers).tolist())
            survey.top_k = max(survey.top_k, int(part["slot"].max()) + 1)
            least_slot = min(least_slot, int(part["slot"].min()))
    layers_L = survey.layers_L(path)
    first_slot = 1 if least_slot == 1 else 0
    top_k = survey.top_k - first_slot
    if least_slot < 0:
        top_k = max(int(_numbered(part, source)["slot"].max()) + 1 for part in _by_document(source, together=together))
    topology = topology_of(options, layers=len(layers_L), experts=survey.experts, top_k=top_k)
    warnings = []
    if not source.phased:
        warnings.append("no column says which tokens the model wrote; all count as prefill")
    if source.unused:
        warnings.append(f"columns that nothing was made of: {', '.join(source.unused)[:200]}")
    return ForeignTrace(
        topology=topology,
        fields=("token_ids", "phase", "expert_ids") + (("gate_weights",) if source.weighted else ()),
        documents=_documents(source, layers_L, top_k, first_slot, warnings, together=together),
        count=len(found),
        settings={"layers": layers_L.tolist(), "columns": source.used},
        warnings=warnings,
    )


def _by_document(source: _Source, *, together: bool) -> Iterator[np.ndarray]:
    """All of a document's rows at a time."""
    if not together:
        yield from _sorted(source)
        return
    pending: list[np.ndarray] = []
    for _, part in source.parts():
        for piece in _pieces(part):
            if pending and piece["document"][0] != pending[0]["document"][0]:
                yield np.concatenate(pending)
                pending = []
            pending.append(piece)
    if pending:
        yield np.concatenate(pending)


def _sorted(source: _Source) -> Iterator[np.ndarray]:
    """The same for documents whose rows lie mixed: each block's are sorted and put away, and fetched by document."""
    places: dict[int, list[tuple[int, int]]] = {}
    with temporary_file() as file:
        for _, part in source.parts():
            for piece in _pieces(part[np.argsort(part["document"], kind="stable")]):
                places.setdefault(int(piece["document"][0]), []).append((file.tell(), piece.nbytes))
                put(file, piece.tobytes(), source.path)
        for number in sorted(places):
            content = bytearray()
            for start, size in places[number]:
                file.seek(start)
                content += file.read(size)
            yield np.frombuffer(content, _ENTRY)


def _pieces(part: np.ndarray) -> list[np.ndarray]:
    """Neighbouring rows of one document."""
    return np.split(part, np.flatnonzero(np.diff(part["document"])) + 1) if len(part) else []


def _numbered(part: np.ndarray, source: _Source) -> np.ndarray:
    """A document's rows with slots in the order of the rows, where rows have none."""
    if (part["slot"] >= 0).all():
        return part
    part = part[np.lexsort((part["line"], part["layer"], part["token"]))]
    new_N = np.ones(len(part), bool)
    new_N[1:] = (np.diff(part["token"]) != 0) | (np.diff(part["layer"]) != 0)
    start_N = np.maximum.accumulate(np.where(new_N, np.arange(len(part)), 0))
    slot_N = np.arange(len(part)) - start_N
    order = np.lexsort((part["line"], part["expert"], part["layer"], part["token"]))
    same_N = np.ones(len(part) - 1, bool)
    for name in ("token", "layer", "expert"):
        same_N &= part[name][order[1:]] == part[name][order[:-1]]
    again = order[1:][same_N & (part["expert"][order[1:]] >= 0)]
    if len(again):
        row = part[again[part["line"][again].argmin()]]
        raise bad_line(
            source.file_of(part),
            int(row["line"]),
            f"expert {row['expert']} of layer {row['layer']} for the same token {row['token']} a second time; keep "
            "each run in a file of its own, or say what tells documents apart with --map document=COLUMN",
        )
    if int(slot_N.max()) > _LARGEST_SLOT:
        raise SpecmoeError(f"{source.file_of(part)}: {int(slot_N.max()) + 1:,} experts for one token in one layer")
    part["slot"] = slot_N
    return part


def _documents(
    source: _Source, layers_L: np.ndarray, top_k: int, first_slot: int, warnings: list[str], *, together: bool
) -> Iterator[ImportedDocument]:
    oddities, renumbered = Oddities(), 0
    documents = list(source.documents.values())
    for part in _by_document(source, together=together):
        document = documents[int(part["document"][0])]
        part, restarts = _in_order(_numbered(part, source))
        renumbered += restarts
        entries = Entries(
            document.file,
            part["token"],
            part["layer"].astype(np.int64),
            part["slot"].astype(np.int64) - first_slot,
            part["expert"].astype(np.int64),
            part["weight"] if source.weighted else None,
            part["line"],
        )
        placed = entries.place(layers_L, top_k)
        oddities.count(placed)
        phase_T = _of_tokens(part, placed, "phase", document.file)
        token_ids_T = _of_tokens(part, placed, "token_id", document.file)
        yield ImportedDocument(document.name, placed.record(phase_T, token_ids_T), document.domain, document.group)
    if renumbered:
        warnings.append(
            f"in {renumbered:,} documents, generated tokens have numbers that tokens of the prompt have, too; "
            "they were put behind the prompt"
        )
    warnings += oddities.warnings()


def _in_order(part: np.ndarray) -> tuple[np.ndarray, bool]:
    """Rows with tokens numbered through where the generated ones are counted anew."""
    decode_N = part["phase"] == Phase.DECODE
    if decode_N.all() or not decode_N.any():
        return part, False
    place_N = np.unique(part["token"], return_inverse=True)[1] * (int(part["layer"].max()) + 1) + part["layer"]
    if not np.isin(np.unique(place_N[decode_N]), place_N[~decode_N]).any():
        return part, False
    part = part.copy()
    part["token"][decode_N] += part["token"][~decode_N].max() + 1 - part["token"][decode_N].min()
    return part, True


def _of_tokens(part: np.ndarray, placed: Placed, name: str, file: Path) -> np.ndarray:
    """What all rows of a token say, or those that say anything (-1 is nothing)."""
    token_N = np.searchsorted(placed.token_T, part["token"])
    values_T = np.full(len(placed.token_T), -1, np.int64)
    np.maximum.at(values_T, token_N, part[name])
    if (wrong_N := (part[name] >= 0) & (part[name] != values_T[token_N])).any():
        row = part[int(wrong_N.argmax())]
        raise bad_line(
            file, int(row["line"]), f"token {row['token']} has the {name} {row[name]} here and another elsewhere"
        )
    return values_T


def _recognises(path: Path, head: bytes) -> bool:
    head = head_of(path, head, *_SUFFIXES)
    try:
        table = first_table(path, head)
        if table is None:
            return False
        layout_of(table, {}, str(path))
    except AmbiguousColumns:
        return True  # so that reading it says which
    except (SpecmoeError, ValueError, RecursionError):
        return False
    return True


IMPORTER = Importer(
    name="rows",
    about="JSONL, CSV or TSV of anybody's: rows of tokens, layers or single experts under usual names, or --map",
    read=read,
    recognises=_recognises,
)
