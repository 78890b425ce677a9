"""The charts that compare predictors: ranking, difference from ridge, trained against untrained.

Each function returns a Vega-Lite chart made by altair, or None where there is nothing to draw. Recalls are
drawn in %. A chart whose data have a row per horizon shows those of the parameter ``horizon``, which the page
sets; the data carry it as ``h``.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import altair as alt

from specmoe.files import atomic_path
from specmoe.report.select import CATEGORIES, RECALL, excludes_zero, far_horizon, finished, groups
from specmoe.report.text import margin, percent, points
from specmoe.report.theme import CATEGORY_SHAPES, LIGHT, vega_config
from specmoe.results import Interval, PredictorResult, Results

__all__ = [
    "Row",
    "Spec",
    "category_encoding",
    "finish",
    "horizon_scale",
    "interval_rows",
    "is_figure",
    "over_ridge",
    "ranking",
    "ranking_figure",
    "recall_domain",
    "shown_base",
    "structure",
    "table",
    "tooltips",
    "untrained",
]

# How a figure is known again as one of ours: a text chunk of a PNG (its type and content), a comment of an SVG.
_SIGNATURE_PNG, _SIGNATURE_SVG = b"tEXtSoftware\0specmoe", "<!-- specmoe -->"
_PNG_END_BYTES, _TAIL_BYTES = 12, 64

Row: TypeAlias = dict[str, Any]
Spec: TypeAlias = dict[str, Any]
# altair's ``properties`` may return either.
Layered: TypeAlias = alt.LayerChart | alt.FacetChart
AnyChart: TypeAlias = Layered | alt.Chart | alt.VConcatChart | alt.HConcatChart
# In a narrower plot only the value is written beside a point, not its interval.
_LABEL = "width < 330 ? datum.short : datum.label"
_VERDICTS = ("ahead", "open", "behind")


def table(name: str = "rows") -> alt.NamedData:
    """Data that ``finish`` adds under this name; altair would copy them many times if it had them now."""
    return alt.NamedData(name=name)


def structure(chart: AnyChart) -> Spec:
    """The chart as Vega-Lite JSON, without data."""
    # Not validated against the schema: that takes longer than all else, and the tests draw every chart.
    return chart.to_dict(validate=False)


def finish(
    spec: Spec, datasets: Mapping[str, Iterable[Row]], horizon: int | None = None, height: int | None = None
) -> Spec:
    """A copy of ``spec`` with its data.

    Args:
        spec: from ``structure``; left as it is. datasets: rows by name, as given to ``table``.
        horizon: the one to show first, None if the chart shows all. height: in pixels, None to leave it.
    """
    done = {**spec, "datasets": {name: list(rows) for name, rows in datasets.items()}}
    if horizon is not None:
        done["params"] = [{"name": "horizon", "value": horizon}]
    if height is not None:
        done["height"] = height
    return done


def horizon_scale(rows: Iterable[Row], below: float, above: float) -> alt.Scale:
    """A linear scale that holds ``low`` to ``high`` of the rows of the horizon shown, with room at both ends.

    below, above: the room, as shares of the range.
    """
    ends: dict[int, tuple[float, float]] = {}
    for row in rows:
        low, high = ends.get(row["h"], (row["low"], row["high"]))
        ends[row["h"]] = (min(low, row["low"]), max(high, row["high"]))
    spans = {h: high - low or 1.0 for h, (low, high) in ends.items()}
    bottom = ",".join(f"{h}:{ends[h][0] - below * spans[h]:.4f}" for h in ends)
    top = ",".join(f"{h}:{ends[h][1] + above * spans[h]:.4f}" for h in ends)
    looked_up = [alt.ExprRef(f"{{{end}}}[horizon]") for end in (bottom, top)]
    return alt.Scale(domain=looked_up, nice=False, zero=False)


def category_encoding(*, legend: bool = False) -> dict[str, Any]:
    """Colour and shape by category; in the page one legend stands beside the charts instead of in each."""
    domain, shapes = list(CATEGORIES), list(CATEGORY_SHAPES.values())
    key = alt.Legend(title=None, orient="bottom", symbolOpacity=1) if legend else None
    return {
        "color": alt.Color("category:N", scale=alt.Scale(domain=domain), legend=key),
        "shape": alt.Shape("category:N", scale=alt.Scale(domain=domain, range=shapes), legend=key),
    }


def recall_domain(intervals: Iterable[Interval], step: float = 10) -> tuple[float, float]:
    """A range in % that holds all intervals, rounded outwards to ``step``."""
    found = list(intervals)
    low = min((interval.low for interval in found), default=0.0)
    high = max((interval.high for interval in found), default=1.0)
    return max(0.0, step * math.floor(100 * low / step)), min(100.0, step * math.ceil(100 * high / step))


def ranking(results: Results, part: Sequence[PredictorResult], *, last: bool = True) -> Spec | None:
    """recall@K with intervals of one group of predictors, best on top. last: carries the axis."""
    domain = recall_domain(i for r in finished(results) for i in r.scores[RECALL].values())
    rows = [row for r in part for row in interval_rows(r, r.scores[RECALL])]
    if not rows:
        return None
    return finish(_ranking_structure(domain, last), {"rows": rows}, results.protocol.horizons[0], 24 * len(part))


@cache
def _ranking_structure(domain: tuple[float, float], last: bool) -> Spec:
    return structure(_dots(_Look(domain, last)))


def over_ridge(results: Results, learned: Sequence[PredictorResult]) -> Spec | None:
    """Paired differences from ridge in points, and which of them are settled."""
    rows = [
        {**row, "verdict": _verdict(i), "label": points(i), "short": margin(i)}
        for r in learned
        for row in interval_rows(r, r.over_ridge)
        for i in (r.over_ridge[row["h"]],)
    ]
    if not rows:
        return None
    nothing = {"low": 0.0, "high": 0.0}
    scale = horizon_scale([*rows, *({"h": row["h"], **nothing} for row in rows)], 0.06, 0.34)
    base = shown_base()
    y = _names_axis("value")
    title = "points of recall@K more than ridge"
    axis = alt.Axis(tickCount=8)
    x = alt.X("value:Q", title=title, scale=scale, axis=axis)
    color = alt.Color(
        "verdict:N",
        scale=alt.Scale(domain=list(_VERDICTS), range="diverging"),
        legend=None,
    )
    shape = alt.Shape("verdict:N", scale=alt.Scale(domain=list(_VERDICTS), range=["circle", "diamond", "square"]))
    zero = alt.Chart(table("zero")).mark_rule(style="reference").encode(x="zero:Q")
    chart = alt.layer(
        zero,
        base.mark_rule(strokeWidth=2.5).encode(
            x=alt.X("low:Q", scale=scale, title=title, axis=axis), x2="high:Q", y=y, color=color
        ),
        base.mark_point(size=70, filled=True, opacity=1).encode(
            x=x, y=y, color=color, shape=shape.legend(None), tooltip=tooltips("difference, points")
        ),
        base.transform_calculate(said=_LABEL)
        .mark_text(align="left", dx=8, style="label")
        .encode(x=alt.X("high:Q", scale=scale, title=title, axis=axis), y=y, text="said:N"),
    ).properties(width="container", height=26 * len({row["name"] for row in rows}))
    return finish(structure(chart), {"rows": rows, "zero": [{"zero": 0}]}, results.protocol.horizons[0])


def untrained(results: Results) -> Spec | None:
    """recall@K of training-free predictors on the trained model's routing and on the untrained one's."""
    rows: list[Row] = []
    for result in finished(results):
        for h, control in results.untrained.get(result.name, {}).items():
            if h in result.scores[RECALL]:
                here = result.scores[RECALL][h]
                rows.append(
                    {
                        "h": h,
                        "name": result.name,
                        "trained": 100 * here.value,
                        "untrained": 100 * control.value,
                        "said": f"trained {percent(here)} %, untrained {percent(control)} %",
                    }
                )
    if not rows:
        return None
    order = list(dict.fromkeys(row["name"] for row in rows))
    y = alt.Y("name:N", sort=order, title=None, axis=names_axis(grid=False))
    scale = alt.Scale(domain=[0, 100])
    title = "recall@K, %"
    axis = alt.Axis(values=list(range(0, 101, 20)))
    base = shown_base()
    tooltip = [alt.Tooltip("name:N", title="predictor"), alt.Tooltip("said:N", title="recall@K")]
    models = ["trained model", "untrained control"]
    legend = alt.Legend(title=None, orient="top", symbolStrokeWidth=2)
    dots = [
        base.transform_calculate(model=f"'{model}'")
        .mark_point(size=80, filled=True, opacity=1)
        .encode(
            x=alt.X(f"{field}:Q", scale=scale, title=title, axis=axis),
            y=y,
            tooltip=tooltip,
            color=alt.Color("model:N", scale=alt.Scale(domain=models), legend=legend),
            shape=alt.Shape("model:N", scale=alt.Scale(domain=models, range=["circle", "diamond"]), legend=legend),
        )
        for model, field in zip(models, ("trained", "untrained"), strict=True)
    ]
    line = base.mark_rule(style="quiet").encode(
        x=alt.X("trained:Q", scale=scale, title=title, axis=axis), x2="untrained:Q", y=y
    )
    chart = alt.layer(line, *dots).properties(width="container", height=28 * len(order))
    return finish(structure(chart), {"rows": rows}, results.protocol.horizons[0])


def ranking_figure(results: Results, path: Path) -> None:
    """Draw the ranking at the first horizon as a picture, for pages that show no HTML.

    Args:
        results: what was measured. path: ends in ``.png`` (twice the nominal resolution) or ``.svg``.

    Raises:
        ValueError: another ending. SpecmoeError: the file cannot be written.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{path}: a figure is a .png or an .svg file")
    shown = list(dict.fromkeys((results.protocol.horizons[0], far_horizon(results))))
    parts = [(sees, [r for r in part if shown[0] in r.scores[RECALL]]) for sees, part in groups(results)]
    parts = [(sees, part) for sees, part in parts if part]
    domain = recall_domain(
        r.scores[RECALL][h] for _, part in parts for r in part for h in shown if h in r.scores[RECALL]
    )
    columns: list[alt.VConcatChart] = []
    datasets: dict[str, list[Row]] = {}
    for column, horizon in enumerate(shown):
        charts: list[Layered] = []
        for place, (sees, part) in enumerate(parts):
            name = f"rows_{column}_{place}"
            datasets[name] = [row for r in part for row in interval_rows(r, r.scores[RECALL]) if row["h"] == horizon]
            look = _Look(domain, last=place == len(parts) - 1, order=[r.name for r in part], names=column == 0)
            heading = f"sees {sees}" if column == 0 else " "
            chart = _dots(look, name, horizon).properties(width=330, height=20 * len(part))
            charts.append(chart.properties(title=alt.Title(heading, anchor="start", fontSize=12)))
        if charts:
            plural = "s" if horizon > 1 else ""
            above = alt.Title(f"{horizon} MoE layer{plural} ahead", fontSize=13, anchor="start", offset=10)
            columns.append(alt.vconcat(*charts, spacing=6).properties(title=above))
    topology = results.trace.topology
    title = alt.Title(
        "Experts foreseen: recall@K, in %",
        subtitle=f"{topology.model_id}: K={topology.top_k} of {topology.experts_text} experts, "
        f"{topology.layers} layers; test part, 95 % intervals over documents and seeds",
        fontSize=16,
        subtitleFontSize=12,
        anchor="start",
        offset=14,
    )
    datasets["none"] = [{}]
    body: alt.HConcatChart | alt.Chart = alt.Chart(table("none")).mark_text(text="no predictor has a result")
    if columns:
        body = alt.hconcat(*columns, spacing=24)
    config = vega_config(LIGHT)
    config["background"] = "white"
    config["font"] = "Helvetica, Arial, sans-serif"
    config["text"]["font"] = config["font"]
    spec = finish(structure(body.properties(title=title, padding=16)), datasets)
    spec["config"] = config
    import vl_convert

    with atomic_path(path) as temporary:
        if kind == "png":
            temporary.write_bytes(_signed_png(vl_convert.vegalite_to_png(spec, scale=2)))
        else:
            temporary.write_text(vl_convert.vegalite_to_svg(spec) + f"\n{_SIGNATURE_SVG}\n", encoding="utf-8")


