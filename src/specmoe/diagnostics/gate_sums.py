"""Sums of gate weights over a whole trace: are they probabilities, and on what scale?"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["GateSums"]

_EVEN = 1e-6


class GateSums:
    """What is kept of the gate weights of all places.

    A place is one token at one layer. Only slots that a number of E or above or an expert serves count towards its sum.

    Attributes:
        places: how many. low, high: extreme weights. negative: slots with a weight below 0.
        even: places with at least two served slots whose weights are all the same. several: places with two such slots.
        unserved: slots without an expert that carry a weight.
        sum_L, square_L: of the places' sums and of their squares, per layer. largest: the largest sum.
    """

    def __init__(self, layers: int) -> None:
        self.places = self.negative = self.even = self.several = self.unserved = 0
        self.low, self.high, self.largest = math.inf, -math.inf, -math.inf
        self.sum_L, self.square_L = np.zeros(layers), np.zeros(layers)

    def take(self, gates_KLT: np.ndarray, ids_KLT: np.ndarray) -> None:
        """Add a block: float32 weights and int16 ids."""
        empty_KLT = ids_KLT < 0
        holes = bool(empty_KLT.any())
        if holes:
            self.unserved += int((empty_KLT & (gates_KLT != 0)).sum())
            gates_KLT = np.where(empty_KLT, np.float32(0), gates_KLT)
        low, high = float(gates_KLT.min()), float(gates_KLT.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if low < 0:
            self.negative += int((gates_KLT < 0).sum())
        # Finite weights may still overflow float32 in a sum or a square.
        total_LT = gates_KLT.sum(0, dtype=np.float64)
        self.places += total_LT.size
        self.sum_L += total_LT.sum(-1)
        self.square_L += (total_LT**2).sum(-1)
        self.largest = max(self.largest, float(total_LT.max()))
        self._count_even(gates_KLT, empty_KLT if holes else None)

    def _count_even(self, gates_KLT: np.ndarray, empty_KLT: np.ndarray | None) -> None:
        if len(gates_KLT) == 1:
            return
        least_LT, most_LT = gates_KLT.min(0), gates_KLT.max(0)
        even_LT = most_LT - least_LT <= _EVEN * np.abs(most_LT)
        if empty_KLT is None:
            self.several += even_LT.size
        else:
            several_LT = (~empty_KLT).sum(0) > 1
            least_LT = np.where(empty_KLT, np.float32(np.inf), gates_KLT).min(0)
            even_LT = (most_LT - least_LT <= _EVEN * np.abs(most_LT)) & several_LT
            self.several += int(several_LT.sum())
        self.even += int(even_LT.sum())

    @property
    def mean(self) -> float:
        """Mean sum of a place."""
        return float(self.sum_L.sum() / max(1, self.places))

    @property
    def spread(self) -> float:
        """Coefficient of variation of the places' sums: the largest of any layer."""
        count = max(1.0, self.places / len(self.sum_L))
        mean_L = self.sum_L / count
        variance_L = np.maximum(self.square_L / count - mean_L**2, 0)
        return float((np.sqrt(variance_L) / np.maximum(np.abs(mean_L), 1e-12)).max())
