"""Compiled verbs of one tier: moving an expert over its link, making room, and the prefetches that wait."""

from __future__ import annotations

import numpy as np

from specmoe.offload.compiled import compiled, inlined
from specmoe.offload.simulation.state import (
    CANCELLED,
    EVICTIONS,
    REFUSED,
    WASTED,
    Log,
    Tier,
)
from specmoe.offload.simulation.verbs import insert, victim


@compiled()
def record(log: Log, kind: int, link: int, what: int, event: int, begin: float, end: float) -> None:
    """Keep a span, if there is room."""
    place = log.size[0]
    if place < len(log.when):
        log.what[place, 0] = kind
        log.what[place, 1] = link
        log.what[place, 2] = what
        log.what[place, 3] = event
        log.when[place, 0] = begin
        log.when[place, 1] = end
        log.size[0] = place + 1


@compiled()
def free_slot(tier: Tier) -> int:
    """The slot that is free first."""
    first = 0
    for slot in range(1, len(tier.slots)):
        if tier.slots[slot] < tier.slots[first]:
            first = slot
    return first


@compiled()
def transfer(tier: Tier, key: int, ready: float) -> tuple[float, float]:
    """Send an expert that may start at ``ready``: when its transfer begins and ends."""
    link, seconds = tier.own[0], tier.copies[key].seconds
    slot = free_slot(tier)
    begin = max(ready, tier.slots[slot])
    end = max(begin + link.latency, link.bus) + seconds
    tier.slots[slot] = end
    link.bus = end
    link.busy += seconds
    return begin, end


@compiled()
def arrived(tier: Tier, key: int, event: int) -> None:
    """A prefetch is there: from now on its policy decides about it."""
    for place in range(tier.own[0].flights):
        if tier.flying[place] == key:
            tier.own[0].flights -= 1
            tier.flying[place] = tier.flying[tier.own[0].flights]
            break
    tier.copies[key].arrival = np.inf
    tier.cache.keys[key].resident = True
    insert(tier.own[0].policy, tier.cache, key, event)


@compiled()
def earliest(tier: Tier) -> int:
    """The expert that arrives next, -1 if none is under way."""
    first = -1
    for place in range(tier.own[0].flights):
        key = tier.flying[place]
        if first < 0 or tier.copies[key].arrival < tier.copies[first].arrival:
            first = key
    return first


@compiled()
def settle(tier: Tier, now: float, event: int) -> None:
    """Take in every prefetch that has arrived by ``now``, in the order of arrival."""
    while tier.own[0].flights > 0:
        key = earliest(tier)
        if tier.copies[key].arrival > now:
            return
        arrived(tier, key, event)
        tier.copies[key].unused = True


@compiled()
def evict(tier: Tier, key: int, phase: int) -> None:
    """``key``, which its policy has given up, is gone."""
    layer = tier.cache.keys[key].layer
    tier.cache.keys[key].resident = False
    tier.cache.caches[tier.cache.keys[key].group].size -= tier.cache.keys[key].units
    tier.own[0].held -= 1
    tier.counts[phase, layer, EVICTIONS] += 1
    tier.own[0].soonest = min(tier.own[0].soonest, tier.cache.keys[key].next_use)
    if tier.copies[key].unused:
        tier.copies[key].unused = False
        tier.counts[phase, layer, WASTED] += 1


@compiled()
def occupy(tier: Tier, key: int) -> None:
    """An expert's place in its cache is taken, from the moment its transfer begins."""
    tier.cache.caches[tier.cache.keys[key].group].size += tier.cache.keys[key].units
    tier.own[0].held += 1
    tier.own[0].largest = max(tier.own[0].largest, tier.own[0].held)


@inlined()
def lacks_room(tier: Tier, key: int) -> bool:
    """Whether something must leave an expert's cache before it can come."""
    cache = tier.cache.caches[tier.cache.keys[key].group]
    return cache.size + tier.cache.keys[key].units > cache.capacity


