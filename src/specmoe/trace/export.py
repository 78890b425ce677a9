"""Writing a trace for other tools: Parquet, one row per token, or an ``.npz`` that ``specmoe import`` reads back.

Both are written document by document into a temporary file that takes its place when it is complete.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path, may_replace, remove_leftovers
from specmoe.trace.reader import Trace
from specmoe.trace.record import Phase, RoutingRecord, field_shape

__all__ = ["FORMATS", "export_trace", "format_of"]

Format = Literal["parquet", "npz"]
FORMATS: tuple[Format, ...] = ("parquet", "npz")
Progress = Callable[[int, int], None]

_OPTIONAL = ("gate_weights", "router_logits", "hidden")
_NAMES_AT_ONCE = 4096
_SPOOLED_BYTES = 16 << 20
_COPIED_BYTES = 1 << 20
# numpy has no bfloat16: its bits go into 16-bit integers.
_HIDDEN_MEMBERS = {"F16": ("hidden", "<f2"), "BF16": ("hidden_bf16", "<u2"), "F32": ("hidden", "<f4")}


def format_of(path: Path, name: str | None) -> Format:
    """The format asked for, or the one that the file's name says.

    Raises:
        SpecmoeError: neither is known.
    """
    chosen = name if name is not None else path.suffix.removeprefix(".").lower()
    for known in FORMATS:
        if chosen == known:
            return known
    if name is not None:
        raise SpecmoeError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    raise SpecmoeError(f"{path.name} does not end in .parquet or .npz; name the format with --format")


def export_trace(
    trace: Trace,
    out: Path,
    *,
    format: Format,
    hidden: bool = True,
    force: bool = False,
    on_progress: Progress = lambda _done, _total: None,
) -> None:
    """Write a whole trace to one file. Memory is bounded by the longest document.

    Args:
        trace: what to write. out: the file. format: its format. hidden: whether hidden states go along, if kept.
        force: replace a file that is there.
        on_progress: called with documents written and documents in all; for ``.npz``, each array counts them anew.

    Raises:
        SpecmoeError: ``out`` exists, the trace is damaged, the disk is full, or pyarrow is missing.
    """
    if out.is_dir():
        raise SpecmoeError(f"{out} is a folder; name a file")
    if out.exists() and not force:
        raise SpecmoeError(f"{out} exists; replace it with --force, or choose another --out")
    may_replace(out, is_ours=lambda _: False, force=force, read=list(trace.directory.iterdir()))
    fields = [name for name in _OPTIONAL if name in trace.manifest.fields and (hidden or name != "hidden")]
    write = _write_parquet if format == "parquet" else _write_npz
    remove_leftovers(out.parent, out.name)
    with atomic_path(out) as temporary:
        write(trace, temporary, fields, on_progress)


def _hidden_dtype(trace: Trace) -> str:
    """F16, BF16 or F32: what holds the hidden states of every shard without changing a number."""
    found = set()
    for shard in trace.manifest.shards:
        path = trace.directory / shard.file
        try:
            with safe_open(str(path), framework="pt") as file:
                if "hidden" in file.keys():  # noqa: SIM118
                    found.add(file.get_slice("hidden").get_dtype())
        except (SafetensorError, OSError) as error:
            raise SpecmoeError(f"{path} cannot be read: {error}") from error
    return found.pop() if len(found) == 1 else "F32"


# --- npz -------------------------------------------------------------------------------------------------


def _write_npz(trace: Trace, path: Path, fields: list[str], on_progress: Progress) -> None:
    documents, tokens, shape = trace.documents, trace.tokens, trace.topology
    with zipfile.ZipFile(path, "w") as archive:
        _write_required(trace, archive, on_progress)
        _write_numbers(archive, "seq_offsets", _offsets(document.tokens for document in documents))
        _write_numbers(archive, "num_experts", np.array(shape.experts))
        _write_texts(archive, "doc_ids", [document.doc_id for document in documents])
        _write_texts(archive, "domains", [document.domain for document in documents])
        for name in ("gate_weights", "router_logits"):
            if name in fields:
                _write_floats(trace, archive, name, (name, "<f4"), tokens, on_progress)
        if "hidden" in fields:
            kept = [document.tokens if document.hidden_start is not None else 0 for document in documents]
            _write_floats(trace, archive, "hidden", _HIDDEN_MEMBERS[_hidden_dtype(trace)], sum(kept), on_progress)
            _write_numbers(archive, "hidden_offsets", _offsets(kept))


def _write_required(trace: Trace, archive: zipfile.ZipFile, on_progress: Progress) -> None:
    """Experts, token ids and phases. A document gives all three, but an archive is written one member at a time."""
    narrow = {"token_ids": "<i4", "phase": "|u1"}
    with ExitStack() as stack:
        waiting = {name: stack.enter_context(SpooledTemporaryFile(_SPOOLED_BYTES)) for name in narrow}
        shape = (trace.tokens, *field_shape("expert_ids", trace.topology))
        with _member(archive, "experts", shape, "<i2") as stream:
            for record in _records(trace, "expert_ids", on_progress):
                stream.write(_bytes(record.expert_ids, "<i2"))
                for name, dtype in narrow.items():
                    waiting[name].write(_bytes(getattr(record, name), dtype))
        for name, dtype in narrow.items():
            waiting[name].seek(0)
            with _member(archive, name, (trace.tokens,), dtype) as stream:
                shutil.copyfileobj(waiting[name], stream, _COPIED_BYTES)


def _write_floats(
    trace: Trace, archive: zipfile.ZipFile, name: str, member: tuple[str, str], rows: int, on_progress: Progress
) -> None:
    """A field of ``rows`` rows, under the name and dtype of ``member``; what a model computed hardly compresses."""
    shape = (rows, *field_shape(name, trace.topology))
    with _member(archive, member[0], shape, member[1], compress=False) as stream:
        for record in _records(trace, name, on_progress):
            tensor = getattr(record, name)
            if tensor is not None:
                stream.write(_bytes(tensor, member[1]))


def _records(trace: Trace, name: str, on_progress: Progress) -> Iterator[RoutingRecord]:
    for index in range(len(trace)):
        yield trace.read(index, (name,))
        on_progress(index + 1, len(trace))


def _bytes(tensor: Tensor, dtype: str) -> memoryview:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16) if dtype == "<u2" else tensor.float()
    return np.ascontiguousarray(tensor.numpy(), dtype).reshape(-1).view(np.uint8).data


def _member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str, *, compress: bool = True
) -> IO[bytes]:
    """A member with its numpy header written, open for its numbers."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    info._compresslevel = 1  # type: ignore[attr-defined]  # public as compress_level from Python 3.13 on
    stream = archive.open(info, "w", force_zip64=True)
    np.lib.format.write_array_header_2_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream


