"""One compiled function for each verb, whatever the policy: a replay is compiled once for all of them.

A new policy is a file with ``hit``, ``insert`` and ``victim``, a number and three branches here, and a line in
``registry``. A verb that a policy shares with another needs no branch where the other's is the last one.
"""

from __future__ import annotations

from specmoe.offload.compiled import inlined
from specmoe.offload.policies import (
    belady,
    belady_bypass,
    least_stale,
    lfu,
    lfu_aged,
    lru,
    predicted,
    s3_fifo,
    sieve,
    slru,
)
from specmoe.offload.policies.state import PolicyState

__all__ = [
    "BELADY",
    "BELADY_BYPASS",
    "LEAST_STALE",
    "LFU",
    "LFU_AGED",
    "LRU",
    "PREDICTED",
    "S3_FIFO",
    "SIEVE",
    "SLRU",
    "admit",
    "hit",
    "insert",
    "victim",
]

LRU, LFU, LFU_AGED, SLRU, S3_FIFO, SIEVE, LEAST_STALE, PREDICTED, BELADY, BELADY_BYPASS = range(10)


@inlined()
def hit(policy: int, state: PolicyState, key: int, now: int) -> None:
    """A resident key is used by event ``now``."""
    if policy == LRU:
        lru.hit(state, key, now)
    elif policy == LFU:
        lfu.hit(state, key, now)
    elif policy == LFU_AGED:
        lfu_aged.hit(state, key, now)
    elif policy == SLRU:
        slru.hit(state, key, now)
    elif policy == S3_FIFO:
        s3_fifo.hit(state, key, now)
    elif policy == SIEVE:
        sieve.hit(state, key, now)
    elif policy == LEAST_STALE:
        least_stale.hit(state, key, now)
    elif policy == PREDICTED:
        predicted.hit(state, key, now)
    else:
        belady.hit(state, key, now)


@inlined()
def insert(policy: int, state: PolicyState, key: int, now: int) -> None:
    """A key has just become resident, during event ``now``."""
    if policy == LRU:
        lru.insert(state, key, now)
    elif policy == LFU:
        lfu.insert(state, key, now)
    elif policy == LFU_AGED:
        lfu_aged.insert(state, key, now)
    elif policy == SLRU:
        slru.insert(state, key, now)
    elif policy == S3_FIFO:
        s3_fifo.insert(state, key, now)
    elif policy == SIEVE:
        sieve.insert(state, key, now)
    elif policy == LEAST_STALE:
        least_stale.insert(state, key, now)
    elif policy == PREDICTED:
        predicted.insert(state, key, now)
    else:
        belady.insert(state, key, now)


@inlined()
def victim(policy: int, state: PolicyState, group: int, now: int) -> int:
    """The key that leaves a cache, already forgotten by the policy; -1 if every one is in use.

    Only ``BELADY_BYPASS``, which is a bound and no cache, may choose one that is in use.
    """
    if policy == LRU:
        return lru.victim(state, group, now)
    if policy == LFU:
        return lfu.victim(state, group, now)
    if policy == LFU_AGED:
        return lfu_aged.victim(state, group, now)
    if policy == SLRU:
        return slru.victim(state, group, now)
    if policy == S3_FIFO:
        return s3_fifo.victim(state, group, now)
    if policy == SIEVE:
        return sieve.victim(state, group, now)
    if policy == LEAST_STALE:
        return least_stale.victim(state, group, now)
    if policy == PREDICTED:
        return predicted.victim(state, group, now)
    if policy == BELADY_BYPASS:
        return belady_bypass.victim(state, group, now)
    return belady.victim(state, group, now)


@inlined()
def admit(policy: int, state: PolicyState, key: int, now: int) -> bool:
    """Shall a missed key be kept? To be asked when its cache is full, before ``victim``; only one policy says no.

    A key that is refused is used from the buffer that it was read into, and ``insert`` is not called for it.
    """
    if policy == BELADY_BYPASS:
        return belady_bypass.admit(state, key, now)
    return True
