"""Least frequently used leaves first, counted since a key came in; the least recently used of equals.

In-cache LFU as in Arlitt et al., "Evaluating content management techniques for Web proxy caches" (2000): what has left
starts from one again.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.heap import add, pop_unpinned, settle
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """One use more."""
    state.clock[0].tick += 1
    state.keys[key].used = state.clock[0].tick
    state.keys[key].score += 1.0
    settle(state, key)


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """The first use."""
    state.clock[0].tick += 1
    state.keys[key].used = state.clock[0].tick
    state.keys[key].score = 1.0
    add(state, key)


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """Fewest uses."""
    return pop_unpinned(state, group)
