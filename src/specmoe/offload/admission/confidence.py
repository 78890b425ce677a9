"""Every expert whose chance is high enough."""

from __future__ import annotations

from specmoe.offload.compiled import compiled

__all__ = ["admits"]


@compiled()
def admits(chance: float, least: float) -> bool:
    """``chance``: calibrated probability that the expert is needed. ``least``: the cut."""
    return chance >= least
