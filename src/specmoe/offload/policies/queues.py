"""Circular doubly linked lists over keys: several queues to a cache, each hung on a sentinel."""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.state import QUEUES, PolicyState

__all__ = ["link", "oldest_unpinned", "push", "remove", "sentinel_of", "unlink"]


@inlined()
def sentinel_of(state: PolicyState, group: int, queue: int) -> int:
    """Where a queue begins and ends."""
    return state.experts + group * QUEUES + queue


@inlined()
def link(state: PolicyState, key: int, sentinel: int) -> None:
    """Put a key that is in no list at the newest end of one."""
    after = state.keys[sentinel].next
    state.keys[key].next = after
    state.keys[key].previous = sentinel
    state.keys[after].previous = key
    state.keys[sentinel].next = key


@inlined()
def unlink(state: PolicyState, key: int) -> None:
    """Take a key out of the list that it is in."""
    before, after = state.keys[key].previous, state.keys[key].next
    state.keys[before].next = after
    state.keys[after].previous = before


@inlined()
def push(state: PolicyState, key: int, queue: int) -> None:
    """Put a key that is in no queue at the newest end of one of its cache's queues."""
    group = state.keys[key].group
    link(state, key, sentinel_of(state, group, queue))
    state.keys[key].queue = queue
    state.lengths_GQ[group, queue] += state.keys[key].units


@inlined()
def remove(state: PolicyState, key: int) -> None:
    """Take a key out of the queue that it is in."""
    unlink(state, key)
    state.lengths_GQ[state.keys[key].group, state.keys[key].queue] -= state.keys[key].units
    state.keys[key].queue = -1


@inlined()
def oldest_unpinned(state: PolicyState, sentinel: int) -> int:
    """The oldest key of a list that is not in use; -1 if there is none."""
    key = state.keys[sentinel].previous
    while key != sentinel and state.keys[key].pinned == state.clock[0].stamp:
        key = state.keys[key].previous
    return -1 if key == sentinel else key
