"""Where the names of points fit in a scatter plot without covering each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["LABEL_PLACES", "label_places"]

# Vega-Lite text marks by place, in the order in which they are tried.
LABEL_PLACES: dict[str, dict[str, Any]] = {
    "left above": {"align": "right", "dx": -8, "dy": -9},
    "right below": {"align": "left", "dx": 8, "dy": 11},
    "above": {"align": "center", "dx": 0, "dy": -14},
    "right above": {"align": "left", "dx": 8, "dy": -9},
    "left below": {"align": "right", "dx": -8, "dy": 11},
    "below": {"align": "center", "dx": 0, "dy": 15},
}
# Pixels: the plot's height, and what a letter, a line and a point take.
_HEIGHT = 300.0
_LETTER, _LINE, _POINT = 6.5, 13.0, 5.0

_Box = tuple[float, float, float, float]


def label_places(points: Sequence[tuple[float, float]], names: Sequence[str], width: float) -> list[str]:
    """The place of each name beside its point, the highest point first; empty where none is free.

    Args:
        points: x (to the right) and y (upwards), in any unit. names: empty for points without a label.
        width: of the plot, in pixels; wider ones only have more room.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    where = [
        (width * _share(x, xs), _HEIGHT * (1 - _share(y, ys)))  # pixels run downwards
        for x, y in points
    ]
    taken: list[_Box] = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in where]
    chosen = [""] * len(points)
    for index in sorted(range(len(points)), key=lambda i: -ys[i]):
        if not names[index]:
            continue
        for place, mark in LABEL_PLACES.items():
            box = _box(where[index], len(names[index]) * _LETTER, mark)
            inside = box[0] >= -30 and box[2] <= width + 30
            if inside and not any(_overlap(box, other) for n, other in enumerate(taken) if n != index):
                chosen[index] = place
                taken.append(box)
                break
    return chosen


def _share(value: float, values: Sequence[float]) -> float:
    span = max(values) - min(values)
    # Plots leave some room at their edges.
    return 0.5 if span == 0 else 0.08 + 0.84 * (value - min(values)) / span


def _box(point: tuple[float, float], length: float, mark: dict[str, Any]) -> _Box:
    left = point[0] + mark["dx"] - {"left": 0.0, "center": 0.5, "right": 1.0}[mark["align"]] * length
    middle = point[1] + mark["dy"]
    return left, middle - _LINE / 2, left + length, middle + _LINE / 2


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
