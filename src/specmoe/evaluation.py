"""From logits to tables: sums per document first, then estimates with intervals.

Documents are the unit of resampling, because tokens of one document are alike. So every number is kept as
a sum per document, and a table is a few weighted ratios of such sums.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specmoe.calibration import Calibration
from specmoe.dataset import Windows, targets_of, tokens_at_once
from specmoe.errors import SpecmoeError
from specmoe.metrics import (
    CALIBRATION_BINS,
    calibration_sums,
    event_metrics,
    inclusion_probabilities,
    recall_at_k,
)
from specmoe.predictors.base import Predictor
from specmoe.residency import Residency
from specmoe.results import ByHorizon, CalibrationBin, Interval, PredictorResult, Results, TestDocuments

__all__ = ["BOOTSTRAP_DRAWS", "Tally", "evaluate", "interval_of", "paired_difference"]

BOOTSTRAP_DRAWS = 1000
PHASES = 2
COLD_RECALL = "cold_recall@"
_PARTS = ("documents", "events", "bins", "needed", "cold")


@dataclass
class Tally:
    """Sums over one part of the split, for one predictor and seed.

    Attributes:
        documents: [G] index in the trace of each document.
        sums: metric → [G, 2, L, H] float64, summed over the events of document, phase and source layer.
        events: [G, 2, L, H] float64, how many there were.
        needed, cold: [G, 2, L, H] float64, how many experts were needed, and how many of them the stated cache lacked;
            empty where no cache was replayed.
        bins: [G, H, bins, 3] float64: predicted, observed and count of the inclusion probabilities.
    """

    documents: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    events: Tensor = field(default_factory=lambda: torch.zeros(0))
    bins: Tensor = field(default_factory=lambda: torch.zeros(0))
    needed: Tensor = field(default_factory=lambda: torch.zeros(0))
    cold: Tensor = field(default_factory=lambda: torch.zeros(0))

    def denominator(self, metric: str) -> Tensor:
        """[G, 2, L, H]: what a metric's sums are divided by, events or, for cold-miss recall, cold experts."""
        return self.cold if metric.startswith(COLD_RECALL) else self.events

    def tensors(self) -> dict[str, Tensor]:
        """Flat, for a file."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return parts | {f"sum {name}": tensor for name, tensor in self.sums.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tally:
        """Inverse of :meth:`tensors`."""
        sums = {name.removeprefix("sum "): tensor for name, tensor in tensors.items() if name.startswith("sum ")}
        return cls(sums=sums, **{name: tensors[name] for name in _PARTS})

    def recall(self) -> list[float]:
        """recall@K at each horizon, over everything; NaN where nothing was to be foreseen."""
        return (self.sums["recall@K"].sum((0, 1, 2)) / self.events.sum((0, 1, 2))).tolist()


@torch.no_grad()
def evaluate(
    predictor: Predictor,
    windows: Windows,
    device: str = "cpu",
    *,
    calibration: Calibration | None = None,
    residency: Residency | None = None,
    only_recall: bool = False,
    batch_tokens: int | None = None,
) -> Tally:
    """Score every event of ``windows`` once.

    Args:
        calibration: how the logits are read where a metric needs probabilities; None: as they are.
        residency: of these windows (:func:`specmoe.residency.replay`), for cold-miss recall; None: without.
        only_recall: leave everything but recall@K out, which takes a fraction of the time.
        batch_tokens: tokens scored at once; None for as many as keep the logits in the processor's cache (on a
            GPU, busy).
    """
    predictor.eval()
    documents, group_of_window = windows.documents.unique(return_inverse=True)
    topology, horizons = windows.topology, len(predictor.horizons)
    shape = (len(documents), PHASES, topology.layers, horizons)
    sums: dict[str, Tensor] = {}
    bins = torch.zeros(0 if only_recall else len(documents), horizons, CALIBRATION_BINS, 3, dtype=torch.float64)
    plain = functools.partial(inclusion_probabilities, top_k=topology.top_k)
    probabilities_of = calibration.apply if calibration else plain
    batch_tokens = batch_tokens or tokens_at_once(topology, horizons, device)
    for rows, window in windows.by_length(batch_tokens):
        window = window.to(device)
        targets = targets_of(window, predictor.horizons)
        logits = predictor(window)
        document = group_of_window[rows]
        if only_recall:
            values = {"recall@K": recall_at_k(logits, targets, topology.top_k)}
        else:
            cold = residency.cold(rows, window, predictor.horizons) if residency else None
            probability = probabilities_of(logits)
            values = event_metrics(logits, probability, targets, topology.top_k, cold)
            if cold is not None:
                values |= {"needed": (targets.expert_ids_BTSHK >= 0).sum(-1), "cold": cold.sum(-1)}
            bins.index_add_(0, document, calibration_sums(probability, targets).cpu())
        values["events"] = torch.ones_like(values["recall@K"])
        assert window.phase_BT is not None
        group = (document[:, None] * PHASES + window.phase_BT.cpu()).flatten()
        groups, place = group.unique(return_inverse=True)
        known = targets.known_BTSH
        stacked = torch.stack([torch.where(known, value, 0.0).flatten(0, 1).flatten(1) for value in values.values()])
        # A product with a table of who belongs where: several times faster than adding row by row.
        member = torch.zeros(len(groups), len(place)).scatter_(0, place[None], 1.0).to(device)
        for name, value in zip(values, (member @ stacked).double().cpu(), strict=True):
            total = sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            total.view(-1, value.shape[1])[groups] += value
    counts = {name: sums.pop(name) for name in ("events", "needed", "cold") if name in sums}
    return Tally(documents, sums, bins=bins, **counts)


@functools.lru_cache(maxsize=16)
def resampled(units: int, draws: int = BOOTSTRAP_DRAWS, *, salt: int = 0) -> Tensor:
    """Bootstrap weights [draws, units]: how often each unit is drawn. The same every time it is called."""
    generator = torch.Generator().manual_seed(20_011 + salt)
    drawn = torch.randint(units, (draws, units), generator=generator)
    return torch.zeros(draws, units, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, units).double())


def interval_of(estimate: float, draws: Tensor) -> Interval:
    """The 2.5 % and 97.5 % quantiles of the draws around an estimate."""
    finite = draws[torch.isfinite(draws)]
    if len(finite) == 0:
        return Interval(value=round(estimate, 6), low=round(estimate, 6), high=round(estimate, 6))
    low, high = torch.quantile(finite, torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
    # What lies beyond would only make the file long: a bootstrap of a thousand draws settles no more than the third.
    value, low, high = (round(x, 6) for x in (estimate, min(low, estimate), max(high, estimate)))
    return Interval(value=value, low=low, high=high)


@dataclass(frozen=True)
class Ratios:
    """A metric's sums of several seeds over the same documents: [S, G, H], and what they are divided by [G, H]."""

    sums_SGH: Tensor
    events_GH: Tensor

    @classmethod
    def of(
        cls, tallies: Sequence[Tally], metric: str, documents: Tensor | None = None, phase: int | None = None
    ) -> Ratios:
        """Collect one metric, over all documents or those where ``documents`` [G] is True."""
        sums = torch.stack([tally.sums[metric] for tally in tallies])
        events = tallies[0].denominator(metric)
        if phase is not None:
            sums, events = sums[:, :, phase : phase + 1], events[:, phase : phase + 1]
        sums, events = sums.sum((2, 3)), events.sum((1, 2))
        if documents is not None:
            sums, events = sums[:, documents], events[documents]
        return cls(sums, events)

    @classmethod
    def of_result(cls, results: Results, predictor: PredictorResult, metric: str = "recall@K") -> Ratios:
        """The same from a results file.

        Raises:
            SpecmoeError: the file holds no sums of this metric per document.
        """
        sums = predictor.document_sums.get(metric, ())
        documents = results.test_documents
        denominators = documents.cold if metric.startswith(COLD_RECALL) else documents.events
        shape = (len(sums), len(denominators), len(results.protocol.horizons))
        complaint = f"the results file holds no {metric} of {predictor.name} per document; run `specmoe train` again"
        try:
            sums_SGH, events_GH = (torch.tensor(values, dtype=torch.float64) for values in (sums, denominators))
        except ValueError as error:  # rows of different lengths
            raise SpecmoeError(complaint) from error
        if 0 in shape or sums_SGH.shape != shape or events_GH.shape != shape[1:]:
            raise SpecmoeError(complaint)
        return cls(sums_SGH, events_GH)

    def estimate(self) -> Tensor:
        """[H]: all documents and seeds."""
        return self.sums_SGH.mean(0).sum(0) / self.events_GH.sum(0)

    def draws(self, salt: int = 0) -> Tensor:
        """[draws, H]: documents and seeds resampled, each with replacement.

        The documents' draws do not depend on the predictor, so differences between predictors are paired. One document
        cannot be resampled, and the spread of seeds over it is no interval: all draws are then the estimate.
        """
        seeds, documents, _ = self.sums_SGH.shape
        if documents < 2:
            return self.estimate().expand(BOOTSTRAP_DRAWS, -1)
        by_document = resampled(documents)
        by_seed = resampled(seeds, salt=1 + salt) / seeds
        sums = (by_seed.T[..., None] * (by_document @ self.sums_SGH)).sum(0)
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
    if documents < 2:
        draws = estimate.expand(BOOTSTRAP_DRAWS, -1)
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


