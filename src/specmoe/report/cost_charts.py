"""The charts of recall against cost, with the Pareto front. See ``charts`` for the form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from specmoe.report.charts import (
    Row,
    Spec,
    category_encoding,
    finish,
    horizon_scale,
    interval_rows,
    shown_base,
    structure,
    table,
    tooltips,
)
from specmoe.report.labels import LABEL_PLACES, label_places
from specmoe.report.pareto import pareto_front
from specmoe.report.select import RECALL, finished
from specmoe.report.text import microseconds
from specmoe.results import PredictorResult, Results

__all__ = ["latency_front", "parameter_front"]

# Plots, in pixels, for which names of points are placed.
_WIDE, _NARROW = 360, 250


def parameter_front(results: Results) -> Spec | None:
    """recall@K of the learned predictors against trained parameters, with the Pareto front."""
    learned = [r for r in finished(results) if r.learned and r.parameters > 0]
    rows = _front_rows([(r, float(r.parameters)) for r in learned], results)
    if not rows:
        return None
    baselines: list[Row] = []
    for h in results.protocol.horizons:
        free = [r for r in finished(results) if not r.learned and h in r.scores[RECALL]]
        if free:
            strongest = max(free, key=lambda r: r.scores[RECALL][h].value)
            value = 100 * strongest.scores[RECALL][h].value
            baselines.append({"h": h, "value": value, "label": f"{strongest.name}, nothing trained"})
    return _front_chart(rows, results, "trained parameters (log scale)", "~s", across=baselines)


def latency_front(results: Results) -> Spec | None:
    """recall@K against the time of one prediction, with the Pareto front and the layer's own compute time."""
    timed = [(r, r.latency.p50_us) for r in finished(results) if r.latency is not None and r.latency.p50_us > 0]
    rows = _front_rows(timed, results)
    if not rows:
        return None
    budget = results.trace.layer_us_p50
    upright = [{"cost": budget, "label": f"a layer computes: {microseconds(budget)}"}] if budget else []
    return _front_chart(rows, results, "p50 of one prediction, µs (log scale)", "~s", upright=upright)


def _front_rows(costs: Sequence[tuple[PredictorResult, float]], results: Results) -> list[Row]:
    """Points by horizon, whether they are on the front, and where its names fit; the weak are left out."""
    rows: list[Row] = []
    for h in results.protocol.horizons:
        there = [(r, cost) for r, cost in costs if h in r.scores[RECALL]]
        enough = 0.5 * max((r.scores[RECALL][h].value for r, _ in there), default=0.0)
        there = [(r, cost) for r, cost in there if r.scores[RECALL][h].value >= enough]
        front = set(pareto_front([cost for _, cost in there], [r.scores[RECALL][h].value for r, _ in there]))
        found = [
            {**interval_rows(r, {h: r.scores[RECALL][h]})[0], "cost": cost, "front": index in front}
            for index, (r, cost) in enumerate(there)
        ]
        points_ = [(math.log(row["cost"]), row["value"]) for row in found]
        names = [row["name"] if row["front"] else "" for row in found]
        places = zip(label_places(points_, names, _WIDE), label_places(points_, names, _NARROW), strict=True)
        rows += [{**row, "wide": wide, "narrow": narrow} for row, (wide, narrow) in zip(found, places, strict=True)]
    return rows


def _front_chart(
    rows: list[Row],
    results: Results,
    title: str,
    number: str,
    *,
    across: Sequence[Row] = (),
    upright: Sequence[Row] = (),
) -> Spec:
    """Recall against a cost. across: horizontal reference lines by horizon. upright: vertical ones."""
    base = shown_base()
    costs = [row["cost"] for row in (*rows, *upright)]
    scale = alt.Scale(type="log", domain=[min(costs) / 1.6, max(costs) * 1.6], nice=False)
    x = alt.X("cost:Q", scale=scale, title=title, axis=alt.Axis(format=number, grid=False, tickCount=5))
    levels = horizon_scale([*rows, *({**row, "low": row["value"], "high": row["value"]} for row in across)], 0.07, 0.07)
    y = alt.Y("value:Q", scale=levels, title="recall@K, %", axis=alt.Axis(tickCount=6))
    tooltip = [*tooltips("recall@K, %"), alt.Tooltip("cost:Q", title=title, format=",")]
    layers: list[alt.Chart] = [
        base.transform_filter("datum.front").mark_line(style="quiet", interpolate="step-after").encode(x=x, y=y),
        base.mark_rule(strokeWidth=2, opacity=0.5).encode(
            x=x, y=alt.Y("low:Q", title="recall@K, %", scale=levels), y2="high:Q", color=category_encoding()["color"]
        ),
        base.mark_point(size=80, filled=True, opacity=1).encode(x=x, y=y, tooltip=tooltip, **category_encoding()),
    ]
    for place, mark in LABEL_PLACES.items():
        named = base.transform_filter(f"(width < {_WIDE} ? datum.narrow : datum.wide) === '{place}'")
        layers.append(named.mark_text(style="label", **mark).encode(x=x, y=y, text="name:N"))
    if across:
        line = shown_base("across")
        layers.append(line.mark_rule(style="reference").encode(y=y))
        layers.append(
            line.mark_text(align="left", dx=4, dy=-8, style="reference-text").encode(
                y=y, x=alt.value(0), text="label:N"
            )
        )
    if upright:
        line = alt.Chart(table("upright"))
        layers.append(line.mark_rule(style="reference").encode(x=x))
        layers.append(
            line.mark_text(**_beside(upright[0]["cost"], costs), baseline="bottom", style="reference-text").encode(
                x=x, y=alt.value("height"), text="label:N"
            )
        )
    chart = alt.layer(*layers).properties(width="container", height=340)
    return finish(structure(chart), {"rows": rows, "across": across, "upright": upright}, results.protocol.horizons[0])


def _beside(cost: float, costs: Sequence[float]) -> dict[str, Any]:
    """On which side of an upright line there is room for its label."""
    right = math.log(cost) < (math.log(min(costs)) + math.log(max(costs))) / 2
    return {"align": "left", "dx": 5} if right else {"align": "right", "dx": -5}
