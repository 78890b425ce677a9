"""How the hot loops are compiled, and where what is compiled is kept."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba

__all__ = ["Records", "compiled", "inlined", "keeping"]

# An array of numpy records whose fields are read and set as attributes, which only compiled code can do.
Records = Any


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _private(folder: Path) -> bool:
    """The same, of a folder that nobody but this user can put a file into: compiled code is run as it lies there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = folder.lstat()
    except OSError:
        return False
    own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022
    return own and _takes_files(folder)


def _private_places() -> Iterator[Path]:
    with suppress(RuntimeError):  # No home folder at all.
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        if base.is_absolute():
            yield base / "specmoe" / "numba"
    with suppress(OSError):  # No temporary folder that can be written to.
        yield Path(tempfile.gettempdir()) / f"specmoe-numba-{os.geteuid()}"


def place_of_cache(asked: str, sources: Path, private: Callable[[], Iterator[Path]] = _private_places) -> str | None:
    """Where compiled functions are kept, or None if nowhere: then they are compiled in each process anew.

    Args:
        asked: of NUMBA_CACHE_DIR; empty for nothing. sources: folder of the functions' files.
        private: places for an installation that cannot be written to, best first.

    Returns:
        A folder, or an empty string for beside the sources.
    """
    if asked and _takes_files(Path(asked)):
        return asked
    folders = {file.parent / "__pycache__" for file in sources.rglob("*.py")}
    if all(_takes_files(folder) for folder in folders):
        return ""
    return next((str(folder) for folder in private() if _private(folder)), None)


# Before the first function is compiled: numba looks for the place when a function is decorated, and one without any
# place would be an error.
_config: Any = numba.config
place = place_of_cache(_config.CACHE_DIR, Path(__file__).parent)
if place:
    _config.CACHE_DIR = place
_njit: Any = numba.njit  # whose types do not list every option
# For what allocates.
keeping = functools.partial(_njit, cache=place is not None)
# Without reference counts on arrays: these functions make none and only change what they are given, and counting, one
# atomic operation for each array whenever a tuple of them is passed on or opened, took nine tenths of a run's time.
# Whoever calls from Python holds the arrays meanwhile. What allocates must not be compiled so; numba says it then.
compiled = functools.partial(keeping, nogil=True, _nrt=False)
# For the smallest verbs, and for parts of a loop that are used once.
inlined = functools.partial(compiled, forceinline=True)
