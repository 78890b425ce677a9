"""LFU with dynamic ageing (LFU-DA): uses count on top of the cache's age when they happen.

Arlitt, Cherkasova, Dilley, Friedrich, Jin, "Evaluating content management techniques for Web proxy caches" (2000).
A key's value is its uses since it came in plus the cache's age at its last use; the least value leaves, the least
recently used of equals, and the age becomes that value. So a key that was used much long ago leaves in time.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.heap import add, pop_unpinned, settle
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """One use more, at the age of now."""
    state.keys[key].count += 1
    _value(state, key)
    settle(state, key)


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """The first use, at the age of now."""
    state.keys[key].count = 1
    _value(state, key)
    add(state, key)


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """The least value, which becomes the age."""
    key = pop_unpinned(state, group)
    if key >= 0:
        state.caches[group].age = state.keys[key].score
    return key


@inlined()
def _value(state: PolicyState, key: int) -> None:
    state.clock[0].tick += 1
    state.keys[key].used = state.clock[0].tick
    state.keys[key].score = state.keys[key].count + state.caches[state.keys[key].group].age
