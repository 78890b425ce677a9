"""The charts of studies: learning curves over documents, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import altair as alt

from specmoe.report.charts import (
    Row,
    Spec,
    category_encoding,
    finish,
    horizon_scale,
    names_axis,
    shown_base,
    structure,
    table,
)
from specmoe.report.select import excludes_zero
from specmoe.report.text import margin, percent, points
from specmoe.results import Interval
from specmoe.suite.study_results import LearningCurve, Studied

__all__ = ["curve", "differences"]

_RIDGE = "Ridge"


def curve(study: LearningCurve, predictor: Studied) -> Spec | None:
    """recall@K of one predictor over the training documents (log2 axis), ridge as a dashed line beside it.

    All predictors of a study share the vertical axis. Nothing is drawn beyond what was measured.
    """
    rows = _curve_rows(study, predictor)
    if not rows:
        return None
    reference = _curve_rows(study, predictor, _RIDGE) if predictor.name != _RIDGE else []
    everything = [row for each in study.predictors for row in _curve_rows(study, each)]
    counts = [point.documents for point in study.points]
    scale = alt.Scale(type="log", base=2, domain=[counts[0] / 1.15, counts[-1] * 1.15], nice=False)
    axis = alt.Axis(values=counts, format="d", grid=False)
    x = alt.X("documents:Q", title="training documents", scale=scale, axis=axis)
    title = "recall@K, %"
    heights = horizon_scale(everything, 0.08, 0.14)
    y_axis = alt.Axis(tickCount=5)

    def up(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=title, scale=heights, axis=y_axis)

    base, color = shown_base(), category_encoding()["color"]
    tooltip = [
        alt.Tooltip("documents:Q", title="training documents"),
        alt.Tooltip("label:N", title=title),
        alt.Tooltip("gained:N", title="points over the share before"),
    ]
    chart = alt.layer(
        shown_base("reference").mark_line(style="reference").encode(x=x, y=up("value")),
        base.mark_rule(strokeWidth=2.5, opacity=0.55).encode(x=x, y=up("low"), y2="high:Q", color=color),
        base.mark_line(strokeWidth=1.5).encode(x=x, y=up("value"), color=color),
        base.mark_point(size=52, filled=True, opacity=1).encode(x=x, y=up("value"), color=color, tooltip=tooltip),
        base.mark_text(dy=-14, style="label").encode(x=x, y=up("high"), text="short:N"),
    ).properties(width="container", height=190)
    return finish(structure(chart), {"rows": rows, "reference": reference}, study.protocol.horizons[0])


def differences(
    rows: Iterable[tuple[str, int, Interval]], title: str, horizons: Sequence[int], *, good: bool
) -> Spec | None:
    """Differences in points with their intervals, from top to bottom in the order given, and which are settled.

    Args:
        rows: name, horizon and difference. title: of the axis. good: whether more is better.
    """
    verdicts = ["above", "open", "below"]
    shown: list[Row] = [
        {
            "h": h,
            "name": name,
            "value": 100 * difference.value,
            "low": 100 * difference.low,
            "high": 100 * difference.high,
            "label": points(difference),
            "short": margin(difference),
            "verdict": ("above" if difference.value > 0 else "below") if excludes_zero(difference) else "open",
        }
        for name, h, difference in rows
    ]
    if not shown:
        return None
    scale = horizon_scale([*shown, *({"h": row["h"], "low": 0.0, "high": 0.0} for row in shown)], 0.06, 0.34)
    order = list(dict.fromkeys(row["name"] for row in shown))
    y = alt.Y("name:N", sort=order, title=None, axis=names_axis(grid=True))
    axis = alt.Axis(tickCount=8)
    colors = verdicts if good else verdicts[::-1]
    color = alt.Color("verdict:N", scale=alt.Scale(domain=colors, range="diverging"), legend=None)
    shape = alt.Shape("verdict:N", scale=alt.Scale(domain=verdicts, range=["circle", "diamond", "square"]), legend=None)
    base = shown_base()

    def across(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=scale, axis=axis)

    written = base.transform_calculate(said="width < 330 ? datum.short : datum.label")
    tooltip = [alt.Tooltip("name:N", title="of"), alt.Tooltip("label:N", title=title)]
    chart = alt.layer(
        alt.Chart(table("zero")).mark_rule(style="reference").encode(x="zero:Q"),
        base.mark_rule(strokeWidth=2.5).encode(x=across("low"), x2="high:Q", y=y, color=color),
        base.mark_point(size=70, filled=True, opacity=1).encode(
            x=across("value"), y=y, color=color, shape=shape, tooltip=tooltip
        ),
        written.mark_text(align="left", dx=8, style="label").encode(x=across("high"), y=y, text="said:N"),
    ).properties(width="container", height=26 * len(order))
    return finish(structure(chart), {"rows": shown, "zero": [{"zero": 0}]}, horizons[0])


def _curve_rows(study: LearningCurve, predictor: Studied, name: str | None = None) -> list[Row]:
    """A row per share and horizon of ``name``, or of the predictor itself."""
    return [
        {
            "h": h,
            "documents": point.documents,
            "category": predictor.category,
            "value": 100 * recall.value,
            "low": 100 * recall.low,
            "high": 100 * recall.high,
            "label": percent(recall),
            "short": f"{100 * recall.value:.1f}",
            "gained": points(result.gain.get(h)),
        }
        for point in study.points
        for result in point.results
        if result.name == (name or predictor.name)
        for h, recall in result.recall.items()
    ]