def _write_numbers(archive: zipfile.ZipFile, name: str, numbers: np.ndarray) -> None:
    with _member(archive, name, numbers.shape, "<i8") as stream:
        stream.write(numbers.astype("<i8").tobytes())


def _write_texts(archive: zipfile.ZipFile, name: str, texts: list[str]) -> None:
    dtype = f"<U{max([1, *map(len, texts)])}"
    with _member(archive, name, (len(texts),), dtype) as stream:
        for start in range(0, len(texts), _NAMES_AT_ONCE):
            stream.write(np.array(texts[start : start + _NAMES_AT_ONCE], dtype).tobytes())


def _offsets(counts: Iterable[int]) -> np.ndarray:
    return np.array([0, *accumulate(counts)], np.int64)


# --- Parquet ---------------------------------------------------------------------------------------------


def _write_parquet(trace: Trace, path: Path, fields: list[str], on_progress: Progress) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SpecmoeError("writing Parquet needs pyarrow; install it with: pip install 'specmoe[parquet]'") from error
    schema = _schema(trace, fields)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for index, document in enumerate(trace.documents):
            if document.tokens:
                record = trace.read(index, tuple(fields))
                columns = [_column(record, field, document.doc_id, document.domain) for field in schema]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=document.tokens)
            on_progress(index + 1, len(trace))


def _schema(trace: Trace, fields: list[str]) -> Any:
    """One row per token; lists are [layers][·], of fixed size."""
    import pyarrow as pa

    numbers = {"expert_ids": pa.int16(), "gate_weights": pa.float32(), "router_logits": pa.float32()}
    if "hidden" in fields:
        # Arrow has no bfloat16; float32 holds its numbers exactly.
        numbers["hidden"] = pa.float16() if _hidden_dtype(trace) == "F16" else pa.float32()
    columns = [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
    ]
    for name in ("expert_ids", *fields):
        layers, width = field_shape(name, trace.topology)
        columns.append(pa.field(name, pa.list_(pa.list_(numbers[name], width), layers), nullable=name == "hidden"))
    about = {
        "format": "specmoe-trace",
        "topology": trace.topology.model_dump(mode="json"),
        "source": trace.manifest.source.model_dump(mode="json"),
    }
    return pa.schema(columns, metadata={"specmoe": json.dumps(about)})


def _column(record: RoutingRecord, field: Any, doc_id: str, domain: str) -> Any:
    import pyarrow as pa

    length = len(record)
    match field.name:
        case "doc_id" | "domain":
            return pa.repeat(pa.scalar(doc_id if field.name == "doc_id" else domain, field.type), length)
        case "position":
            return pa.array(np.arange(length, dtype=np.int32))
        case "token_id":
            return pa.array(record.token_ids.numpy())
        case "phase":
            names = pa.array([phase.name.lower() for phase in Phase])
            return names.take(pa.array(record.phase.numpy()))
    tensor: Tensor | None = getattr(record, field.name)
    if tensor is None:
        return pa.nulls(length, field.type)
    inner = field.type.value_type
    flat = (tensor.float() if inner.value_type == pa.float32() else tensor).contiguous().reshape(-1).numpy()
    rows = pa.FixedSizeListArray.from_arrays(pa.array(flat, inner.value_type), inner.list_size)
    return pa.FixedSizeListArray.from_arrays(rows, field.type.list_size)
