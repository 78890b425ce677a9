"""The text that every machine has: the Python standard library, one file a document.

The library's sources and docstrings are real English and real code, need no download, and carry a
natural domain, the package that a file belongs to. Which files a model may be trained on and which
are kept for traces is decided by a hash of the file's name, so it does not depend on the Python
version, the machine or the order of a directory listing.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from specmoe.errors import SpecmoeError

__all__ = ["Document", "read_documents", "standard_library", "text_hash"]

# Character tables and generated help topics: megabytes of text without sentences or code.
_GENERATED = {"encodings", "pydoc_data"}
_TESTS = {"test", "tests", "idle_test"}
_HELD_OUT_PERCENT = 20
_MINIMUM_CHARACTERS = 1200
_TOP_LEVEL = "(top level)"

Part = Literal["train", "held-out"]


@dataclass(frozen=True)
class Document:
    """One text. ``doc_id`` is its name within its source, ``domain`` what kind of text it is."""

    doc_id: str
    domain: str
    text: str


def standard_library(part: Part) -> list[Document]:
    """The standard library's files as documents, sorted by name.

    Args:
        part: ``"train"``: four fifths of the modules, what the bundled models are trained on.
            ``"held-out"``: the others, for measuring the language model and for traces. The library's own
            tests are in neither: not every machine has them.

    Raises:
        SpecmoeError: this Python has no source files (a stripped or frozen installation).
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        folders = set(name.parts[:-1])
        if folders & (_GENERATED | _TESTS | {"site-packages", "dist-packages"}):
            continue
        if _is_held_out(name.as_posix()) != (part == "held-out"):
            continue
        text = _read_text(path)
        if text is not None and len(text) >= _MINIMUM_CHARACTERS:
            documents.append(Document(name.as_posix(), _package(name), text))
    if not documents:
        raise SpecmoeError(f"no Python sources under {root}; name your own text with --text")
    return documents


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """Text files as documents; a folder stands for all files below it, and names their domain.

    Files that are not UTF-8 text are passed over.

    Raises:
        SpecmoeError: a path does not exist, or nothing readable was found.
    """
    found: list[tuple[str, str, Document]] = []
    for path in paths:
        if not path.exists():
            raise SpecmoeError(f"text {path} does not exist")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            text = _read_text(file)
            if text:
                name = file.relative_to(path.parent if path.is_dir() else file.parent)
                within = name.parts[1:] if path.is_dir() else name.parts
                # The first folder within the one that was given, else that one itself.
                domain = within[0] if len(within) > 1 else path.name if path.is_dir() else _TOP_LEVEL
                found.append((name.as_posix(), file.as_posix(), Document(name.as_posix(), domain, text)))
    if not found:
        raise SpecmoeError("the text given with --text holds no readable UTF-8 file")
    taken = Counter(short for short, _, _ in found)
    unique: dict[str, Document] = {}
    for short, full, document in found:
        name = short if taken[short] == 1 else full
        unique[name] = replace(document, doc_id=name)
    return list(unique.values())


def text_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts, in order: two traces with the same hash read the same text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.doc_id}\0{document.text}\0".encode())
    return digest.hexdigest()


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100 < _HELD_OUT_PERCENT


def _package(name: Path) -> str:
    return name.parts[0] if len(name.parts) > 1 else _TOP_LEVEL


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
