"""All formats that can be imported, and the one loop that imports them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.sources.importers import (
    bigmoeonedge,
    colibri_route_trace,
    flame_moe,
    gating_pickle,
    llama_moe_trace,
    megatron_jsonl,
    moe_beyond,
    npz,
    problem_jsonl,
    rl_rollouts,
    routed_experts,
    routed_responses,
    safetensors_set,
    sglang_recorder,
    table_rows,
)
from specmoe.sources.importers._streams import first_bytes, scratch
from specmoe.sources.importers.base import ForeignTrace, Importer, ImportOptions, content_hash, fingerprint
from specmoe.trace import Manifest, Source, TraceWriter

__all__ = ["IMPORTERS", "import_trace", "recognise"]

# Recognised in this order: the strictest first, the general one last.
IMPORTERS: dict[str, Importer] = {
    module.IMPORTER.name: module.IMPORTER
    for module in (
        npz,
        sglang_recorder,
        flame_moe,
        rl_rollouts,
        safetensors_set,
        routed_experts,
        routed_responses,
        gating_pickle,
        bigmoeonedge,
        moe_beyond,
        megatron_jsonl,
        problem_jsonl,
        colibri_route_trace,
        llama_moe_trace,
        table_rows,
    )
}

_HEAD_BYTES = 64 << 10


def recognise(path: Path) -> Importer:
    """The importer whose format a file or folder looks like.

    Raises:
        SpecmoeError: there is nothing at ``path``, or no importer knows it.
    """
    head = b""
    try:
        if not path.is_dir():
            head = first_bytes(path, _HEAD_BYTES)
    except OSError as error:
        raise SpecmoeError(f"{path} cannot be read: {error.strerror}") from error
    for importer in IMPORTERS.values():
        if importer.recognises(path, head):
            return importer
    raise SpecmoeError(
        f"{path} is of no known format; name one with --format: {', '.join(IMPORTERS)}; "
        "or, of a table, the columns with --map"
    )


def import_trace(
    path: Path,
    out: Path,
    *,
    format: str | None = None,
    options: ImportOptions | None = None,
    on_progress: Callable[[int, int | None], None] = lambda _done, _total: None,
) -> list[str]:
    """Turn a foreign trace into ours. A run that was interrupted is continued by the same call.

    Args:
        path: file or folder. out: directory of the trace. format: a name of :data:`IMPORTERS`, None to recognise it.
        options: what the file does not say.
        on_progress: called with documents written and documents in all (None if that is not known).

    Returns:
        Warnings, one line each: what was dropped, and what makes the data doubtful.

    Raises:
        SpecmoeError: the file is missing, damaged, of another format, or holds no token; a full disk; or ``out``
            holds another trace.
    """
    if format is not None and format not in IMPORTERS:
        raise unknown_name("format", format, IMPORTERS)
    if not path.exists():
        raise SpecmoeError(f"{path} does not exist")
    options = options or ImportOptions()
    if options.columns:
        format = format or table_rows.IMPORTER.name
        if format != table_rows.IMPORTER.name:
            raise SpecmoeError(f"--map goes with --format {table_rows.IMPORTER.name}, not with {format}")
    importer = IMPORTERS[format] if format is not None else recognise(path)
    try:
        with scratch(out):
            try:
                foreign = importer.read(path, options)
            except SpecmoeError as error:
                if str(path) in str(error):
                    raise
                raise SpecmoeError(f"{path}: {error}") from error
            try:
                _write(foreign, _manifest(foreign, importer, path, options), out, on_progress)
            finally:
                if isinstance(foreign.documents, Generator):
                    foreign.documents.close()  # with the files that it has open
    except OSError as error:
        raise SpecmoeError(f"{path} cannot be read: {error.strerror or error}") from error
    return foreign.warnings


def _manifest(foreign: ForeignTrace, importer: Importer, path: Path, options: ImportOptions) -> Manifest:
    known = options.experts is not None or foreign.experts_known or "router_logits" in foreign.fields
    settings = {
        "experts_from": ("user" if options.experts is not None else "file") if known else "ids",
        "file": path.name,
        "file_sha256": fingerprint(path),
        **foreign.settings,
    }
    source = Source(kind=importer.name, tokenizer=foreign.tokenizer, settings=settings)
    return Manifest(topology=foreign.topology, source=source, fields=foreign.fields)


def _write(
    foreign: ForeignTrace, manifest: Manifest, out: Path, on_progress: Callable[[int, int | None], None]
) -> None:
    with TraceWriter(out, manifest) as writer:
        if foreign.routers is not None:
            writer.keep_routers(*foreign.routers)
        tokens = 0
        # Documents of an interrupted import are read again, so that the format is checked whole, but not written.
        for number, document in enumerate(foreign.documents, 1):
            if document.doc_id not in writer.written:
                digest = content_hash(document.record)
                writer.add(document.doc_id, document.domain, digest, document.record, group=document.group)
            tokens += len(document.record)
            on_progress(number, foreign.count)
        if tokens == 0:
            raise SpecmoeError("there is no token in it")
