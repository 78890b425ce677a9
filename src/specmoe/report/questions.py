"""The five research questions, answered from the numbers of a results file and with their uncertainty.

Every answer is a pure function of the results. Where an interval includes 0, or cannot be drawn, the answer
says that the question is open instead of naming a winner.
"""

from __future__ import annotations

from typing import NamedTuple

from specmoe.report import deployment, generalisation
from specmoe.report.answer import Answer
from specmoe.report.pareto import pareto_front
from specmoe.report.select import (
    RECALL,
    Spread,
    best,
    best_per_category,
    excludes_zero,
    far_horizon,
    finished,
    has_width,
    paired_difference,
    recall,
    ridge,
    spread,
    spread_limits,
    strongest_training_free,
)
from specmoe.report.text import NOT_MEASURED, count, margin, percent, percent_range, points, points_range
from specmoe.results import Interval, PredictorResult, Results

__all__ = ["Answer", "answers", "headline", "versus"]


def answers(results: Results) -> tuple[Answer, ...]:
    """The five answers, in the order of the questions."""
    return (
        best_approach(results),
        efficiency(results),
        stability(results),
        generalisation.generalisation(results),
        deployment.deployment(results),
    )


def headline(results: Results) -> str:
    """The result in one or two sentences, after those on controls that do not hold."""
    broken = [control.name for control in results.controls if not control.holds]
    if not broken:
        return _headline(results)
    which = "a control does not hold" if len(broken) == 1 else f"{len(broken)} controls do not hold"
    return f"Not to be trusted: {which} ({'; '.join(broken)}). {_headline(results)}"


def _headline(results: Results) -> str:
    horizon = results.protocol.horizons[0]
    winner = best(finished(results), horizon, learned=True)
    if winner is None:
        return _nothing_learned(results, horizon)
    share = percent_range(_recall(winner, horizon))
    said = f"{winner.name} foresees {share} of the experts that a token needs {ahead(horizon)}"
    if ridge(results) is None:
        rival = strongest_training_free(results, horizon)
        if rival is None:
            return f"{said}; there is no training-free baseline to compare it with."
        return f"{said}; {against(winner.lift.get(horizon), rival.name)}."
    sentences = [f"{said}; {against(winner.over_ridge.get(horizon), 'ridge')}."]
    far = far_horizon(results)
    further = best(finished(results), far, learned=True)
    if far != horizon and further is not None:
        subject = "it foresees" if further is winner else f"{further.name} foresees"
        sentences.append(
            f"{ahead(far).capitalize()}, {subject} {percent_range(_recall(further, far))}; "
            f"{against(further.over_ridge.get(far), 'ridge')}."
        )
    return " ".join(sentences)


def best_approach(results: Results) -> Answer:
    """Question 1: the best learned predictor per horizon, against the runner-up and against ridge."""
    question = "Which approach works best?"
    horizons = results.protocol.horizons
    winners = {h: best(finished(results), h, learned=True) for h in horizons}
    found = {h: winner for h, winner in winners.items() if winner is not None}
    if not found:
        return Answer(question, (_nothing_learned(results, horizons[0]),))
    sentences: list[str] = []
    for winner, at in _by_winner(found):
        figures = ", ".join(f"{percent_range(_recall(winner, h))} at h={h}" for h in at)
        sentences.append(f"{winner.name} ({winner.category}) has the highest recall@K of the learned: {figures}.")
    sentences.append(_runner_up(results, horizons[0]))
    compared = [(h, found[h].over_ridge[h]) for h in found if h in found[h].over_ridge]
    if compared:
        said = ", ".join(f"{points(interval)} at h={h}" for h, interval in compared)
        unclear = [f"h={h}" for h, interval in compared if not excludes_zero(interval)]
        verdict = f"at {', '.join(unclear)} it is open which is better" if unclear else "every interval excludes 0"
        sentences.append(f"Points over ridge, which is fitted in closed form: {said}; {verdict}.")
    elif ridge(results) is None:
        sentences.append("Ridge was not run, so whether training pays over a closed-form fit is open.")
    sentences.append(
        "The best was picked on the documents it is judged on, so its figures flatter it a little. All intervals "
        "resample documents and seeds."
    )
    columns = ("category", "its best", *(f"recall@K h={h}, %" for h in horizons), f"over ridge h={horizons[0]}")
    rows = tuple(
        (
            category,
            result.name,
            *(percent(recall(result, h)) for h in horizons),
            points(result.over_ridge.get(horizons[0])),
        )
        for category, result in best_per_category(results).items()
    )
    return Answer(question, tuple(sentence for sentence in sentences if sentence), columns, rows)


