"""Furthest next use leaves first: the fewest misses any policy can have (Belady, 1966; Mattson et al., 1970).

Every missed key is taken in (forced admission). Of keys that are never used again the one with the larger number
leaves first. Where keys differ in size the rule is only a good guess: several small ones may be worth more than a large
one that is needed sooner, and no rule as simple is best.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.heap import add, pop_unpinned, settle
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """Its next use lies further away now."""
    state.keys[key].score = -state.keys[key].next_use
    settle(state, key)


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """Into the heap by its next use."""
    state.keys[key].score = -state.keys[key].next_use
    state.keys[key].used = -key
    add(state, key)


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """Furthest next use."""
    return pop_unpinned(state, group)
