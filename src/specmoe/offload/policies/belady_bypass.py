"""Belady without forced admission: a missed key that is needed later than all that is held is used and not kept.

The verbs are Belady's; the difference is :func:`admit`. What is not kept is used from the buffer that it was read into,
outside the capacity, so this is a bound and not a cache that could be built at the same size: while an event runs
it needs room for the experts that it passes by.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.heap import top_unpinned
from specmoe.offload.policies.state import PolicyState

__all__ = ["admit"]


@inlined()
def admit(state: PolicyState, key: int, now: int) -> bool:
    """Is something held, and not in use, that is needed later than this key? Asked when its cache is full."""
    top = top_unpinned(state, state.keys[key].group)
    return top >= 0 and state.keys[key].next_use < state.keys[top].next_use
