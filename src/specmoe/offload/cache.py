"""A cache of experts without time: every access of a stream, every miss filled at once, nothing fetched ahead.

An event is atomic. Its experts are all in use until it ends; which of them are hits is decided before any of them
enters or moves; then they are gone through from the largest number to the smallest, so that of experts used at the same
time the one with the larger id counts as used earlier (the rule of ``residency``).

An event of more experts than the cache holds runs in waves: when every resident expert is in use, those are released
and the event goes on, as an engine must that computes with what it has and then loads the next.

Where experts differ in size by layer, capacities are bytes, and experts leave until the one that comes fits.

Letters: V events, M accesses, N experts of the model, L layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specmoe.errors import SpecmoeError
from specmoe.offload.capacity import ExpertBytes, units_L
from specmoe.offload.compiled import compiled
from specmoe.offload.demand import Demand
from specmoe.offload.policies import belady
from specmoe.offload.policies.dispatch import BELADY_BYPASS, admit, hit, insert, victim
from specmoe.offload.policies.registry import policy_named
from specmoe.offload.policies.state import PolicyState, make_state
from specmoe.topology import Topology
from specmoe.trace.record import Phase

__all__ = ["CacheCounts", "empty_caches", "miss_ratio_curves", "replay_cache"]


@dataclass(frozen=True)
class CacheCounts:
    """What a replay came to. Accesses are experts of events; an expert that several tokens of a step share is one.

    Attributes:
        policy: its name. capacity: units held (see ``offload.capacity``) by each cache, by all together if they differ.
        per_layer: a cache for each layer, or one for all.
        accesses, misses: of all events. cold: misses of experts that were never needed before, which no policy avoids.
        evictions: experts that left. bypassed: misses that were not kept.
        prefill_accesses, prefill_misses: of prefill steps; what remains is decode.
        misses_L: int64 [L]. missed_M: bool [M], if asked for.
    """

    policy: str
    capacity: int
    per_layer: bool
    accesses: int
    misses: int
    cold: int
    evictions: int
    bypassed: int
    prefill_accesses: int
    prefill_misses: int
    misses_L: NDArray[np.int64]
    missed_M: NDArray[np.bool_] | None = None

    @property
    def hits(self) -> int:
        """Accesses that found their expert."""
        return self.accesses - self.misses

    @property
    def miss_ratio(self) -> float:
        """Misses by accesses."""
        return self.misses / self.accesses

    @property
    def decode_accesses(self) -> int:
        """Of decode steps."""
        return self.accesses - self.prefill_accesses

    @property
    def decode_misses(self) -> int:
        """Of decode steps."""
        return self.misses - self.prefill_misses


def empty_caches(
    topology: Topology,
    capacity: int | NDArray[np.int64],
    *,
    per_layer: bool = False,
    expert_bytes: ExpertBytes | None = None,
) -> PolicyState:
    """The state of empty caches of a model: one that the layers share, or one for each layer.

    Args:
        topology: of the model. capacity: units that each cache may hold, or int64 with a number for each. per_layer: as
            said. expert_bytes: by layer where sizes differ, and units are bytes.

    Raises:
        SpecmoeError: not even one expert, or not a capacity for each cache.
    """
    layers, experts = topology.layers, topology.experts
    layer_N = np.repeat(np.arange(layers, dtype=np.int32), experts)
    group_N = layer_N if per_layer else np.zeros(layers * experts, dtype=np.int32)
    groups, taken_L = layers if per_layer else 1, units_L(topology, expert_bytes)
    if isinstance(capacity, np.ndarray) and capacity.shape != (groups,):
        raise SpecmoeError(f"{capacity.size} capacities do not go with {groups} caches")
    capacity_G = np.broadcast_to(np.asarray(capacity, dtype=np.int64), groups).copy()
    least_G = taken_L if per_layer else taken_L.max(keepdims=True)
    if (capacity_G < least_G).any():
        small = int((capacity_G < least_G).argmax())
        if isinstance(expert_bytes, tuple):
            raise SpecmoeError(
                f"a cache of {capacity_G[small]:,} bytes holds nothing; choose at least {least_G[small]:,}, the size "
                "of an expert"
            )
        raise SpecmoeError(f"a cache of {capacity_G[small]} experts holds nothing; choose at least 1")
    return make_state(group_N, layer_N, capacity_G, layers, taken_L)


def replay_cache(
    demand: Demand,
    policy: str,
    capacity: int | NDArray[np.int64],
    *,
    per_layer: bool = False,
    wanted: NDArray[np.float32] | None = None,
    keep_misses: bool = False,
    expert_bytes: ExpertBytes | None = None,
) -> CacheCounts:
    """Send a stream through a cache that starts empty.

    Args:
        demand: the stream. policy: its name in ``POLICIES``.
        capacity: experts held, in all, or in each layer with ``per_layer``; int64 [L] if layers differ in it.
        expert_bytes: by layer where sizes differ: ``capacity`` is bytes then, and experts leave until the one that
            comes fits. None, or one size: it is experts.
        wanted: float [V, E], for ``predicted`` only: how much each expert of an event's layer is wanted once that event
            has its own, as known when the event runs; larger is more.
        keep_misses: also return for each access whether it missed.

    Raises:
        SpecmoeError: no such policy, a capacity below 1, or ``wanted`` missing, not called for or of another shape.
    """
    info = policy_named(policy)
    if (info.needs == "predictor") != (wanted is not None):
        need = "needs" if wanted is None else "does not use"
        raise SpecmoeError(f"policy {policy!r} {need} the wishes of a predictor (wanted)")
    shape = (demand.events, demand.topology.experts)
    if wanted is None:
        wanted = np.zeros((0, 0), dtype=np.float32)
    elif wanted.shape != shape:
        raise SpecmoeError(f"wanted has the shape {wanted.shape}, the stream needs {shape} (events, experts)")
    elif np.isnan(wanted).any():
        raise SpecmoeError("wanted holds what is not a number; a predictor whose logits are finite is asked for")
    state = empty_caches(demand.topology, capacity, per_layer=per_layer, expert_bytes=expert_bytes)
    future = info.needs == "future"
    next_use_M = demand.next_use_M if future else np.zeros(0, dtype=np.int64)
    missed_M = np.zeros(demand.accesses if keep_misses else 0, dtype=np.bool_)
    totals = np.zeros(5, dtype=np.int64)
    misses_L = np.zeros(demand.topology.layers, dtype=np.int64)
    unused_N = np.ones(state.experts, dtype=np.bool_)
    _replay(
        info.number,
        state,
        demand.keys_M,
        demand.starts_V,
        demand.phase_J == Phase.PREFILL,
        next_use_M,
        np.ascontiguousarray(wanted, dtype=np.float32),
        missed_M,
        unused_N,
        np.zeros(state.experts, dtype=np.bool_),
        misses_L,
        totals,
    )
    cold, evictions, bypassed, prefill_accesses, prefill_misses = totals.tolist()
    return CacheCounts(
        policy,
        capacity if isinstance(capacity, int) else int(capacity.sum()),
        per_layer,
        demand.accesses,
        int(misses_L.sum()),
        cold,
        evictions,
        bypassed,
        prefill_accesses,
        prefill_misses,
        misses_L,
        missed_M if keep_misses else None,
    )


def miss_ratio_curves(
    demand: Demand,
    policies: Iterable[str],
    capacities: Sequence[int] | Sequence[NDArray[np.int64]],
    *,
    per_layer: bool = False,
    wanted: Mapping[str, NDArray[np.float32]] | None = None,
    workers: int | None = None,
    expert_bytes: ExpertBytes | None = None,
) -> dict[str, list[CacheCounts]]:
    """Replay a stream with every policy at every capacity, several at a time.

    Args:
        demand: the stream; all replays read the same arrays. policies: names. capacities: see :func:`replay_cache`.
        wanted: what :func:`replay_cache` takes, by policy. workers: threads; by default one for each core.
        expert_bytes: as there.

    Returns:
        Policy → counts, in the order of the capacities.

    Raises:
        SpecmoeError: as :func:`replay_cache`.
    """
    names = list(policies)
    if any(policy_named(name).needs == "future" for name in names):
        _ = demand.next_use_M  # once, not in every thread

    def one(job: tuple[str, int | NDArray[np.int64]]) -> CacheCounts:
        name, capacity = job
        wishes = (wanted or {}).get(name)
        return replay_cache(demand, name, capacity, per_layer=per_layer, wanted=wishes, expert_bytes=expert_bytes)

    jobs = [(name, capacity) for name in names for capacity in capacities]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        counts = list(pool.map(one, jobs))
    return {name: counts[i * len(capacities) : (i + 1) * len(capacities)] for i, name in enumerate(names)}


@compiled()
def _make_room(policy: int, state: PolicyState, key: int, event: int) -> tuple[int, bool]:
    """Let more than one expert go, where sizes differ: how many, and whether the one that comes is kept.

    Apart from the loop below, which is a tenth slower with a loop in it.
    """
    group, gone = state.keys[key].group, 0
    while state.caches[group].size + state.keys[key].units > state.caches[group].capacity:
        if not admit(policy, state, key, event):
            return gone, False
        leaves = victim(policy, state, group, event)
        if leaves < 0:
            state.clock[0].stamp += 1
            leaves = victim(policy, state, group, event)
        state.keys[leaves].resident = False
        state.caches[group].size -= state.keys[leaves].units
        gone += 1
    return gone, True


@compiled()
def _replay(
    policy: int,
    state: PolicyState,
    keys_M: NDArray[np.int32],
    starts_V: NDArray[np.int64],
    prefill_J: NDArray[np.bool_],
    next_use_M: NDArray[np.int64],
    wanted_VE: NDArray[np.float32],
    missed_M: NDArray[np.bool_],
    unused_N: NDArray[np.bool_],
    missed_here_N: NDArray[np.bool_],
    misses_L: NDArray[np.int64],
    totals: NDArray[np.int64],
) -> None:
    """Fill misses of each layer, and cold ones, evictions, bypassed, prefill accesses and prefill misses."""
    layers = state.layers
    experts = state.experts // layers
    future, wishes, keep = len(next_use_M) > 0, len(wanted_VE) > 0, len(missed_M) > 0
    bound = policy == BELADY_BYPASS
    cold = evictions = bypassed = prefill_accesses = prefill_misses = 0
    stamp = 0
    layer = 0
    for event in range(len(starts_V) - 1):
        first, last = starts_V[event], starts_V[event + 1]
        if wishes:
            for expert in range(experts):
                state.keys[layer * experts + expert].wanted = wanted_VE[event, expert]
        stamp += 1
        state.clock[0].stamp = stamp
        misses = 0
        for access in range(first, last):
            key = keys_M[access]
            if future:
                state.keys[key].next_use = next_use_M[access]
            if state.keys[key].resident:
                state.keys[key].pinned = stamp
                missed_here_N[key] = False
                # The bound chooses among all that is held, as it will be when the event is over.
                if bound:
                    belady.hit(state, key, event)
            else:
                missed_here_N[key] = True
                misses += 1
                cold += unused_N[key]
                unused_N[key] = False
                if keep:
                    missed_M[access] = True
        misses_L[layer] += misses
        if prefill_J[event // layers]:
            prefill_accesses += last - first
            prefill_misses += misses
        for access in range(last - 1, first - 1, -1):
            key = keys_M[access]
            if not missed_here_N[key]:
                # The release of a wave may have let it go before its turn; it was used all the same.
                if state.keys[key].resident and not bound:
                    hit(policy, state, key, event)
                continue
            group = state.keys[key].group
            if state.caches[group].size + state.keys[key].units > state.caches[group].capacity:
                if not admit(policy, state, key, event):
                    bypassed += 1
                    continue
                leaves = victim(policy, state, group, event)
                if leaves < 0:
                    stamp += 1
                    state.clock[0].stamp = stamp
                    leaves = victim(policy, state, group, event)
                state.keys[leaves].resident = False
                state.caches[group].size -= state.keys[leaves].units
                evictions += 1
                if state.caches[group].size + state.keys[key].units > state.caches[group].capacity:
                    more, kept = _make_room(policy, state, key, event)
                    stamp = state.clock[0].stamp
                    evictions += more
                    if not kept:
                        bypassed += 1
                        continue
            state.keys[key].resident = True
            state.keys[key].pinned = stamp
            state.caches[group].size += state.keys[key].units
            insert(policy, state, key, event)
        layer += 1
        if layer == layers:
            layer = 0
    totals[0], totals[1], totals[2] = cold, evictions, bypassed
    totals[3], totals[4] = prefill_accesses, prefill_misses
