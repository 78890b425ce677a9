"""All formats that can be imported, and the one loop that imports them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import impostor, regular_file
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
from specmoe.sources.importers.base import (
    ForeignTrace,
    Importer,
    ImportOptions,
    content_hash,
    files_below,
    fingerprint,
    written_to,
)
from specmoe.sources.importers.cleaning import Cleaning
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
        if not regular_file(path).is_dir():
            head = first_bytes(path, _HEAD_BYTES)
    except OSError as error:
        raise SpecmoeError(f"{path} cannot be read: {error.strerror}") from error
    for importer in IMPORTERS.values():
        if importer.recognises(path, head):
            return importer
    _refuse_impostors(_below(path))
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
            holds another trace, or is ``path``.
    """
    if format is not None and format not in IMPORTERS:
        raise unknown_name("format", format, IMPORTERS)
    if not path.exists():
        raise SpecmoeError(f"{path} does not exist")
    regular_file(path)
    if path.resolve() == out.resolve():
        raise SpecmoeError(f"{out} is what is imported; choose another --out, within it or elsewhere")
    with written_to(out):
        try:
            return _imported(path, out, format, options or ImportOptions(), on_progress)
        except SpecmoeError as error:
            # Whatever an importer says of a file that is none, this says more; of an empty one it may say more itself.
            _refuse_impostors(file for file in _below(path) if file.name in str(error) and file.stat().st_size)
            raise


def _below(path: Path) -> list[Path]:
    return files_below(path) if path.is_dir() else [path]


def _refuse_impostors(files: Iterable[Path]) -> None:
    for file in files:
        if (found := impostor(file)) is not None:
            raise SpecmoeError(f"{file} {found}")


def _importer(path: Path, format: str | None, options: ImportOptions) -> Importer:
    """The one that is named or recognised, if it heeds the options that not all do."""
    if options.columns:
        format = format or table_rows.IMPORTER.name
        if format != table_rows.IMPORTER.name:
            raise SpecmoeError(f"--map goes with --format {table_rows.IMPORTER.name}, not with {format}")
    importer = IMPORTERS[format] if format is not None else recognise(path)
    if options.axes is not None and not importer.takes_axes:
        able = ", ".join(name for name, other in IMPORTERS.items() if other.takes_axes)
        raise SpecmoeError(f"--axes is for arrays ({able}); {importer.name} says itself what its numbers are")
    if options.group_by is not None and not importer.group_by:
        able = ", ".join(other.name for other in IMPORTERS.values() if other.group_by)
        raise SpecmoeError(f"--group-by is not possible for {importer.name}; it is for {able}")
    return importer


def _imported(
    path: Path,
    out: Path,
    format: str | None,
    options: ImportOptions,
    on_progress: Callable[[int, int | None], None],
) -> list[str]:
    importer = _importer(path, format, options)
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
        **({} if options.group_by is None else {"group_by": options.group_by}),
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
        cleaned = Cleaning(foreign.topology, foreign.fused)
        # Documents of an interrupted import are read again, so that the format is checked whole, but not written.
        for number, document in enumerate(foreign.documents, 1):
            record = cleaned(document.record)
            emptied = len(record) == 0 < len(document.record)
            if document.doc_id not in writer.written and not emptied:
                digest = content_hash(record)
                writer.add(document.doc_id, document.domain, digest, record, group=document.group)
            tokens += len(record)
            on_progress(number, foreign.count)
        foreign.warnings.extend(cleaned.warnings())
        if tokens == 0:
            raise SpecmoeError("; ".join(["there is no token in it", *cleaned.warnings()]))
