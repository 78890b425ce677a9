"""From tallies on the test part to what is kept: intervals, paired differences, time and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specmoe.ensembling.members import FinishedRun, Member
from specmoe.ensembling.outcome import Check, Contender, EnsembleResult, Key, MemberFacts
from specmoe.evaluation import BOOTSTRAP_DRAWS, Ratios, Tally, by_horizon, interval_of, paired_difference
from specmoe.latency import measure_latency
from specmoe.metrics import budgets_of
from specmoe.predictors.base import Predictor, parameter_count
from specmoe.results import Interval, Latency, Protocol
from specmoe.suite.assemble import made_now, trace_facts
from specmoe.suite.data import SuiteData

__all__ = ["Judged", "assemble"]

# Rounds in which all contenders are timed one after another; each one's fastest counts, as others share the machine.
_TIMINGS = 3


@dataclass
class Judged:
    """A contender and what was measured of it.

    Attributes:
        title: how it is called. members: whom it asks. predictor: the first seed's, which is timed and counted.
        tallies, files: one a seed.
    """

    title: str
    members: tuple[str, ...]
    predictor: Predictor
    tallies: list[Tally] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def add(self, tally: Tally, file: str) -> None:
        """Add a seed."""
        self.tallies.append(tally)
        self.files.append(file)

    @property
    def ratios(self) -> Ratios:
        """recall@K by document."""
        return Ratios.of(self.tallies, "recall@K")


def assemble(
    run: FinishedRun,
    chosen: Sequence[Member],
    left_out: dict[str, str],
    checks: Sequence[Check],
    weights: Sequence[Tensor],
    judged: dict[Key, Judged],
    seeds: Sequence[int],
    pupil: str,
) -> EnsembleResult:
    """Intervals, differences and times of all contenders, as one results file.

    Args:
        checks, weights: one a seed; weights are shares [M, H]. judged: with the tallies of all seeds.
    """
    data, results = run.data, run.results
    horizons = data.horizons
    best = judged["best"].ratios
    latencies = _latencies({key: entry.predictor.to("cpu") for key, entry in judged.items()}, data)
    contenders = []
    for key, entry in judged.items():
        against: dict[str, Any] = {}
        if key != "best":
            against["difference"] = paired_difference(entry.ratios, best, horizons)
            against["gain"] = _mean_difference(entry.ratios, best)
        contenders.append(
            Contender(
                key=key,
                title=entry.title,
                members=entry.members,
                seeds=len(entry.tallies),
                recall=by_horizon(entry.ratios, horizons),
                latency=latencies[key],
                parameters=parameter_count(entry.predictor),
                megabytes=round(_megabytes(entry.predictor), 3),
                files=tuple(entry.files),
                **against,
            )
        )
    share_MH = torch.stack(list(weights)).mean(0)
    picked = [check.picks for check in checks]
    taught_ratios, plain = judged["taught"].ratios, judged["student"].ratios
    return EnsembleResult(
        made=made_now(0.0),
        trace=trace_facts(data.trace),
        split_hash=data.split.hash,
        test_documents=len(judged["best"].tallies[0].documents),
        validation_documents=len(data.validation.documents.unique()),
        protocol=Protocol(
            horizons=horizons,
            budgets=budgets_of(data.topology.top_k, data.topology.experts),
            seeds=tuple(seeds),
            bootstrap_draws=BOOTSTRAP_DRAWS,
            cache_experts=results.protocol.cache_experts,
        ),
        run=str(run.folder),
        best=chosen[0].name,
        student=pupil,
        members=tuple(
            MemberFacts(
                name=member.name,
                learned=member.learned,
                validation=round(member.validation, 6),
                weights={h: round(float(share_MH[index, i]), 4) for i, h in enumerate(horizons)},
                picks=round(sum(names.count(member.name) / len(names) for names in picked) / len(picked), 4),
            )
            for index, member in enumerate(chosen)
        ),
        left_out=left_out,
        checks=tuple(checks),
        contenders=tuple(contenders),
        taught_gain=paired_difference(taught_ratios, plain, horizons),
        taught_mean=_mean_difference(taught_ratios, plain),
    )


def _mean_difference(ours: Ratios, theirs: Ratios) -> Interval:
    """Mean over horizons of the paired difference."""
    estimate = ours.estimate() - theirs.estimate()
    there = estimate.isfinite()
    draws = (ours.draws() - theirs.draws(salt=1))[:, there].mean(1)
    return interval_of(float(estimate[there].mean()), draws)


def _latencies(predictors: dict[Key, Predictor], data: SuiteData) -> dict[Key, Latency]:
    """Of one step, the fastest of a few rounds in which all take turns."""
    found: dict[Key, Latency] = {}
    for _ in range(_TIMINGS):
        for key, predictor in predictors.items():
            measured = measure_latency(predictor, data.journey[1])
            if key not in found or measured.p50_us < found[key].p50_us:
                found[key] = measured
    return found


def _megabytes(predictor: Predictor) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in predictor.state_dict().values()) / 1e6
