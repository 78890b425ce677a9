"""Picking and comparing predictors of a results file. Pure functions; recalls are shares from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.evaluation import Ratios
from specmoe.evaluation import paired_difference as difference_of_ratios
from specmoe.results import Interval, PredictorResult, Results

__all__ = [
    "CATEGORIES",
    "COLD_RECALL",
    "RECALL",
    "SEES",
    "Spread",
    "best",
    "best_per_category",
    "excludes_zero",
    "far_horizon",
    "finished",
    "groups",
    "has_width",
    "paired_difference",
    "recall",
    "ridge",
    "selection",
    "spread",
    "strongest_training_free",
    "train_seconds",
    "unfinished",
]

RECALL = "recall@K"
COLD_RECALL = "cold_recall@K"
CATEGORIES = ("attention-based", "ensemble", "multi-scale", "edge", "training-free")
# From least to most informed; predictors compare fairly only within one of these.
SEES = ("nothing", "routing", "token", "hidden", "context")

# 95 % limits of a standard deviation, as multiples of the estimate, by degrees of freedom: sqrt(df / chi2).
_SPREAD_LIMITS = {
    1: (0.446, 31.91),
    2: (0.521, 6.285),
    3: (0.566, 3.729),
    4: (0.599, 2.874),
    5: (0.624, 2.453),
    6: (0.644, 2.202),
    7: (0.661, 2.035),
    8: (0.675, 1.916),
    9: (0.688, 1.826),
}


class Spread(NamedTuple):
    """A standard deviation over seeds with its 95 % limits for normal deviates."""

    value: float
    low: float
    high: float
    seeds: int


def recall(result: PredictorResult, horizon: int, metric: str = RECALL) -> Interval | None:
    """A score on the test part, None where it was not measured."""
    return result.scores.get(metric, {}).get(horizon)


def finished(results: Results) -> tuple[PredictorResult, ...]:
    """Predictors that have a recall to show, best first at the first horizon that each has."""
    shown = [result for result in results.predictors if result.status == "ok" and result.scores.get(RECALL)]
    first = results.protocol.horizons[0]
    return tuple(sorted(shown, key=lambda result: (-_value(recall(result, first)), result.name)))


def unfinished(results: Results) -> tuple[PredictorResult, ...]:
    """Predictors without a result: skipped, failed, or ``ok`` without any recall."""
    done = {result.name for result in finished(results)}
    return tuple(result for result in results.predictors if result.name not in done)


def groups(results: Results) -> list[tuple[str, tuple[PredictorResult, ...]]]:
    """Finished predictors by what they may see, the most informed group first; within it best first."""
    found = finished(results)
    kinds = [*reversed(SEES), *sorted({result.sees for result in found} - set(SEES))]
    parts = [(kind, tuple(result for result in found if result.sees == kind)) for kind in kinds]
    return [(kind, part) for kind, part in parts if part]


def best(results: Iterable[PredictorResult], horizon: int, *, learned: bool | None = None) -> PredictorResult | None:
    """The predictor with the highest recall@K at ``horizon``; ``learned`` restricts the choice."""
    candidates = [
        result
        for result in results
        if recall(result, horizon) is not None and (learned is None or result.learned == learned)
    ]
    return max(candidates, key=lambda result: _value(recall(result, horizon)), default=None)


def best_per_category(results: Results, horizon: int | None = None) -> dict[str, PredictorResult]:
    """Category → its best finished predictor at ``horizon`` (default: the first), in the usual order."""
    at = results.protocol.horizons[0] if horizon is None else horizon
    found = finished(results)
    names = [*CATEGORIES, *sorted({result.category for result in found} - set(CATEGORIES))]
    chosen = {name: best((r for r in found if r.category == name), at) for name in names}
    return {name: result for name, result in chosen.items() if result is not None}


def ridge(results: Results) -> PredictorResult | None:
    """The closed-form linear probe, None where it was not run."""
    candidates = [result for result in finished(results) if not result.learned and "ridge" in result.name.lower()]
    return candidates[0] if candidates else None


def strongest_training_free(results: Results, horizon: int) -> PredictorResult | None:
    """The training-free predictor with the highest recall@K at ``horizon``."""
    return best(finished(results), horizon, learned=False)


def selection(results: Results) -> tuple[PredictorResult, ...]:
    """Those worth a picture of their own: the best of each learned category, ridge, and the strongest
    training-free predictor of each other kind of input; best first.
    """
    found = finished(results)
    horizon = results.protocol.horizons[0]
    names = {result.name for result in best_per_category(results).values() if result.learned}
    probe = ridge(results)
    for kind in SEES[1:]:
        rest = [r for r in found if not r.learned and r.sees == kind and r is not probe]
        strongest = best(rest, horizon)
        names |= {strongest.name} if strongest else set()
    names |= {probe.name} if probe else set()
    return tuple(result for result in found if result.name in names)


def far_horizon(results: Results) -> int:
    """The horizon that stands for looking further ahead: 3 where it was measured, else the last."""
    horizons = results.protocol.horizons
    return 3 if 3 in horizons else horizons[-1]


def has_width(interval: Interval) -> bool:
    """Whether an interval could be drawn; one of no width says nothing of the uncertainty."""
    return interval.high > interval.low


def excludes_zero(interval: Interval) -> bool:
    """Whether a difference is settled: its interval could be drawn and lies on one side of 0."""
    return has_width(interval) and (interval.low > 0 or interval.high < 0)


def paired_difference(results: Results, a: PredictorResult, b: PredictorResult, horizon: int) -> Interval | None:
    """recall@K of ``a`` minus that of ``b`` on the test part, with a 95 % percentile bootstrap interval over
    documents and seeds (Efron, 1979): documents weigh by their events, as in every other number.

    Returns:
        None if the file lacks the sums of one of them, or has fewer than two documents.
    """
    try:
        ours, theirs = (Ratios.of_result(results, predictor, RECALL) for predictor in (a, b))
    except SpecmoeError:
        return None
    if len(ours.events_GH) < 2:
        return None
    return difference_of_ratios(ours, theirs, results.protocol.horizons).get(horizon)


def spread(values: Sequence[float]) -> Spread | None:
    """Standard deviation of one predictor over its seeds; None with fewer than two."""
    if len(values) < 2:
        return None
    deviation = float(np.std(values, ddof=1))
    low, high = spread_limits(len(values) - 1)
    return Spread(deviation, deviation * low, deviation * high, len(values))


def spread_limits(freedom: int) -> tuple[float, float]:
    """95 % limits of a standard deviation, as multiples of the estimate (chi-squared distribution)."""
    if freedom in _SPREAD_LIMITS:
        return _SPREAD_LIMITS[freedom]

    # Wilson and Hilferty (1931): the cube root of chi-squared / df is close to normal.
    def quantile(z: float) -> float:
        return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3

    return math.sqrt(freedom / quantile(1.96)), math.sqrt(freedom / quantile(-1.96))


def train_seconds(result: PredictorResult) -> float | None:
    """Mean training time of the seeds that finished, in seconds."""
    times = [seed.train_seconds for seed in result.seeds if seed.status == "ok"]
    return sum(times) / len(times) if times else None


def _value(interval: Interval | None) -> float:
    return -1.0 if interval is None else interval.value
