"""The fourth research question: what is left of the recall on text that training did not see."""

from __future__ import annotations

import math

from specmoe.report.answer import Answer
from specmoe.report.select import RECALL, best, excludes_zero, finished, has_width, recall, ridge
from specmoe.report.text import NOT_MEASURED, margin, percent, percent_range, points_range
from specmoe.results import Interval, PredictorResult, Results

__all__ = ["generalisation"]


def generalisation(results: Results) -> Answer:
    """Question 4: from training to unseen documents, and to a domain that was kept out."""
    question = "Does it generalise to unseen text?"
    horizon = results.protocol.horizons[0]
    learned = [r for r in finished(results) if r.learned and _part(r, "train", horizon) is not None]
    sentences: list[str] = []
    gaps = [(r, g) for r in learned if (g := _gap(r, "train", "test", horizon)) is not None]
    if gaps:
        widest, narrowest = max(gaps, key=lambda pair: pair[1]), min(gaps, key=lambda pair: pair[1])
        sentences.append(
            f"Recall@K at h={horizon} on the training part minus that on the test part: "
            f"{100 * narrowest[1]:+.1f} points ({narrowest[0].name}) to {100 * widest[1]:+.1f} ({widest[0].name})."
            if len(gaps) > 1
            else f"{widest[0].name} loses {100 * widest[1]:.1f} points of recall@K at h={horizon} from the training "
            "to the test part."
        )
        sentences.append("These gaps are means over seeds, without an interval.")
    else:
        sentences.append("Recall on the training part was not measured, so the gap to the test part is unknown.")
    domain = results.split.held_out_domain
    away = [r for r in finished(results) if horizon in r.held_out_domain]
    winner = best(away, horizon, learned=True)
    if domain is None or not away:
        sentences.append("No domain was held out, so nothing is known of text unlike the training text.")
    else:
        for result in [r for r in (winner, ridge(results)) if r is not None and r in away]:
            here, there = result.scores[RECALL][horizon], result.held_out_domain[horizon]
            sentences.append(
                f"On {domain}, which no training document comes from, {result.name} reaches {percent_range(there)} "
                f"against {percent_range(here)} on the test part; {_apart(here, there)}."
            )
        sentences.append(
            "One held-out domain is one sample: it may simply be an easier or a harder text. `specmoe "
            "leave-one-domain-out` keeps out each domain in turn and judges it on the same documents with and without."
        )
    shown = [r for r in finished(results) if r in away or r in learned]
    columns = ("predictor", "train, %", "validation, %", "test, %", "train − test, points", "held-out domain, %")
    rows = tuple(
        (
            r.name,
            _share(_part(r, "train", horizon)),
            _share(_part(r, "validation", horizon)),
            percent(recall(r, horizon)),
            NOT_MEASURED if (gap := _gap(r, "train", "test", horizon)) is None else f"{100 * gap:+.1f}",
            percent(r.held_out_domain.get(horizon)),
        )
        for r in shown
    )
    return Answer(question, tuple(sentences), columns, rows)


def _part(result: PredictorResult, part: str, horizon: int) -> float | None:
    """Mean over seeds of recall@K on one part."""
    values = [seed.recall[part][horizon] for seed in result.seeds if horizon in seed.recall.get(part, {})]
    return sum(values) / len(values) if values else None


def _gap(result: PredictorResult, first: str, second: str, horizon: int) -> float | None:
    left, right = _part(result, first, horizon), _part(result, second, horizon)
    return None if left is None or right is None else left - right


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.1f}"


def _apart(here: Interval, there: Interval) -> str:
    if not (has_width(here) and has_width(there)):
        return "without intervals, whether they differ is open"
    loss = independent_difference(here, there)
    if not excludes_zero(loss):
        return f"a difference of {margin(loss)} points, whose interval includes 0, so a loss is not shown"
    if loss.value > 0:
        return f"it foresees {points_range(loss)} less there"
    return f"it foresees {points_range(independent_difference(there, here))} more there"


def independent_difference(a: Interval, b: Interval) -> Interval:
    """``a`` minus ``b``, estimates on different documents, with its interval.

    From the limits of the two by the method of variance estimates recovery (Zou and Donner, 2008).
    """
    value = a.value - b.value
    return Interval(
        value=value,
        low=value - math.hypot(a.value - a.low, b.high - b.value),
        high=value + math.hypot(a.high - a.value, b.value - b.low),
    )
