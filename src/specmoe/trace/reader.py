"""Reading a trace: the headers at opening, a document's bytes when it is asked for, nothing else."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.files import impostor, sha256_file
from specmoe.topology import Topology
from specmoe.trace.integrity import checksum, header_sha256
from specmoe.trace.manifest import ROUTERS_NAME, DocumentRecord, Manifest, ShardRecord, decode_documents
from specmoe.trace.record import FIELDS, REQUIRED_FIELDS, RoutingRecord, field_shape

__all__ = ["Trace"]

# Pages once read count as this process's memory for as long as their file is mapped, so this much may be.
_RESIDENT_BYTES = 512 << 20
# The kernel maps more than is touched: up to a huge page (2 MiB) at either end of what was read.
_PAGE_BYTES = 4 << 20


@dataclass(frozen=True)
class _Place:
    shard: int
    record: DocumentRecord


class Trace:
    """A trace on disk, opened for reading by document.

    Opening reads the manifest and the shards' headers and checks them against each other. Reading a
    document maps its shard and copies only that document's rows, whose checksums are verified. The shards
    read last stay mapped, as many as may bring 512 MiB to memory; leaving the trace as a context manager
    unmaps them all.
    """

    def __init__(self, directory: Path, manifest: Manifest, places: list[_Place]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._places = places
        # Each with the bytes that were read from it; the one read last is at the end.
        self._mapped: OrderedDict[int, tuple[Any, int]] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all shards. The trace can still be read, and maps them anew."""
        self._mapped.clear()

    @classmethod
    def open(cls, directory: Path | str, *, allow_incomplete: bool = False) -> Trace:
        """Open a trace.

        Raises:
            SpecmoeError: the directory is not a trace, a shard is missing, truncated or contradicts the
                manifest, or the capture was never finished (unless ``allow_incomplete``).
        """
        directory = Path(directory)
        manifest = Manifest.load(directory)
        if not manifest.complete and not allow_incomplete:
            raise SpecmoeError(f"{directory} is not finished; run the same collect command again to continue it")
        unknown = set(manifest.fields) - set(FIELDS)
        absent = set(REQUIRED_FIELDS) - set(manifest.fields)
        if unknown or absent:
            raise SpecmoeError(f"{directory}: the manifest's fields are wrong ({', '.join(sorted(unknown | absent))})")
        places = []
        for index, shard in enumerate(manifest.shards):
            places += [_Place(index, record) for record in _read_header(directory / shard.file, shard, manifest)]
        names = [place.record.doc_id for place in places]
        if len(set(names)) < len(names):
            raise SpecmoeError(f"{directory} is damaged: it names a document twice; capture again")
        return cls(directory, manifest, places)

    @property
    def topology(self) -> Topology:
        """The model's shape."""
        return self.manifest.topology

    @cached_property
    def documents(self) -> list[DocumentRecord]:
        """All documents, in the order in which they were written."""
        return [place.record for place in self._places]

    @property
    def tokens(self) -> int:
        """Tokens in all documents."""
        return sum(shard.tokens for shard in self.manifest.shards)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int, fields: tuple[str, ...] | None = None) -> RoutingRecord:
        """Read one document.

        Args:
            index: its place in :attr:`documents`. fields: optional fields to read; None for all kept.

        Raises:
            SpecmoeError: the document's bytes are damaged, or hold NaN or Inf.
        """
        place = self._places[index]
        record, path = place.record, self.directory / self.manifest.shards[place.shard].file
        tensors: dict[str, Tensor] = {}
        shard = None
        for name in self.manifest.fields:
            start = record.hidden_start if name == "hidden" else record.start
            if start is None or (fields is not None and name not in fields and name not in REQUIRED_FIELDS):
                continue
            try:
                # A copy: the slice is a view of the mapping, which must not change under what was verified.
                shard = shard or self._map(place.shard)
                tensor = shard.get_slice(name)[start : start + record.tokens].clone()
            except (SafetensorError, OSError) as error:
                raise SpecmoeError(f"{path} cannot be read: {error}") from error
            if checksum(tensor) != record.crc32.get(name):
                raise SpecmoeError(
                    f"{path} is damaged: {name} of document {record.doc_id!r} fails its checksum; capture again"
                )
            tensors[name] = tensor
        self._bound(place.shard, shard, sum(tensor.nbytes for tensor in tensors.values()))
        result = RoutingRecord(**tensors)
        try:
            result.check(self.topology)
        except SpecmoeError as error:
            raise SpecmoeError(f"{path}, document {record.doc_id!r}: {error}") from error
        return result

    def routers(self) -> tuple[Tensor, Tensor] | None:
        """The routers' own weights [L, C, D] and biases [L, C] as float32, None if they were not kept.

        C counts what a router chooses among: experts and zero experts.

        Raises:
            SpecmoeError: the file is damaged or has other shapes than the topology says.
        """
        tensors = self._router_file()
        if tensors is None:
            return None
        layers, experts, width = self.topology.layers, self.topology.router_classes, self.topology.hidden_size
        bias = tensors.get("bias", torch.zeros(layers, experts))
        weight = tensors.get("weight")
        if weight is None or weight.shape != (layers, experts, width) or bias.shape != (layers, experts):
            raise SpecmoeError(f"{self.directory / ROUTERS_NAME} does not fit the trace's topology; capture again")
        return weight.float(), bias.float()

    def unembedding(self) -> Tensor | None:
        """The model's output embedding [V, D] as float32, None if it was not kept.

        Raises:
            SpecmoeError: the file is damaged or is of another width than the topology says.
        """
        kept = (self._router_file() or {}).get("unembedding")
        if kept is not None and (kept.ndim != 2 or kept.shape[1] != self.topology.hidden_size):
            raise SpecmoeError(f"{self.directory / ROUTERS_NAME} does not fit the trace's topology; capture again")
        return None if kept is None else kept.float()

    def _router_file(self) -> dict[str, Tensor] | None:
        if self.manifest.routers_sha256 is None:
            return None
        path = self.directory / ROUTERS_NAME
        try:
            if sha256_file(path) != self.manifest.routers_sha256:
                _refuse_impostor(path)
                raise SpecmoeError(f"{path} is damaged: its SHA-256 is not the manifest's; capture again")
            return load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise SpecmoeError(f"{path} cannot be read: {error}") from error

    def verify(self) -> None:
        """Read the whole trace and compare everything with its checksums.

        Raises:
            SpecmoeError: something is missing or was changed after it was written.
        """
        self.routers()
        for index in range(len(self)):
            self.read(index)

    def _map(self, index: int) -> Any:
        mapped = self._mapped.get(index)
        if mapped is not None:
            return mapped[0]
        return safe_open(str(self.directory / self.manifest.shards[index].file), framework="pt").__enter__()

    def _bound(self, index: int, shard: Any, read: int) -> None:
        """Count what a read may have brought to memory, and unmap the shards read longest ago if it is too much."""
        _, before = self._mapped.pop(index, (shard, 0))
        # A shard's pages are in memory once, however often they are read.
        self._mapped[index] = (shard, min(before + read + _PAGE_BYTES, self.manifest.shards[index].bytes))
        resident = sum(size for _, size in list(self._mapped.values()))
        while resident > _RESIDENT_BYTES and len(self._mapped) > 1:
            # Forgetting it unmaps it, as soon as no thread reads from it any more.
            _, (_, size) = self._mapped.popitem(last=False)
            resident -= size