@compiled()
def make_room(tier: Tier, wanted: int, event: int, phase: int, begin: float) -> float:
    """Free the place of an expert, ``wanted``, that is needed now.

    Returns:
        When its transfer may start: ``begin``, or later if the place is held by a prefetch that must arrive before
        it can be evicted. -1 if all that is held is in use.
    """
    group = tier.cache.keys[wanted].group
    while lacks_room(tier, wanted):
        key = victim(tier.own[0].policy, tier.cache, group, event)
        if key >= 0:
            evict(tier, key, phase)
            continue
        # Only a prefetch into the same cache can give way, and none that is needed now.
        coming = -1
        for place in range(tier.own[0].flights):
            other = tier.flying[place]
            if tier.cache.keys[other].group != group or tier.cache.keys[other].pinned == tier.cache.clock[0].stamp:
                continue
            if coming < 0 or tier.copies[other].arrival < tier.copies[coming].arrival:
                coming = other
        if coming < 0:
            return -1.0
        begin = max(begin, tier.copies[coming].arrival)
        arrived(tier, coming, event)
        tier.copies[coming].unused = True
    return begin


@compiled()
def forget(tier: Tier, place: int) -> None:
    """Take an entry out of the queue."""
    waiting, last = tier.waiting, tier.own[0].waiting - 1
    tier.copies[waiting[place].key].waits = -1
    if place < last:
        waiting[place].key = waiting[last].key
        waiting[place].due = waiting[last].due
        waiting[place].chance = waiting[last].chance
        waiting[place].ready = waiting[last].ready
        waiting[place].seconds = waiting[last].seconds
        tier.copies[waiting[place].key].waits = place
    tier.own[0].waiting = last


@compiled()
def enqueue(tier: Tier, key: int, due: int, chance: float, ready: float, phase: int) -> None:
    """Let a prefetch wait for the link. A full queue keeps what is due sooner, and of that the likelier."""
    waiting, size = tier.waiting, tier.own[0].waiting
    place = tier.copies[key].waits
    if place >= 0:
        # Foreseen again: what was said last is known best, and the sooner need counts.
        if due <= waiting[place].due:
            waiting[place].due = due
            waiting[place].chance = chance
        return
    if size == len(waiting):
        worst = 0
        for place in range(1, size):
            if waiting[place].due > waiting[worst].due or (
                waiting[place].due == waiting[worst].due and waiting[place].chance < waiting[worst].chance
            ):
                worst = place
        refused = due > waiting[worst].due or (due == waiting[worst].due and chance <= waiting[worst].chance)
        tier.counts[phase, tier.cache.keys[key if refused else waiting[worst].key].layer, REFUSED] += 1
        if refused:
            return
        forget(tier, worst)
        size -= 1
    waiting[size].key = key
    waiting[size].due = due
    waiting[size].chance = chance
    waiting[size].ready = ready
    waiting[size].seconds = tier.copies[key].seconds
    tier.copies[key].waits = size
    tier.own[0].waiting = size + 1


@compiled()
def expire(tier: Tier, event: int, phase: int) -> None:
    """The router of ``event`` has run: what waited for it is fetched now because it is needed, or not at all."""
    place, stamp = 0, tier.cache.clock[0].stamp
    while place < tier.own[0].waiting:
        key = tier.waiting[place].key
        if tier.waiting[place].due <= event or tier.cache.keys[key].pinned == stamp:
            tier.counts[phase, tier.cache.keys[key].layer, CANCELLED] += 1
            forget(tier, place)
        else:
            place += 1


@compiled()
def next_waiting(tier: Tier) -> tuple[int, float]:
    """The entry that goes next, and when: what is due first among those ready, then what is likelier. -1 if none."""
    waiting, size = tier.waiting, tier.own[0].waiting
    if size == 0:
        return -1, 0.0
    begin = waiting[0].ready
    for place in range(1, size):
        begin = min(begin, waiting[place].ready)
    begin = max(begin, tier.slots[free_slot(tier)])
    best = -1
    for place in range(size):
        if waiting[place].ready > begin:
            continue
        if (
            best < 0
            or waiting[place].due < waiting[best].due
            or (waiting[place].due == waiting[best].due and waiting[place].chance > waiting[best].chance)
        ):
            best = place
    return best, begin
