"""What a study found, in sentences and in plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from specmoe.report.select import excludes_zero, has_width
from specmoe.report.text import NOT_MEASURED, margin, percent, percent_range, points_range
from specmoe.results import ByHorizon, Interval
from specmoe.suite.study_results import CurvePoint, DomainStudy, LearningCurve, Study

__all__ = ["curve_table", "domain_table", "found", "study_lines"]

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def found(study: Study) -> tuple[str, ...]:
    """The sentences of a study, the most telling first."""
    return _curve_found(study) if isinstance(study, LearningCurve) else _domains_found(study)


def study_lines(study: Study) -> list[str]:
    """Tables and sentences for a terminal, at the first horizon; the page has the others."""
    h = study.protocol.horizons[0]
    columns, rows = curve_table(study, h) if isinstance(study, LearningCurve) else domain_table(study, h)
    lines = [columns, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [f"recall@K at h={h}, %", *table, "", *found(study), *_missing(study)]


def curve_table(study: LearningCurve, horizon: int) -> Table:
    """A row per predictor, a column per share, and what the last step bought."""
    columns = ("predictor", *(f"{_share(p)} ({p.documents})" for p in study.points), "last step, points")
    rows = []
    for name in _named(study.points):
        cells = [_of(point, name) for point in study.points]
        last = study.points[-1]
        gain = next((r.gain.get(horizon) for r in last.results if r.name == name), None)
        rows.append((name, *(percent(by_h.get(horizon)) for by_h in cells), margin(gain)))
    return columns, rows


def domain_table(study: DomainStudy, horizon: int) -> Table:
    """A row per domain and predictor."""
    columns = (
        "domain (test documents)",
        "predictor",
        "domain seen",
        "not seen",
        "drop, points",
        "drop at equal size",
        "whole domain",
    )
    rows = [
        (
            f"{kept.domain or '(no name)'} ({kept.test_documents})",
            r.name,
            percent(r.seen.get(horizon)),
            percent(r.unseen.get(horizon)),
            margin(r.drop.get(horizon)),
            margin(r.own_drop.get(horizon)),
            percent(r.whole.get(horizon)),
        )
        for kept in study.domains
        for r in kept.results
    ]
    documents = sum(kept.test_documents for kept in study.domains)
    rows += [
        (
            f"together ({documents})",
            r.name,
            percent(r.seen.get(horizon)),
            percent(r.unseen.get(horizon)),
            margin(r.drop.get(horizon)),
            margin(r.own_drop.get(horizon)),
            NOT_MEASURED,
        )
        for r in study.together
    ]
    return columns, rows


def _curve_found(study: LearningCurve) -> tuple[str, ...]:
    horizon = study.protocol.horizons[0]
    before, last = study.points[-2:]
    sentences = [
        _step(result.name, result.gain[horizon], before, last, horizon)
        for result in sorted(last.results, key=lambda r: -_value(r.recall.get(horizon)))
        if horizon in result.gain
    ]
    tokens = f"{last.tokens:,} tokens in {last.documents} documents"
    sentences.append(
        f"Nothing is known beyond {tokens}. All shares were judged on the same {study.test_documents} test documents, "
        "with the same validation part; which documents come first was drawn once, and no interval covers that draw."
    )
    return tuple(sentences)


def _step(name: str, gain: Interval, before: CurvePoint, last: CurvePoint, horizon: int) -> str:
    steps = f"from {_share(before)} to {_share(last)} of the training documents"
    if gain.value == gain.low == gain.high == 0:
        return f"{name} foresees exactly as much {steps} at h={horizon}."
    if not has_width(gain):
        return f"{name}: {100 * gain.value:+.1f} points {steps} at h={horizon}; no interval can be drawn."
    if not excludes_zero(gain):
        return f"{name}: {margin(gain)} points {steps} at h={horizon}; the interval includes 0, so no gain is shown."
    if gain.value < 0:
        return f"{name} loses {_size(gain)} {steps} at h={horizon}."
    return f"{name} gains {points_range(gain)} {steps} at h={horizon}: up to here, more documents still bought recall."


def _domains_found(study: DomainStudy) -> tuple[str, ...]:
    horizon = study.protocol.horizons[0]
    documents = sum(kept.test_documents for kept in study.domains)
    over = f"over {len(study.domains)} domain{'' if len(study.domains) == 1 else 's'} and {documents} test documents"
    sentences = []
    for result in sorted(study.together, key=lambda r: -_value(r.unseen.get(horizon))):
        drop = result.drop.get(horizon)
        if drop is None:
            continue
        reached = f"{result.name} foresees {percent_range(result.unseen[horizon])} of text whose domain it never saw"
        sentences.append(f"{reached}: {_lost(drop)} than where training saw it (h={horizon}, {over}).")
        if any(kept.matched_documents < study.train_documents for kept in study.domains):
            own = _lost(result.own_drop[horizon])
            sentences.append(f"Against a training on as few documents of all domains: {own}.")
    sentences.append(
        "All were judged on the same documents. Without a domain there is also less to train on (down to "
        f"{min(kept.train_documents for kept in study.domains)} of {study.train_documents} documents); where that is "
        "more than a tenth less, the drop at equal size is the one that is the domain's own. Intervals cover the "
        "choice of test documents and seeds, not of training documents, so a small drop may be chance."
    )
    few = [kept.domain for kept in study.domains if kept.test_documents < 5]
    if few:
        sentences.append(f"With fewer than 5 test documents, intervals of these say little: {', '.join(few)}.")
    return tuple(sentences)


def _missing(study: Study) -> list[str]:
    lines = [f"without a result: {p.name}: {p.reason}" for p in study.predictors if p.reason]
    if not isinstance(study, LearningCurve):
        lines += [f"not kept out: {domain or '(no name)'}: {reason}" for domain, reason in study.left_out.items()]
    return lines


def _named(points: Sequence[CurvePoint]) -> list[str]:
    return list(dict.fromkeys(result.name for point in points for result in point.results))


def _of(point: CurvePoint, name: str) -> ByHorizon:
    return next((result.recall for result in point.results if result.name == name), {})


def _share(point: CurvePoint) -> str:
    return f"{100 * point.share:g} %"


def _lost(drop: Interval) -> str:
    """A drop in words that go on with "than"."""
    if drop.value == drop.low == drop.high == 0:
        return "no less"
    if not has_width(drop):
        return f"{100 * abs(drop.value):.1f} points {'less' if drop.value >= 0 else 'more'}, of unknown uncertainty,"
    if not excludes_zero(drop):
        return f"not shown to be less ({margin(drop)} points lost)"
    return f"{points_range(drop)} less" if drop.value > 0 else f"{_size(drop)} more"


def _size(interval: Interval) -> str:
    return points_range(Interval(value=-interval.value, low=-interval.high, high=-interval.low))


def _value(interval: Interval | None) -> float:
    return -1.0 if interval is None else interval.value