def _refuse_impostor(path: Path) -> None:
    if (found := impostor(path)) is not None:
        raise SpecmoeError(f"{path} {found}")


def _read_header(path: Path, shard: ShardRecord, manifest: Manifest) -> list[DocumentRecord]:
    """The document table of a shard, after everything that its header says has been checked."""
    try:
        size = path.stat().st_size
        intact = header_sha256(path) == shard.sha256
    except FileNotFoundError as error:
        raise SpecmoeError(f"{path} is missing; the manifest names it") from error
    except OSError as error:
        raise SpecmoeError(f"{path} cannot be read: {error}") from error
    if size != shard.bytes or not intact:
        _refuse_impostor(path)
    if size != shard.bytes:
        raise SpecmoeError(f"{path} has {size} bytes, the manifest says {shard.bytes}; it is truncated")
    if not intact:
        raise SpecmoeError(f"{path} has a damaged header: its SHA-256 is not the manifest's; capture again")
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            documents = decode_documents((file.metadata() or {})["documents"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SpecmoeError(f"{path} has a damaged header: {str(error).splitlines()[0]}") from error
    rows = hidden_rows = 0
    for document in documents:
        keeps_hidden = document.hidden_start is not None
        expected = set(manifest.fields) - (set() if keeps_hidden else {"hidden"})
        if document.start != rows or (keeps_hidden and document.hidden_start != hidden_rows):
            raise SpecmoeError(
                f"{path}: the rows of document {document.doc_id!r} overlap or leave a gap; capture again"
            )
        if set(document.crc32) != expected:
            raise SpecmoeError(f"{path}: document {document.doc_id!r} has other fields than the manifest says")
        rows += document.tokens
        hidden_rows += document.tokens if keeps_hidden else 0
    if len(documents) != shard.documents or rows != shard.tokens:
        raise SpecmoeError(f"{path}: its document table contradicts the manifest")
    present = {name for document in documents for name in document.crc32}
    expected_shapes = {
        name: (hidden_rows if name == "hidden" else rows, *field_shape(name, manifest.topology)) for name in present
    }
    for name in sorted(shapes.keys() | expected_shapes.keys()):
        if shapes.get(name) != expected_shapes.get(name):
            raise SpecmoeError(
                f"{path}: {name} has shape {shapes.get(name)}, the manifest says {expected_shapes.get(name)}"
            )
    return documents
