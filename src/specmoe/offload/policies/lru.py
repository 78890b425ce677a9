"""Least recently used leaves first (Mattson et al., 1970: the stack of which every size holds a prefix)."""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.queues import link, oldest_unpinned, sentinel_of, unlink
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """To the newest end."""
    unlink(state, key)
    link(state, key, sentinel_of(state, state.keys[key].group, 0))


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """To the newest end."""
    link(state, key, sentinel_of(state, state.keys[key].group, 0))


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """The oldest."""
    key = oldest_unpinned(state, sentinel_of(state, group, 0))
    if key >= 0:
        unlink(state, key)
    return key
