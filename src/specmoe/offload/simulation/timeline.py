"""The simulation itself: one compute stream, one or two links, and what happens when, event by event."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from specmoe.offload.admission import confidence, expected_value, top
from specmoe.offload.admission.registry import CONFIDENCE, TOP
from specmoe.offload.simulation.state import (
    ACCESSES,
    CANCELLED,
    DEMAND,
    EXPERTS,
    HITS,
    LATE,
    LAYER,
    MISSES,
    NEVER,
    PREFETCH,
    PREFETCHED,
    STALL,
    USED,
    WASTED,
    Log,
    Tier,
)
from specmoe.offload.simulation.transfers import (
    arrived,
    enqueue,
    evict,
    expire,
    forget,
    make_room,
    next_waiting,
    occupy,
    record,
    settle,
    transfer,
)
from specmoe.offload.simulation.verbs import hit, insert, victim

__all__ = ["ESTIMATES", "Plan", "Stream", "Times", "World", "run_timeline"]

# How fast the running means follow: about the last fifty events.
_FOLLOW = 0.02


class Stream(NamedTuple):
    """A demand as flat arrays; see :class:`specmoe.offload.demand.Demand`."""

    layers: int
    experts: int
    keys_M: NDArray[np.int32]
    tokens_M: NDArray[np.int32]
    starts_V: NDArray[np.int64]
    next_use_M: NDArray[np.int64]
    phase_J: NDArray[np.uint8]
    tokens_J: NDArray[np.int64]


class Times(NamedTuple):
    """Seconds of computing, as in :class:`specmoe.offload.hardware.cost.StepCost`; ``prediction``: to make one."""

    layer: float
    token_layer: float
    expert: float
    token: float
    other: float
    prediction: float


class Plan(NamedTuple):
    """What is foreseen at each event, and what of it is fetched.

    Attributes:
        horizons_H: int64. experts_VHB: int16, likeliest first, -1 for none. chance_VHB: float32, calibrated.
            ``experts_VHB`` has no event where nothing is foreseen.
        reach: events that the oracle looks ahead; 0 where it is not the oracle that plans.
        rule: number of the admission. parameter: of it.
        informed: whether the eviction policy wants to know what is foreseen.
        clairvoyant: whether the eviction policy knows the future.
    """

    horizons_H: NDArray[np.int64]
    experts_VHB: NDArray[np.int16]
    chance_VHB: NDArray[np.float32]
    reach: int
    rule: int
    parameter: float
    informed: bool
    clairvoyant: bool


# What an engine would know of its own running. now: when the last router ran, s. layer_seconds: from one router to the
# next. miss_chance: that a layer lacks an expert. pushed: experts that prefetches evicted; returned: of them, those needed
# again within one token.
ESTIMATES = np.dtype([(name, "f8") for name in ("now", "layer_seconds", "miss_chance", "pushed", "returned")])


class World(NamedTuple):
    """Everything that a run reads and changes. ``host`` is not looked at with two ``tiers``; ``own``: ``ESTIMATES`` [1]."""

    stream: Stream
    device: Tier
    host: Tier
    tiers: int
    times: Times
    plan: Plan
    own: NDArray[np.void]
    log: Log


@numba.njit(cache=True)
def _worth(tier: Tier, own: NDArray[np.void], chance: float, begin: float, event: int, due: int) -> float:
    one, seen = tier.own[0].latency + tier.own[0].seconds, own[0]
    returning = (seen.returned + 1.0) / (seen.pushed + 2.0)
    return expected_value.worth(
        chance, begin, one, seen.now, float(due - event), seen.layer_seconds, seen.miss_chance, returning
    )


@numba.njit(cache=True)
def _room_for_prefetch(world: World, level: int, key: int, chance: float, event: int, phase: int) -> int:
    """Free a place for a prefetch: 1 if there is one, 0 if not now, -1 if what would have to go is worth more."""
    tier = world.host if level == 1 else world.device
    group = tier.cache.keys[key].group
    if tier.cache.caches[group].size < tier.cache.caches[group].capacity:
        return 1
    leaving = victim(tier.own[0].policy, tier.cache, group, event)
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


@numba.njit(cache=True)
def _pump(world: World, level: int, until: float, event: int, phase: int) -> None:
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
        if pays and world.plan.reach == 0 and world.plan.rule > CONFIDENCE:
            pays = _worth(tier, world.own, chance, begin, event, due) > world.plan.parameter
        room = _room_for_prefetch(world, level, key, chance, event, phase) if pays else -1
        if room == 0:
            break
        forget(tier, place)
        if room < 0:
            tier.counts[phase, CANCELLED] += 1
            continue
        occupy(tier, tier.cache.keys[key].group)
        begin, end = transfer(tier, begin)
        tier.copies[key].arrival = end
        tier.flying[tier.own[0].flights] = key
        tier.own[0].flights += 1
        tier.counts[phase, PREFETCHED] += 1
        record(world.log, PREFETCH, level, key, event, begin, end)
        if level == 1:
            enqueue(world.device, key, due, chance, end, phase)
        elif world.tiers == 3:
            _use_host_copy(world.host, key, event, phase)


@numba.njit(cache=True)
def _use_host_copy(host: Tier, key: int, event: int, phase: int) -> None:
    hit(host.own[0].policy, host.cache, key, event)
    host.counts[phase, ACCESSES] += 1
    host.counts[phase, HITS] += 1
    if host.copies[key].unused:
        host.copies[key].unused = False
        host.counts[phase, USED] += 1


@numba.njit(cache=True)
def _fetch(world: World, key: int, begin: float, event: int, phase: int) -> float:
    """Bring an expert that is needed now to the device, which has room: when it is there."""
    host = world.host
    if world.tiers == 3:
        if host.cache.keys[key].resident:
            _use_host_copy(host, key, event, phase)
        elif host.copies[key].arrival < np.inf:
            begin = max(begin, host.copies[key].arrival)
            arrived(host, key, event)
            host.counts[phase, ACCESSES] += 1
            host.counts[phase, LATE] += 1
        else:
            room = make_room(host, host.cache.keys[key].group, event, phase, begin)
            start, begin = transfer(host, room)
            occupy(host, host.cache.keys[key].group)
            host.cache.keys[key].resident = True
            insert(host.own[0].policy, host.cache, key, event)
            host.counts[phase, ACCESSES] += 1
            host.counts[phase, MISSES] += 1
            record(world.log, DEMAND, 1, key, event, start, begin)
    start, end = transfer(world.device, begin)
    record(world.log, DEMAND, 2, key, event, start, end)
    return end


@numba.njit(cache=True)
def _computing(world: World, first: int, stop: int) -> float:
    """Seconds in which the experts of some accesses compute."""
    seconds = 0.0
    for access in range(first, stop):
        seconds += world.times.expert + (world.stream.tokens_M[access] - 1) * world.times.token
    return seconds


@numba.njit(cache=True, forceinline=True)
def _serve(world: World, event: int, phase: int, now: float, missing: NDArray[np.bool_]) -> tuple[float, int, float]:
    """Get the experts of an event to the device.

    Returns:
        When the last of them is there; the access up to which they have not computed yet; and how long was waited before,
        where a cache smaller than the event took them in several waves.
    """
    device, layer = world.device, event % world.stream.layers
    keys_M, next_use_M, starts_V = world.stream.keys_M, world.stream.next_use_M, world.stream.starts_V
    cache, keys, copies, counts, own = device.cache, device.cache.keys, device.copies, device.counts, device.own
    start, stop = starts_V[event], starts_V[event + 1]
    cache.clock[0].stamp += 1
    stamp, misses = cache.clock[0].stamp, 0
    for access in range(start, stop):
        key = keys_M[access]
        keys[key].pinned = stamp
        keys[key].next_use = next_use_M[access]
        missing[access - start] = not keys[key].resident
    if own[0].waiting > 0:
        expire(device, event, phase)
    ready, computed, waited = now, stop, 0.0
    for access in range(stop - 1, start - 1, -1):
        key = keys_M[access]
        if not missing[access - start]:
            counts[phase, HITS] += 1
            if copies[key].unused:
                copies[key].unused = False
                counts[phase, USED] += 1
            # A wave may have let it go again; it has been used all the same.
            if keys[key].resident:
                hit(own[0].policy, cache, key, event)
            continue
        misses += 1
        if copies[key].arrival < np.inf or keys[key].resident:
            # Its prefetch is under way, or had to be waited for just now.
            if copies[key].arrival < np.inf:
                ready = max(ready, copies[key].arrival)
                arrived(device, key, event)
            copies[key].unused = False
            counts[phase, LATE] += 1
            continue
        group = keys[key].group
        begin = make_room(device, group, event, phase, now)
        if begin < 0:
            # More experts than the cache holds: those that are there compute, and make room.
            record(world.log, STALL, 0, layer, event, now, ready)
            waited += ready - now
            now = ready + _computing(world, access + 1, computed)
            record(world.log, EXPERTS, 0, layer, event, ready, now)
            computed, ready = access + 1, now
            cache.clock[0].stamp += 1
            begin = make_room(device, group, event, phase, now)
        keys[key].pinned = cache.clock[0].stamp
        occupy(device, group)
        ready = max(ready, _fetch(world, key, begin, event, phase))
        keys[key].resident = True
        insert(own[0].policy, cache, key, event)
        counts[phase, MISSES] += 1
        if copies[key].evicted >= 0:
            if event - copies[key].evicted <= world.stream.layers:
                world.own[0].returned += 1
            copies[key].evicted = -1
    counts[phase, ACCESSES] += stop - start
    world.own[0].miss_chance += ((1.0 if misses else 0.0) - world.own[0].miss_chance) * _FOLLOW
    return ready, computed, waited + (ready - now)


@numba.njit(cache=True)
def _propose(world: World, key: int, due: int, chance: float, event: int, phase: int, ready: float) -> None:
    """Let an expert that is foreseen, and not on the device, wait for its link, if it is worth it."""
    tier = world.device
    if world.tiers == 3 and not world.host.cache.keys[key].resident:
        if world.host.copies[key].arrival < np.inf:
            ready = max(ready, world.host.copies[key].arrival)
        else:
            tier = world.host
    if world.plan.reach == 0 and world.plan.rule > CONFIDENCE:
        before = 0.0
        for other in range(tier.own[0].waiting):
            if tier.waiting[other].due <= due:
                before += tier.own[0].seconds
        begin = max(ready, max(tier.slots.min(), tier.own[0].bus - tier.own[0].latency)) + before
        if not expected_value.admits(_worth(tier, world.own, chance, begin, event, due), world.plan.parameter):
            return
    enqueue(tier, key, due, chance, ready, phase)


@numba.njit(cache=True, forceinline=True)
def _foresee(world: World, event: int, phase: int, now: float) -> None:
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
            if keys[key].resident or copies[key].arrival < np.inf:
                continue
            standing = copies[key].waits
            if standing >= 0 and waiting[standing].due < due:
                continue
            _propose(world, key, due, chance, event, phase, now)


@numba.njit(cache=True)
def _look_ahead(world: World, event: int, phase: int, now: float, place: NDArray[np.int64]) -> None:
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


@numba.njit(cache=True)
def _inform(world: World, event: int, usage_N: NDArray[np.float64]) -> None:
    """Tell the eviction policy what is wanted: the chance foreseen, or where nothing is, how often it was used."""
    stream, plan, keys = world.stream, world.plan, world.device.cache.keys
    base = (event % stream.layers) * stream.experts
    for key in range(base, base + stream.experts):
        usage_N[key] *= 1 - _FOLLOW
    for access in range(stream.starts_V[event], stream.starts_V[event + 1]):
        usage_N[stream.keys_M[access]] += _FOLLOW
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


@numba.njit(cache=True, nogil=True)
def run_timeline(world: World, end_J: NDArray[np.float64], stall_J: NDArray[np.float64]) -> float:
    """Run all steps and return the time at the end.

    Order within an event: attention and router of the layer; its experts that are not there are fetched, before
    any prefetch that waits; what the prediction says is admitted to the queue; when all its experts are there they
    compute. Prefetches start whenever a link is free, also while something computes; a transfer that has begun is
    never interrupted.

    Args:
        end_J, stall_J: to be filled: when each step ended, and how long it waited for experts.
    """
    stream, device, host, times, own, log = world.stream, world.device, world.host, world.times, world.own, world.log
    usage_N, place = np.zeros(stream.layers * stream.experts), np.zeros(2, dtype=np.int64)
    missing = np.zeros(stream.experts, dtype=np.bool_)
    event, now = -1, 0.0
    for step in range(len(stream.phase_J)):
        phase, further = int(stream.phase_J[step]), stream.tokens_J[step] - 1
        now += times.other
        for layer in range(stream.layers):
            begun = now
            now += times.layer + further * times.token_layer
            record(log, LAYER, 0, layer, event + 1, begun, now)
            # What began before this router ran was decided by what was known then.
            if world.tiers == 3:
                _pump(world, 1, now, event, phase)
                settle(host, now, event)
            if device.own[0].waiting > 0:
                _pump(world, 2, now, event, phase)
            if device.own[0].flights > 0:
                settle(device, now, event)
            event += 1
            if event > 0:
                follow = _FOLLOW if event > 1 / _FOLLOW else 1 / event
                own[0].layer_seconds += (now - own[0].now - own[0].layer_seconds) * follow
            own[0].now = now
            if world.plan.informed:
                _inform(world, event, usage_N)

            router = now
            ready, computed, waited = _serve(world, event, phase, now, missing)
            if world.tiers == 3:
                expire(host, event, phase)
            if world.plan.reach > 0:
                _look_ahead(world, event, phase, router, place)
            elif event < len(world.plan.experts_VHB):
                _foresee(world, event, phase, router + times.prediction)

            if waited > 0:
                record(log, STALL, 0, layer, event, router, ready)
            now = ready + _computing(world, stream.starts_V[event], computed)
            record(log, EXPERTS, 0, layer, event, ready, now)
            stall_J[step] += waited
        end_J[step] = now
    for key in range(stream.layers * stream.experts):
        if device.copies[key].unused or device.copies[key].arrival < np.inf:
            device.counts[1, WASTED] += 1
        if world.tiers == 3 and (host.copies[key].unused or host.copies[key].arrival < np.inf):
            host.counts[1, WASTED] += 1
    return now
