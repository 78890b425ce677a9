"""Least-Stale: what the running forward pass has not used leaves first, then by the layer's place in it.

Hoang, Jaiswal, Samragh, Cho, "SpecMD: A comprehensive study on speculative expert prefetching" (2026). A model goes
through its layers in turn, so an expert can next be needed when its layer's turn comes. The rule as it is built here:

1. *Stale* keys, neither used nor brought in during the running forward pass, leave before all others.
2. Among keys of the same kind the one whose layer's turn is furthest away leaves: the running event's own layer first
   (its router has run), then the layers before it back to the first, then from the last layer back to the next one.
3. Within a layer, the least recently used.

In a cache for each layer this is LRU.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.queues import link, oldest_unpinned, unlink
from specmoe.offload.policies.state import QUEUES, PolicyState

__all__ = ["hit", "insert", "victim"]


@inlined()
def hit(state: PolicyState, key: int, now: int) -> None:
    """To the newest end of its layer."""
    unlink(state, key)
    insert(state, key, now)


@inlined()
def insert(state: PolicyState, key: int, now: int) -> None:
    """To the newest end of its layer, with the number of the forward pass."""
    state.keys[key].used = now // state.layers
    link(state, key, _sentinel(state, state.keys[key].layer))


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """The first stale key found going back through the layers, else the first of the others."""
    running = now // state.layers
    layer = now % state.layers
    fallback = -1
    for _ in range(state.layers):
        key = oldest_unpinned(state, _sentinel(state, layer))
        if key >= 0 and state.keys[key].group == group:
            if state.keys[key].used < running:
                unlink(state, key)
                return key
            if fallback < 0:
                fallback = key
        layer = layer - 1 if layer > 0 else state.layers - 1
    if fallback >= 0:
        unlink(state, fallback)
    return fallback


@inlined()
def _sentinel(state: PolicyState, layer: int) -> int:
    return state.experts + len(state.caches) * QUEUES + layer
