"""Writing files so that a kill or a full disk never leaves half of one behind, and saying what lies in one's place."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specmoe.errors import SpecmoeError

__all__ = [
    "HTML_PAGE",
    "atomic_path",
    "disk_errors",
    "impostor",
    "read_json",
    "sha256_file",
    "write_json",
    "write_text",
]

# What is said of a web page in a file's place; where pages may be meant, it is no fault.
HTML_PAGE = "is an HTML page, not the file; download the file itself (on the hub: the link named download)"
_HEAD_BYTES = 512


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` durably.

    The content is flushed to disk before the rename and the directory after it, so after a crash at
    any moment ``path`` holds either its old content or all of the new one.

    Raises:
        SpecmoeError: the disk is full, or the place cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # A library that writes through a private file of its own would leave it unreadable to others.
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except Exception as error:
        _discard(temporary)
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise SpecmoeError(f"cannot write {path}: {reason}") from error
    except BaseException:
        _discard(temporary)
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write of a library that writes to ``path`` by itself into a message for the user.

    Raises:
        SpecmoeError: the disk is full, or the place cannot be written to.
    """
    try:
        yield
    except BrokenPipeError:  # Not a file: whoever read our output has gone.
        raise
    except OSError as error:
        raise SpecmoeError(f"cannot write to {path}: {_disk_reason(error)}") from error


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _disk_reason(error: Exception) -> str | None:
    """What to tell the user about a failed write, or None if ``error`` is something else.

    safetensors reports I/O errors as its own exception type with the system's error number in its text.
    """
    number = re.search(r"\(os error (\d+)\)", str(error))
    code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    if code == errno.EFBIG:
        return "the file passes a limit on file size; raise it, then run the same command again to continue"
    if code in {errno.ENOSPC, errno.EDQUOT}:
        return "no space left on the disk; free some, then run the same command again to continue"
    if code in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return "permission denied; choose another folder with --out"
    if code is not None:
        return os.strerror(code)
    return str(error) if isinstance(error, OSError) else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write ``value`` to ``path`` as strict JSON (no NaN), atomically; ``indent=None`` for large ones."""
    separators = (",", ":") if indent is None else None
    write_text(path, json.dumps(value, indent=indent, separators=separators, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SpecmoeError: the file is missing or is not JSON, or holds NaN, infinity or half a character (a lone surrogate).
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        # Half a character, which Python reads and no file or terminal takes.
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except FileNotFoundError as error:
        raise SpecmoeError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        found = impostor(path)
        raise SpecmoeError(f"{path} cannot be read as JSON: {f'it {found}' if found else error}") from error


def _no_number(text: str) -> float:
    raise ValueError(f"it holds {text}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def impostor(path: Path) -> str | None:
    """What lies in the place of a file that could not be read, in words that follow its name; None if nothing known.

    Three things pass for files: the pointer that Git leaves where Git LFS is not installed, the page that a web server
    sends instead of a file, and nothing at all. Only the first bytes are read, and it is never an error.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return None
    if not head:
        return "is empty (0 bytes); get the file again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file; run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype html", b"<html")):
        return HTML_PAGE
    return None
