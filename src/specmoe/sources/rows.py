"""Files of rows: JSON lines, JSON, CSV and Parquet, plain or gzip, and what each row says."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from specmoe.errors import SpecmoeError
from specmoe.sources.chats import CHAT_FIELDS, chat_of, is_chat
from specmoe.sources.corpus import Document
from specmoe.sources.notes import Notes

__all__ = [
    "TEXT_FIELDS",
    "NoRows",
    "Row",
    "document_of",
    "is_lines",
    "is_rows",
    "opened_text",
    "rows_of",
    "stem_of",
    "storable",
]

TEXT_FIELDS = ("text", "prompt", "content", "question", "query", "instruction", "input")
_DOMAIN_FIELDS = ("domain", "source", "dataset", "category")
_GROUP_FIELDS = ("conversation_id", "session_id", "thread_id", "dialogue_id", "chat_id", "id")
# Fields of one object around all rows.
_LISTS = ("data", "rows", "prompts", "examples", "instances", "items", "records", "documents", "questions", "samples")
_SUFFIX = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz)?$", re.IGNORECASE)
_PART_OF = re.compile(r"-\d+-of-\d+$")
# Bytes that a file begins with → how its text is written.
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_LARGEST_FIELD = 1 << 30
_ROWS_AT_ONCE = 256


class NoRows(SpecmoeError):
    """Content that is no row of text, or no rows at all, such as a configuration in JSON."""


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        label: its number, as it goes into a document's name; empty where the file is one row.
        where: file and place, for errors. value: what stands there.
    """

    label: str
    where: str
    value: Any


def is_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return _suffix(path) != ""


def is_lines(path: Path) -> bool:
    """Whether a file's name says that each of its lines is a row."""
    return _suffix(path) in {"jsonl", "ndjson"}


def stem_of(path: Path) -> str:
    """The name of a file of rows without what says so, and without its number among parts of one whole."""
    return _PART_OF.sub("", _SUFFIX.sub("", path.name))


def _suffix(path: Path) -> str:
    match = _SUFFIX.search(path.name)
    return match[1].lower() if match is not None else ""