def efficiency(results: Results) -> Answer:
    """Question 2: recall against parameters, the Pareto front and what the extra parameters bring."""
    question = "How much recall does a parameter buy?"
    horizon = results.protocol.horizons[0]
    learned = [r for r in finished(results) if r.learned and recall(r, horizon) is not None and r.parameters > 0]
    if not learned:
        return Answer(question, ("No learned predictor has a result, so there is nothing to compare.",))
    learned.sort(key=lambda result: result.parameters)
    front = [
        learned[i] for i in pareto_front([r.parameters for r in learned], [_recall(r, horizon).value for r in learned])
    ]
    small, large = front[0], front[-1]
    if len(learned) == 1:
        sentences = [f"{small.name} alone has a result, with {count(small.parameters)} parameters."]
    elif len(front) == 1:
        sentences = [
            (
                f"{small.name}, with {count(small.parameters)} parameters the smallest of the {len(learned)} learned "
                f"predictors, also has the highest recall@K at h={horizon} ({percent_range(_recall(small, horizon))}): "
                "more parameters bought nothing here."
            )
        ]
    else:
        rest = len(learned) - len(front)
        named = ", ".join(f"{r.name} ({count(r.parameters)}, {100 * _recall(r, horizon).value:.1f} %)" for r in front)
        sentences = [
            (
                f"On the Pareto front at h={horizon} are, by size, {named}"
                + (f"; the other {rest} are matched or beaten by smaller ones." if rest else ".")
            ),
            (
                f"From the smallest to the best, {large.parameters / small.parameters:.0f} times the parameters: "
                f"{versus(results, large, small, horizon)}."
            ),
        ]
    probe = ridge(results)
    if probe is not None and recall(probe, horizon) is not None:
        passing = [r for r in learned if horizon in r.over_ridge and r.over_ridge[horizon].low > 0]
        passing = [r for r in passing if excludes_zero(r.over_ridge[horizon])]
        if passing:
            first = passing[0]
            sentences.append(
                f"Ridge reaches {percent_range(_recall(probe, horizon))}. The smallest that beats it by a margin whose "
                f"interval excludes 0 is {first.name}, with {count(first.parameters)} parameters."
            )
        else:
            sentences.append(
                f"Ridge reaches {percent_range(_recall(probe, horizon))}; none beats it by a margin whose interval "
                "excludes 0."
            )
    sentences.append(
        "Recall per parameter always favours the smallest, whatever it foresees, so the front says more than the ratio."
    )
    columns = ("predictor", "parameters", f"recall@K h={horizon}, %", "recall per 100 K parameters, %", "on the front")
    rows = tuple(
        (
            r.name,
            count(r.parameters),
            percent(recall(r, horizon)),
            f"{100 * _recall(r, horizon).value / (r.parameters / 1e5):.1f}",
            "yes" if r in front else "no",
        )
        for r in learned
    )
    return Answer(question, tuple(sentences), columns, rows)


class _Stability(NamedTuple):
    result: PredictorResult
    values: list[float]
    spread: Spread | None


def stability(results: Results) -> Answer:
    """Question 3: the standard deviation over seeds, with limits that own up to how few there are."""
    question = "How stable is training over seeds?"
    horizon = results.protocol.horizons[0]
    rows: list[_Stability] = []
    for result in results.predictors:
        if result.learned and result.seeds:
            values = [s.recall["test"][horizon] for s in result.seeds if _has_test(s.recall, horizon, s.status)]
            rows.append(_Stability(result, values, spread(values)))
    rows.sort(key=lambda row: row.spread.value if row.spread else float("inf"))
    measured = [(row.result, row.spread) for row in rows if row.spread is not None]
    if not measured:
        said = "Fewer than two seeds finished for every predictor, so stability over seeds cannot be told."
        return Answer(question, (said, *_failed_runs(results)))
    freedom = sum(s.seeds - 1 for _, s in measured)
    pooled = (sum(s.value**2 * (s.seeds - 1) for _, s in measured) / freedom) ** 0.5
    low, high = spread_limits(freedom)
    sentences = [
        (
            f"Over seeds, recall@K at h={horizon} on the test part has a standard deviation of {100 * pooled:.2f} "
            f"points ({100 * pooled * low:.2f} to {100 * pooled * high:.2f}), pooled over {len(measured)} predictors "
            f"as if all shared one."
        )
    ]
    if len(measured) > 1:
        (steady, least), (shaky, most) = measured[0], measured[-1]
        fewest = min(s.seeds for _, s in measured)
        sentences.append(
            f"{steady.name} varies least ({100 * least.value:.2f} points, {100 * least.low:.2f} to "
            f"{100 * least.high:.2f}), {shaky.name} most ({100 * most.value:.2f}, {100 * most.low:.2f} to "
            f"{100 * most.high:.2f}); "
            + (
                f"with {fewest} seeds these limits overlap, so which is the steadiest is open."
                if least.high >= most.low
                else "these limits do not overlap."
            )
        )
    gap = _lead(results, horizon)
    if gap is not None:
        sentences.append(
            f"The best learned predictor leads the next by {100 * gap:.2f} points: "
            + ("more" if gap > 2 * pooled else "less")
            + " than twice that standard deviation."
        )
    sentences.extend(_failed_runs(results))
    columns = ("predictor", "seeds", "lowest, %", "highest, %", "standard deviation, points", "95 % limits")
    table = tuple(
        (
            row.result.name,
            f"{len(row.values)} of {len(row.result.seeds)}",
            f"{100 * min(row.values):.2f}" if row.values else NOT_MEASURED,
            f"{100 * max(row.values):.2f}" if row.values else NOT_MEASURED,
            f"{100 * row.spread.value:.2f}" if row.spread else NOT_MEASURED,
            f"{100 * row.spread.low:.2f} to {100 * row.spread.high:.2f}" if row.spread else NOT_MEASURED,
        )
        for row in rows
    )
    return Answer(question, tuple(sentences), columns, table)


