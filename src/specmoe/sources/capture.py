"""Capturing a trace: a live model reads documents, and its routes are written down."""

from __future__ import annotations

import hashlib
import random
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
from specmoe.sources.corpus import Document, text_hash
from specmoe.sources.families import Family
from specmoe.sources.loading import DTYPES, LoadedModel, load_model, untrained_like
from specmoe.sources.model_shape import linear_routers
from specmoe.sources.recording import ForwardRoutes, LayerRoute, Recorder, recorded_routes, run_model
from specmoe.sources.timing import machine_name, measure_layer_us
from specmoe.trace import Manifest, Phase, RoutingRecord, Source, Timing, TraceWriter
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


@dataclass(frozen=True)
class Encoded:
    """A document and the token ids that the model reads of it."""

    document: Document
    ids: list[int]

    def captured(self, family: Family, stack: str) -> list[int]:
        """The ids that the captured stack reads."""
        if not family.is_encoder_decoder:
            return self.ids
        half = len(self.ids) // 2
        return self.ids[:half] if stack == "encoder" else self.ids[half:]


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
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    on_progress: Callable[[CaptureProgress], None] = lambda _: None,
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
        dtype: what the model computes in. device: where.
        on_progress: called after each batch.

    Returns:
        ``out``.

    Raises:
        SpecmoeError: no such model, nothing to read, a NaN on the way (document and layer are named),
            a full disk, or ``out`` holds another trace.
    """
    keeps_hidden("", keep_hidden)
    if hidden_dtype not in DTYPES:
        raise unknown_name("hidden dtype", hidden_dtype, DTYPES)
    for name, value in (("max_tokens_per_document", max_tokens_per_document), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise SpecmoeError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    load = load_model if not untrained else _untrained(seed)
    loaded = load(model, dtype=dtype, device=device, stack=stack)
    encoded, skipped = encode_documents(loaded, documents, max_tokens_per_document, max_tokens, seed)
    batches = batched(encoded, batch_tokens, seed)
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
        },
    )
    routers = linear_routers(loaded.model, loaded.family, loaded.stack)
    with TraceWriter(out, manifest, shard_bytes=SHARD_BYTES) as writer:
        if routers is not None:
            writer.keep_routers(*routers)
        _keep_tokenizer(loaded, out)
        if writer.manifest.timing is None:
            layer_us = measure_layer_us(loaded.model, loaded.family, loaded.stack)
            writer.set_timing(Timing(layer_us_p50=layer_us, machine=machine_name(device)))
        report = _Report(writer, encoded, loaded, skipped, on_progress)
        write_routes(loaded, batches, writer, Keep(keep_hidden, DTYPES[hidden_dtype], keep_logits), report)
    return out


def _keep_tokenizer(loaded: LoadedModel, out: Path) -> None:
    """Put the tokenizer beside the trace, so that token ids can be shown as text; slow tokenizers have no such file."""
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        write_text(out / "tokenizer.json", backend.to_str())


def _untrained(seed: int) -> Callable[..., LoadedModel]:
    return lambda model, **options: untrained_like(model, seed, **options)


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
) -> None:
    """Run every batch that has a document which the writer lacks, and write those documents.

    Raises:
        SpecmoeError: a router saw NaN or Inf, or the disk is full.
    """
    last_flush = time.monotonic()

    def write(records: list[tuple[Encoded, RoutingRecord]]) -> list[tuple[Encoded, RoutingRecord]]:
        nonlocal last_flush
        for entry, record in records:
            digest = hashlib.sha256(entry.document.text.encode()).hexdigest()
            writer.add(entry.document.doc_id, entry.document.domain, digest, record)
        if time.monotonic() - last_flush > _FLUSH_SECONDS:
            writer.flush()
            last_flush = time.monotonic()
        return records

    written = set(writer.written)
    writing: Future[list[tuple[Encoded, RoutingRecord]]] | None = None
    # A batch is written while the model reads the next one: waiting for the disk would cost most of the overhead.
    with recorded_routes(loaded.model, loaded.family, loaded.stack) as recorder, ThreadPoolExecutor(1) as thread:
        for batch in batches:
            if all(entry.document.doc_id in written for entry in batch):
                continue
            with torch.inference_mode():
                run_model(loaded.model, loaded.family, [entry.ids for entry in batch])
                (routes,) = recorder.take()
                records = _records(routes, batch, loaded, keep)
            if writing is not None:
                report(writing.result())
            lacking = [pair for pair in records if pair[0].document.doc_id not in written]
            writing = thread.submit(write, lacking)
        if writing is not None:
            report(writing.result())


class _Report:
    """Counts what is done and tells the caller."""

    def __init__(
        self,
        writer: TraceWriter,
        encoded: list[Encoded],
        loaded: LoadedModel,
        skipped: int,
        on_progress: Callable[[CaptureProgress], None],
    ) -> None:
        lengths = {entry.document.doc_id: len(entry.captured(loaded.family, loaded.stack)) for entry in encoded}
        self._writer, self._skipped, self._tell = writer, skipped, on_progress
        self._documents_total, self._tokens_total = len(lengths), sum(lengths.values())
        self._documents = len(writer.written)
        self._tokens = sum(lengths.get(doc_id, 0) for doc_id in writer.written)
        self._tokens_before, self._start = self._tokens, time.monotonic()

    def __call__(self, records: list[tuple[Encoded, RoutingRecord]]) -> None:
        self._documents += len(records)
        self._tokens += sum(len(record) for _, record in records)
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._tell(
            CaptureProgress(
                documents=self._documents,
                documents_total=self._documents_total,
                tokens=self._tokens,
                tokens_total=self._tokens_total,
                skipped=self._skipped,
                tokens_per_second=(self._tokens - self._tokens_before) / seconds,
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


def encode_documents(
    loaded: LoadedModel, documents: Sequence[Document], longest: int, budget: int | None, seed: int
) -> tuple[list[Encoded], int]:
    """Token ids of every document that is to be read, in the drawn order, and how many are too short."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise SpecmoeError(f"the model reads at most {limit} tokens; lower --max-tokens-per-document from {longest}")
    names = [document.doc_id for document in documents]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SpecmoeError(f"two documents are named {twice!r}; rename one, or capture them to two traces")
    order = list(documents)
    random.Random(f"documents {seed}").shuffle(order)
    mark = loaded.tokenizer.bos_token_id
    front = [] if mark is None else [mark]
    shortest = 2 if loaded.family.is_encoder_decoder else 1
    known = loaded.model.get_input_embeddings().num_embeddings
    encoded, skipped, left = [], 0, budget
    for start in range(0, len(order), 64):
        chunk = order[start : start + 64]
        texts = [document.text for document in chunk]
        rows = loaded.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for document, row in zip(chunk, rows, strict=True):
            ids = [*front, *row][:longest][:left]
            if not row or len(ids) < shortest:
                skipped += 1
                continue
            if max(ids) >= known:
                raise SpecmoeError(f"document {document.doc_id!r} has token {max(ids)}; the model knows {known} tokens")
            encoded.append(Encoded(document, ids))
            left = None if left is None else left - len(ids)
        if left is not None and left < shortest:
            break
    if not encoded:
        raise SpecmoeError("no document has enough text to be read; give other files with --text")
    return encoded, skipped


