"""How the hot loops are compiled."""

from __future__ import annotations

import functools
from typing import Any

import numba

__all__ = ["Records", "compiled", "inlined"]

# An array of numpy records whose fields are read and set as attributes, which only compiled code can do.
Records = Any

# Without reference counts on arrays: these functions make none and only change what they are given, and counting, one
# atomic operation for each array whenever a tuple of them is passed on or opened, took nine tenths of a run's time.
# Whoever calls from Python holds the arrays meanwhile. What allocates must not be compiled so; numba says it then.
_njit: Any = numba.njit  # whose types do not list every option
compiled = functools.partial(_njit, cache=True, nogil=True, _nrt=False)
# For the smallest verbs, and for parts of a loop that are used once.
inlined = functools.partial(compiled, forceinline=True)
