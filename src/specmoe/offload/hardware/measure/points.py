"""Measured points of a link, and the straight line through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specmoe.offload.hardware.profile import Link

__all__ = ["Point", "best_depth", "fit_line", "fit_link", "point_of"]

# A deeper queue must be faster by so much to count as faster; less is noise.
_NOISE = 1.03


@dataclass(frozen=True)
class Point:
    """Transfers of one size at one depth.

    Attributes:
        size: bytes of a transfer. depth: transfers under way at once. n: how many were timed.
        p50, p95: seconds of one transfer. throughput: bytes per second of all together, in wall time.
    """

    size: int
    depth: int
    n: int
    p50: float
    p95: float
    throughput: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def point_of(size: int, depth: int, seconds: Sequence[float], wall: float) -> Point:
    """Sum up the times of transfers that took ``wall`` seconds together."""
    p50, p95 = np.percentile(seconds, [50, 95])
    return Point(size, depth, len(seconds), float(p50), float(p95), size * len(seconds) / max(wall, 1e-9))


def fit_line(points: Sequence[Point]) -> tuple[float, float]:
    """Least-squares ``latency + size / bandwidth`` through the medians: (latency in s, bandwidth in bytes/s).

    Errors count relative to the time, so that the small transfers, which alone tell the latency, are heard. A fit that
    would have a negative latency goes through the origin; where times do not grow with size, the largest transfer
    alone decides.
    """
    sizes = np.array([point.size for point in points], float)
    times = np.array([point.p50 for point in points], float)
    latency, slope = 0.0, 0.0
    if len(set(sizes)) > 1:
        columns = np.stack([np.ones_like(sizes), sizes], 1) / times[:, None]
        latency, slope = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0]
    if latency < 0 or slope <= 0:
        share = sizes / times
        latency, slope = 0.0, float(share.sum() / (share**2).sum())
        if not math.isfinite(slope) or slope <= 0:
            slope = float(times[-1] / sizes[-1])
    return float(latency), 1 / float(slope)


def best_depth(points: Sequence[Point]) -> int:
    """The least depth whose throughput, in the geometric mean over sizes, is that of the best but for noise."""
    rates: dict[int, float] = {}
    for depth in sorted({point.depth for point in points}):
        rates[depth] = float(np.mean([math.log(point.throughput) for point in points if point.depth == depth]))
    best = max(rates.values())
    return next(depth for depth, rate in rates.items() if rate >= best - math.log(_NOISE))


def fit_link(name: str, points: Sequence[Point], source: str) -> Link:
    """A link from the line through the points at depth 1, with as many slots as the best depth has."""
    latency, bandwidth = fit_line([point for point in points if point.depth == 1])
    return Link(name=name, bandwidth=bandwidth, latency=latency, parallelism=best_depth(points), source=source)
