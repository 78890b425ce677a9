"""What an importer is: it turns one foreign layout into a topology and a stream of documents.

A format that says nothing of the tokens, the gate weights or the number of experts leaves them out; nothing is made
up. ``docs/trace-formats.md`` has a field table for every importer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.files import sha256_file
from specmoe.sources.fused_slots import FusedSlots
from specmoe.topology import Topology
from specmoe.trace import RoutingRecord

__all__ = [
    "UNKNOWN_TOKEN",
    "ForeignTrace",
    "ImportOptions",
    "ImportedDocument",
    "Importer",
    "content_hash",
    "files_below",
    "files_of",
    "fingerprint",
    "topology_of",
    "written_to",
]

_written_to: ContextVar[Path | None] = ContextVar("written_to", default=None)

# What stands in ``token_ids`` where a format does not say which token it was.
UNKNOWN_TOKEN = -1
# Files that are read as text, and so may be packed with gzip.
_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".trace", ".log", ".route")


@dataclass(frozen=True)
class ImportOptions:
    """What the user knows and a file may not say.

    Attributes:
        model_id: name of the model that was traced.
        experts: experts in a layer; None to take the format's word or, failing that, one more than the largest id.
        experts_per_layer: of each MoE layer where they differ; the largest is ``experts``.
        axes: names of the axes of arrays of experts, in order; see :mod:`specmoe.sources.importers.axes`. None to take
            them for tokens, layers, k, unless the number of tokens says otherwise.
        group_by: what documents are grouped by, a field or ``file`` or ``folder``; None to let the importer tell.
        columns: for the format ``rows``: what a column holds → its name in the file.
    """

    model_id: str = "unknown"
    experts: int | None = None
    experts_per_layer: tuple[int, ...] | None = None
    axes: tuple[str, ...] | None = None
    group_by: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedDocument:
    """One document (a prompt, a request, a run) as it goes into the trace.

    Attributes:
        doc_id: unique in the trace. domain: what the format groups documents by; empty if it does not.
        record: its routing. group: documents of one group stay on one side of a split, such as the turns of a chat.
    """

    doc_id: str
    record: RoutingRecord
    domain: str = ""
    group: str = ""


@dataclass(frozen=True)
class ForeignTrace:
    """A foreign file, opened.

    Attributes:
        topology: its shape, with hidden size 0 where it holds no hidden states.
        fields: what every document's record holds (``hidden`` may be absent from some).
        documents: streamed; may be iterated over once.
        count: documents in all, None where that takes reading all of it.
        experts_known: whether the file says how many experts a layer has; router logits say so too.
        settings: what the file says of how it was made, for the manifest.
        warnings: what was dropped or looks doubtful, one line each; complete when ``documents`` is exhausted.
        tokenizer: name of the tokenizer that the token ids belong to, if known.
        routers: the routers' weights [L, E, D] and biases [L, E] or None, if the format brings them.
        fused: slots of a shared expert that the records still hold and ``topology`` does not count; the one loop that
            imports takes them out.
    """

    topology: Topology
    fields: tuple[str, ...]
    documents: Iterable[ImportedDocument]
    count: int | None = None
    experts_known: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tokenizer: str = ""
    routers: tuple[Tensor, Tensor | None] | None = None
    fused: FusedSlots | None = None


@dataclass(frozen=True)
class Importer:
    """One format.

    Attributes:
        name: as ``--format`` takes it. about: one line: whose format it is and what it holds.
        read: opens a file or folder; raises :class:`SpecmoeError` if it is not of this format or damaged.
        recognises: whether a file or folder looks like this format, from its name and its first 64 KiB (empty for a
            folder, unpacked if the file is gzip). Cheap, and never an error.
        takes_axes: whether it heeds :attr:`ImportOptions.axes`.
        group_by: what ``--group-by`` may name here, in words; empty where nothing can be named.
    """

    name: str
    about: str
    read: Callable[[Path, ImportOptions], ForeignTrace]
    recognises: Callable[[Path, bytes], bool]
    takes_axes: bool = False
    group_by: str = ""


def topology_of(
    options: ImportOptions,
    *,
    layers: int,
    experts: int,
    top_k: int,
    hidden_size: int = 0,
    bytes_per_expert: tuple[int, ...] | None = None,
) -> Topology:
    """A topology from what a file says; ``options.experts`` may only widen the number of experts.

    Args:
        bytes_per_expert: of each layer; None where the file does not say.

    Raises:
        SpecmoeError: no model has this shape, or the file has more experts than the user says.
    """
    if options.experts is not None:
        if options.experts < experts:
            raise SpecmoeError(f"--experts {options.experts} is too few: expert id {experts - 1} occurs")
        experts = options.experts
    counts = options.experts_per_layer
    if counts is not None and (len(counts) != layers or min(counts) < top_k):
        raise SpecmoeError(
            f"--experts names {len(counts)} layers with at least {min(counts)} experts each, but there are {layers} "
            f"layers, and a token is routed to {top_k} experts of each; give one number, or one for each layer"
        )
    try:
        return Topology(
            model_id=options.model_id,
            layers=layers,
            experts=experts,
            top_k=top_k,
            hidden_size=hidden_size,
            bytes_per_expert_by_layer=bytes_per_expert,
            experts_per_layer=counts,
        )
    except ValueError as error:
        raise SpecmoeError(
            f"{layers} layers of {experts} experts, top-{top_k}, width {hidden_size}, are no possible model"
        ) from error


def files_of(path: Path, *suffixes: str) -> list[Path]:
    """``path`` itself, or the files with one of ``suffixes`` anywhere below it, sorted by name.

    Behind a suffix of text files, ``.gz`` may follow.

    Raises:
        SpecmoeError: there is none.
    """
    if not path.is_dir():
        return [path]
    packed = tuple(f"{suffix}.gz" for suffix in suffixes if suffix in _TEXT_SUFFIXES)
    found = [file for file in files_below(path) if file.name.lower().endswith((*suffixes, *packed))]
    if not found:
        raise SpecmoeError(f"{path} holds no {' or '.join(suffixes)} file")
    return found


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """While an import writes to ``out``, nothing in there is part of what is imported."""
    token = _written_to.set(out.resolve())
    try:
        yield
    finally:
        _written_to.reset(token)


def files_below(path: Path) -> list[Path]:
    """All files anywhere below a folder, sorted by name, but none of the trace that is being written there."""
    out = _written_to.get()
    if out is None or path.resolve() not in out.parents:
        return sorted(file for file in path.rglob("*") if file.is_file())
    inside = path / out.relative_to(path.resolve())
    return sorted(file for file in path.rglob("*") if inside not in file.parents and file.is_file())


def content_hash(record: RoutingRecord) -> str:
    """Stands in for the hash of a document's text: equal tokens are equal texts, where unknown equal routing is."""
    unknown_T = record.token_ids == UNKNOWN_TOKEN
    if unknown_T.all():
        return hashlib.sha256(record.expert_ids.numpy().tobytes()).hexdigest()
    digest = hashlib.sha256(record.token_ids.numpy().tobytes())
    digest.update(record.expert_ids[unknown_T].numpy().tobytes())
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in files_below(path):
        digest.update(f"{file.relative_to(path)}\0{sha256_file(file)}\0".encode())
    return digest.hexdigest()
