"""Which predictors no other one beats in both cost and recall."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points for which nothing else costs no more and gains no less (with one of the two
    strictly better), cheapest first. Of equal points the first counts.

    Raises:
        ValueError: ``costs`` and ``gains`` differ in length.
    """
    if len(costs) != len(gains):
        raise ValueError(f"{len(costs)} costs, but {len(gains)} gains")
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if not front or gains[index] > gains[front[-1]]:
            front.append(index)
    return front
