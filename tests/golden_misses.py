"""Misses of every policy on the small real trace of ``golden_runs``, kept in ``golden/misses.json``.

Refresh, after the definition of a policy has been changed on purpose, with: ``python tests/golden_misses.py``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from golden_runs import golden_demand
from specmoe.offload.cache import CacheCounts, replay_cache
from specmoe.offload.demand import Demand
from specmoe.offload.policies.registry import POLICIES

PATH = Path(__file__).parent / "golden" / "misses.json"
# Experts: a tenth, a quarter, a half and nearly all of 128, and of a layer's 16.
SHARED, PER_LAYER = (13, 32, 64, 112), (2, 4, 8, 14)


def often_used(demand: Demand) -> np.ndarray[Any, Any]:
    """A predictor that knows nothing but how often an expert was needed up to now: [V, E]."""
    layers, experts = demand.topology.layers, demand.topology.experts
    used_VE = np.zeros((demand.events, experts), dtype=np.float32)
    event_M = np.repeat(np.arange(demand.events), np.diff(demand.starts_V))
    used_VE[event_M, demand.keys_M % experts] = 1
    return used_VE.reshape(-1, layers, experts).cumsum(0).reshape(demand.events, experts)


def golden_misses() -> dict[str, list[int]]:
    """Policy, form of the cache and batch → misses of prefill and decode at each capacity."""
    found = {}
    for batch in (1, 3):
        demand = golden_demand(batch)
        for name, info in POLICIES.items():
            wanted = often_used(demand) if info.needs == "predictor" else None
            for per_layer in (False, True):
                rows = [
                    replay_cache(demand, name, capacity, per_layer=per_layer, wanted=wanted)
                    for capacity in (PER_LAYER if per_layer else SHARED)
                ]
                place = "a cache a layer" if per_layer else "one cache"
                found[f"{name}, {place}, batch {batch}"] = [count for row in rows for count in _counts(row)]
    return found


def _counts(row: CacheCounts) -> tuple[int, int]:
    return row.prefill_misses, row.decode_misses


if __name__ == "__main__":
    PATH.write_text(json.dumps(golden_misses(), indent=1) + "\n")
