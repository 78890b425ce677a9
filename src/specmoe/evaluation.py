"""From logits to tables: sums per document first, then estimates with intervals.

Documents are the unit of resampling, because tokens of one document are alike. So every number is kept as
a sum per document, and a table is a few weighted ratios of such sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specmoe.dataset import Windows, targets_of
from specmoe.metrics import (
    CALIBRATION_BINS,
    calibration_sums,
    event_metrics,
    inclusion_probabilities,
    recall_at_k,
)
from specmoe.predictors.base import Predictor
from specmoe.results import ByHorizon, CalibrationBin, Interval

__all__ = ["BOOTSTRAP_DRAWS", "Tally", "evaluate", "inclusion_scale", "interval_of", "paired_difference"]

BOOTSTRAP_DRAWS = 1000
PHASES = 2

# Larger tensors would come from the operating system anew each time: on 26 layers x 64 experts, evaluation took 1.5
# to 1.7 times as long with 7 million logits at once.
_CPU_LOGITS = 1 << 20
_GPU_LOGITS = 1 << 24


@dataclass
class Tally:
    """Sums over one part of the split, for one predictor and seed.

    Attributes:
        documents: [G] index in the trace of each document.
        sums: metric → [G, 2, L, H] float64, summed over the events of document, phase and source layer.
        events: [G, 2, L, H] float64, how many there were.
        bins: [G, H, bins, 3] float64: predicted, observed and count of the inclusion probabilities.
    """

    documents: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    events: Tensor = field(default_factory=lambda: torch.zeros(0))
    bins: Tensor = field(default_factory=lambda: torch.zeros(0))

    def tensors(self) -> dict[str, Tensor]:
        """Flat, for a file."""
        parts = {"documents": self.documents, "events": self.events, "bins": self.bins}
        return parts | {f"sum {name}": tensor for name, tensor in self.sums.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tally:
        """Inverse of :meth:`tensors`."""
        sums = {name.removeprefix("sum "): tensor for name, tensor in tensors.items() if name.startswith("sum ")}
        return cls(tensors["documents"], sums, tensors["events"], tensors["bins"])

    def recall(self) -> list[float]:
        """recall@K at each horizon, over everything; NaN where nothing was to be foreseen."""
        return (self.sums["recall@K"].sum((0, 1, 2)) / self.events.sum((0, 1, 2))).tolist()


@torch.no_grad()
def inclusion_scale(predictor: Predictor, windows: Windows, device: str = "cpu", sample_tokens: int = 1024) -> float:
    """The factor on a predictor's logits that makes its inclusion probabilities most accurate.

    Temperature scaling (Guo et al., 2017) by the Brier score, on windows that are not the test part. It
    changes no ranking: a router that spreads its weight nearly evenly is foreseen as such, and without this
    its K experts would all look improbable.
    """
    predictor.eval()
    count = max(1, min(len(windows), sample_tokens // (windows.length + windows.context)))
    rows = torch.linspace(0, len(windows) - 1, count).long()
    window = windows.batch(rows).to(device)
    targets = targets_of(window, predictor.horizons)
    known = targets.known_BTSH
    logits, routed = predictor(window)[known], targets.routed_BTSHE[known]
    if len(logits) == 0:
        return 1.0

    def brier(log_scale: float) -> float:
        probability = inclusion_probabilities(logits * math.exp(log_scale), windows.topology.top_k)
        return float((probability - routed).square().mean())

    best = min((x / 2 for x in range(-6, 11)), key=brier)
    return math.exp(min((best + x / 10 for x in range(-4, 5)), key=brier))


@torch.no_grad()
def evaluate(
    predictor: Predictor,
    windows: Windows,
    device: str = "cpu",
    *,
    scale: float = 1.0,
    only_recall: bool = False,
    batch_tokens: int | None = None,
) -> Tally:
    """Score every event of ``windows`` once.

    Args:
        scale: :func:`inclusion_scale`, for the metrics that need probabilities.
        only_recall: leave everything but recall@K out, which takes a fraction of the time.
        batch_tokens: tokens scored at once; None for as many as keep the logits in the processor's cache (on a
            GPU, busy).
    """
    predictor.eval()
    documents, group_of_window = windows.documents.unique(return_inverse=True)
    topology, horizons = windows.topology, len(predictor.horizons)
    shape = (len(documents), PHASES, topology.layers, horizons)
    tally = Tally(documents, {}, torch.zeros(shape, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    if not only_recall:
        tally.bins = torch.zeros(len(documents), horizons, CALIBRATION_BINS, 3, dtype=torch.float64)
    if batch_tokens is None:
        logits_per_token = topology.layers * horizons * topology.experts
        batch_tokens = max(1, (_GPU_LOGITS if device.startswith("cuda") else _CPU_LOGITS) // logits_per_token)
    for rows, window in windows.by_length(batch_tokens):
        window = window.to(device)
        targets = targets_of(window, predictor.horizons)
        logits = predictor(window)
        document = group_of_window[rows]
        assert window.phase_BT is not None
        group = (document[:, None] * PHASES + window.phase_BT.cpu()).flatten()
        if only_recall:
            values = {"recall@K": recall_at_k(logits, targets, topology.top_k)}
        else:
            probability = inclusion_probabilities(logits * scale, topology.top_k)
            values = event_metrics(logits, probability, targets, topology.top_k)
            tally.bins.index_add_(0, document, calibration_sums(probability, targets).cpu())
        known = targets.known_BTSH
        for name, value in values.items():
            sums = tally.sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            sums.flatten(0, 1).index_add_(0, group, torch.where(known, value, 0.0).flatten(0, 1).double().cpu())
        tally.events.flatten(0, 1).index_add_(0, group, known.flatten(0, 1).double().cpu())
    return tally


def resampled(units: int, draws: int = BOOTSTRAP_DRAWS, *, salt: int = 0) -> Tensor:
    """Bootstrap weights [draws, units]: how often each unit is drawn. The same every time it is called."""
    generator = torch.Generator().manual_seed(20_011 + salt)
    drawn = torch.randint(units, (draws, units), generator=generator)
    return torch.zeros(draws, units, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, units).double())


def interval_of(estimate: float, draws: Tensor) -> Interval:
    """The 2.5 % and 97.5 % quantiles of the draws around an estimate."""
    finite = draws[torch.isfinite(draws)]
    if len(finite) == 0:
        return Interval(value=estimate, low=estimate, high=estimate)
    low, high = torch.quantile(finite, torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
    return Interval(value=estimate, low=min(low, estimate), high=max(high, estimate))


@dataclass(frozen=True)
class Ratios:
    """A metric's sums of several seeds over the same documents: [S, G, H], and its events [G, H]."""

    sums_SGH: Tensor
    events_GH: Tensor

    @classmethod
    def of(
        cls, tallies: Sequence[Tally], metric: str, documents: Tensor | None = None, phase: int | None = None
    ) -> Ratios:
        """Collect one metric, over all documents or those where ``documents`` [G] is True."""
        sums = torch.stack([tally.sums[metric] for tally in tallies])
        events = tallies[0].events
        if phase is not None:
            sums, events = sums[:, :, phase : phase + 1], events[:, phase : phase + 1]
        sums, events = sums.sum((2, 3)), events.sum((1, 2))
        if documents is not None:
            sums, events = sums[:, documents], events[documents]
        return cls(sums, events)

    def estimate(self) -> Tensor:
        """[H]: all documents and seeds."""
        return self.sums_SGH.mean(0).sum(0) / self.events_GH.sum(0)

    def draws(self, salt: int = 0) -> Tensor:
        """[draws, H]: documents and seeds resampled, each with replacement.

        The documents' draws do not depend on the predictor, so differences between predictors are paired.
        """
        seeds, documents, _ = self.sums_SGH.shape
        by_document = resampled(documents)
        by_seed = resampled(seeds, salt=1 + salt) / seeds
        sums = torch.einsum("rs,sgh,rg->rh", by_seed, self.sums_SGH, by_document)
        return sums / (by_document @ self.events_GH)


