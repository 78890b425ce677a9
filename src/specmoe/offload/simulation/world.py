"""Everything that a simulated run is given, as compiled code takes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.compiled import Records
from specmoe.offload.simulation.state import Log, Tier

__all__ = ["ESTIMATES", "FOLLOW", "Plan", "Stream", "Times", "World"]

# How fast the running means follow: about the last fifty events.
FOLLOW = 0.02


class Stream(NamedTuple):
    """A demand as flat arrays; see :class:`specmoe.offload.demand.Demand`."""

    layers: int
    experts: int
    keys_M: Any
    tokens_M: NDArray[np.int32]
    starts_V: NDArray[np.int64]
    next_use_M: NDArray[np.int64]
    phase_J: NDArray[np.uint8]
    tokens_J: NDArray[np.int64]


class Times(NamedTuple):
    """Seconds of computing outside the experts, as in :class:`specmoe.offload.hardware.cost.StepCost`.

    ``prediction``: to make one. What experts take stands with each of them, in the device's ``copies``.
    """

    layer: float
    token_layer: float
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


# What an engine would know of its own running, one record of float64:
# - next_router: when it will run. computing: from a layer's experts being there to the next router. layer_seconds: from
#   one router to the next, with what was waited. All in seconds.
# - miss_chance: that a layer lacks an expert. misses, insertions: of an event.
# - pushed: experts that prefetches evicted; returned: of them, those needed again within a lifetime in the cache.
# - promised: sum of the chances of the last prefetches; kept: how many of them were used, late or not.
ESTIMATES = np.dtype(
    [
        (name, "f8")
        for name in (
            *("next_router", "computing", "layer_seconds"),
            *("miss_chance", "misses", "insertions"),
            *("pushed", "returned", "promised", "kept"),
        )
    ]
)


class World(NamedTuple):
    """All that a run reads and changes. ``host`` is not looked at with two ``tiers``; ``own``: ``ESTIMATES`` [1]."""

    stream: Stream
    device: Tier
    host: Tier
    tiers: int
    times: Times
    plan: Plan
    own: Records
    log: Log
