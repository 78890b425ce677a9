"""The simulation itself: one compute stream, one or two links, and what happens when, event by event."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.compiled import compiled, inlined
from specmoe.offload.simulation.prefetching import foresee, inform, lifetime, look_ahead, pump, use_host_copy
from specmoe.offload.simulation.state import (
    ACCESSES,
    DEMAND,
    EXPERTS,
    HITS,
    LATE,
    LAYER,
    MISSES,
    STALL,
    USED,
    WASTED,
)
from specmoe.offload.simulation.transfers import (
    arrived,
    expire,
    make_room,
    occupy,
    record,
    settle,
    transfer,
)
from specmoe.offload.simulation.verbs import hit, insert
from specmoe.offload.simulation.world import FOLLOW, World

__all__ = ["run_timeline"]


@compiled()
def _fetch(world: World, key: int, begin: float, event: int, phase: int) -> float:
    """Bring an expert that is needed now to the device, which has room: when it is there."""
    host = world.host
    if world.tiers == 3:
        layer = host.cache.keys[key].layer
        if host.cache.keys[key].resident:
            use_host_copy(host, key, event, phase)
        elif host.copies[key].arrival < np.inf:
            begin = max(begin, host.copies[key].arrival)
            arrived(host, key, event)
            host.counts[phase, layer, ACCESSES] += 1
            host.counts[phase, layer, LATE] += 1
        else:
            room = make_room(host, key, event, phase, begin)
            start, begin = transfer(host, key, room)
            occupy(host, key)
            host.cache.keys[key].resident = True
            insert(host.own[0].policy, host.cache, key, event)
            host.counts[phase, layer, ACCESSES] += 1
            host.counts[phase, layer, MISSES] += 1
            record(world.log, DEMAND, 1, key, event, start, begin)
    start, end = transfer(world.device, key, begin)
    record(world.log, DEMAND, 2, key, event, start, end)
    return end


@compiled()
def _fetch_all(world: World, start: int, stop: int, event: int, phase: int, begin_E: NDArray[np.float64]) -> float:
    """Bring the experts of some accesses that have room, from when ``begin_E`` says: when the last is there."""
    ready = 0.0
    # What the host has does not wait for what must come from below it.
    for turn in range(world.tiers - 1):
        for access in range(stop - 1, start - 1, -1):
            key, begin = world.stream.keys_M[access], begin_E[access - start]
            if begin < 0 or (turn == 0 and world.tiers == 3 and not world.host.cache.keys[key].resident):
                continue
            ready = max(ready, _fetch(world, key, begin, event, phase))
            begin_E[access - start] = -1.0
    return ready


@compiled()
def _computing(world: World, first: int, stop: int) -> float:
    """Seconds in which the experts of some accesses of one event compute."""
    seconds = 0.0
    if first < stop:
        # All of one layer, and so alike.
        own = world.device.copies[world.stream.keys_M[first]]
        expert, token = own.first_token, own.token
        for access in range(first, stop):
            seconds += expert + (world.stream.tokens_M[access] - 1) * token
    return seconds


@inlined()
def _serve(
    world: World, event: int, phase: int, now: float, missing_E: NDArray[np.bool_], begin_E: NDArray[np.float64]
) -> tuple[float, int, float]:
    """Get the experts of an event to the device.

    Returns:
        When the last of them is there; the access up to which they have not computed yet; and how long was waited,
        for all waves where a cache smaller than the event takes it in several.
    """
    device, layer = world.device, event % world.stream.layers
    keys_M, next_use_M, starts_V = world.stream.keys_M, world.stream.next_use_M, world.stream.starts_V
    cache, keys, copies, counts, own = device.cache, device.cache.keys, device.copies, device.counts, device.own
    start, stop = starts_V[event], starts_V[event + 1]
    cache.clock[0].stamp += 1
    stamp, misses, fetched, used, late = cache.clock[0].stamp, 0, 0, 0, 0
    for access in range(start, stop):
        key = keys_M[access]
        keys[key].pinned = stamp
        keys[key].next_use = next_use_M[access]
        missing_E[access - start] = not keys[key].resident
        begin_E[access - start] = -1.0
    if own[0].waiting > 0:
        expire(device, event, phase)
    ready, computed, waited = now, stop, 0.0
    for access in range(stop - 1, start - 1, -1):
        key = keys_M[access]
        if not missing_E[access - start]:
            if copies[key].unused:
                copies[key].unused = False
                used += 1
                world.own[0].kept += 1
            # A wave may have let it go again; it has been used all the same.
            if keys[key].resident:
                hit(own[0].policy, cache, key, event)
            continue
        misses += 1
        if copies[key].arrival < np.inf or keys[key].resident:
            # Its prefetch is under way.
            keys[key].pinned = cache.clock[0].stamp
            if copies[key].arrival < np.inf:
                ready = max(ready, copies[key].arrival)
                arrived(device, key, event)
            copies[key].unused = False
            late += 1
            world.own[0].kept += 1
            continue
        begin = make_room(device, key, event, phase, now)
        if begin < 0:
            # More experts than the cache holds: those that are there compute, and make room.
            ready = max(ready, _fetch_all(world, start, stop, event, phase, begin_E))
            record(world.log, STALL, 0, layer, event, now, ready)
            waited += ready - now
            now = ready + _computing(world, access + 1, computed)
            record(world.log, EXPERTS, 0, layer, event, ready, now)
            computed, ready = min(computed, access + 1), now
            cache.clock[0].stamp += 1
            begin = make_room(device, key, event, phase, now)
        keys[key].pinned = cache.clock[0].stamp
        occupy(device, key)
        begin_E[access - start] = begin
        keys[key].resident = True
        insert(own[0].policy, cache, key, event)
        fetched += 1
        if copies[key].evicted >= 0:
            if event - copies[key].evicted <= lifetime(device, world.own):
                world.own[0].returned += 1
            copies[key].evicted = -1
    ready = max(ready, _fetch_all(world, start, stop, event, phase, begin_E))
    counts[phase, layer, ACCESSES] += stop - start
    counts[phase, layer, HITS] += stop - start - misses
    counts[phase, layer, USED] += used
    counts[phase, layer, LATE] += late
    counts[phase, layer, MISSES] += fetched
    seen = world.own[0]
    seen.miss_chance += ((1.0 if misses else 0.0) - seen.miss_chance) * FOLLOW
    seen.misses += (misses - seen.misses) * FOLLOW
    # Prefetches are added when they start.
    seen.insertions += (fetched - seen.insertions) * FOLLOW
    return ready, computed, waited + (ready - now)


@compiled()
def run_timeline(
    world: World,
    end_J: NDArray[np.float64],
    stall_J: NDArray[np.float64],
    usage_N: NDArray[np.float64],
    place: NDArray[np.int64],
    missing_E: NDArray[np.bool_],
    begin_E: NDArray[np.float64],
) -> float:
    """Run all steps and return the time at the end.

    Order within an event: attention and router of the layer; its experts that are not there are fetched, before
    any prefetch that waits; what the prediction says is admitted to the queue; when all its experts are there they
    compute. Prefetches start whenever a link is free, also while something computes; a transfer that has begun is
    never interrupted.

    Args:
        end_J, stall_J: to be filled: when each step ended, and how long it waited for experts.
        usage_N, place, missing_E, begin_E: [N], [2], [E] and [E], to work in; ``usage_N`` and ``place`` zero.
    """
    stream, device, host, times, own, log = world.stream, world.device, world.host, world.times, world.own, world.log
    event, now, last_router, ready = -1, 0.0, 0.0, 0.0
    for step in range(len(stream.phase_J)):
        phase, further = int(stream.phase_J[step]), stream.tokens_J[step] - 1
        now += times.other
        for layer in range(stream.layers):
            begun = now
            now += times.layer + further * times.token_layer
            record(log, LAYER, 0, layer, event + 1, begun, now)
            # What began before this router ran was decided by what was known then.
            if world.tiers == 3:
                pump(world, 1, now, event, phase)
                settle(host, now, event)
            if device.own[0].waiting > 0:
                pump(world, 2, now, event, phase)
            if device.own[0].flights > 0:
                settle(device, now, event)
            event += 1
            if event > 0:
                follow = FOLLOW if event > 1 / FOLLOW else 1 / event
                own[0].layer_seconds += (now - last_router - own[0].layer_seconds) * follow
                own[0].computing += (now - ready - own[0].computing) * follow
            last_router = now
            if world.plan.informed:
                inform(world, event, usage_N)

            router = now
            ready, computed, waited = _serve(world, event, phase, now, missing_E, begin_E)
            own[0].next_router = ready + own[0].computing
            if world.tiers == 3:
                expire(host, event, phase)
            if world.plan.reach > 0:
                look_ahead(world, event, phase, router, place)
            elif event < len(world.plan.experts_VHB):
                foresee(world, event, phase, router + times.prediction)

            if waited > 0:
                record(log, STALL, 0, layer, event, router, ready)
            now = ready + _computing(world, stream.starts_V[event], computed)
            record(log, EXPERTS, 0, layer, event, ready, now)
            stall_J[step] += waited
        end_J[step] = now
    for key in range(stream.layers * stream.experts):
        if device.copies[key].unused or device.copies[key].arrival < np.inf:
            device.counts[1, key // stream.experts, WASTED] += 1
        if world.tiers == 3 and (host.copies[key].unused or host.copies[key].arrival < np.inf):
            host.counts[1, key // stream.experts, WASTED] += 1
    return now