def by_horizon(ratios: Ratios, horizons: Sequence[int]) -> ByHorizon:
    """Estimates with intervals; horizons without an event are left out."""
    estimate, draws = ratios.estimate(), ratios.draws()
    return {
        horizon: interval_of(float(estimate[i]), draws[:, i])
        for i, horizon in enumerate(horizons)
        if torch.isfinite(estimate[i])
    }


def paired_difference(ours: Ratios, theirs: Ratios, horizons: Sequence[int]) -> ByHorizon:
    """Our metric minus theirs on the same documents, with the interval of the difference."""
    estimate = ours.estimate() - theirs.estimate()
    draws = ours.draws() - theirs.draws(salt=1)
    return {
        horizon: interval_of(float(estimate[i]), draws[:, i])
        for i, horizon in enumerate(horizons)
        if torch.isfinite(estimate[i])
    }


def expected_calibration_error(tallies: Sequence[Tally], horizons: Sequence[int]) -> ByHorizon:
    """ECE (Naeini et al., 2015): mean distance of predicted and observed frequency over equal-width bins."""
    bins_SGHBX = torch.stack([tally.bins for tally in tallies])
    seeds, documents = bins_SGHBX.shape[:2]
    by_document, by_seed = resampled(documents), resampled(seeds, salt=1) / seeds

    def error(bins: Tensor) -> Tensor:
        return (bins[..., 0] - bins[..., 1]).abs().sum(-1) / bins[..., 2].sum(-1)

    estimate = error(bins_SGHBX.sum(1)).mean(0)
    per_seed = torch.stack([error(torch.einsum("rg,ghbx->rhbx", by_document, bins)) for bins in bins_SGHBX])
    draws = torch.einsum("rs,srh->rh", by_seed, per_seed)
    return {
        horizon: interval_of(float(estimate[i]), draws[:, i])
        for i, horizon in enumerate(horizons)
        if torch.isfinite(estimate[i])
    }


