"""What the predictor wants least leaves first: lowest ``wanted``, the least recently used of equals.

Eviction by a prediction of the next use, in the spirit of Belady's rule. The caller may change ``wanted`` at any time,
so all keys of the cache are looked at when one has to leave: the cost grows with the capacity. It must be a number.
"""

from __future__ import annotations

import numpy as np

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """Note when it was used."""
    state.clock[0].tick += 1
    state.keys[key].used = state.clock[0].tick


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """To the end of the cache's keys, which stand in no order."""
    state.clock[0].tick += 1
    state.keys[key].used = state.clock[0].tick
    group = state.keys[key].group
    place = state.caches[group].first + state.caches[group].heap_size
    state.heap_N[place] = key
    state.keys[key].place = place
    state.caches[group].heap_size += 1


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """Look at all of them."""
    first, size = state.caches[group].first, state.caches[group].heap_size
    stamp = state.clock[0].stamp
    found, least, oldest = -1, np.inf, np.int64(0)
    for place in range(first, first + size):
        key = state.heap_N[place]
        wanted = state.keys[key].wanted
        if (
            wanted <= least
            and (wanted < least or state.keys[key].used < oldest or found < 0)
            and state.keys[key].pinned != stamp
        ):
            found, least, oldest = key, wanted, state.keys[key].used
    if found >= 0:
        last = state.heap_N[first + size - 1]
        state.heap_N[state.keys[found].place] = last
        state.keys[last].place = state.keys[found].place
        state.keys[found].place = -1
        state.caches[group].heap_size = size - 1
    return found
