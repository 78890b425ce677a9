"""From a simulated run to the numbers that are kept, and from many runs to what one gains over another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from specmoe.evaluation import interval_of, resampled
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.profile import Link
from specmoe.offload.jobs import SimulationJob
from specmoe.offload.results import Comparison, Quantiles, RunResult
from specmoe.offload.simulator import Outcome
from specmoe.results import Interval

__all__ = ["compared", "gain_of", "result_of"]

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


def compared(runs: Sequence[RunResult], policy: str) -> tuple[RunResult, ...]:
    """The same runs, each beside its reference without prefetching and the oracle of the same machine.

    Args:
        policy: of eviction of the reference.
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
            gain=gain_of(reference, run),
            # Less than a millionth of the run is rounding.
            share_of_oracle=(reference.seconds - run.seconds) / to_save if to_save > 1e-6 * reference.seconds else None,
            bytes_saved=saved,
            bytes_per_byte_saved=run.prefetch_bytes / saved if saved > 0 and run.prefetch_bytes else None,
        )
        judged.append(run.model_copy(update={"against": against}))
    return tuple(judged)


def gain_of(reference: RunResult, run: RunResult) -> Interval:
    """Tokens a second over the reference's, minus 1; 95 % interval of a paired bootstrap over batches of sequences."""
    theirs, ours = (torch.tensor(each.group_seconds, dtype=torch.float64) for each in (reference, run))
    weights = resampled(len(ours))
    return interval_of(reference.seconds / run.seconds - 1, (weights @ theirs) / (weights @ ours) - 1)


def _quantiles(seconds: NDArray[np.float64]) -> Quantiles | None:
    if len(seconds) == 0:
        return None
    p50, p95 = np.quantile(seconds, [0.5, 0.95]).tolist()
    return Quantiles(p50=p50, p95=p95)
