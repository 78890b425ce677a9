"""The fifth research question: which predictor is quick enough to be asked before every layer."""

from __future__ import annotations

from specmoe.report.answer import Answer
from specmoe.report.pareto import pareto_front
from specmoe.report.select import RECALL, best, excludes_zero, finished, recall
from specmoe.report.text import NOT_MEASURED, count, microseconds, percent, percent_range
from specmoe.results import Interval, PredictorResult, Results

__all__ = ["deployment"]

_COLD = "cold_recall@K"


def deployment(results: Results) -> Answer:
    """Question 5: the time of one prediction beside the layer's own compute time."""
    question = "What can be deployed?"
    horizon = results.protocol.horizons[0]
    timed = [r for r in finished(results) if r.latency is not None and recall(r, horizon) is not None]
    if not timed:
        return Answer(question, ("Latency was not measured, so nothing can be said of deployment.",))
    timed.sort(key=_p50)
    budget = results.trace.layer_us_p50
    sentences = [*_against_budget(timed, budget, horizon), *_cold(results, timed, horizon), *_front(timed, horizon)]
    sentences.append(
        "Times are medians of one prediction at batch 1, in eager PyTorch or, where a predictor has such a form, "
        "compiled, on one thread of the machine named under provenance; other runtimes and machines were not measured, "
        "nor was whether prefetching pays."
    )
    cold = any(_COLD in r.scores for r in timed)
    columns = (
        "predictor",
        "p50",
        "p99",
        "share of a layer's compute",
        f"recall@K h={horizon}, %",
        *((f"of cold experts h={horizon}, %",) if cold else ()),
        "parameters",
    )
    rows = tuple(
        (
            r.name,
            microseconds(_p50(r)),
            microseconds(r.latency.p99_us if r.latency else None),
            f"{_p50(r) / budget:.2f} ×" if budget else NOT_MEASURED,
            percent(recall(r, horizon)),
            *((percent(recall(r, horizon, _COLD)),) if cold else ()),
            count(r.parameters),
        )
        for r in timed
    )
    return Answer(question, tuple(sentences), columns, rows)


def _against_budget(timed: list[PredictorResult], budget: float | None, horizon: int) -> list[str]:
    if not budget:
        return ["The layer's own compute time was not measured, so whether a prediction is in time is open."]
    fitting = [r for r in timed if _p50(r) <= budget]
    learned = [r for r in fitting if r.learned]
    choice = best(fitting, horizon)
    if choice is None:
        quickest = timed[0]
        return [
            (
                f"No predictor answers within the {microseconds(budget)} (median) that one MoE layer of this model "
                f"computes. The quickest, {quickest.name}, takes "
                f"{microseconds(_p50(quickest))}, {_p50(quickest) / budget:.1f} times as long: here, asking at every "
                "layer would cost more than it can save unless it runs beside the layer or in a faster runtime."
            )
        ]
    sentences = [
        (
            f"{choice.name} foresees the most of those that answer within the {microseconds(budget)} (median) that one "
            f"MoE layer of this model computes: {percent_range(_recall(choice, horizon))} at h={horizon}, "
            f"in {microseconds(_p50(choice))}."
        ),
        f"{len(fitting)} of {len(timed)} predictors answer within it, {len(learned)} of them learned.",
    ]
    trained = best(learned, horizon)
    if trained is not None and trained is not choice:
        sentences.append(
            f"The best learned one among them is {trained.name} ({percent_range(_recall(trained, horizon))}, "
            f"{microseconds(_p50(trained))})."
        )
    overall = best(timed, horizon)
    if overall is not None and overall not in fitting:
        sentences.append(
            f"{overall.name}, with the highest recall, takes {microseconds(_p50(overall))}, "
            f"{_p50(overall) / budget:.1f} times a layer's compute."
        )
    return sentences


def _cold(results: Results, timed: list[PredictorResult], horizon: int) -> list[str]:
    """What is foreseen of the experts that a prefetch is for: those that a cache would not hold anyway."""
    measured = [r for r in timed if recall(r, horizon, _COLD) is not None]
    if not measured:
        return []
    budget = results.trace.layer_us_p50
    fitting = [r for r in measured if not budget or _p50(r) <= budget] or measured
    choice = max(fitting, key=lambda r: r.scores[_COLD][horizon].value)
    size, lacking = results.protocol.cache_experts, results.cold_share.get(horizon)
    share = f" lacks {percent_range(lacking)} of the experts needed; of these" if lacking else " is what counts:"
    named = f"A cache of the {size} experts used last in every layer{share}"
    among = "" if len(fitting) == len(measured) else ", the most of those in time"
    said = f"{choice.name} foresees {percent_range(choice.scores[_COLD][horizon])}{among}"
    return [f"{named}, {said}, against {percent_range(_recall(choice, horizon))} of all (h={horizon})."]


def _front(timed: list[PredictorResult], horizon: int) -> list[str]:
    if len(timed) < 2:
        return []
    front = [timed[i] for i in pareto_front([_p50(r) for r in timed], [_recall(r, horizon).value for r in timed])]
    if len(front) == 1:
        return [f"{front[0].name} is both the quickest and the best at h={horizon}."]
    sure = [r for r in front if r.learned and horizon in r.over_ridge]
    ahead = [r for r in sure if excludes_zero(r.over_ridge[horizon]) and r.over_ridge[horizon].value > 0]
    named = ", ".join(f"{r.name} ({microseconds(_p50(r))})" for r in front)
    sentence = f"On the Pareto front of recall against latency are {named}"
    if sure:
        beating = ", ".join(r.name for r in ahead) or "none"
        sentence += f"; of the learned among them, these beat ridge by a margin whose interval excludes 0: {beating}"
    return [f"{sentence}."]


def _recall(result: PredictorResult, horizon: int) -> Interval:
    return result.scores[RECALL][horizon]


def _p50(result: PredictorResult) -> float:
    return result.latency.p50_us if result.latency else float("inf")