def is_figure(path: Path) -> bool:
    """Whether a file is a figure of :func:`ranking_figure`; never an error."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            tail = stream.read(_TAIL_BYTES)
    except OSError:
        return False
    return _SIGNATURE_PNG in tail or _SIGNATURE_SVG.encode() in tail


def _signed_png(picture: bytes) -> bytes:
    """The same picture with a text chunk (PNG specification, 11.3.3.3) that says which software made it."""
    chunk = struct.pack(">I", len(_SIGNATURE_PNG) - 4) + _SIGNATURE_PNG
    chunk += struct.pack(">I", zlib.crc32(_SIGNATURE_PNG))
    return picture[:-_PNG_END_BYTES] + chunk + picture[-_PNG_END_BYTES:]


def interval_rows(result: PredictorResult, by_horizon: Mapping[int, Interval]) -> list[Row]:
    """A row per horizon with value, low and high in % and what is written beside the point."""
    return [
        {
            "h": h,
            "name": result.name,
            "category": result.category,
            "value": 100 * interval.value,
            "low": 100 * interval.low,
            "high": 100 * interval.high,
            "label": percent(interval),
            "short": percent(interval).split(" ")[0],
        }
        for h, interval in by_horizon.items()
    ]


def shown_base(name: str = "rows", horizon: str | int = "horizon") -> alt.Chart:
    """A chart of the rows of one horizon: that of the page, or a fixed one."""
    return alt.Chart(table(name)).transform_filter(f"datum.h === {horizon}")


def _names_axis(by: str) -> alt.Y:
    """Predictors from top to bottom by falling ``by``."""
    order = alt.EncodingSortField(field=by, op="max", order="descending")
    return alt.Y("name:N", sort=order, title=None, axis=names_axis(grid=True))


def names_axis(*, grid: bool, breaking: bool = True) -> alt.Axis:
    """An axis of predictor names; in a narrow plot the long ones break after their first word if ``breaking``."""
    if not breaking:
        return alt.Axis(style="names", grid=grid)
    broken = "split(replace(datum.label, regexp('([a-z])([A-Z])'), '$1\\n$2'), '\\n')"
    short = f"width < 420 && length(datum.label) > 20 ? {broken} : datum.label"
    return alt.Axis(style="names", grid=grid, labelExpr=short)


def tooltips(measured: str) -> list[alt.Tooltip]:
    """What a point says when it is pointed at; ``measured`` names the value."""
    return [
        alt.Tooltip("name:N", title="predictor"),
        alt.Tooltip("category:N", title="category"),
        alt.Tooltip("label:N", title=measured),
    ]


class _Look(NamedTuple):
    """How a dot plot looks: its range in %, whether it carries the axis, a fixed order, whether it names rows."""

    domain: tuple[float, float]
    last: bool
    order: list[str] | None = None
    names: bool = True


def _dots(look: _Look, name: str = "rows", horizon: str | int = "horizon") -> Layered:
    """Points with intervals on stems, their values written beside them."""
    low, high = look.domain
    # Room at the right for the value that is written there.
    scale = alt.Scale(domain=[low, high + 0.2 * (high - low)], nice=False, zero=False)
    sort = look.order or alt.EncodingSortField(field="value", op="max", order="descending")
    # The page's plots adapt to their width; one with a fixed order is a picture of a fixed size.
    adapts = look.order is None
    names = alt.Axis(labels=False, ticks=False, domain=False)
    if look.names:
        names = names_axis(grid=False, breaking=adapts)
    y = alt.Y("name:N", sort=sort, title=None, axis=names)
    axis = alt.Axis(
        values=[value for value in range(0, 101, 10) if low <= value <= high],
        labels=look.last,
        ticks=False,
        domain=False,
    )
    title = "recall@K, %" if look.last else None

    def across(field: str) -> alt.X:
        return alt.X(f"{field}:Q", scale=scale, title=title, axis=axis)

    base, marks = shown_base(name, horizon), category_encoding(legend=look.order is not None)
    stem = base.transform_calculate(start=f"{low}").mark_rule(style="stem").encode(x=across("start"), x2="low:Q", y=y)
    interval = base.mark_rule(strokeWidth=3, opacity=0.55).encode(
        x=across("low"), x2="high:Q", y=y, color=marks["color"]
    )
    point = base.mark_point(size=64, filled=True, opacity=1).encode(
        x=across("value"), y=y, tooltip=tooltips("recall@K, %"), **marks
    )
    written = base.transform_calculate(said=_LABEL if adapts else "datum.label")
    label = written.mark_text(align="left", dx=9, style="label")
    label = label.encode(x=across("high"), y=y, text="said:N")
    return alt.layer(stem, interval, point, label).properties(width="container")


def _verdict(difference: Interval) -> str:
    if not excludes_zero(difference):
        return "open"
    return "ahead" if difference.value > 0 else "behind"
