"""Capturing a trace: a live model reads documents, and its routes are written down."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import write_text
from specmoe.sources.batches import Encoded, batched, encode_documents
from specmoe.sources.chats import ChatReader
from specmoe.sources.corpus import Document, text_hash
from specmoe.sources.generation import BatchRoutes, Generation, join, run_generation
from specmoe.sources.loading import DTYPES, LoadedModel, load_model, untrained_like
from specmoe.sources.model_shape import linear_routers, unembedding
from specmoe.sources.recording import ForwardRoutes, LayerRoute, Recorder, recorded_routes, run_model
from specmoe.sources.timing import machine_name, measure_layer_us
from specmoe.sources.unlisted import checked_by_replay
from specmoe.trace import Manifest, RoutingRecord, Source, Timing, TraceWriter
from specmoe.trace.record import is_finite
from specmoe.trace.writer import fields_of, keeps_hidden

__all__ = [
    "CaptureProgress",
    "ForwardRoutes",
    "LayerRoute",
    "Recorder",
    "collect",
    "load_model",
    "measure_layer_us",
    "recorded_routes",
    "run_model",
    "untrained_like",
]

# What a kill may cost: documents gather in memory until one of the two is reached.
SHARD_BYTES = 64 << 20
_FLUSH_SECONDS = 5.0


@dataclass(frozen=True)
class CaptureProgress:
    """How far a capture is.

    Attributes:
        documents, documents_total, tokens, tokens_total: done, earlier runs included, and to be done.
        skipped: documents that are too short to be read (no text, or half a sequence would be empty).
        tokens_per_second: in this run. bytes: written to the trace so far.
    """

    documents: int
    documents_total: int
    tokens: int
    tokens_total: int
    skipped: int
    tokens_per_second: float
    bytes: int


def collect(
    model: str | Path,
    documents: Sequence[Document],
    out: Path,
    *,
    max_tokens_per_document: int = 512,
    max_tokens: int | None = None,
    keep_hidden: str = "all",
    hidden_dtype: str = "float16",
    keep_logits: bool = True,
    stack: str | None = None,
    batch_tokens: int = 2048,
    untrained: bool = False,
    generation: Generation | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    on_progress: Callable[[CaptureProgress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Let a model read documents and write its routing to a trace.

    A run that was interrupted is continued by the same call: documents that are in the trace stay, and
    batches are drawn from the whole list, so that the rest comes out as it would have without a break.

    Args:
        model: directory or hub id, see :func:`load_model`.
        documents: what is read. Their order in the trace is drawn from ``seed``.
        out: directory of the trace.
        max_tokens_per_document: each document is cut there.
        max_tokens: tokens to read in all; documents are taken in the drawn order until it is reached.
        keep_hidden: ``all``, ``none`` or ``sample:FRACTION`` of the documents.
        hidden_dtype: float16, bfloat16 or float32. keep_logits: keep the router's logits.
        stack: which stack of an encoder-decoder is captured; None for the family's first.
        batch_tokens: padded tokens in a forward pass (one document at least).
        untrained: use random weights drawn from ``seed``, as a control.
        generation: let the model continue each document, which is its prompt; None to read only.
        dtype: what the model computes in. device: where. device_map: how it is spread over several GPUs.
        on_progress: called after each batch. on_note: told what a user should know, a line each: what is left out or
            read in another way, and that a family is not listed.

    Returns:
        ``out``.

    Raises:
        SpecmoeError: no such model, routes that cannot be told for certain, nothing to read, a NaN on the way
            (document and layer are named), a full disk, or ``out`` holds another trace.
    """
    keeps_hidden("", keep_hidden)
    if hidden_dtype not in DTYPES:
        raise unknown_name("hidden dtype", hidden_dtype, DTYPES)
    for name, value in (("max_tokens_per_document", max_tokens_per_document), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise SpecmoeError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if untrained and device_map is not None:
        raise SpecmoeError("--untrained makes its weights on one device; leave --device-map out")
    if untrained:
        loaded = untrained_like(model, seed, dtype=dtype, device=device, stack=stack)
    else:
        loaded = load_model(model, dtype=dtype, device=device, device_map=device_map, stack=stack)
    if generation is not None and loaded.stack == "encoder":
        other = ", or capture the decoder" if "decoder" in loaded.family.stacks else ""
        raise SpecmoeError(f"an encoder writes nothing; leave --generate out{other}")
    written = generation.tokens if generation else 0
    chats = ChatReader(loaded.tokenizer, loaded.topology.model_id, continued=generation is not None)
    encoded, skipped = encode_documents(loaded, documents, max_tokens_per_document, max_tokens, seed, written, chats)
    for line in chats.lines():
        on_note(line)
    batches = batched(encoded, batch_tokens, seed)
    if not loaded.family.listed:
        loaded = checked_by_replay(loaded, batches[0][0].ids)
        on_note(
            f"{loaded.family.name} models are not listed; their routers, called again with what was recorded on the "
            "first document, gave the recorded routes bit for bit"
        )
    manifest = _manifest(
        loaded,
        documents,
        fields=["gate_weights", *["router_logits"] * keep_logits, *["hidden"] * (keep_hidden != "none")],
        settings={
            "max_tokens_per_document": max_tokens_per_document,
            "max_tokens": max_tokens,
            "keep_hidden": keep_hidden,
            "hidden_dtype": hidden_dtype,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "untrained": untrained,
            "generate": generation.tokens if generation else 0,
            "temperature": generation.temperature if generation else None,
            **chats.settings(),
        },
    )
    routers = linear_routers(loaded.model, loaded.family, loaded.stack)
    with TraceWriter(out, manifest, shard_bytes=SHARD_BYTES) as writer:
        if routers is not None:
            head = None if keep_hidden == "none" else unembedding(loaded.model, loaded.topology.hidden_size)
            writer.keep_routers(*routers, head)
        _keep_tokenizer(loaded, out)
        if writer.manifest.timing is None:
            layer_us = measure_layer_us(loaded.model, loaded.family, loaded.stack)
            writer.set_timing(Timing(layer_us_p50=layer_us, machine=machine_name(device)))
        report = _Report(writer, encoded, loaded, skipped, on_progress, written)
        keep = Keep(keep_hidden, DTYPES[hidden_dtype], keep_logits)
        write_routes(loaded, batches, writer, keep, report, generation)
    return out


def _keep_tokenizer(loaded: LoadedModel, out: Path) -> None:
    """Put the tokenizer beside the trace, so that token ids can be shown as text; slow tokenizers have no such file."""
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        write_text(out / "tokenizer.json", backend.to_str())


@dataclass(frozen=True)
class Keep:
    """What is kept: hidden states (``all``, ``none``, ``sample:FRACTION``), in which dtype, and logits."""

    hidden: str
    hidden_dtype: torch.dtype
    logits: bool


def write_routes(
    loaded: LoadedModel,
    batches: list[list[Encoded]],
    writer: TraceWriter,
    keep: Keep,
    report: Callable[[list[tuple[Encoded, RoutingRecord]]], None] = lambda _: None,
    generation: Generation | None = None,
) -> None:
    """Run every batch that has a document which the writer lacks, and write those documents.

    Raises:
        SpecmoeError: a router saw NaN or Inf, or the disk is full.
    """
    last_flush = time.monotonic()

    def write(records: list[tuple[Encoded, RoutingRecord]]) -> list[tuple[Encoded, RoutingRecord]]:
        nonlocal last_flush
        for entry, record in records:
            document = entry.document
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            writer.add(document.doc_id, document.domain, digest, record, group=document.group)
        if time.monotonic() - last_flush > _FLUSH_SECONDS:
            writer.flush()
            last_flush = time.monotonic()
        return records

    written = set(writer.written)
    writing: Future[list[tuple[Encoded, RoutingRecord]]] | None = None
    # A batch is written while the model reads the next one: waiting for the disk would cost most of the overhead.
    with recorded_routes(loaded.model, loaded.family, loaded.stack) as recorder, ThreadPoolExecutor(1) as thread:
        for number, batch in enumerate(batches):
            if all(entry.document.doc_id in written for entry in batch):
                continue
            with torch.inference_mode():
                routes = _run(loaded, batch, generation, number, recorder)
                records = _records(routes, batch, keep)
            if writing is not None:
                report(writing.result())
            lacking = [pair for pair in records if pair[0].document.doc_id not in written]
            writing = thread.submit(write, lacking)
        if writing is not None:
            report(writing.result())


def _run(
    loaded: LoadedModel, batch: list[Encoded], generation: Generation | None, number: int, recorder: Recorder
) -> BatchRoutes:
    """Let the model read, or read and continue, one batch."""
    ids = [entry.ids for entry in batch]
    written = None
    if generation is None:
        run_model(loaded.model, loaded.family, ids)
    else:
        written = run_generation(loaded.model, loaded.family, ids, generation, number)
    return join(recorder.take(), len(batch), written)


class _Report:
    """Counts what is done and tells the caller."""

    def __init__(
        self,
        writer: TraceWriter,
        encoded: list[Encoded],
        loaded: LoadedModel,
        skipped: int,
        on_progress: Callable[[CaptureProgress], None],
        written: int = 0,
    ) -> None:
        # Of a continued document, as many tokens as it may get.
        lengths = {
            entry.document.doc_id: len(entry.captured(loaded.family, loaded.stack)) + written for entry in encoded
        }
        self._writer, self._skipped, self._tell = writer, skipped, on_progress
        self._documents_total, self._tokens_total = len(lengths), sum(lengths.values())
        self._documents = len(writer.written)
        self._lengths = lengths
        self._tokens = sum(lengths.get(doc_id, 0) for doc_id in writer.written)
        self._recorded, self._start = 0, time.monotonic()

    def __call__(self, records: list[tuple[Encoded, RoutingRecord]]) -> None:
        self._documents += len(records)
        self._tokens += sum(self._lengths[entry.document.doc_id] for entry, _ in records)
        self._recorded += sum(len(record) for _, record in records)
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._tell(
            CaptureProgress(
                documents=self._documents,
                documents_total=self._documents_total,
                tokens=self._tokens,
                tokens_total=self._tokens_total,
                skipped=self._skipped,
                tokens_per_second=self._recorded / seconds,
                bytes=sum(shard.bytes for shard in self._writer.manifest.shards),
            )
        )


def _manifest(
    loaded: LoadedModel, documents: Sequence[Document], *, fields: list[str], settings: dict[str, Any]
) -> Manifest:
    return Manifest(
        topology=loaded.topology,
        source=Source(
            kind="capture",
            tokenizer=loaded.tokenizer_id,
            text_sha256=text_hash(documents),
            settings={**loaded.settings, **settings},
        ),
        fields=fields_of(fields),
    )


def _records(routes: BatchRoutes, batch: list[Encoded], keep: Keep) -> list[tuple[Encoded, RoutingRecord]]:
    """Cut a batch into documents, and make sure that every number is one."""
    lengths = routes.lengths
    kept = [keeps_hidden(entry.document.doc_id, keep.hidden) for entry in batch]
    logits = _stacked([layer.logits for layer in routes.layers], torch.float32)
    if not keep.logits:
        _check_finite(logits, batch, lengths)
    ids = _stacked([layer.ids for layer in routes.layers], torch.int16).split(lengths)
    weights = _stacked([layer.weights for layer in routes.layers], torch.float32).split(lengths)
    token_ids, phase = routes.token_ids.to("cpu", torch.int32).split(lengths), routes.phase.split(lengths)
    hidden: Sequence[Tensor | None] = [None] * len(batch)
    if any(kept):
        rows = torch.tensor(kept).repeat_interleave(torch.tensor(lengths))
        whole = all(kept)
        parts = [layer.hidden if whole else layer.hidden[rows.to(layer.hidden.device)] for layer in routes.layers]
        kept_lengths = [length for length, wanted in zip(lengths, kept, strict=True) if wanted]
        pieces = iter(_stacked(parts, keep.hidden_dtype).split(kept_lengths))
        hidden = [next(pieces) if wanted else None for wanted in kept]
    return [
        (
            entry,
            RoutingRecord(
                token_ids=token_ids[i],
                phase=phase[i],
                expert_ids=ids[i],
                gate_weights=weights[i],
                router_logits=piece if keep.logits else None,
                hidden=hidden[i],
            ),
        )
        for i, (entry, piece) in enumerate(zip(batch, logits.split(lengths), strict=True))
    ]


def _stacked(layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[N, L, ...] on the CPU from one [N, ...] per layer."""
    stacked = torch.empty(len(layers[0]), len(layers), *layers[0].shape[1:], dtype=dtype, device=layers[0].device)
    for index, layer in enumerate(layers):
        stacked[:, index] = layer
    return stacked.cpu()


def _check_finite(logits: Tensor, batch: list[Encoded], lengths: list[int]) -> None:
    """The writer checks what it keeps; logits that are not kept still must not be NaN."""
    if is_finite(logits):
        return
    row, layer = (~torch.isfinite(logits)).any(-1).nonzero()[0].tolist()
    for entry, length in zip(batch, lengths, strict=True):
        if row < length:
            name = entry.document.doc_id
            raise SpecmoeError(
                f"document {name!r}: router_logits holds NaN or Inf at token {row} in MoE layer {layer}; "
                "the model's run is at fault"
            )
        row -= length
