"""What an eviction policy may know and keep: preallocated arrays that all policies share, and the verbs' conventions.

A policy is a file with the same three verbs, compiled by numba:

- ``hit(state, key, now)``: a resident key is used.
- ``insert(state, key, now)``: a key has just become resident, by a demand miss or by a prefetch.
- ``victim(state, group, now) -> key``: choose a key of a cache to leave and forget it; -1 where every key is in use.

``policies.dispatch`` has the same verbs with the policy's number in front, and ``admit``. Who calls them (a replay or a
simulator) keeps of a key ``resident``, ``pinned``, ``next_use`` and ``wanted``, of a cache ``size``, and the clock's
``stamp``; the policy keeps everything else. A key that is on its way is not resident, and no verb hears of it before
``insert``.

A capacity is counted in units: an expert takes one of them, or its bytes where sizes differ by layer. Then more than
one expert may have to leave for one that comes: ``victim`` is called until there is room.

Letters: N experts of the model (key = layer·E + expert), G caches (1 where the layers share one), Q queues of a cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.compiled import Records

__all__ = ["CACHE", "CLOCK", "KEY", "QUEUES", "PolicyState", "make_state"]

# SLRU has the most queues: four segments.
QUEUES = 4


# One record of 72 bytes a key, so that a verb touches a cache line or two, and compiled functions pass six arrays
# instead of twenty-five: four times as fast as an array for each field, and compiled in half the time. A seventh array,
# of units by layer, cost a tenth of an LRU's time; so each key has its own.
KEY = np.dtype(
    [
        ("next_use", "i8"),
        ("wanted", "f8"),
        ("score", "f8"),
        ("pinned", "i8"),
        ("used", "i8"),
        ("units", "i8"),
        ("count", "i4"),
        ("next", "i4"),
        ("previous", "i4"),
        ("place", "i4"),
        ("group", "i2"),
        ("layer", "i2"),
        ("queue", "i1"),
        ("resident", "?"),
    ],
    align=True,
)
CACHE = np.dtype(
    [("capacity", "i8"), ("size", "i8"), ("first", "i8"), ("heap_size", "i8"), ("age", "f8"), ("hand", "i8")],
    align=True,
)
CLOCK = np.dtype([("stamp", "i8"), ("tick", "i8")], align=True)


class PolicyState(NamedTuple):
    """State of the caches of one replay.

    Attributes:
        layers: L; event ``now`` belongs to forward pass ``now // layers``. experts: N, of the whole model.
        keys: records of ``KEY`` [N + G·Q + L], one for each key and then one for each list's sentinel:

            group: the cache that a key belongs to. layer: its layer. units: what it takes of a capacity.
            resident: kept by the caller: True from just before ``insert``, False from ``victim`` on.
            pinned: a key is in use, and never a victim, while ``pinned`` is the clock's ``stamp``.
            next_use: the event that next needs a key, as far as it lies after the event being run; the number of
            events for never. The caller renews it for an event's keys before the event's first verb.
            wanted: how much a predictor wants a key to be there; larger is more. Kept by the caller.
            next, previous: circular lists; queue q of cache g hangs on sentinel N + g·Q + q, that of layer l on
            N + G·Q + l; the newest key is the sentinel's ``next``, the oldest its ``previous``.
            queue: the queue a key is in; -1 for none. count: uses, or a visited bit.
            place: where a key stands in ``heap_N``; -1 for nowhere. score, used: the heap's order; where scores are
            equal the smaller ``used`` leaves.
        caches: records of ``CACHE`` [G]. capacity: units it may hold. size: units it holds; the caller counts what is
            on its way here too, if it has reserved its room. first: where its heap begins in ``heap_N``, heap_size how
            many keys that has. age: of LFU with ageing. hand: a key or a sentinel.
        clock: one record of ``CLOCK``. stamp: of the event being run. tick: uses so far.
        heap_N: int32, the heaps one after the other; a heap's root is the next victim.
        lengths_GQ: int64, how many units the keys of each queue take.
    """

    layers: int
    experts: int
    keys: Records
    caches: Records
    clock: Records
    heap_N: Any
    lengths_GQ: NDArray[np.int64]


def make_state(
    group_N: NDArray[np.int32],
    layer_N: NDArray[np.int32],
    capacity_G: NDArray[np.int64],
    layers: int,
    units_L: NDArray[np.int64],
) -> PolicyState:
    """Empty caches. All policies use the same arrays, so the state does not depend on which one is asked for.

    Args:
        group_N: int32 [N], numbers 0 to G - 1. layer_N: int32 [N]. capacity_G: int64 [G]. layers: L.
        units_L: int64 [L], what an expert of each layer takes of a capacity.
    """
    experts, groups = len(group_N), len(capacity_G)
    total = experts + groups * QUEUES + layers
    keys = np.zeros(total, dtype=KEY)
    for field in ("next", "previous", "pinned", "queue", "place"):
        keys[field] = -1
    keys["next"][experts:] = keys["previous"][experts:] = np.arange(experts, total)
    keys["group"][:experts], keys["layer"][:experts], keys["units"][:experts] = group_N, layer_N, units_L[layer_N]
    keys["next_use"] = np.iinfo(np.int64).max >> 11
    members_G = np.bincount(group_N, minlength=groups)
    caches = np.zeros(groups, dtype=CACHE)
    caches["capacity"], caches["hand"] = capacity_G, -1
    caches["first"] = np.cumsum(members_G) - members_G
    return PolicyState(
        layers=layers,
        experts=experts,
        keys=keys,
        caches=caches,
        clock=np.zeros(1, dtype=CLOCK),
        heap_N=np.full(experts, -1, dtype=np.int32),
        lengths_GQ=np.zeros((groups, QUEUES), dtype=np.int64),
    )
