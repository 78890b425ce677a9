"""A prefetch is worth its bytes when the time it is expected to save exceeds the time it is expected to cost.

All times in seconds. With p the calibrated chance that the expert is needed, τ the time of one transfer, f when the
prefetch would have arrived and D when its layer's router will have run:

- *saved*, if it is needed: the layer would have waited until D + τ, and now waits until max(D, f). At most τ.
- *delay*: a transfer under way is not interrupted. If the router of a layer before D runs while the bytes pass, and
  that layer misses an expert (chance m, as observed so far), its read waits for the rest.
- *displaced*: an expert that is not needed takes the place of one that is needed again before long with the chance g,
  as observed among those that prefetches pushed out so far; fetching that one again costs τ.

worth = p · saved − m · delay − (1 − p) · g · τ: an expected value, as in cost-benefit prefetching (Patterson et al.,
1995).
"""

from __future__ import annotations

import math

import numba

__all__ = ["admits", "worth"]


@numba.njit(cache=True)
def worth(
    chance: float,
    begin: float,
    transfer: float,
    now: float,
    layers_ahead: float,
    layer_seconds: float,
    miss_chance: float,
    return_chance: float,
) -> float:
    """Expected seconds that a prefetch saves, net.

    Args:
        chance: p. begin: when the link is free for it. transfer: τ. now: when the last router ran.
        layers_ahead: routers from that one to the target's. layer_seconds: from one router to the next, lately.
        miss_chance: m. return_chance: g.
    """
    deadline = now + layers_ahead * layer_seconds
    arrival = begin + transfer
    saved = min(transfer, max(0.0, deadline + transfer - max(deadline, arrival)))
    delay = 0.0
    if layer_seconds > 0:
        # The first router to run after the transfer has begun; the target's own waits for this very expert.
        ahead = math.floor(max(0.0, begin - now) / layer_seconds) + 1
        if ahead < layers_ahead:
            delay = min(transfer, max(0.0, arrival - (now + ahead * layer_seconds)))
    return chance * saved - miss_chance * delay - (1 - chance) * return_chance * transfer


@numba.njit(cache=True)
def admits(value: float, margin: float) -> bool:
    """``margin``: seconds that the worth must exceed."""
    return value > margin
