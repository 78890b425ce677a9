"""SIEVE: a FIFO queue, and a hand in it that spares what was used since it last passed (Zhang et al., 2024).

New keys enter at the newest end, a use only sets the key's bit. The hand goes from the oldest to the newest, clears
bits, and takes the first key without one; it goes on from there at the next eviction. A key in use is passed by.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.queues import push, remove, sentinel_of
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """Set its bit."""
    state.keys[key].count = 1


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """At the newest end, without a bit."""
    state.keys[key].count = 0
    push(state, key, 0)


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """The first key from the hand on that was not used since the hand passed."""
    sentinel = sentinel_of(state, group, 0)
    key = state.caches[group].hand
    if key < 0:
        key = state.keys[sentinel].previous
    # The way to the first sentinel, once round to clear the bits, and once more to find.
    rounds = 0
    while rounds < 3:
        if key == sentinel:
            rounds += 1
        elif state.keys[key].pinned != state.clock[0].stamp:
            if state.keys[key].count == 0:
                ahead = state.keys[key].previous
                state.caches[group].hand = -1 if ahead == sentinel else ahead
                remove(state, key)
                return key
            state.keys[key].count = 0
        key = state.keys[key].previous
    return -1
