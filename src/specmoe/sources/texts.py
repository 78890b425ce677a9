"""The user's own texts: files, folders, rows and conversations, and data sets on the hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from specmoe.errors import SpecmoeError
from specmoe.files import HTML_PAGE, impostor, regular_file
from specmoe.sources.corpus import Document
from specmoe.sources.notes import Notes
from specmoe.sources.rows import NoRows, Row, document_of, is_lines, is_rows, opened_text, rows_of, stem_of, storable

__all__ = ["read_texts"]

_TOP_LEVEL = "(top level)"
_HUB = re.compile(
    r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[^#]+))?(?:#(?P<column>.+))?"
)
# Of these a web page in the file's place is a failed download; others may be meant to be pages.
_PLAIN = re.compile(r"\.(txt|text|md|rst)(\.gz)?$", re.IGNORECASE)
_NO_TEXT = "files that are no text, passed over"
_NO_ROWS = "files of JSON or tables without text, passed over"
# Enough to tell most binary files from text.
_HEAD_CHARACTERS = 1 << 13


def read_texts(places: Sequence[str], on_note: Callable[[str], None] = lambda _: None) -> list[Document]:
    """Documents from files, folders and ``hub:`` data sets; ``docs/collect.md`` describes what each file may hold.

    Files are read by what their names say: rows of ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` and
    ``.parquet``, a document each; any other file is one document of text. A folder stands for all files below it.
    ``hub:NAME[:CONFIG][@SPLIT][#COLUMN]`` is a data set of the Hugging Face hub, its first split ``train`` if none is
    named; ``@train[:500]`` takes 500 rows. This is the only place where text comes from the network, and it takes the
    package datasets.

    Args:
        on_note: told what was left out, one line for each kind.

    Raises:
        SpecmoeError: something does not exist, is not of its format, or holds no text.
    """
    notes = Notes()
    sources = {place: None if place.startswith("hub:") else list(_files(Path(place))) for place in places}
    # One name for files of two folders would be ambiguous; such files go by their whole path.
    names = Counter(_short_name(*file) for files in sources.values() for file in files or ())
    documents: list[Document] = []
    for place, files in sources.items():
        found = _from_hub(place, notes) if files is None else _from_files(files, names, notes)
        documents += _grouped(list(found), place)
    for line in notes.lines():
        on_note(line)
    if not documents:
        raise SpecmoeError(f"the text given with --text is empty, or no readable text{_why(notes)}")
    return _unique(documents)


def _why(notes: Notes) -> str:
    lines = list(notes.lines())
    return f": {'; '.join(lines)}" if lines else ""


def _unique(documents: list[Document]) -> list[Document]:
    """Two sources may use one name; numbers tell them apart."""
    seen: Counter[str] = Counter()
    unique = []
    for document in documents:
        seen[document.doc_id] += 1
        number = seen[document.doc_id]
        unique.append(document if number == 1 else replace(document, doc_id=f"{document.doc_id} ({number})"))
    return unique


def _grouped(documents: list[Document], place: str) -> list[Document]:
    """Rows of one conversation as a group of their source; a name that only one row has is no group."""
    counts = Counter(document.group for document in documents)
    source = storable(Path(place).name)
    return [
        replace(each, group=f"{source}:{each.group}" if each.group and counts[each.group] > 1 else "")
        for each in documents
    ]


# --- files -----------------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """Files with the folder that was named, None for a file that was named itself. Hidden ones are not looked at."""
    if not path.exists():
        raise SpecmoeError(f"text {path} does not exist")
    if not path.is_dir():
        yield path if _is_open_pipe(path) else regular_file(path), None
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file, path


def _is_open_pipe(path: Path) -> bool:
    """Whether a shell has opened it for us, as with ``<(command)``; one by another name may never have a writer."""
    return (path == Path("/dev/stdin") or path.parent in (Path("/dev/fd"), Path("/proc/self/fd"))) and path.is_fifo()


def _short_name(file: Path, root: Path | None) -> str:
    return (file.relative_to(root.parent) if root is not None else Path(file.name)).as_posix()


def _from_files(files: Iterable[tuple[Path, Path | None]], names: Counter[str], notes: Notes) -> Iterator[Document]:
    for file, root in files:
        short = _short_name(file, root)
        name = storable(short if names[short] == 1 or (root is None and is_rows(file)) else file.as_posix())
        if not _holds_something(file, root, notes):
            continue
        inner = file.relative_to(root).parts[:-1] if root is not None else ()
        if is_rows(file):
            yield from _documents_of_rows(file, root, name, storable(inner[0] if inner else stem_of(file)), notes)
        elif text := _text_of(file, root, notes):
            # The first folder within the one that was given, else that one itself.
            domain = _TOP_LEVEL if root is None else inner[0] if inner else root.name
            yield Document(name, storable(domain), text)


def _holds_something(file: Path, root: Path | None, notes: Notes) -> bool:
    """Whether a file is not empty, and nothing lies in its place.

    Raises:
        SpecmoeError: it is a pointer or a page where text is due.
    """
    if not file.is_file():  # A pipe: what is read of it is gone.
        return True
    if file.stat().st_size == 0:
        return False
    found, is_due = impostor(file), is_rows(file) or _PLAIN.search(file.name) is not None
    if found is None or (found == HTML_PAGE and not is_due):
        return True
    if is_due or root is None:
        raise SpecmoeError(f"{file} {found}")
    notes.add(_NO_TEXT, str(file))
    return False


def _documents_of_rows(file: Path, root: Path | None, name: str, domain: str, notes: Notes) -> Iterator[Document]:
    is_first = True
    try:
        for row in rows_of(file):
            document = document_of(row, f"{name}:{row.label}" if row.label else name, domain, notes)
            is_first = False
            if document is not None:
                yield document
    except NoRows:
        # A folder may hold JSON and tables that are not meant as text.
        if root is None or is_lines(file) or not is_first:
            raise
        notes.add(_NO_ROWS, str(file))


def _text_of(file: Path, root: Path | None, notes: Notes) -> str:
    try:
        with opened_text(file) as stream:
            text = stream.read(_HEAD_CHARACTERS)
            if "\0" not in text:
                text += stream.read()
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
        reason = "it holds zero bytes"
    except SpecmoeError as error:
        reason = f"it {str(error).removeprefix(f'{file} ')}"
    if root is None:
        raise SpecmoeError(f"{file} is no readable text: {reason}; give UTF-8, or rows as .jsonl, .csv or .parquet")
    notes.add(_NO_TEXT, str(file))
    return ""


# --- the hub ---------------------------------------------------------------------------------------------


def _from_hub(place: str, notes: Notes) -> Iterator[Document]:
    match = _HUB.fullmatch(place)
    if match is None:
        raise SpecmoeError(f"{place!r} is no data set; write hub:NAME[:CONFIG][@SPLIT][#COLUMN]")
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SpecmoeError("data sets of the hub need a package: pip install 'specmoe[datasets]'") from error
    name, config, split, column = match["name"], match["config"], match["split"] or "train", match["column"]
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecmoeError(f"cannot get data set {name} from the hub; check name and network ({reason})") from error
    for number, value in enumerate(rows):
        where = f"{place}, row {number}"
        if column is not None and column not in value:
            raise SpecmoeError(f"{where} has no column {column!r}; it has {', '.join(value)}")
        row = Row(str(number), where, value)
        document = document_of(row, f"{name}:{split}:{number}", name, notes, column)
        if document is not None:
            yield document
