"""Two results side by side: the difference with its interval, or a refusal where the two cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.evaluation import Ratios, by_horizon, paired_difference
from specmoe.report.select import RECALL, best, excludes_zero, finished, has_width
from specmoe.report.text import percent_range, points_range
from specmoe.results import ByHorizon, Interval, PredictorResult, Results

__all__ = ["Comparison", "Side", "compare", "read_side", "side_of"]

# Of the protocol: how often something was done, not what was measured.
_MAY_DIFFER = {"horizons", "seeds", "bootstrap_draws"}


class Side(NamedTuple):
    """One of the two: a predictor in a results file. path: where it was read from."""

    path: Path
    results: Results
    predictor: PredictorResult


class Comparison(NamedTuple):
    """A compared with B.

    Attributes:
        a, b: what was compared. metric: of which. documents: test documents that both were judged on.
        ours, theirs: the metric of A and of B by horizon. difference: A minus B, paired by document.
        unproven: controls that do not hold in either file.
    """

    a: Side
    b: Side
    metric: str
    documents: int
    ours: ByHorizon
    theirs: ByHorizon
    difference: ByHorizon
    unproven: tuple[str, ...]

    def names(self) -> tuple[str, str]:
        """What to call the two: the predictors, with their files where both have one name."""
        a, b = self.a.predictor.name, self.b.predictor.name
        return (a, b) if a != b else (f"{a} ({self.a.path})", f"{b} ({self.b.path})")

    def sentences(self) -> tuple[str, ...]:
        """One plain sentence per horizon, and a warning where controls do not hold."""
        a, b = self.names()
        said = [
            f"{_ahead(h)}: {_said(d, a, b, self.metric)}, on {self.documents} document"
            f"{'' if self.documents == 1 else 's'}."
            for h, d in self.difference.items()
        ]
        if self.unproven:
            said.append(f"Beware: {_count(self.unproven)} ({'; '.join(self.unproven)}).")
        return tuple(said)

    def as_json(self) -> dict[str, Any]:
        """For scripts; shares from 0 to 1."""
        names, sides = ("a", "b"), (self.a, self.b)
        return {
            **{
                name: {"results": str(side.path), "predictor": side.predictor.name, "seeds": _seeds(side)}
                for name, side in zip(names, sides, strict=True)
            },
            "metric": self.metric,
            "documents": self.documents,
            "split": self.a.results.split.hash,
            "horizons": {
                str(h): {
                    "a": self.ours[h].model_dump(),
                    "b": self.theirs[h].model_dump(),
                    "difference": d.model_dump(),
                    "settled": excludes_zero(d),
                }
                for h, d in self.difference.items()
            },
            "controls_that_do_not_hold": list(self.unproven),
            "said": list(self.sentences()),
        }


def read_side(text: str) -> Side:
    """``PATH`` or ``PATH:NAME``, where PATH is a results file or a folder that has one.

    Raises:
        SpecmoeError: there is no such file, it is damaged, or it has no such predictor.
    """
    path, name = Path(text), ""
    if not path.exists() and ":" in text:
        before, _, after = text.rpartition(":")
        path, name = Path(before), after
    path = path / "results.json" if path.is_dir() else path
    return side_of(path, Results.load(path), name)


def side_of(path: Path, results: Results, name: str = "") -> Side:
    """A predictor of a results file; without a name the best learned one by validation.

    Where nothing was trained it is the one with the highest recall@K at the first horizon.

    Raises:
        SpecmoeError: the file has no such predictor, or that has no result.
    """
    judged = finished(results)
    if name:
        every = {predictor.name: predictor for predictor in results.predictors}
        if name not in every:
            raise unknown_name("predictor", name, every)
        chosen = every[name]
        if chosen not in judged:
            raise SpecmoeError(f"{name} has no result in {path}: {chosen.reason or 'nothing was measured'}")
        return Side(path, results, chosen)
    first = results.protocol.horizons[0]
    learned = [(value, r) for r in judged if r.learned and (value := _validation(r, first)) is not None]
    chosen = max(learned, key=lambda pair: pair[0])[1] if learned else best(judged, first)
    if chosen is None:
        raise SpecmoeError(f"no predictor has a result in {path}")
    return Side(path, results, chosen)


def compare(a: Side, b: Side, *, metric: str = RECALL, horizon: int | None = None) -> Comparison:
    """The paired difference of two results on the same test documents.

    Documents and seeds are resampled (paired bootstrap, Efron, 1979); the draws of documents are the same for both.

    Args:
        metric: one of which the files hold sums per document. horizon: the only one to compare; None for all.

    Raises:
        SpecmoeError: the two were not judged on the same events in the same way, or a file lacks the metric.
    """
    refused = _refusal(a, b, metric, horizon)
    if refused:
        raise SpecmoeError(f"cannot compare {a.path} with {b.path}: {refused}")
    ours, theirs = (_ratios(side, metric, horizon) for side in (a, b))
    horizons = a.results.protocol.horizons if horizon is None else (horizon,)
    sides = [side.results for side in (a, b)]
    broken = dict.fromkeys(c.name for results in sides for c in results.controls if not c.holds)
    return Comparison(
        a,
        b,
        metric,
        len(a.results.test_documents.ids),
        by_horizon(ours, horizons),
        by_horizon(theirs, horizons),
        paired_difference(ours, theirs, horizons),
        tuple(broken),
    )


def _refusal(a: Side, b: Side, metric: str, horizon: int | None) -> str:
    """Why the two cannot be compared; empty if they can."""
    left, right = a.results, b.results
    model, other = left.trace.topology, right.trace.topology
    if left.protocol.metric_version != right.protocol.metric_version:
        versions = f"{left.protocol.metric_version} and {right.protocol.metric_version}"
        return f"their metric versions differ ({versions}); run `specmoe train` again with one version of specmoe"
    if (model.experts_L, model.top_k) != (other.experts_L, other.top_k):
        return f"they are of models of other shapes ({_shape(left)}; {_shape(right)})"
    if left.split.hash != right.split.hash:
        return (
            f"their splits differ (hash {left.split.hash} and {right.split.hash}), so they were judged on other "
            "documents; train both on one trace with one split"
        )
    if left.trace.fingerprint != right.trace.fingerprint:
        prints = f"fingerprint {left.trace.fingerprint} and {right.trace.fingerprint}"
        return f"they were made on other traces ({prints}), so the routing to foresee differs"
    for side in (left, right):
        if horizon is not None and horizon not in side.protocol.horizons:
            return f"horizon {horizon} is not in both ({_listed(left)}; {_listed(right)})"
    if horizon is None and left.protocol.horizons != right.protocol.horizons:
        both = sorted(set(left.protocol.horizons) & set(right.protocol.horizons))
        hint = f"pick one that both have with --horizon ({', '.join(map(str, both))})" if both else "they share none"
        return f"their horizons differ ({_listed(left)}; {_listed(right)}): {hint}"
    for name, value in left.protocol.model_dump().items():
        of_cache = "cache" in name and not metric.startswith("cold")
        other_value = getattr(right.protocol, name)
        if name not in _MAY_DIFFER and not of_cache and value != other_value:
            return f"their {name.replace('_', ' ')} differ ({value} and {other_value})"
    if left.test_documents.ids != right.test_documents.ids:
        return "they were judged on other test documents"
    for side in (a, b):
        if metric not in side.predictor.document_sums:
            known = ", ".join(side.predictor.document_sums) or "none"
            return f"{side.path} keeps no {metric} per document for {side.predictor.name} (it has: {known})"
    if _events(a, metric, horizon) != _events(b, metric, horizon):
        return "their test documents have other numbers of events"
    return ""


def _ratios(side: Side, metric: str, horizon: int | None) -> Ratios:
    ratios = Ratios.of_result(side.results, side.predictor, metric)
    if horizon is None:
        return ratios
    column = side.results.protocol.horizons.index(horizon)
    return Ratios(ratios.sums_SGH[..., column : column + 1], ratios.events_GH[:, column : column + 1])


def _events(side: Side, metric: str, horizon: int | None) -> list[tuple[int, ...]]:
    """What the metric's sums are divided by, by document."""
    horizons, documents = side.results.protocol.horizons, side.results.test_documents
    columns = range(len(horizons)) if horizon is None else (horizons.index(horizon),)
    counts = documents.cold if metric.startswith("cold") else documents.events
    return [tuple(row[column] for column in columns) for row in counts]


