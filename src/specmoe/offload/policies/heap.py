"""An indexed binary heap to each cache: the key with the smallest (score, used) is the next to leave."""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.state import PolicyState

__all__ = ["add", "drop_root", "pop_unpinned", "settle"]


@inlined()
def add(state: PolicyState, key: int) -> None:
    """Put a key into its cache's heap; its ``score`` and ``used`` are set before."""
    group = state.keys[key].group
    spot = state.caches[group].heap_size
    state.caches[group].heap_size = spot + 1
    _rise(state, state.caches[group].first, spot, key)


@inlined()
def settle(state: PolicyState, key: int) -> None:
    """Put a key in its place again after its score has changed."""
    group = state.keys[key].group
    first = state.caches[group].first
    spot = state.keys[key].place - first
    _rise(state, first, spot, key)
    if state.keys[key].place - first == spot:
        _sink(state, first, state.caches[group].heap_size, spot, key)


@inlined()
def pop_unpinned(state: PolicyState, group: int) -> int:
    """Take out the first key that is not in use; -1 if there is none."""
    first = state.caches[group].first
    whole = state.caches[group].heap_size
    found = -1
    while found < 0 and state.caches[group].heap_size > 0:
        key = state.heap_N[first]
        drop_root(state, group)
        if state.keys[key].pinned != state.clock[0].stamp:
            found = key
        else:
            # The heap has just become one place shorter: that place keeps the key until it is put back.
            state.heap_N[first + state.caches[group].heap_size] = key
    aside = whole - state.caches[group].heap_size - (found >= 0)
    begin = first + whole - aside
    for place in range(begin, begin + aside):
        # In the order from the last one set aside; adding one never reaches beyond its own place.
        add(state, state.heap_N[place])
    return found


@inlined()
def drop_root(state: PolicyState, group: int) -> None:
    """Take out the first key of a heap that has one."""
    first = state.caches[group].first
    state.keys[state.heap_N[first]].place = -1
    size = state.caches[group].heap_size - 1
    state.caches[group].heap_size = size
    if size > 0:
        _sink(state, first, size, 0, state.heap_N[first + size])


@inlined()
def _rise(state: PolicyState, first: int, spot: int, key: int) -> None:
    """A key belongs to ``spot`` or above it: move smaller ancestors' places up until it fits."""
    score, used = state.keys[key].score, state.keys[key].used
    while spot > 0:
        above = (spot - 1) >> 1
        other = state.heap_N[first + above]
        other_score = state.keys[other].score
        if other_score < score or (other_score == score and state.keys[other].used <= used):
            break
        state.heap_N[first + spot] = other
        state.keys[other].place = first + spot
        spot = above
    state.heap_N[first + spot] = key
    state.keys[key].place = first + spot


@inlined()
def _sink(state: PolicyState, first: int, size: int, spot: int, key: int) -> None:
    """A key belongs to ``spot`` or below it."""
    score, used = state.keys[key].score, state.keys[key].used
    while True:
        below = 2 * spot + 1
        if below >= size:
            break
        child = state.heap_N[first + below]
        child_score = state.keys[child].score
        if below + 1 < size:
            right = state.heap_N[first + below + 1]
            right_score = state.keys[right].score
            if right_score < child_score or (
                right_score == child_score and state.keys[right].used < state.keys[child].used
            ):
                below, child, child_score = below + 1, right, right_score
        if score < child_score or (score == child_score and used <= state.keys[child].used):
            break
        state.heap_N[first + spot] = child
        state.keys[child].place = first + spot
        spot = below
    state.heap_N[first + spot] = key
    state.keys[key].place = first + spot
