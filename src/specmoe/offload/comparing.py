"""From a simulated run to the numbers that are kept, and from many runs to what one gains over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from specmoe.evaluation import resampled
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.profile import Link
from specmoe.offload.jobs import SimulationJob
from specmoe.offload.results import Comparison, Gain, Quantiles, RunResult
from specmoe.offload.simulator import Outcome
from specmoe.trace import DocumentRecord

__all__ = [
    "FEWEST_UNITS",
    "compared",
    "drawn_gains",
    "gain_between",
    "gain_of",
    "levels",
    "resampling_units",
    "result_of",
]

# Resampling few units gives an interval that is much too narrow. Of 3,000 made-up comparisons each, the 95 % interval
# of 2, 3, 4 and 5 units held the truth in 49, 75, 86 and 92 % (normal gains) or 48, 70, 82 and 88 % (skewed ones):
# benchmarks/interval_coverage.py.
FEWEST_UNITS = 5

# Far below what any clock tells apart; more would only make the file long.
_DIGITS = 10


def result_of(
    job: SimulationJob,
    fingerprint: str,
    outcome: Outcome,
    demand: Demand,
    link: Link,
    horizons: tuple[int, ...],
    recall: dict[int, float],
) -> RunResult:
    """What is kept of a run.

    Args:
        link: the one into the device. horizons, recall: of what was foreseen; empty where nothing was.
    """
    used, late, misses = (outcome.count(name) for name in ("used", "late", "misses"))
    transfers, moved = misses + outcome.count("prefetched"), outcome.demand_bytes + outcome.prefetch_bytes
    loading = max(outcome.link_seconds[-1], link.least_seconds(moved, transfers))
    lacking = used + late + misses
    return RunResult(
        key=job.key,
        fingerprint=fingerprint,
        group=job.group,
        x=job.x,
        kind=job.kind,
        predictor=job.predictor,
        admission=outcome.admission,
        policy=outcome.policy,
        horizons=horizons,
        prediction_seconds=job.seconds,
        recall={horizon: round(value, 6) for horizon, value in recall.items()},
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        compute=outcome.compute,
        stall=outcome.stall,
        link_seconds=outcome.link_seconds,
        loading=loading,
        counts=outcome.counts,
        host_counts=outcome.host_counts,
        largest=outcome.largest,
        hit_rate=outcome.hit_rate,
        cold_recall=used / lacking if lacking and outcome.count("prefetched") else None,
        demand_bytes=outcome.demand_bytes,
        prefetch_bytes=outcome.prefetch_bytes,
        used_bytes=outcome.bytes_of("used"),
        late_bytes=outcome.bytes_of("late"),
        wasted_bytes=outcome.bytes_of("wasted"),
        cancelled_bytes=outcome.bytes_of("cancelled"),
        first_token=_quantiles(outcome.first_token_seconds(demand)),
        output_token=_quantiles(outcome.output_token_seconds(demand)),
        group_seconds=tuple(outcome.group_seconds(demand).round(_DIGITS).tolist()),
    )


def resampling_units(documents: Sequence[DocumentRecord], batch: int = 1) -> tuple[int, ...]:
    """Number of the independent unit that each batch of sequences belongs to, counted from 0 in order.

    Documents of one group, and ungrouped ones of one text, are one unit, as they are for a split; so are batches that
    share one.

    Args:
        documents: that are replayed, in order. batch: sequences side by side.
    """
    joined = list(range(-(-len(documents) // batch)))

    def first_of(place: int) -> int:
        while joined[place] != place:
            joined[place] = joined[joined[place]]
            place = joined[place]
        return place

    seen: dict[tuple[str, str], int] = {}
    for number, document in enumerate(documents):
        place = number // batch
        key = ("group", document.group) if document.group else ("text", document.text_sha256)
        if key[1]:
            joined[first_of(place)] = first_of(seen.setdefault(key, place))
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(first_of(place), len(numbers)) for place in range(len(joined)))


def compared(runs: Sequence[RunResult], policy: str, units: Sequence[int]) -> tuple[RunResult, ...]:
    """The same runs, each beside its reference without prefetching and the oracle of the same machine.

    Args:
        policy: of eviction of the reference. units: see :func:`resampling_units`.
    """
    by_place = {(run.kind, run.policy, run.group, run.x): run for run in runs if run.kind in {"none", "oracle"}}
    # Eviction by a predictor has a reference too: the run that prefetches nothing.
    informed = next((run for run in runs if run.policy == "predicted" and not run.admission), None)
    judged = []
    for run in runs:
        # The recall sweep is about the machine as it is.
        group, x = ("main", None) if run.group == "recall" else (run.group, run.x)
        reference = by_place.get(("none", policy, group, x))
        oracle = by_place.get(("oracle", "belady", group, x))
        if reference is None:
            judged.append(run.model_copy(update={"against": None}))
            continue
        same = (
            by_place.get(("none", run.policy, group, x))
            or (informed if run.policy == "predicted" else None)
            or reference
        )
        saved = same.demand_bytes - run.demand_bytes
        to_save = reference.seconds - oracle.seconds if oracle is not None else 0.0
        against = Comparison(
            gain=gain_of(reference, run, units),
            # Less than a millionth of the run is rounding.
            share_of_oracle=(reference.seconds - run.seconds) / to_save if to_save > 1e-6 * reference.seconds else None,
            bytes_saved=saved,
            bytes_per_byte_saved=run.prefetch_bytes / saved if saved > 0 and run.prefetch_bytes else None,
        )
        judged.append(run.model_copy(update={"against": against}))
    return tuple(judged)


def gain_of(reference: RunResult, run: RunResult, units: Sequence[int]) -> Gain:
    """What a run gains over another of the same demand. ``units``: see :func:`resampling_units`."""
    return gain_between(reference.group_seconds, run.group_seconds, units)


def gain_between(theirs: Sequence[float], ours: Sequence[float], units: Sequence[int]) -> Gain:
    """Tokens a second over a reference's, minus 1, with the 95 % interval of a paired bootstrap over units.

    The quantiles lie as far out as Student's t asks for (expanded percentile interval; Hesterberg, 2015), since a
    bootstrap over n units is otherwise too narrow by what n - 1 degrees of freedom and a variance over n leave out.

    Args:
        theirs, ours: seconds of each batch of sequences, the reference's and the run's. units: of each batch, see
            :func:`resampling_units`; fewer than :data:`FEWEST_UNITS` give no interval.
    """
    theirs_U, ours_U = (np.bincount(units, weights=each).astype(np.float64) for each in (theirs, ours))
    number, value = len(ours_U), float(theirs_U.sum() / ours_U.sum() - 1)
    if number < FEWEST_UNITS:
        return Gain(value=round(value, 6), units=number)
    low, high = np.quantile(drawn_gains(theirs_U, ours_U), levels(number)).tolist()
    # Whatever is drawn, an interval holds its own estimate. Further digits would only make the file long.
    low, high = min(low, value), max(high, value)
    return Gain(value=round(value, 6), low=round(low, 6), high=round(high, 6), units=number)


def drawn_gains(theirs_U: NDArray[np.float64], ours_U: NDArray[np.float64]) -> NDArray[np.float64]:
    """The gain in each bootstrap draw of the units [draws]."""
    weights = resampled(len(ours_U)).numpy()
    return (weights @ theirs_U) / (weights @ ours_U) - 1


def levels(units: int) -> tuple[float, float]:
    """Of the quantiles of so many units' draws that make a 95 % interval."""
    beyond = NormalDist().cdf(-math.sqrt(units / (units - 1)) * _student(units - 1))
    return beyond, 1 - beyond


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t (Abramowitz and Stegun, 1964, 26.7.5); within 0.01 from 4 degrees on."""
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _quantiles(seconds: NDArray[np.float64]) -> Quantiles | None:
    if len(seconds) == 0:
        return None
    p50, p95 = np.quantile(seconds, [0.5, 0.95]).tolist()
    return Quantiles(p50=p50, p95=p95)
