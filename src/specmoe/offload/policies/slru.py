"""Segmented LRU with four segments of a quarter of the cache each (Karedla, Love, Wherry, 1994, with two).

A key enters the lowest segment that has room, moves one segment up with each use, and what a full segment pushes out
goes to the newest end of the segment below. The oldest key of the lowest segment leaves. Segments and their sizes are
libCacheSim's: capacity // 4, and what remains of the capacity belongs to the lowest. A key that is larger than a
segment does not stay in it.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.queues import oldest_unpinned, push, remove, sentinel_of
from specmoe.offload.policies.state import QUEUES, PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """One segment up, or to the newest end of the highest."""
    group = state.keys[key].group
    segment = min(state.keys[key].queue + 1, QUEUES - 1)
    remove(state, key)
    push(state, key, segment)
    most = state.caches[group].capacity // QUEUES
    while segment > 0 and state.lengths_GQ[group, segment] > most:
        oldest = state.keys[sentinel_of(state, group, segment)].previous
        remove(state, oldest)
        push(state, oldest, segment - 1)
        if state.lengths_GQ[group, segment] <= most:
            segment -= 1


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """Into the lowest segment with room."""
    group = state.keys[key].group
    most = state.caches[group].capacity // QUEUES
    chosen = 0
    for segment in range(QUEUES):
        if state.lengths_GQ[group, segment] + state.keys[key].units <= most:
            chosen = segment
            break
    push(state, key, chosen)


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """The oldest of the lowest segment that has one not in use."""
    for segment in range(QUEUES):
        key = oldest_unpinned(state, sentinel_of(state, group, segment))
        if key >= 0:
            remove(state, key)
            return key
    return -1
