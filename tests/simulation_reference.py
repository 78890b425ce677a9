"""The simulation of two tiers with LRU once more, slow and plain: lists and dictionaries, written from the rules.

The rules, as the docstrings of ``simulation`` and ``cache`` state them:

- A transfer holds one of the link's slots from its beginning to its end; its fixed cost overlaps with that of others,
  its bytes pass the bus first come first served, and nothing interrupts it.
- An event's missing experts are asked for when its router has run, before any prefetch that has not begun.
- Prefetches begin when the link is free: what is due first, then what is likelier. What still waits when its event's
  router runs, or when its expert is needed, is cancelled. Nothing begins before it was possible.
- A place is taken from the beginning of a transfer. Experts of the event that ran last are in use, and stay.
- A prefetch that is under way when its expert is needed is joined: late.
- An event of more experts than the cache holds runs in waves.
- Where experts differ in size by layer a cache holds bytes, and experts leave until the one that comes fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from specmoe.offload.demand import Demand
from specmoe.offload.hardware.cost import StepCost
from specmoe.offload.hardware.profile import Link
from specmoe.offload.prefetchers.predictions import Predictions
from specmoe.offload.simulation.state import COUNTS
from specmoe.trace.record import Phase

__all__ = ["Reference", "Wait"]


@dataclass
class Wait:
    """A prefetch that waits for the link."""

    key: int
    due: int
    chance: float
    ready: float


@dataclass
class Reference:
    """One run. ``capacities``: experts, or bytes where sizes differ, that each cache holds: one, or one a layer."""

    demand: Demand
    capacities: list[int]
    link: Link
    expert_bytes: int | tuple[int, ...]
    cost: StepCost
    predictions: Predictions = field(default_factory=Predictions.none)
    rule: str = ""
    parameter: float = 0.0
    prediction_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.caches: list[list[int]] = [[] for _ in self.capacities]  # oldest use first
        self.under_way: dict[int, float] = {}
        self.unused: set[int] = set()
        self.in_use: set[int] = set()
        self.queue: list[Wait] = []
        self.slots = [0.0] * self.link.parallelism
        self.bus = 0.0
        self.asked = 0.0  # when the last router ran
        self.stall = 0.0
        self.largest = 0
        self.moved = 0
        self.counts = {phase.name.lower(): dict.fromkeys(COUNTS, 0) for phase in Phase}

    # What a cache holds

    def cache_of(self, key: int) -> int:
        return key // self.demand.topology.experts if len(self.capacities) > 1 else 0

    def resident(self, key: int) -> bool:
        return key in self.caches[self.cache_of(key)]

    def layer_of(self, key: int) -> int:
        return key // self.demand.topology.experts

    def bytes_of(self, key: int) -> int:
        return self.expert_bytes if isinstance(self.expert_bytes, int) else self.expert_bytes[self.layer_of(key)]

    def full(self, cache: int, newcomer: int) -> bool:
        keys = [*self.caches[cache], *(key for key in self.under_way if self.cache_of(key) == cache), newcomer]
        if isinstance(self.expert_bytes, int):
            return len(keys) > self.capacities[cache]
        return sum(map(self.bytes_of, keys)) > self.capacities[cache]

    def evict_one(self, cache: int, phase: str) -> bool:
        """The least recently used expert that is not in use goes, if there is one."""
        for key in self.caches[cache]:
            if key not in self.in_use:
                self.caches[cache].remove(key)
                self.counts[phase]["evictions"] += 1
                if key in self.unused:
                    self.unused.remove(key)
                    self.counts[phase]["wasted"] += 1
                return True
        return False

    def note_size(self) -> None:
        held = sum(map(len, self.caches)) + len(self.under_way)
        self.largest = max(self.largest, held)

    # The link

    def transfer(self, key: int, ready: float) -> float:
        slot = self.slots.index(min(self.slots))
        begin = max(ready, self.slots[slot])
        end = max(begin + self.link.latency, self.bus) + self.bytes_of(key) / self.link.bandwidth
        self.slots[slot] = self.bus = end
        self.moved += self.bytes_of(key)
        return end

    def arrive(self, key: int) -> None:
        del self.under_way[key]
        self.caches[self.cache_of(key)].append(key)

    def take_in(self, until: float) -> None:
        """Prefetches that have arrived, in the order of their arrival."""
        for key, arrival in sorted(self.under_way.items(), key=lambda item: item[1]):
            if arrival <= until:
                self.arrive(key)
                self.unused.add(key)

    def start_prefetches(self, until: float, phase: str) -> None:
        while self.queue:
            # What could not begin before the last router ran can begin from then on, not earlier.
            begin = max(min(wait.ready for wait in self.queue), min(self.slots), self.asked)
            if begin >= until:
                return
            ready = [wait for wait in self.queue if wait.ready <= begin]
            chosen = min(ready, key=lambda wait: (wait.due, -wait.chance))
            self.take_in(begin)
            cache = self.cache_of(chosen.key)
            room = True
            while room and self.full(cache, chosen.key):
                room = self.evict_one(cache, phase)
            if not room:
                # All that this cache holds is in use: not before the next router has run.
                chosen.ready = until
                continue
            self.queue.remove(chosen)
            self.under_way[chosen.key] = self.transfer(chosen.key, begin)
            self.counts[phase]["prefetched"] += 1
            self.note_size()

    # An event

    def room_for_demand(self, key: int, now: float, phase: str) -> float | None:
        """From when on there is a place; None if all that is held is in use."""
        cache = self.cache_of(key)
        while self.full(cache, key):
            if self.evict_one(cache, phase):
                continue
            others = {
                other: arrival
                for other, arrival in self.under_way.items()
                if self.cache_of(other) == cache and other not in self.in_use
            }
            if not others:
                return None
            first = min(others, key=lambda other: others[other])
            self.arrive(first)
            self.unused.add(first)
            now = max(now, others[first])
        return now

    def computing(self, event: int, keys: list[int]) -> float:
        start, stop = self.demand.starts_V[event : event + 2]
        tokens = dict(
            zip(self.demand.keys_M[start:stop].tolist(), self.demand.tokens_M[start:stop].tolist(), strict=True)
        )
        return sum(self.cost.expert(tokens[key], self.layer_of(key)) for key in keys)

    def serve(self, event: int, phase: str, now: float) -> float:
        """Returns when the event's experts have computed."""
        start, stop = self.demand.starts_V[event : event + 2]
        needed = self.demand.keys_M[start:stop].tolist()
        there = {key for key in needed if self.resident(key)}
        self.in_use = set(needed)
        for wait in list(self.queue):
            if wait.due <= event or wait.key in self.in_use:
                self.queue.remove(wait)
                self.counts[phase]["cancelled"] += 1
        counts, ready, wave = self.counts[phase], now, []
        for key in sorted(needed, reverse=True):
            cache = self.cache_of(key)
            counts["accesses"] += 1
            if key in there:
                counts["hits"] += 1
                if key in self.unused:
                    self.unused.remove(key)
                    counts["used"] += 1
                if self.resident(key):
                    self.caches[cache].remove(key)
                    self.caches[cache].append(key)
            elif key in self.under_way:
                ready = max(ready, self.under_way[key])
                self.arrive(key)
                self.in_use.add(key)
                counts["late"] += 1
            else:
                begin = self.room_for_demand(key, now, phase)
                if begin is None:
                    self.stall += ready - now
                    now = ready = ready + self.computing(event, wave)
                    wave = []
                    # A prefetch of this very event that holds the only place gives way too, and is fetched again.
                    self.in_use = set()
                    begin = self.room_for_demand(key, now, phase)
                    assert begin is not None
                self.in_use.add(key)
                self.caches[cache].append(key)
                self.note_size()
                ready = max(ready, self.transfer(key, begin))
                counts["misses"] += 1
            wave.append(key)
        self.stall += ready - now
        return ready + self.computing(event, wave)

    def propose(self, event: int, phase: str, ready: float) -> None:
        for row, horizon in enumerate(self.predictions.horizons):
            due = event + horizon
            first = due % self.demand.topology.layers * self.demand.topology.experts
            for place in range(self.predictions.experts_VHB.shape[2]):
                expert = int(self.predictions.experts_VHB[event, row, place])
                chance = float(self.predictions.chance_VHB[event, row, place])
                wanted = place < self.parameter if self.rule == "top" else chance >= self.parameter
                if expert < 0 or not wanted:
                    continue
                key = first + expert
                if not self.resident(key) and key not in self.under_way:
                    self.enqueue(Wait(key, due, chance, ready), phase)

    def enqueue(self, wait: Wait, phase: str) -> None:
        for other in self.queue:
            if other.key == wait.key:
                if wait.due <= other.due:
                    other.due, other.chance = wait.due, wait.chance
                return
        self.queue.append(wait)
        if len(self.queue) > self.link.queue_depth:
            self.queue.remove(max(self.queue, key=lambda other: (other.due, -other.chance)))
            self.counts[phase]["refused"] += 1

    def run(self) -> float:
        """Run it all: seconds."""
        demand, now, event = self.demand, 0.0, 0
        tokens_J = np.diff(demand.first_J).tolist()
        for step in range(demand.steps):
            phase = Phase(int(demand.phase_J[step])).name.lower()
            now += self.cost.other_seconds
            for _ in range(demand.topology.layers):
                now += self.cost.layer(tokens_J[step])
                self.start_prefetches(now, phase)
                self.take_in(now)
                self.asked = now
                done = self.serve(event, phase, now)
                if self.rule:
                    self.propose(event, phase, now + self.prediction_seconds)
                now, event = done, event + 1
        self.counts["decode"]["wasted"] += len(self.unused) + len(self.under_way)
        return now