@contextmanager
def opened_text(path: Path) -> Iterator[TextIO]:
    """A text file, as it is or in gzip: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

    Raises:
        SpecmoeError: it does not exist, or cannot be read as such text, which may show while it is read.
    """
    encoding = "utf-8"
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as packed:
            binary: Any = packed if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            head = binary.peek(4)[:4]
            encoding = next((name for mark, name in _MARKS if head.startswith(mark)), encoding)
            with io.TextIOWrapper(binary, encoding=encoding, newline="") as stream:
                yield stream
    except FileNotFoundError as error:
        raise SpecmoeError(f"text {path} does not exist") from error
    except (OSError, UnicodeError, EOFError, zlib.error) as error:
        raise SpecmoeError(f"{path} cannot be read as {encoding.upper().removesuffix('-SIG')}: {error}") from error


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, one by one.

    Raises:
        NoRows: it is JSON of another form, or a table without a column of text.
        SpecmoeError: it cannot be read, or a line is not JSON.
    """
    kind = _suffix(path)
    if kind == "parquet":
        yield from _parquet_rows(path)
        return
    with opened_text(path) as stream:
        if kind == "json":
            yield from _json_rows(path, stream.read())
        elif kind in {"csv", "tsv"}:
            yield from _table_rows(path, stream, "\t" if kind == "tsv" else ",")
        else:
            yield from _line_rows(path, stream)


def _line_rows(path: Path, stream: Iterable[str]) -> Iterator[Row]:
    lines, is_first = iter(stream), True
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = _parsed(line, where)
            except SpecmoeError:
                # A list or an object over several lines, whatever the name says.
                if not is_first or line.lstrip()[0] not in "[{":
                    raise
                try:
                    content = json.loads("".join([line, *lines]))
                except (ValueError, RecursionError):
                    content = None
                if content is None:
                    raise
                yield from _entries(path, content)
                return
            is_first = False
            yield Row(str(number), where, value)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Many a data set in JSON lines is called .json.
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _line_rows(path, io.StringIO(text))
            return
        raise NoRows(f"{path} is not JSON: {error}") from error
    yield from _entries(path, content)


def _entries(path: Path, content: Any) -> Iterator[Row]:
    """The rows of one JSON value: a list, an object around a list, or one row."""
    if isinstance(content, str) or is_chat(content) or (isinstance(content, dict) and _is_row(content)):
        yield Row("", str(path), content)
        return
    rows, place = content, "entry"
    if isinstance(content, dict):
        # Columns under the names of fields count as lists too.
        names = [name for name in (*_LISTS, *TEXT_FIELDS) if isinstance(content.get(name), list)]
        if not names:
            wanted = ", ".join((*TEXT_FIELDS[:2], *CHAT_FIELDS[:2]))
            raise NoRows(f"{path} holds no list of rows (under {', '.join(_LISTS[:3])}) and no text (under {wanted})")
        rows, place = content[names[0]], names[0]
    if not isinstance(rows, list):
        raise NoRows(f"{path} holds neither a list of rows nor an object")
    for number, value in enumerate(rows, 1):
        yield Row(str(number), f"{path}, {place} {number}", value)


def _is_row(content: dict[str, Any]) -> bool:
    return any(is_chat(content.get(name)) for name in CHAT_FIELDS) or any(
        isinstance(content.get(name), str) for name in TEXT_FIELDS
    )


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SpecmoeError(f"{where} is not JSON: {error}") from error


def _table_rows(path: Path, stream: TextIO, delimiter: str) -> Iterator[Row]:
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        rows = csv.DictReader(stream, delimiter=delimiter)
        _check_columns(path, rows.fieldnames or ())
        for row in rows:
            yield Row(str(rows.line_num), f"{path}, line {rows.line_num}", row)
    except csv.Error as error:
        raise SpecmoeError(f"{path} cannot be read as a table: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SpecmoeError("reading Parquet needs pyarrow; install it with: pip install 'specmoe[parquet]'") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            columns = _check_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(str(number), f"{path}, row {number}", value)
    except FileNotFoundError as error:
        raise SpecmoeError(f"text {path} does not exist") from error
    except (ArrowException, OSError) as error:
        raise SpecmoeError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error


def _check_columns(path: Path, names: Iterable[str]) -> list[str]:
    """The columns of a table that are looked at."""
    names = list(names)
    if not {*TEXT_FIELDS, *CHAT_FIELDS} & set(names):
        raise NoRows(f"{path} has no column of text; call one of its columns {', '.join(TEXT_FIELDS)}")
    known = {*TEXT_FIELDS, *CHAT_FIELDS, *_DOMAIN_FIELDS, *_GROUP_FIELDS, "system", "tools"}
    return [name for name in names if name in known]


# --- rows ----------------------------------------------------------------------------------------------


def document_of(row: Row, name: str, domain: str, notes: Notes, column: str | None = None) -> Document | None:
    """A row as a document, None if its text is empty.

    Its ``group`` is what it says of the conversation that it belongs to, whether or not another row says the same.

    Args:
        name: of the document. domain: where the row names none. notes: counts what is left out.
        column: the only field to look for text in; None for all that are known.

    Raises:
        NoRows: it has no text and no conversation.
        SpecmoeError: a message of it is none.
    """
    value = row.value if column is None or not isinstance(row.value, dict) else _only(row.value, column)
    chat = chat_of(value, row.where, notes) if isinstance(value, dict | list) else None
    if chat is None and isinstance(value, list):
        raise NoRows(f"{row.where} is no JSON object, no text and no list of messages")
    text = chat if chat is not None else _text(value, row.where, column)
    if not text.strip():
        notes.add("rows without text, left out", row.where)
        return None
    fields = row.value if isinstance(row.value, dict) else {}
    domain, group = _label(fields, _DOMAIN_FIELDS) or domain, _label(fields, _GROUP_FIELDS)
    return Document(name, storable(domain), storable(text), storable(group), chat is not None)


def _only(fields: dict[str, Any], column: str) -> dict[str, Any]:
    value = fields.get(column)
    return {"messages": value} if is_chat(value) else {"text": value}


def _text(value: Any, where: str, column: str | None) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise NoRows(f"{where} is no JSON object")
    found = False
    for name in TEXT_FIELDS:
        text = value.get(name)
        found = found or isinstance(text, str) or (text is None and name in value)
        if isinstance(text, str) and text.strip():
            more = value.get("input") if name == "instruction" else None
            return f"{text}\n\n{more}" if isinstance(more, str) and more.strip() else text
    if found:
        return ""
    if column is not None:
        raise NoRows(f"{where} has no text in column {column!r}")
    raise NoRows(
        f"{where} has no text; put it under one of: {', '.join(TEXT_FIELDS)}, or a conversation under {CHAT_FIELDS[0]}"
    )


def _label(fields: dict[str, Any], names: Iterable[str]) -> str:
    """The first of some fields that names something: text or a number, of a list its first entry."""
    for name in names:
        value = fields.get(name)
        while isinstance(value, list) and value:
            value = value[0]
        # NaN is what tables put where nothing is.
        if (
            isinstance(value, str | int | float)
            and not isinstance(value, bool)
            and str(value).strip() not in {"", "nan"}
        ):
            return str(value).strip()
    return ""


def storable(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON may hold and no file can."""
    return text.encode("utf-8", "replace").decode()