def versus(results: Results, better: PredictorResult, other: PredictorResult, horizon: int) -> str:
    """``A is 1.2 points (0.8 to 1.6) ahead of B``, or that the difference is open."""
    difference = paired_difference(results, better, other, horizon)
    if difference is None:
        plain = 100 * (_recall(better, horizon).value - _recall(other, horizon).value)
        return f"{better.name} is {plain:.1f} points ahead of {other.name} (no paired interval can be drawn)"
    if not excludes_zero(difference):
        return (
            f"{better.name} and {other.name} differ by {margin(difference)} points, paired by document; "
            "the interval includes 0, so their order is open"
        )
    if difference.value < 0:
        better, other = other, better
        difference = Interval(value=-difference.value, low=-difference.high, high=-difference.low)
    return f"{better.name} is {points_range(difference)} ahead of {other.name}, paired by document"


def against(difference: Interval | None, rival: str) -> str:
    """A paired difference from a named rival in words."""
    if difference is None:
        return f"the difference from {rival} was not measured"
    if not has_width(difference):
        return f"{margin(difference)} points against {rival}, of unknown uncertainty"
    if not excludes_zero(difference):
        return f"{points(difference)} points against {rival}: the interval includes 0, so which is better is open"
    if difference.value < 0:
        behind = Interval(value=-difference.value, low=-difference.high, high=-difference.low)
        return f"that is {points_range(behind)} less than {rival}"
    return f"that is {points_range(difference)} more than {rival}"


def ahead(horizon: int) -> str:
    """A horizon in words."""
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    return f"{words.get(horizon, str(horizon))} layer{'' if horizon == 1 else 's'} ahead"


def _nothing_learned(results: Results, horizon: int) -> str:
    rival = strongest_training_free(results, horizon)
    if rival is None:
        return "No predictor finished, so there is no result; the reasons are listed below."
    return (
        f"No learned predictor has a result; of the training-free, {rival.name} foresees the most: "
        f"{percent_range(_recall(rival, horizon))} of the experts needed {ahead(horizon)}."
    )


def _by_winner(found: dict[int, PredictorResult]) -> list[tuple[PredictorResult, list[int]]]:
    grouped: dict[str, tuple[PredictorResult, list[int]]] = {}
    for horizon, winner in found.items():
        grouped.setdefault(winner.name, (winner, []))[1].append(horizon)
    return list(grouped.values())


def _ranked(results: Results, horizon: int) -> list[PredictorResult]:
    learned = [r for r in finished(results) if r.learned and recall(r, horizon) is not None]
    return sorted(learned, key=lambda result: -_recall(result, horizon).value)


def _runner_up(results: Results, horizon: int) -> str:
    order = _ranked(results, horizon)
    return f"At h={horizon}, {versus(results, order[0], order[1], horizon)}." if len(order) > 1 else ""


def _lead(results: Results, horizon: int) -> float | None:
    order = _ranked(results, horizon)
    if len(order) < 2:
        return None
    return _recall(order[0], horizon).value - _recall(order[1], horizon).value


def _failed_runs(results: Results) -> list[str]:
    failed = [(r, [s for s in r.seeds if s.status == "failed"]) for r in results.predictors]
    return [
        f"{len(runs)} of {len(r.seeds)} runs of {r.name} failed ({runs[0].reason or 'no cause given'})."
        for r, runs in failed
        if runs
    ]


def _recall(result: PredictorResult, horizon: int) -> Interval:
    return result.scores[RECALL][horizon]


def _has_test(parts: dict[str, dict[int, float]], horizon: int, status: str) -> bool:
    return status == "ok" and horizon in parts.get("test", {})