def _validation(result: PredictorResult, horizon: int) -> float | None:
    """Mean over seeds of recall@K on the validation part."""
    found = [seed.recall["validation"] for seed in result.seeds if seed.status == "ok" and "validation" in seed.recall]
    values = [by_h[horizon] for by_h in found if horizon in by_h]
    return sum(values) / len(values) if values else None


def _seeds(side: Side) -> list[int]:
    return [seed.seed for seed in side.predictor.seeds if seed.status == "ok"]


def _said(difference: Interval, a: str, b: str, metric: str) -> str:
    verb = "foresees" if metric == RECALL else f"has in {metric}"
    if excludes_zero(difference):
        more = "more" if difference.value > 0 else "fewer"
        low, high = sorted((abs(difference.low), abs(difference.high)))
        size = Interval(value=abs(difference.value), low=low, high=high)
        return f"{a} {verb} {100 * size.value:.1f} points {more} than {b} (95 % interval {_limits(size)})"
    if has_width(difference):
        return (
            f"no difference can be shown between {a} and {b} ({100 * difference.value:+.1f} points, "
            f"95 % interval {_limits(difference)})"
        )
    if difference.value == 0:
        return f"{a} and {b} are equal"
    return f"{a} and {b} differ by {points_range(difference)}, but no interval can be drawn"


def _limits(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}".replace("-", "−")


def _count(broken: tuple[str, ...]) -> str:
    return "one control does not hold" if len(broken) == 1 else f"{len(broken)} controls do not hold"


def _ahead(horizon: int) -> str:
    return f"{horizon} layer{'' if horizon == 1 else 's'} ahead"


def _shape(results: Results) -> str:
    topology = results.trace.topology
    shape = f"{topology.layers} layers, K={topology.top_k} of {topology.experts_text} experts"
    return f"{topology.model_id}: {shape}"


def _listed(results: Results) -> str:
    return ", ".join(str(h) for h in results.protocol.horizons)


def comparison_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Horizon, A, B and the difference as text, for a table."""
    return [
        (
            f"h={h}",
            percent_range(comparison.ours[h]),
            percent_range(comparison.theirs[h]),
            f"{100 * d.value:+.2f} points ({100 * d.low:+.2f} to {100 * d.high:+.2f})",
        )
        for h, d in comparison.difference.items()
    ]
