"""Copying within the host's memory: what a cached expert costs to move."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from specmoe.offload.hardware.measure.points import Point, point_of

__all__ = ["measure_memory"]


def measure_memory(
    sizes: Sequence[int] = (1 << 20, 4 << 20, 16 << 20, 64 << 20),
    *,
    seconds: float = 0.5,
    buffer_bytes: int = 256 << 20,
) -> list[Point]:
    """Time copies from one large buffer to another, on one thread, at places that the caches no longer hold.

    Args:
        sizes: bytes of a copy. seconds: time for each. buffer_bytes: of each of the two buffers; more than the caches.
    """
    buffer_bytes = max(buffer_bytes, 2 * max(sizes))
    source = np.random.default_rng(0).integers(0, 256, buffer_bytes, np.uint8)
    target = np.zeros_like(source)
    points = []
    for size in sizes:
        places = buffer_bytes // size
        times: list[float] = []
        begun, turn = time.perf_counter(), 0
        while len(times) < 5 or time.perf_counter() - begun < seconds:
            place = turn % places * size
            turn += 1
            started = time.perf_counter()
            np.copyto(target[place : place + size], source[place : place + size])
            times.append(time.perf_counter() - started)
        points.append(point_of(size, 1, times, sum(times)))
    return points
