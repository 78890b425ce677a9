"""The user's own texts: files, folders, JSON lines, and data sets on the hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specmoe.errors import SpecmoeError
from specmoe.sources.corpus import Document, read_documents

__all__ = ["read_texts"]

_TEXT_FIELDS = ("text", "prompt", "content", "question")
_DOMAIN_FIELDS = ("domain", "source", "dataset", "category")
_HUB = re.compile(
    r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[^#]+))?(?:#(?P<column>.+))?"
)


def read_texts(places: Sequence[str]) -> list[Document]:
    """Documents from files, folders, ``.jsonl`` files and ``hub:`` data sets.

    A line of a ``.jsonl`` file is an object with its text under ``text``, ``prompt``, ``content`` or ``question``, and
    may have a ``domain``, ``source``, ``dataset`` or ``category``. ``hub:NAME[:CONFIG][@SPLIT][#COLUMN]`` is a data set
    of the Hugging Face hub, its first split ``train`` if none is named; ``@train[:500]`` takes 500 rows. This is the
    only place where text comes from the network, and it takes the package datasets.

    Raises:
        SpecmoeError: something does not exist, is not of its format, or holds no text.
    """
    documents: list[Document] = []
    for place in places:
        if place.startswith("hub:"):
            documents += _from_hub(place)
        elif place.lower().endswith(".jsonl") and not Path(place).is_dir():
            documents += _from_jsonl(Path(place))
    files = [Path(place) for place in places if not place.startswith("hub:") and not place.lower().endswith(".jsonl")]
    documents += read_documents(files) if files else []
    if not documents:
        raise SpecmoeError("the text given with --text is empty")
    # Two sources may use one name; numbers tell them apart.
    seen: Counter[str] = Counter()
    unique = []
    for document in documents:
        seen[document.doc_id] += 1
        number = seen[document.doc_id]
        unique.append(document if number == 1 else replace(document, doc_id=f"{document.doc_id} ({number})"))
    return unique


def _from_jsonl(path: Path) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    row = _object(line, f"{path}, line {number}")
                    yield Document(
                        f"{path.name}:{number}", _domain(row, path.stem), _text(row, f"{path}, line {number}")
                    )
    except FileNotFoundError as error:
        raise SpecmoeError(f"text {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecmoeError(f"{path} cannot be read as UTF-8: {error}") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SpecmoeError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise SpecmoeError(f"{where} is no JSON object")
    return row


def _text(row: dict[str, Any], where: str) -> str:
    text = next((row[name] for name in _TEXT_FIELDS if isinstance(row.get(name), str)), None)
    if text is None:
        raise SpecmoeError(f"{where} has no text; put it under one of: {', '.join(_TEXT_FIELDS)}")
    return text


def _domain(row: dict[str, Any], otherwise: str) -> str:
    return next((row[name] for name in _DOMAIN_FIELDS if isinstance(row.get(name), str)), otherwise)


def _from_hub(place: str) -> Iterator[Document]:
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
    for number, row in enumerate(rows):
        where = f"{place}, row {number}"
        text = row.get(column) if column else _text(row, where)
        if not isinstance(text, str):
            raise SpecmoeError(f"{where} has no text in column {column!r}; it has {', '.join(row)}")
        yield Document(f"{name}:{split}:{number}", _domain(row, name), text)
