"""One run at a time writes to a folder. The kernel takes the lock back from a process that ends, however it ends."""

from __future__ import annotations

import datetime
import errno
import functools
import inspect
import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from specmoe.errors import SpecmoeError
from specmoe.files import NoLocks, disk_errors, remove_leftovers, try_lock

__all__ = ["at_work", "hold", "locked", "take", "writes"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

LOCK, WORKERS = ".specmoe.lock", ".specmoe.workers"
# Workers look twice a second whether their parent lives.
_ORPHAN_SECONDS = 30.0
_HOLDER_BYTES = 512
# Folders within a run's that are its own. A folder that somebody else may hold (a trace, a cut) is cleaned by whoever
# holds it.
_OWN_FOLDERS = ("jobs/*", "taught/jobs/*", "trials")
# What this process holds by :func:`locked`: device and inode of a folder → the thread.
_held: dict[tuple[int, int], int] = {}
_told = False


def writes(verb: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Decorate a function that writes to the folder ``out`` it is given: it holds that folder while it runs."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            with locked(bound.arguments["out"], verb):
                return function(*args, **kwargs)

        return alone

    return decorate


@contextmanager
def locked(folder: Path, verb: str) -> Iterator[None]:
    """Hold a folder, made if it is missing, while the context lasts. Within what holds it already, nothing happens.

    Temporary files that a killed run left in it are removed.

    Where a file system (or the system) has no locks, one line on standard error says so and the run goes on: to refuse
    would make such places useless for the many who run one thing at a time.

    Args:
        verb: what is running, for whoever comes second.

    Raises:
        SpecmoeError: another run holds it (process, verb and start are named), its workers do not end, or the folder
            cannot be written to.
    """
    if _held.get(_identity(folder) or (-1, -1)) == threading.get_ident():
        yield
        return
    release = hold(folder, verb)
    identity = _identity(folder)
    if identity is not None:
        _held[identity] = threading.get_ident()
    try:
        for place in (folder, *(found for own in _OWN_FOLDERS for found in folder.glob(own))):
            remove_leftovers(place)
        yield
    finally:
        if identity is not None:
            del _held[identity]
        release()


def hold(folder: Path, verb: str) -> Callable[[], None]:
    """As :func:`locked`, until what is returned is called; a folder that this process holds is refused too."""
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise SpecmoeError(f"{folder} is a file; name a folder with --out")
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            descriptor = _acquire(folder, verb)
            try:
                _outlive_workers(folder)
            except BaseException:
                os.close(descriptor)
                raise
        except BaseException:
            _remove_empty(made)
            raise
    process = os.getpid()

    def release() -> None:
        if os.getpid() != process:  # A copy of this process does not hold what its original holds.
            return
        with suppress(OSError):
            _remove_if_idle(folder / WORKERS)
        # Before the lock is given back; whoever waits for this file looks whether it is still the one in its place.
        with suppress(OSError):
            (folder / LOCK).unlink()
        with suppress(OSError):
            os.close(descriptor)
        _remove_empty(made)

    return release


def at_work(folder: Path) -> int:
    """Show that a worker of the folder's run lives, until the descriptor that is returned is closed.

    The next run waits for workers that a killed one left: until they notice, they may still write.
    """
    with disk_errors(folder):
        while True:
            descriptor = _open(folder / WORKERS)
            take(descriptor, shared=True, wait=True)
            if _lies_at(descriptor, folder / WORKERS):
                return descriptor
            os.close(descriptor)  # The next run has just found it idle and removed it.


def take(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """As :func:`specmoe.files.try_lock`; where there are no locks it goes well, and one line says so."""
    try:
        return try_lock(descriptor, shared=shared, wait=wait)
    except NoLocks as error:
        _tell_once(str(error))
        return True


def _tell_once(why: str) -> None:
    global _told
    if not _told:
        _told = True
        print(f"note: nothing is locked here ({why}); do not let two runs write to one folder", file=sys.stderr)


def _acquire(folder: Path, verb: str) -> int:
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # Who held it has just removed the folder, which was empty.
            continue
        try:
            if not take(descriptor):
                raise SpecmoeError(
                    f"another process is writing to {folder}{_holder(descriptor)}; wait for it, or choose another --out"
                )
            if _lies_at(descriptor, path):
                started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "verb": verb, "since": started}).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a lock file, made if it is missing; nothing is followed, and what is no file of one name is refused."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise SpecmoeError(f"{path} is no lock file of specmoe; remove it") from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise SpecmoeError(f"{path} is no lock file of specmoe; remove it")
    return descriptor


def _holder(descriptor: int) -> str:
    """Who has the lock, in words; nothing where that is not legible."""
    try:
        said = json.loads(os.pread(descriptor, _HOLDER_BYTES, 0))
        pid, verb, since = said["pid"], said["verb"], said["since"]
        if type(pid) is int and re.fullmatch(r"[a-z-]{1,40}", verb) and re.fullmatch(r"[0-9: -]{1,30}UTC", since):
            return f" (specmoe {verb}, process {pid}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return ""


def _outlive_workers(folder: Path) -> None:
    """Wait until workers of a run that was killed have ended."""
    if not os.path.lexists(folder / WORKERS):
        return
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while not _remove_if_idle(folder / WORKERS):
        if time.monotonic() > deadline:
            raise SpecmoeError(f"workers of an earlier run are still at work in {folder}; end them first")
        time.sleep(0.1)


def _remove_if_idle(path: Path) -> bool:
    if not os.path.lexists(path):
        return True
    descriptor = _open(path)
    try:
        if idle := take(descriptor):
            path.unlink(missing_ok=True)
        return idle
    finally:
        os.close(descriptor)


def _lies_at(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _identity(folder: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
