"""Pure functions of counts: how even a load is, and how much one thing tells of another."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

__all__ = ["Excess", "chance_overlap", "entropy_bits", "excess_information", "gini", "mutual_information_bits"]

_LOG2 = math.log(2)
_SHUFFLES = 16


def entropy_bits(count_X: np.ndarray) -> float:
    """Entropy in bits of the distribution that counts are proportional to; 0 without any count."""
    share = count_X[count_X > 0] / max(count_X.sum(), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0


def gini(count_X: np.ndarray) -> float:
    """Gini coefficient of counts: 0 where all are equal, (n - 1) / n where one has everything (Gini, 1912)."""
    total, size = int(count_X.sum()), len(count_X)
    if total == 0:
        return 0.0
    rank = np.arange(1, size + 1)
    return float((2 * rank - size - 1) @ np.sort(count_X) / (size * total))


def chance_overlap(load_E: np.ndarray, places: int, top_k: int) -> float:
    """Share of K experts that two independent places with the same load have in common.

    An expert is in both with the square of its probability to be among the K of one.
    """
    if places == 0:
        return 0.0
    return float(((load_E / places) ** 2).sum() / top_k)


def mutual_information_bits(joint_XY: np.ndarray) -> float:
    """Mutual information in bits from a table of joint counts, corrected for its upward bias.

    The plug-in estimate is too high by about (cells - rows - columns + 1) / 2N nats, cells, rows and columns
    counted where they are not empty (Miller, 1955; Paninski, Neural Computation 15, 2003). The
    corrected value may be slightly negative where there is nothing to tell; such values are returned as 0.
    """
    total = int(joint_XY.sum())
    if total == 0:
        return 0.0
    row_X, column_Y = joint_XY.sum(1), joint_XY.sum(0)
    plugin = entropy_bits(row_X) + entropy_bits(column_Y) - entropy_bits(joint_XY)
    filled = [np.count_nonzero(counts) for counts in (row_X, column_Y, joint_XY)]
    return max(0.0, plugin - (filled[2] - filled[0] - filled[1] + 1) / (2 * total * _LOG2))


class Excess(NamedTuple):
    """Mutual information beyond that of shuffled data.

    Attributes:
        bits: difference to the shuffles' mean. variance: of one shuffle, in bits².
    """

    bits: float
    variance: float


def excess_information(x_N: np.ndarray, y_N: np.ndarray, rng: np.random.Generator) -> Excess:
    """How much x tells of y beyond what finite data shows anyway, by a permutation test.

    ``y`` is shuffled 16 times, which keeps both marginals and breaks what binds them (Fisher's randomisation;
    for mutual information see François, Wertz and Verleysen, ESANN 2006).

    Args:
        x_N, y_N: labels, non-negative integers of any size.
    """
    x_N, y_N = (np.unique(labels, return_inverse=True)[1] for labels in (x_N, y_N))
    width = int(y_N.max()) + 1
    # The marginals stay, so the joint entropy alone decides; joint cells are counted by sorting where they are many.
    observed = _joint_entropy(x_N * width + y_N)
    shuffled = np.array([_joint_entropy(x_N * width + rng.permutation(y_N)) for _ in range(_SHUFFLES)])
    return Excess(float(shuffled.mean() - observed), float(shuffled.var(ddof=1)))


def _joint_entropy(cell_N: np.ndarray) -> float:
    if int(cell_N.max()) <= 64 * len(cell_N):
        return entropy_bits(np.bincount(cell_N))
    return entropy_bits(np.unique(cell_N, return_counts=True)[1])
