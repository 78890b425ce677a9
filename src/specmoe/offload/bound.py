"""The fewest loads that any cache can do with, whatever it evicts: the ground that the bound on a run's time stands on.

Experts are taken to be divisible: part of one may stay when the rest has left. A cache of whole experts does no better.
Then every unit of capacity holds something of its own that is needed at known events, all of one size, and keeping what
is needed soonest is best for every part of the stream from its beginning (``policies.belady_bypass`` says why). Where
an expert takes one unit, that policy has exactly these misses.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.cache import empty_caches
from specmoe.offload.capacity import ExpertBytes
from specmoe.offload.compiled import compiled
from specmoe.offload.demand import Demand
from specmoe.offload.policies import belady
from specmoe.offload.policies.heap import drop_root
from specmoe.offload.policies.state import PolicyState

__all__ = ["fewest_loads"]


def fewest_loads(
    demand: Demand,
    capacity: int | NDArray[np.int64],
    *,
    per_layer: bool = False,
    expert_bytes: ExpertBytes | None = None,
) -> NDArray[np.int64]:
    """Units that each event has to load at least, in the sum over all events up to it: int64 [V].

    Args:
        demand: the stream. capacity, per_layer, expert_bytes: as :func:`specmoe.offload.cache.replay_cache` takes them;
            units are experts, or bytes where sizes differ by layer.

    Raises:
        SpecmoeError: not even one expert fits.
    """
    state = empty_caches(demand.topology, capacity, per_layer=per_layer, expert_bytes=expert_bytes)
    loaded_V = np.zeros(demand.events, dtype=np.int64)
    held_N = np.zeros(state.experts, dtype=np.int64)
    _load(state, held_N, demand.keys_M, demand.starts_V, demand.next_use_M, loaded_V)
    return loaded_V


@compiled()
def _load(
    state: PolicyState,
    held_N: NDArray[np.int64],
    keys_M: NDArray[np.int32],
    starts_V: NDArray[np.int64],
    next_use_M: NDArray[np.int64],
    loaded_V: NDArray[np.int64],
) -> None:
    """``held_N``: units of each expert that are there; zero at the beginning."""
    for event in range(len(starts_V) - 1):
        group = 0
        for access in range(starts_V[event], starts_V[event + 1]):
            key = keys_M[access]
            group, units = state.keys[key].group, state.keys[key].units
            state.keys[key].next_use = next_use_M[access]
            loaded_V[event] += units - held_N[key]
            state.caches[group].size += units - held_N[key]
            if held_N[key] == 0:
                belady.insert(state, key, event)
            else:
                belady.hit(state, key, event)
            held_N[key] = units
        while state.caches[group].size > state.caches[group].capacity:
            last = state.heap_N[state.caches[group].first]
            gone = min(held_N[last], state.caches[group].size - state.caches[group].capacity)
            held_N[last] -= gone
            state.caches[group].size -= gone
            if held_N[last] == 0:
                drop_root(state, group)
