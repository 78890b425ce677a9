"""A prefetch is worth its bytes when the time it is expected to save exceeds the time it is expected to cost.

All times in seconds. With p the calibrated chance that the expert is needed, τ the time of one transfer, φ what one
miss more costs a layer (τ, or less where a layer's reads overlap), f when the prefetch would have arrived and D when
its layer's router will have run:

- *saved*, if it is needed: the layer would have waited until D + φ, and now waits until max(D, f). At most φ.
- *delay*: a transfer under way is not interrupted. If the router of a layer before D runs while the bytes pass, and
  that layer misses an expert (chance m, as observed so far), its read waits for the rest.
- *displaced*: an expert that is not needed holds a place of the cache as long as any other, its lifetime of capacity /
  insertions; all that leaves meanwhile leaves one insertion sooner. The chance g that this costs a miss is that of an
  expert just evicted to be needed again within a lifetime, as observed so far. One that is needed holds the place too
  early, by the layers until then.

worth = p · saved − m · delay − g · φ · ((1 − p) + p · ahead / lifetime): an expected value, as in cost-benefit
prefetching (Patterson et al., 1995). When the transfer begins, what would be evicted for it is known: an expert that
is itself foreseen with a better chance stays, and the next one in the policy's order is asked.
"""

from __future__ import annotations

import math

from specmoe.offload.compiled import compiled

__all__ = ["admits", "worth"]


@compiled()
def worth(
    chance: float,
    begin: float,
    transfer: float,
    next_router: float,
    layers_ahead: float,
    layer_seconds: float,
    miss_chance: float,
    return_chance: float,
    fetch: float,
    lifetime: float,
) -> float:
    """Expected seconds that a prefetch saves, net.

    Args:
        chance: p. begin: when the link is free for it. transfer: τ. next_router: when the next layer's router runs.
        layers_ahead: routers from the last one to the target's. layer_seconds: from one router to the next, lately.
        miss_chance: m. return_chance: g. fetch: φ. lifetime: of an expert in the cache, in layers.
    """
    deadline = next_router + (layers_ahead - 1) * layer_seconds
    arrival = begin + transfer
    saved = min(fetch, max(0.0, deadline + fetch - max(deadline, arrival)))
    delay = 0.0
    # The first router to run after the transfer has begun; the target's own waits for this very expert.
    passed = math.floor((begin - next_router) / max(layer_seconds, 1e-12)) + 1 if begin >= next_router else 0
    if passed < layers_ahead - 1:
        delay = min(transfer, max(0.0, arrival - (next_router + passed * layer_seconds)))
    held = (1 - chance) + chance * min(1.0, layers_ahead / lifetime)
    return chance * saved - miss_chance * delay - return_chance * fetch * held


@compiled()
def admits(value: float, margin: float) -> bool:
    """``margin``: seconds that the worth must exceed."""
    return value > margin
