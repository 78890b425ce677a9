"""The eviction policies once more, as simple and as slow as can be: lists, and a search through all that is held."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.demand import Demand


@dataclass
class Reference:
    """One cache. ``oldest`` first in every list; ``pinned`` keys must not leave; sizes are by layer, 1 by default."""

    capacity: int
    demand: Demand
    sizes: Sequence[int] = ()
    wanted: dict[int, float] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    uses: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    tick: int = 0

    def __post_init__(self) -> None:
        """For those that hold their keys otherwise."""

    def taken(self, keys: Iterable[int]) -> int:
        """What some keys take of the capacity."""
        experts = self.demand.topology.experts
        return sum(self.sizes[key // experts] if self.sizes else 1 for key in keys)

    def use(self, key: int) -> None:
        self.tick += 1
        self.last[key] = self.tick
        self.uses[key] = self.uses.get(key, 0) + 1

    def hit(self, key: int, now: int) -> None:
        self.use(key)

    def insert(self, key: int, now: int) -> None:
        self.uses[key] = 0
        self.use(key)
        self.held.append(key)

    def rank(self, key: int, now: int) -> Any:
        """The smallest leaves first."""
        return self.last[key]

    def admit(self, key: int, now: int) -> bool:
        return True

    def victim(self, pinned: Collection[int], now: int) -> int | None:
        free = [key for key in self.held if key not in pinned]
        if not free:
            return None
        chosen = min(free, key=lambda key: self.rank(key, now))
        self.held.remove(chosen)
        return chosen

    def next_use(self, key: int, now: int) -> int:
        starts, keys = self.demand.starts_V, self.demand.keys_M
        for event in range(now + 1, self.demand.events):
            if key in keys[starts[event] : starts[event + 1]]:
                return event
        return self.demand.events


class Lfu(Reference):
    def rank(self, key: int, now: int) -> Any:
        return self.uses[key], self.last[key]


class LfuAged(Reference):
    age = 0

    def use(self, key: int) -> None:
        super().use(key)
        self.values = {**getattr(self, "values", {}), key: self.uses[key] + self.age}

    def rank(self, key: int, now: int) -> Any:
        return self.values[key], self.last[key]

    def victim(self, pinned: Collection[int], now: int) -> int | None:
        chosen = super().victim(pinned, now)
        if chosen is not None:
            self.age = self.values[chosen]
        return chosen


class Slru(Reference):
    def __post_init__(self) -> None:
        self.segments: list[list[int]] = [[], [], [], []]

    def hit(self, key: int, now: int) -> None:
        place = next(i for i, segment in enumerate(self.segments) if key in segment)
        self.segments[place].remove(key)
        place = min(place + 1, 3)
        self.segments[place].append(key)
        while place:
            while self.taken(self.segments[place]) > self.capacity // 4:
                self.segments[place - 1].append(self.segments[place].pop(0))
            place -= 1

    def insert(self, key: int, now: int) -> None:
        room = [i for i, segment in enumerate(self.segments) if self.taken([*segment, key]) <= self.capacity // 4]
        self.segments[room[0] if room else 0].append(key)

    def victim(self, pinned: Collection[int], now: int) -> int | None:
        for segment in self.segments:
            for key in segment:
                if key not in pinned:
                    segment.remove(key)
                    return key
        return None


class S3Fifo(Reference):
    evicted = False

    def __post_init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []

    def hit(self, key: int, now: int) -> None:
        self.uses[key] += 1

    def insert(self, key: int, now: int) -> None:
        self.uses[key] = 0
        early = not self.evicted and self.taken(self.small) >= max(1, self.capacity // 10)
        (self.main if key in self.ghosts or early else self.small).append(key)
        self.ghosts = [ghost for ghost in self.ghosts if ghost != key]
        while self.taken(self.ghosts) > self.capacity * 9 // 10:
            self.ghosts.pop(0)

    def victim(self, pinned: Collection[int], now: int) -> int | None:
        self.evicted = True
        order = [self.from_small, self.from_main]
        if self.taken(self.main) > self.capacity - max(1, self.capacity // 10):
            order.reverse()
        for source in order:
            key = source(pinned)
            if key is not None:
                return key
        return None

    def from_small(self, pinned: Collection[int]) -> int | None:
        for key in list(self.small):
            if key in pinned:
                continue
            self.small.remove(key)
            if self.uses[key] >= 2:
                self.uses[key] = 0
                self.main.append(key)
            else:
                self.ghosts.append(key)
                return key
        return None

    def from_main(self, pinned: Collection[int]) -> int | None:
        while True:
            free = [key for key in self.main if key not in pinned]
            if not free:
                return None
            key = free[0]
            self.main.remove(key)
            if self.uses[key] == 0:
                return key
            self.uses[key] = min(self.uses[key], 3) - 1
            self.main.append(key)


class Sieve(Reference):
    hand: int | None = None

    def __post_init__(self) -> None:
        self.visited: set[int] = set()

    def hit(self, key: int, now: int) -> None:
        self.visited.add(key)

    def insert(self, key: int, now: int) -> None:
        self.held.append(key)

    def victim(self, pinned: Collection[int], now: int) -> int | None:
        if all(key in pinned for key in self.held):
            return None
        place = 0 if self.hand is None else self.held.index(self.hand)
        while True:
            key = self.held[place]
            if key not in pinned:
                if key not in self.visited:
                    break
                self.visited.remove(key)
            place = (place + 1) % len(self.held)
        self.hand = self.held[place + 1] if place + 1 < len(self.held) else None
        self.held.remove(key)
        return key


class LeastStale(Reference):
    def hit(self, key: int, now: int) -> None:
        super().hit(key, now)
        self.passes[key] = now // self.demand.topology.layers

    def insert(self, key: int, now: int) -> None:
        super().insert(key, now)
        self.passes = {**getattr(self, "passes", {}), key: now // self.demand.topology.layers}

    def rank(self, key: int, now: int) -> Any:
        layers, experts = self.demand.topology.layers, self.demand.topology.experts
        # Events until the layer's turn comes again; that of the running event has just been.
        turn = (key // experts - now % layers - 1) % layers
        return self.passes[key] == now // layers, -turn, self.last[key]


class Predicted(Reference):
    def rank(self, key: int, now: int) -> Any:
        return self.wanted.get(key, 0.0), self.last[key]


class Belady(Reference):
    def use(self, key: int) -> None:
        super().use(key)
        self.upcoming = {**getattr(self, "upcoming", {}), key: self.next_use(key, self.now)}

    def hit(self, key: int, now: int) -> None:
        self.now = now
        super().hit(key, now)

    def insert(self, key: int, now: int) -> None:
        self.now = now
        super().insert(key, now)

    def rank(self, key: int, now: int) -> Any:
        # In a wave's release, what has not had its turn in the event is still needed by it.
        return -self.upcoming[key], -key


class BeladyBypass(Reference):
    def rank(self, key: int, now: int) -> Any:
        return -self.next_use(key, now), -key

    def admit(self, key: int, now: int) -> bool:
        return any(self.next_use(other, now) > self.next_use(key, now) for other in self.held)

    def victim(self, pinned: Collection[int], now: int) -> int | None:
        return super().victim((), now)


def fewest_misses(demand: Demand, capacity: int, forced: bool) -> int:
    """The best that can be done with one cache, by trying everything; forced: all of an event is held at its end."""
    best = {frozenset[int](): 0}
    for event in range(demand.events):
        keys = frozenset(demand.keys_M[demand.starts_V[event] : demand.starts_V[event + 1]].tolist())
        after: dict[frozenset[int], int] = {}
        for held, misses in best.items():
            there = held | keys
            count = misses + len(keys - held)
            must = keys if forced else frozenset[int]()
            # More is never worse, so only full caches are looked at.
            for kept in combinations(there - must, min(capacity, len(there)) - len(must)):
                state = must | frozenset(kept)
                after[state] = min(after.get(state, count), count)
        best = after
    return min(best.values())


REFERENCES: dict[str, type[Reference]] = {
    "lru": Reference,
    "lfu": Lfu,
    "lfu-aged": LfuAged,
    "slru": Slru,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
    "least-stale": LeastStale,
    "predicted": Predicted,
    "belady": Belady,
    "belady-bypass": BeladyBypass,
}


def replay_reference(
    demand: Demand,
    policy: str,
    capacity: int,
    *,
    per_layer: bool = False,
    wanted: NDArray[np.float32] | None = None,
    sizes: Sequence[int] = (),
) -> tuple[list[bool], int]:
    """Which accesses miss, in the order of ``keys_M``, and how many experts leave.

    With ``sizes``, by layer, the capacity is bytes, and experts leave until the one that comes fits.
    """
    topology = demand.topology
    caches = [REFERENCES[policy](capacity, demand, sizes) for _ in range(topology.layers if per_layer else 1)]
    resident: list[set[int]] = [set() for _ in caches]
    missed: list[bool] = []
    evictions = 0
    for event in range(demand.events):
        keys = demand.keys_M[demand.starts_V[event] : demand.starts_V[event + 1]].tolist()
        layer = event % topology.layers
        cache, inside = (caches[layer], resident[layer]) if per_layer else (caches[0], resident[0])
        if wanted is not None:
            cache.wanted |= {layer * topology.experts + i: float(value) for i, value in enumerate(wanted[event])}
        misses = [key not in inside for key in keys]
        missed += misses
        pinned = {key for key in keys if key in inside}
        for key, miss in sorted(zip(keys, misses, strict=True), reverse=True):
            if not miss:
                if key in inside:
                    cache.hit(key, event)
                continue
            kept = True
            while kept and cache.taken([*inside, key]) > capacity:
                kept = cache.admit(key, event)
                if not kept:
                    break
                leaves = cache.victim(pinned, event)
                if leaves is None:
                    pinned.clear()
                    leaves = cache.victim(pinned, event)
                assert leaves is not None
                assert leaves not in pinned or isinstance(cache, BeladyBypass)
                inside.remove(leaves)
                evictions += 1
            if not kept:
                continue
            inside.add(key)
            pinned.add(key)
            cache.insert(key, event)
            assert cache.taken(inside) <= capacity
    return missed, evictions
