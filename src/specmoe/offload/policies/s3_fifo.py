"""S3-FIFO: a small queue on trial, a main queue, and the ghosts of those that failed (Yang et al., SOSP 2023).

New keys enter the small queue, a tenth of the capacity; keys whose ghost is still remembered enter the main queue, as
do, before anything has left, those for which the small queue is full (so in the authors' libCacheSim; in the paper the
small queue may be larger then). What was used at least twice moves from the small to the main queue with its count
cleared, the rest leaves and is remembered: nine tenths of the capacity, oldest forgotten first. The main queue is a
CLOCK that counts to three.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.queues import oldest_unpinned, push, remove, sentinel_of
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]

_SMALL, _MAIN, _GHOST = 0, 1, 2
_MOVE_UP, _MOST = 2, 3


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """One use more, in place."""
    state.keys[key].count += 1


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """Into the main queue if its ghost is there, else on trial."""
    group = state.keys[key].group
    state.keys[key].count = 0
    if state.keys[key].queue == _GHOST:
        remove(state, key)
        push(state, key, _MAIN)
    elif state.caches[group].hand < 0 and state.lengths_GQ[group, _SMALL] >= _small(state, group):
        push(state, key, _MAIN)
    else:
        push(state, key, _SMALL)
    # Only here, so that a key is still known that comes back as the very ghost that its own victim pushes out.
    while state.lengths_GQ[group, _GHOST] > 9 * state.caches[group].capacity // 10:
        remove(state, state.keys[sentinel_of(state, group, _GHOST)].previous)


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """From the small queue, unless the main queue is above its share or the small one has nothing to give."""
    state.caches[group].hand = 0
    main_first = state.lengths_GQ[group, _MAIN] > state.caches[group].capacity - _small(state, group)
    if not main_first:
        key = _from_small(state, group)
        if key >= 0:
            return key
    key = _from_main(state, group)
    if key < 0 and main_first:
        key = _from_small(state, group)
    return key


@inlined()
def _small(state: PolicyState, group: int) -> int:
    return max(1, state.caches[group].capacity // 10)


@inlined()
def _from_small(state: PolicyState, group: int) -> int:
    while True:
        key = oldest_unpinned(state, sentinel_of(state, group, _SMALL))
        if key < 0:
            return -1
        remove(state, key)
        if state.keys[key].count < _MOVE_UP:
            push(state, key, _GHOST)
            return key
        state.keys[key].count = 0
        push(state, key, _MAIN)


@inlined()
def _from_main(state: PolicyState, group: int) -> int:
    while True:
        key = oldest_unpinned(state, sentinel_of(state, group, _MAIN))
        if key < 0:
            return -1
        remove(state, key)
        if state.keys[key].count == 0:
            return key
        state.keys[key].count = min(state.keys[key].count, _MOST) - 1
        push(state, key, _MAIN)
