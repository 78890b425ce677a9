"""What waits for a link and when it goes: proposals, their admission, and the prefetches that are started."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.admission import confidence, expected_value, top
from specmoe.offload.admission.registry import CONFIDENCE, EXPECTED_VALUE, TOP
from specmoe.offload.compiled import Records, compiled, inlined
from specmoe.offload.simulation.state import ACCESSES, CANCELLED, HITS, NEVER, PREFETCH, PREFETCHED, USED, Tier
from specmoe.offload.simulation.transfers import (
    enqueue,
    evict,
    forget,
    free_slot,
    lacks_room,
    next_waiting,
    occupy,
    record,
    settle,
    transfer,
)
from specmoe.offload.simulation.verbs import hit, insert, victim
from specmoe.offload.simulation.world import FOLLOW, World

__all__ = ["foresee", "inform", "lifetime", "look_ahead", "pump", "use_host_copy"]


# Prefetches that an engine remembers: about so many; and how many kept promises it begins with.
_FORGET, _PRIOR = 1 / 500, 10.0
# Hopeful before anything was pushed out, or nothing would ever be tried.
_PRIOR_RETURNED = 0.1
# Experts that are foreseen and therefore passed over, for one prefetch.
_MOST_SPARED = 16


@compiled()
def _worth(tier: Tier, own: Records, key: int, chance: float, begin: float, event: int, due: int) -> float:
    link, seen, seconds = tier.own[0], own[0], tier.copies[key].seconds
    returning = (seen.returned + _PRIOR_RETURNED) / (seen.pushed + 1.0)
    # What is evicted before it is needed was fetched for nothing, and so was what a prediction is too sure of.
    chance *= min(1.0, (seen.kept + _PRIOR) / (seen.promised + _PRIOR))
    # Reads of one layer share the fixed cost, as many as there are slots.
    at_once = max(1.0, min(float(len(tier.slots)), seen.misses / max(seen.miss_chance, 1e-9)))
    return expected_value.worth(
        chance,
        begin,
        link.latency + seconds,
        seen.next_router,
        float(due - event),
        seen.layer_seconds,
        seen.miss_chance,
        returning,
        link.latency / at_once + seconds,
        lifetime(tier, own),
    )


@compiled()
def lifetime(tier: Tier, own: Records) -> float:
    """Events that an expert stays in the cache: what it holds by what comes in at an event."""
    return max(1.0, tier.own[0].held / max(own[0].insertions, 1e-6))


@compiled()
def _room_for_prefetch(world: World, level: int, key: int, chance: float, event: int, phase: int) -> int:
    """Free a place for a prefetch: 1 if there is one, 0 if not now, -1 if what would have to go is worth more.

    What a large expert pushes out is judged one by one. If one of them stays, those before it have left all the same.
    """
    tier = world.host if level == 1 else world.device
    while lacks_room(tier, key):
        outcome = _let_one_go(world, level, key, chance, event, phase)
        if outcome <= 0:
            return outcome
    return 1


@inlined()
def _let_one_go(world: World, level: int, key: int, chance: float, event: int, phase: int) -> int:
    """As :func:`_room_for_prefetch`, for one victim: 1 if it has left. A call of its own costs a tenth of a run."""
    tier = world.host if level == 1 else world.device
    group = tier.cache.keys[key].group
    leaving = victim(tier.own[0].policy, tier.cache, group, event)
    if level == 2 and world.plan.rule == EXPECTED_VALUE and world.plan.reach == 0:
        for _ in range(_MOST_SPARED):
            if leaving < 0 or tier.copies[leaving].due <= event or tier.copies[leaving].chance < chance:
                break
            # To its policy that is a use: it goes to the end of the line.
            insert(tier.own[0].policy, tier.cache, leaving, event)
            leaving = victim(tier.own[0].policy, tier.cache, group, event)
        else:
            if leaving >= 0:
                insert(tier.own[0].policy, tier.cache, leaving, event)
            return -1
    if leaving < 0:
        return 0
    # The host's policies know nothing of what comes.
    if level == 2 and (
        (world.plan.clairvoyant and tier.cache.keys[leaving].next_use <= tier.cache.keys[key].next_use)
        or (world.plan.informed and tier.cache.keys[leaving].wanted >= chance)
    ):
        insert(tier.own[0].policy, tier.cache, leaving, event)
        return 0 if world.plan.reach > 0 else -1
    evict(tier, leaving, phase)
    if level == 2:
        tier.copies[leaving].evicted = event
        world.own[0].pushed += 1
    return 1


@compiled()
def pump(world: World, level: int, until: float, event: int, phase: int) -> None:
    """Start the prefetches into the host (level 1) or the device (level 2) whose turn comes before ``until``."""
    tier = world.host if level == 1 else world.device
    while tier.own[0].waiting > 0:
        place, begin = next_waiting(tier)
        if begin >= until:
            break
        key, due, chance = tier.waiting[place].key, tier.waiting[place].due, tier.waiting[place].chance
        settle(tier, begin, event)
        if tier.cache.keys[key].resident or tier.copies[key].arrival < np.inf:
            forget(tier, place)
            continue
        pays = True
        if world.tiers == 3 and level == 2:
            settle(world.host, begin, event)
            pays = world.host.cache.keys[key].resident
        if pays and world.plan.reach == 0 and world.plan.rule == EXPECTED_VALUE:
            pays = _worth(tier, world.own, key, chance, begin, event, due) > world.plan.parameter
        room = _room_for_prefetch(world, level, key, chance, event, phase) if pays else -1
        if room == 0:
            # All that could give way is in use: not before the next router has run.
            tier.waiting[place].ready = until
            continue
        forget(tier, place)
        layer = tier.cache.keys[key].layer
        if room < 0:
            tier.counts[phase, layer, CANCELLED] += 1
            continue
        occupy(tier, key)
        begin, end = transfer(tier, key, begin)
        tier.copies[key].arrival = end
        tier.flying[tier.own[0].flights] = key
        tier.own[0].flights += 1
        tier.counts[phase, layer, PREFETCHED] += 1
        record(world.log, PREFETCH, level, key, event, begin, end)
        if level == 2:
            world.own[0].insertions += FOLLOW
            world.own[0].promised = world.own[0].promised * (1 - _FORGET) + chance
            world.own[0].kept *= 1 - _FORGET
        if level == 1:
            enqueue(world.device, key, due, chance, end, phase)
        elif world.tiers == 3:
            use_host_copy(world.host, key, event, phase)


@compiled()
def use_host_copy(host: Tier, key: int, event: int, phase: int) -> None:
    """The device takes an expert from the host, which holds it."""
    layer = host.cache.keys[key].layer
    hit(host.own[0].policy, host.cache, key, event)
    host.counts[phase, layer, ACCESSES] += 1
    host.counts[phase, layer, HITS] += 1
    if host.copies[key].unused:
        host.copies[key].unused = False
        host.counts[phase, layer, USED] += 1


@compiled()
def _propose(world: World, key: int, due: int, chance: float, event: int, phase: int, ready: float) -> None:
    """Let an expert that is foreseen, and not on the device, wait for its link, if it is worth it."""
    tier = world.device
    if world.tiers == 3 and not world.host.cache.keys[key].resident:
        if world.host.copies[key].arrival < np.inf:
            ready = max(ready, world.host.copies[key].arrival)
        else:
            tier = world.host
    if world.plan.reach == 0 and world.plan.rule == EXPECTED_VALUE:
        before = 0.0
        for other in range(tier.own[0].waiting):
            if tier.waiting[other].due <= due:
                before += tier.waiting[other].seconds
        begin = max(ready, max(tier.slots[free_slot(tier)], tier.own[0].bus - tier.own[0].latency)) + before
        if not expected_value.admits(_worth(tier, world.own, key, chance, begin, event, due), world.plan.parameter):
            return
    enqueue(tier, key, due, chance, ready, phase)


@inlined()
def foresee(world: World, event: int, phase: int, now: float) -> None:
    """Propose what the prediction made at an event lists."""
    # Taking an array out of a tuple costs as much as a few events of this loop: once is enough.
    keys, copies, waiting = world.device.cache.keys, world.device.copies, world.device.waiting
    experts_VHB, chance_VHB, horizons_H = world.plan.experts_VHB, world.plan.chance_VHB, world.plan.horizons_H
    rule, parameter = world.plan.rule, world.plan.parameter
    layers, experts = world.stream.layers, world.stream.experts
    for row in range(len(horizons_H)):
        due = event + horizons_H[row]
        target = (due % layers) * experts
        for place in range(experts_VHB.shape[2]):
            expert = experts_VHB[event, row, place]
            if expert < 0 or (rule == TOP and not top.admits(place, parameter)):
                break
            key, chance = target + expert, float(chance_VHB[event, row, place])
            if rule == CONFIDENCE and not confidence.admits(chance, parameter):
                break
            copies[key].chance, copies[key].due = chance, due
            if keys[key].resident or copies[key].arrival < np.inf:
                continue
            standing = copies[key].waits
            if standing >= 0 and waiting[standing].due < due:
                continue
            _propose(world, key, due, chance, event, phase, now)


@compiled()
def look_ahead(world: World, event: int, phase: int, now: float, place: NDArray[np.int64]) -> None:
    """Propose what is needed next, as far as the queue has room. ``place``: the access and its event that come next."""
    stream, device, host = world.stream, world.device, world.host
    soonest = device.own[0].soonest
    # What was evicted since it was passed must be fetched once more, before what comes later.
    if min(place[1], soonest) <= event or soonest < place[1]:
        place[1] = max(event + 1, min(place[1], soonest))
        place[0] = stream.starts_V[place[1]]
    device.own[0].soonest = NEVER
    while place[1] <= min(event + world.plan.reach, len(stream.starts_V) - 2):
        if device.own[0].waiting == len(device.waiting) or host.own[0].waiting == len(host.waiting):
            break
        if place[0] == stream.starts_V[place[1] + 1]:
            place[1] += 1
            continue
        key = stream.keys_M[place[0]]
        if not device.cache.keys[key].resident and device.copies[key].arrival == np.inf:
            _propose(world, key, place[1], 1.0, event, phase, now)
        place[0] += 1


@compiled()
def inform(world: World, event: int, usage_N: NDArray[np.float64]) -> None:
    """Tell the eviction policy what is wanted: the chance foreseen, or where nothing is, how often it was used."""
    stream, plan, keys = world.stream, world.plan, world.device.cache.keys
    base = (event % stream.layers) * stream.experts
    for key in range(base, base + stream.experts):
        usage_N[key] *= 1 - FOLLOW
    for access in range(stream.starts_V[event], stream.starts_V[event + 1]):
        usage_N[stream.keys_M[access]] += FOLLOW
    for key in range(base, base + stream.experts):
        keys[key].wanted = usage_N[key]
    if event >= len(plan.experts_VHB):
        return
    for row in range(len(plan.horizons_H)):
        target = ((event + plan.horizons_H[row]) % stream.layers) * stream.experts
        least = plan.chance_VHB[event, row, -1]
        for key in range(target, target + stream.experts):
            keys[key].wanted = min(usage_N[key], least)
        for place in range(plan.experts_VHB.shape[2]):
            expert = plan.experts_VHB[event, row, place]
            if expert >= 0:
                keys[target + expert].wanted = plan.chance_VHB[event, row, place]
