"""Every expert whose chance is high enough."""

from __future__ import annotations

import numba

__all__ = ["admits"]


@numba.njit(cache=True)
def admits(chance: float, least: float) -> bool:
    """``chance``: calibrated probability that the expert is needed. ``least``: the cut."""
    return chance >= least
