"""The text that every machine has: the Python standard library, one file a document.

The library's sources and docstrings are real English and real code, need no download, and carry a
natural domain, the package that a file belongs to. Which files a model may be trained on and which
are kept for traces is decided by a hash of the file's name, so it does not depend on the Python
version, the machine or the order of a directory listing.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specmoe.errors import SpecmoeError

__all__ = ["Document", "standard_library", "text_hash"]

# Character tables and generated help topics: megabytes of text without sentences or code.
_GENERATED = {"encodings", "pydoc_data"}
_TESTS = {"test", "tests", "idle_test"}
_HELD_OUT_PERCENT = 20
_MINIMUM_CHARACTERS = 1200
_TOP_LEVEL = "(top level)"

Part = Literal["train", "held-out"]


@dataclass(frozen=True)
class Document:
    """One text, or one conversation.

    Attributes:
        doc_id: its name within its source. domain: what kind of text it is.
        text: what is read; of a conversation, JSON with its ``messages`` and perhaps ``tools``, see
            :class:`specmoe.sources.chats.ChatReader`.
        group: documents of one group stay on one side of a split, such as the turns of a chat; empty for none.
        is_chat: it is a conversation.
    """

    doc_id: str
    domain: str
    text: str
    group: str = ""
    is_chat: bool = False


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