def batched(encoded: list[Encoded], batch_tokens: int, seed: int) -> list[list[Encoded]]:
    """Documents of similar length together. A function of the whole list alone, so that resuming is exact."""
    batches: list[list[Encoded]] = []
    for entry in sorted(encoded, key=lambda entry: len(entry.ids), reverse=True):
        # The first document of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= batch_tokens:
            batches[-1].append(entry)
        else:
            batches.append([entry])
    # In random order, so that the speed of the first batches foretells that of the rest.
    random.Random(f"batches {seed}").shuffle(batches)
    return batches


def _records(
    routes: ForwardRoutes, batch: list[Encoded], loaded: LoadedModel, keep: Keep
) -> list[tuple[Encoded, RoutingRecord]]:
    """Cut a forward pass into documents, and make sure that every number is one."""
    lengths = [len(entry.captured(loaded.family, loaded.stack)) for entry in batch]
    kept = [keeps_hidden(entry.document.doc_id, keep.hidden) for entry in batch]
    logits = _stacked([layer.logits for layer in routes.layers], torch.float32)
    if not keep.logits:
        _check_finite(logits, batch, lengths)
    ids = _stacked([layer.ids for layer in routes.layers], torch.int16).split(lengths)
    weights = _stacked([layer.weights for layer in routes.layers], torch.float32).split(lengths)
    token_ids = routes.token_ids.to("cpu", torch.int32).split(lengths)
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
                phase=torch.full((lengths[i],), Phase.PREFILL, dtype=torch.uint8),
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