def sums_by_document(
    tallies: Sequence[Tally], metrics: Sequence[str] = ("recall@K",)
) -> dict[str, tuple[tuple[tuple[float, ...], ...], ...]]:
    """What a results file keeps for later comparisons: ``document_sums`` of :class:`PredictorResult`."""
    kept = {}
    for metric in metrics:
        # Four decimals of a sum over hundreds of events: far below what a bootstrap can see.
        rounded = Ratios.of(tallies, metric).sums_SGH.round(decimals=4).tolist()
        kept[metric] = tuple(tuple(tuple(row) for row in seed) for seed in rounded)
    return kept


def documents_of(tally: Tally, names: Sequence[str]) -> TestDocuments:
    """The documents of a tally and how many events each has. ``names``: ids of all documents of the trace."""

    def table(counts: Tensor) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(row) for row in counts.sum((1, 2)).long().tolist()) if counts.numel() else ()

    ids = tuple(names[int(index)] for index in tally.documents)
    return TestDocuments(ids=ids, events=table(tally.events), cold=table(tally.cold))


def cold_share(tally: Tally, horizons: Sequence[int]) -> ByHorizon:
    """Share of the needed experts that the stated cache lacks when the event is made."""
    if not tally.cold.numel():
        return {}
    return by_horizon(Ratios(tally.cold.sum((1, 2))[None], tally.needed.sum((1, 2))), horizons)
