"""The first b experts of every prediction, whatever their chance: what most engines do."""

from __future__ import annotations

from specmoe.offload.compiled import compiled

__all__ = ["admits"]


@compiled()
def admits(place: int, budget: float) -> bool:
    """``place``: rank of the expert in its prediction, from 0. ``budget``: b."""
    return place < budget
