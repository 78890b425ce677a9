"""Belady without forced admission: a missed key that is needed later than all that is held is used and not kept.

After an event the cache holds, of what it held and what the event brought, the keys that are needed soonest. That is
the fewest misses there can be, whatever the size of events: keeping keys from one use to the next is a choice of
intervals, of which at most as many as the capacity may overlap, and leaving out the one that ends last is best
(Carlisle and Lloyd, 1995). What is not kept, and what only takes its place when the event is over, is used from the
buffer that it was read into, outside the capacity. So this is a bound, and not a cache that could be built so small.

Where keys differ in size it is no bound either, only a guess like ``belady``; :mod:`specmoe.offload.bound` has one.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies.heap import drop_root
from specmoe.offload.policies.state import PolicyState

__all__ = ["admit", "victim"]


@inlined()
def admit(state: PolicyState, key: int, now: int) -> bool:
    """Is something held that is needed later than this key? Asked when its cache is full."""
    top = state.heap_N[state.caches[state.keys[key].group].first]
    return state.keys[key].next_use < state.keys[top].next_use


@inlined()
def victim(state: PolicyState, group: int, now: int) -> int:
    """Furthest next use, be it in use or not: it leaves when the event is over."""
    if state.caches[group].heap_size == 0:
        return -1
    key = state.heap_N[state.caches[group].first]
    drop_root(state, group)
    return key
