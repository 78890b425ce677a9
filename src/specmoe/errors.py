"""The one exception that users are meant to see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["SpecmoeError", "unknown_name"]


class SpecmoeError(Exception):
    """Something the user can put right: bad input, a missing file, a full disk.

    The message is one line that says what is wrong and what to do about it. The command line prints
    it without a traceback and exits with code 2.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> SpecmoeError:
    """Build the error for a name that is not in a closed list, with the nearest known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return SpecmoeError(f"unknown {kind} {name!r}; {hint}")
