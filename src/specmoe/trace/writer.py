"""Writing a trace, document by document, so that a kill at any moment loses at most one shard."""

from __future__ import annotations

import contextlib
import hashlib
import random
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path, remove_leftovers, sha256_file
from specmoe.locks import hold
from specmoe.trace.integrity import checksum, header_sha256
from specmoe.trace.manifest import (
    MANIFEST_NAME,
    ROUTERS_NAME,
    DocumentRecord,
    Manifest,
    ShardRecord,
    Timing,
    encode_documents,
)
from specmoe.trace.record import REQUIRED_FIELDS, RoutingRecord

__all__ = ["TraceWriter", "checksum", "keeps_hidden"]


_BUFFER_BYTES = 64 << 20


class _Pending(NamedTuple):
    """A document that waits for its shard, and how much there is up to its end."""

    entry: DocumentRecord
    rows: int
    hidden_rows: int
    bytes: int


class TraceWriter:
    """Append documents to a trace.

    Documents gather in memory until a shard is full. A shard becomes part of the trace when the manifest
    that names it has replaced the old one, so a reader never sees half of anything, and a shard that a
    kill left unnamed is written anew. Used as a context manager, it flushes on leaving, also on an error,
    and marks the trace complete only if there was none. One process writes to a trace at a time.

    Args:
        directory: where the trace lies or shall lie.
        manifest: its description; ``shards`` is taken from disk when the directory already holds a trace.
        shard_bytes: size at which a shard is written.

    Raises:
        SpecmoeError: the directory holds a trace of something else, another process is writing to it, or it
            cannot be written.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, shard_bytes: int = 64 << 20) -> None:
        self.directory = directory
        self._shard_bytes = shard_bytes
        self._pending: list[_Pending] = []
        # One tensor per field, used again for every shard: fresh memory costs more than the copy into it.
        self._buffers: dict[str, Tensor] = {}
        self._unlock = weakref.finalize(
            self, hold(directory, "collect" if manifest.source.kind == "capture" else "import")
        )
        self.written: set[str] = set()
        try:
            remove_leftovers(directory)
            if (directory / MANIFEST_NAME).exists():
                manifest = self._continue(manifest)
            self.manifest = manifest.model_copy(update={"complete": False})
            self.manifest.save(directory)
        except BaseException:
            self._unlock()
            raise

    def _continue(self, manifest: Manifest) -> Manifest:
        from specmoe.trace.reader import Trace

        present = Trace.open(self.directory, allow_incomplete=True)
        for name in ("topology", "source", "fields"):
            if getattr(present.manifest, name) != getattr(manifest, name):
                raise SpecmoeError(f"{self.directory} holds another trace ({name} differs); choose another --out")
        self.written = {document.doc_id for document in present.documents}
        named = {shard.file for shard in present.manifest.shards}
        # What a kill left: a shard that no manifest names yet.
        for orphan in self.directory.glob("shard-*.safetensors"):
            if orphan.name not in named:
                orphan.unlink()
        kept = {name: getattr(present.manifest, name) for name in ("shards", "routers_sha256")}
        return manifest.model_copy(update={**kept, "timing": present.manifest.timing or manifest.timing})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
                self._update(complete=True)
            else:
                # Save what can be saved; if the disk is what failed, the error in flight tells more.
                with contextlib.suppress(SpecmoeError):
                    self.flush()
        finally:
            self._unlock()

    def add(self, doc_id: str, domain: str, text_sha256: str, record: RoutingRecord, *, group: str = "") -> None:
        """Append one document; documents of one group stay on one side of a split.

        Raises:
            SpecmoeError: the id is already there, a field is missing, or a tensor is wrong (shape, dtype,
                NaN).
        """
        if doc_id in self.written:
            raise SpecmoeError(f"document {doc_id!r} is already in {self.directory}")
        try:
            record.check(self.manifest.topology)
        except SpecmoeError as error:
            raise SpecmoeError(f"document {doc_id!r}: {error}") from error
        present = {name for name, _ in record.tensors()}
        missing = set(self.manifest.fields) - {"hidden"} - present
        extra = present - set(self.manifest.fields)
        if missing or extra:
            wrong = (
                f"lacks {', '.join(sorted(missing))}" if missing else f"has an unexpected {', '.join(sorted(extra))}"
            )
            raise SpecmoeError(f"document {doc_id!r} {wrong}")
        last = self._pending[-1] if self._pending else None
        start, hidden_start, size = (last.rows, last.hidden_rows, last.bytes) if last else (0, 0, 0)
        if record.hidden is not None and hidden_start and self._buffers["hidden"].dtype != record.hidden.dtype:
            # A shard holds one tensor per field, and joining two dtypes would change the numbers of one.
            others = self._buffers["hidden"].dtype
            raise SpecmoeError(f"document {doc_id!r}: hidden is {record.hidden.dtype}, others {others}")
        checksums: dict[str, int] = {}
        for name, tensor in record.tensors():
            checksums[name] = checksum(tensor)
            self._put(name, hidden_start if name == "hidden" else start, tensor)
            size += tensor.nbytes
        entry = DocumentRecord(
            doc_id=doc_id,
            domain=domain,
            text_sha256=text_sha256,
            group=group,
            start=start,
            tokens=len(record),
            hidden_start=hidden_start if record.hidden is not None else None,
            crc32=checksums,
        )
        # From here on the document counts; an interrupt before leaves rows behind that the next one overwrites.
        hidden_rows = hidden_start + (len(record) if record.hidden is not None else 0)
        self._pending.append(_Pending(entry, start + len(record), hidden_rows, size))
        self.written.add(doc_id)
        if size >= self._shard_bytes:
            self.flush()

    def _put(self, name: str, start: int, tensor: Tensor) -> None:
        """Copy a document's rows behind those of the documents before it."""
        end = start + len(tensor)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != tensor.dtype or len(buffer) < end:
            # Room for a whole shard from the start: memory that is not written to costs nothing, growing does.
            row_bytes = tensor.nbytes // len(tensor) if len(tensor) else 1 << 30
            expected = min(self._shard_bytes, _BUFFER_BYTES) // row_bytes
            # A buffer made under inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                larger = torch.empty(max(end, 2 * start, expected), *tensor.shape[1:], dtype=tensor.dtype)
            if buffer is not None and start:
                larger[:start] = buffer[:start]
            self._buffers[name] = buffer = larger
        buffer[start:end] = tensor

    def flush(self) -> None:
        """Write the pending documents as one shard and name it in the manifest."""
        if not self._pending:
            return
        last, documents = self._pending[-1], [pending.entry for pending in self._pending]
        kept = {name for document in documents for name in document.crc32}
        tensors = {
            name: self._buffers[name][: last.hidden_rows if name == "hidden" else last.rows]
            for name in self.manifest.fields
            if name in kept
        }
        path = self.directory / f"shard-{len(self.manifest.shards):05d}.safetensors"
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), metadata={"documents": encode_documents(documents)})
            shard = ShardRecord(
                file=path.name,
                tokens=last.rows,
                documents=len(documents),
                bytes=temporary.stat().st_size,
                sha256=header_sha256(temporary),
            )
        # Forgotten before they are named: an interrupt in between may lose them, but not write them twice.
        self._pending = []
        self._update(shards=(*self.manifest.shards, shard))

    def keep_routers(
        self, weight_LED: Tensor, bias_LE: Tensor | None = None, unembedding_VD: Tensor | None = None
    ) -> None:
        """Keep the routers' own weights beside the trace, for predictors that start from them.

        Args:
            weight_LED: [L, E, D]. bias_LE: [L, E] or None.
            unembedding_VD: the model's output embedding [V, D] or None; kept as float16.
        """
        tensors = {"weight": weight_LED.detach().float().cpu().contiguous()}
        if bias_LE is not None:
            tensors["bias"] = bias_LE.detach().float().cpu().contiguous()
        if unembedding_VD is not None:
            tensors["unembedding"] = unembedding_VD.detach().half().cpu().contiguous()
        with atomic_path(self.directory / ROUTERS_NAME) as temporary:
            save_file(tensors, str(temporary))
            digest = sha256_file(temporary)
        self._update(routers_sha256=digest)

    def set_timing(self, timing: Timing) -> None:
        """Record what a layer costs the model itself."""
        self._update(timing=timing)

    def _update(self, **changes: object) -> None:
        self.manifest = self.manifest.model_copy(update=changes)
        self.manifest.save(self.directory)


def keeps_hidden(doc_id: str, keep: str) -> bool:
    """Whether a document's hidden states are kept under ``keep``: all, none, or sample:FRACTION.

    The sample is drawn by a hash of the document's id, so that it does not depend on order or on where a
    run was interrupted.

    Raises:
        SpecmoeError: ``keep`` is none of these.
    """
    if keep in {"all", "none"}:
        return keep == "all"
    kind, _, fraction = keep.partition(":")
    try:
        share = float(fraction)
    except ValueError:
        share = -1.0
    if kind != "sample" or not 0 < share <= 1:
        raise SpecmoeError(f"--keep-hidden {keep!r} is not known; use all, none or sample:0.1")
    return random.Random(hashlib.sha256(doc_id.encode()).digest()).random() < share


def fields_of(records: Iterable[str]) -> tuple[str, ...]:
    """Field names in their fixed order, the required ones first."""
    wanted = set(records)
    order = (*REQUIRED_FIELDS, "gate_weights", "router_logits", "hidden")
    return tuple(name for name in order if name in wanted or name in REQUIRED_FIELDS)