def reliability(tallies: Sequence[Tally], horizons: Sequence[int]) -> dict[int, tuple[CalibrationBin, ...]]:
    """The reliability curve of each horizon, all seeds together; empty bins are left out."""
    bins = torch.stack([tally.bins for tally in tallies]).sum((0, 1))
    return {
        horizon: tuple(
            CalibrationBin(predicted=float(p / n), observed=float(o / n), count=int(n))
            for p, o, n in bins[i].tolist()
            if n > 0
        )
        for i, horizon in enumerate(horizons)
    }


def recall_by_layer(tallies: Sequence[Tally]) -> tuple[tuple[float | None, ...], ...]:
    """recall@K by source layer (rows) and horizon (columns), None where there was no event."""
    sums = torch.stack([tally.sums["recall@K"] for tally in tallies]).mean(0).sum((0, 1))
    events = tallies[0].events.sum((0, 1))
    return tuple(
        tuple(float(s / n) if n > 0 else None for s, n in zip(row, counts, strict=True))
        for row, counts in zip(sums.tolist(), events.tolist(), strict=True)
    )


def recall_by_document(tallies: Sequence[Tally]) -> tuple[tuple[float | None, ...], ...]:
    """recall@K by document (rows) and horizon (columns)."""
    ratios = Ratios.of(tallies, "recall@K")
    sums, events = ratios.sums_SGH.mean(0).tolist(), ratios.events_GH.tolist()
    return tuple(
        tuple(s / n if n > 0 else None for s, n in zip(row, counts, strict=True))
        for row, counts in zip(sums, events, strict=True)
    )
