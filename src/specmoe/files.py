"""Writing files so that a kill or a full disk never leaves half of one behind, and saying what lies in one's place."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specmoe.errors import SpecmoeError

try:
    import fcntl as _system
except ImportError:  # A system without such locks, Windows for one.
    _system = None
_fcntl: Any = _system

__all__ = [
    "HTML_PAGE",
    "NoLocks",
    "atomic_path",
    "disk_errors",
    "impostor",
    "may_replace",
    "read_json",
    "regular_file",
    "remove_leftovers",
    "sha256_file",
    "try_lock",
    "write_json",
    "write_text",
]

# What is said of a web page in a file's place; where pages may be meant, it is no fault.
HTML_PAGE = "is an HTML page, not the file; download the file itself (on the hub: the link named download)"
_HEAD_BYTES = 512
# Of a name, in that of its temporary file: what is left of 255 is for the rest.
_NAME_BYTES = 200
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
# Temporary files: ours, those that once bore the number of a process, and those of safetensors.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{16}|[0-9]+)\.tmp|\.tmp[A-Za-z0-9]{6}", re.DOTALL)
_SPECIAL = {
    "pipe": stat.S_ISFIFO,
    "socket": stat.S_ISSOCK,
    "character device": stat.S_ISCHR,
    "block device": stat.S_ISBLK,
}
# What folders answer that cannot be synced: by their permissions, or by their file system.
_NO_SYNC = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` durably.

    The content is flushed to disk before the rename and the directory after it, so after a crash at
    any moment ``path`` holds either its old content or all of the new one. The temporary file is a new one under a name
    that nobody can foresee; a link in the place of ``path`` is replaced, not followed. It is locked while it is
    written, so that what a kill left can be told from what is in use.

    Raises:
        SpecmoeError: the disk is full, or the place cannot be written to.
    """
    temporary = path.with_name(f".{_temporary_name(path.name)}.{secrets.token_hex(8)}.tmp")
    descriptor = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(temporary, flags, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        try:
            try_lock(descriptor)
        except NoLocks:  # Where there is no fcntl, an open file cannot be renamed either.
            os.close(descriptor)
            descriptor = None
        yield temporary
        _settle(temporary, mode)
        temporary.replace(path)
        with _unless(_NO_SYNC):
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
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that killed processes left in ``folder``; those that somebody still writes stay.

    Whoever writes one has it locked. Libraries that put a file of their own in its place are the exception, so a folder
    in which they write is to be held by the caller (``locks``). Never an error: what cannot be removed stays.

    Args:
        name: only those of this file, in a folder that nobody holds; None for all.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None or (name is not None and match["name"] != _temporary_name(name)):
                continue
            with suppress(OSError, NoLocks):
                _remove_unlocked(Path(entry.path))


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and try_lock(descriptor):
            path.unlink()
    finally:
        os.close(descriptor)


def _temporary_name(name: str) -> str:
    """What stands for a file's name in that of its temporary file, which has to be shorter than 255 bytes too."""
    return name.encode(errors="surrogateescape")[:_NAME_BYTES].decode(errors="ignore")


class NoLocks(Exception):
    """The system or the file system knows no locks; says which."""


def try_lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file, unless somebody else has it; returns whether that went well.

    Args:
        shared: with others that share it. wait: until it is free.

    Raises:
        NoLocks: there are none here.
    """
    if _fcntl is None:
        raise NoLocks("this system has none")
    try:
        kind = _fcntl.LOCK_SH if shared else _fcntl.LOCK_EX
        _fcntl.flock(descriptor, kind if wait else kind | _fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(f"the file system has none: {error.strerror}") from error
        raise
    return True


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


def _settle(temporary: Path, mode: int) -> None:
    """Bring what was written to the disk, readable for those whom the umask lets read.

    A library that writes through a private file of its own would leave it unreadable to others, and has put another
    file in the place of the one that was made here.
    """
    descriptor = os.open(temporary, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _unless(numbers: set[int]) -> Iterator[None]:
    """Go on after errors with one of these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def may_replace(path: Path, *, is_ours: Callable[[Path], bool], force: bool, read: Sequence[Path] = ()) -> None:
    """Look whether a file that a user named may be written, before the work is done.

    Args:
        is_ours: whether what lies there is an earlier output of the same kind. force: replace what is not.
        read: what the output is made from, which it never replaces.

    Raises:
        SpecmoeError: something else lies there.
    """
    with disk_errors(path):
        if not os.path.lexists(path):
            return
        if path.is_dir():
            raise SpecmoeError(f"{path} is a folder; name a file")
        if any(source.exists() and path.exists() and path.samefile(source) for source in read):
            raise SpecmoeError(f"{path} would be written over what it is made from; choose another name")
        if path.exists() and not path.is_file():
            raise SpecmoeError(f"{path} is no regular file; choose another name")
        if not force and not (path.exists() and is_ours(path)):
            raise SpecmoeError(
                f"{path} exists and was not made by this command; replace it with --force, or choose another name"
            )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write ``value`` to ``path`` as strict JSON (no NaN), atomically; ``indent=None`` for large ones."""
    separators = (",", ":") if indent is None else None
    write_text(path, json.dumps(value, indent=indent, separators=separators, allow_nan=False) + "\n")


def regular_file(path: Path) -> Path:
    """``path``, unless a pipe, a socket or a device lies there: to open one may wait or read for ever.

    A folder or a missing file is left to whoever opens it, who knows what it should have been.

    Raises:
        SpecmoeError: it is no regular file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path
    for kind, is_kind in _SPECIAL.items():
        if is_kind(mode):
            raise SpecmoeError(f"{path} is a {kind}, not a regular file; name a file, or write its content to one")
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SpecmoeError: the file is missing, no regular file or not JSON, or holds NaN, infinity or half a character (a
            lone surrogate).
    """
    regular_file(path)
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
    """SHA-256 of a file's bytes, as hex.

    Raises:
        SpecmoeError: it is no regular file.
    """
    with regular_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def impostor(path: Path) -> str | None:
    """What lies in the place of a file that could not be read, in words that follow its name; None if nothing known.

    Three things pass for files: the pointer that Git leaves where Git LFS is not installed, the page that a web server
    sends instead of a file, and nothing at all. Only the first bytes are read, and it is never an error.
    """
    try:
        with regular_file(path).open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except (OSError, SpecmoeError):
        return None
    if not head:
        return "is empty (0 bytes); get the file again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file; run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype html", b"<html")):
        return HTML_PAGE
    return None
