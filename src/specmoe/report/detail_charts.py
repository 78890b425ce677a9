"""The charts that look inside: layers, learning curves, calibration, domains. See ``charts`` for the form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import altair as alt

from specmoe.report.charts import Row, Spec, category_encoding, finish, structure, table
from specmoe.report.select import RECALL, best, finished, ridge, strongest_training_free
from specmoe.report.text import percent
from specmoe.results import PredictorResult, Results

__all__ = ["calibration", "domains", "layers", "learning_curves"]

_MOST_DOMAINS = 24
_LABELLED_LAYERS = 40


def layers(result: PredictorResult, horizons: Sequence[int], domain: tuple[float, float]) -> Spec | None:
    """Heat map of recall@K by source layer (rows) and horizon (columns). domain: of the colours, in %."""
    rows = [
        {"layer": layer, "h": h, "value": 100 * value, "text": f"{100 * value:.0f}"}
        for layer, values in enumerate(result.per_layer)
        for h, value in zip(horizons, values, strict=False)
        if value is not None
    ]
    if not rows:
        return None
    labelled = len(result.per_layer) <= _LABELLED_LAYERS
    step = 20 if labelled else 8
    return finish(_layers_structure(domain, labelled), {"rows": rows}, height=step * len(result.per_layer))


@cache
def _layers_structure(domain: tuple[float, float], labelled: bool) -> Spec:
    base = alt.Chart(table()).encode(
        x=alt.X("h:O", title="horizon", axis=alt.Axis(orient="top", labelAngle=0, domain=False, ticks=False)),
        y=alt.Y("layer:O", title="source layer", axis=alt.Axis(domain=False, ticks=False, labelOverlap=True)),
    )
    color = alt.Color("value:Q", scale=alt.Scale(domain=list(domain)), legend=None)
    tooltip = [
        alt.Tooltip("layer:O", title="source layer"),
        alt.Tooltip("h:O", title="horizon"),
        alt.Tooltip("value:Q", title="recall@K, %", format=".1f"),
    ]
    parts = [base.mark_rect(cornerRadius=2).encode(color=color, tooltip=tooltip)]
    if labelled:
        # From here up the cells are dark in the light theme and light in the dark one.
        middle = domain[0] + 0.6 * (domain[1] - domain[0])
        for style, test in (("on-low", f"datum.value < {middle}"), ("on-high", f"datum.value >= {middle}")):
            parts.append(base.transform_filter(test).mark_text(style=style).encode(text="text:N"))
    return structure(alt.layer(*parts).properties(width="container"))


def learning_curves(result: PredictorResult, domain: tuple[float, float]) -> Spec | None:
    """Validation recall@K over epochs, a line a seed; a dot marks the epoch whose weights were kept."""
    rows = [
        {
            "seed": seed.seed,
            "epoch": point.epoch,
            "value": 100 * point.validation_recall,
            "kept": point.epoch == seed.best_epoch,
            "category": result.category,
        }
        for seed in result.seeds
        for point in seed.curve
    ]
    if not rows:
        return None
    return finish(_curves_structure(domain), {"rows": rows})


@cache
def _curves_structure(domain: tuple[float, float]) -> Spec:
    base = alt.Chart(table()).encode(
        x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickCount=4, tickMinStep=1, format="d", grid=False)),
        y=alt.Y(
            "value:Q",
            title="validation recall@K, %",
            scale=alt.Scale(domain=list(domain), clamp=True),
            axis=alt.Axis(tickCount=4),
        ),
        color=category_encoding()["color"],
        detail="seed:N",
        tooltip=[
            alt.Tooltip("seed:N", title="seed"),
            alt.Tooltip("epoch:Q", title="epoch"),
            alt.Tooltip("value:Q", title="validation recall@K, %", format=".1f"),
        ],
    )
    chart = alt.layer(
        base.mark_line(strokeWidth=1.2, opacity=0.8),
        base.transform_filter("datum.kept").mark_point(size=34, filled=True, opacity=1),
    ).properties(width="container", height=150)
    return structure(chart)


def calibration(result: PredictorResult, results: Results) -> Spec | None:
    """Share of experts needed against the predicted probability; on the diagonal the two agree."""
    rows = [
        {
            "h": h,
            "predicted": 100 * bin_.predicted,
            "observed": 100 * bin_.observed,
            "count": bin_.count,
            "category": result.category,
        }
        for h, bins in result.calibration.items()
        for bin_ in bins
        if bin_.count
    ]
    if not rows:
        return None
    corners: list[Row] = [{"predicted": 0, "observed": 0}, {"predicted": 100, "observed": 100}]
    return finish(_calibration_structure(), {"rows": rows, "corners": corners}, results.protocol.horizons[0])


@cache
def _calibration_structure() -> Spec:
    scale = alt.Scale(domain=[0, 100])
    x = alt.X("predicted:Q", title="predicted, %", scale=scale, axis=alt.Axis(values=[0, 50, 100], grid=False))
    y = alt.Y("observed:Q", title="observed, %", scale=scale, axis=alt.Axis(values=[0, 50, 100]))
    base = alt.Chart(table()).transform_filter("datum.h === horizon").encode(x=x, y=y)
    color = category_encoding()["color"]
    chart = alt.layer(
        alt.Chart(table("corners")).mark_line(style="reference").encode(x=x, y=y),
        base.mark_line(strokeWidth=1.5).encode(color=color),
        base.mark_point(filled=True, opacity=1).encode(
            color=color,
            size=alt.Size("count:Q", scale=alt.Scale(type="sqrt", range=[12, 90]), legend=None),
            tooltip=[
                alt.Tooltip("predicted:Q", title="predicted, %", format=".1f"),
                alt.Tooltip("observed:Q", title="observed, %", format=".1f"),
                alt.Tooltip("count:Q", title="experts", format=","),
            ],
        ),
    ).properties(width="container", height=170)
    return structure(chart)


def domains(results: Results) -> tuple[Spec | None, str]:
    """recall@K by domain of the best learned predictor, ridge and the strongest other training-free one.

    Returns:
        The chart, and what it leaves out where there are many domains.
    """
    first = results.protocol.horizons[0]
    found = finished(results)
    probe = ridge(results)
    others = [r for r in found if not r.learned and r is not probe]
    chosen = [best(found, first, learned=True), probe or strongest_training_free(results, first), best(others, first)]
    series = list({r.name: r for r in chosen if r is not None}.values())
    held_out = results.split.held_out_domain
    away = f"{held_out} (held out)"
    rows: list[Row] = []
    for result in series:
        measured = {name: scores[RECALL] for name, scores in result.per_domain.items() if name != held_out}
        if held_out is not None and result.held_out_domain:
            measured[away] = result.held_out_domain
        for name, by_horizon in measured.items():
            rows += [
                {
                    "h": h,
                    "domain": name,
                    "name": result.name,
                    "value": 100 * interval.value,
                    "low": 100 * interval.low,
                    "high": 100 * interval.high,
                    "label": percent(interval),
                }
                for h, interval in by_horizon.items()
            ]
    if not rows:
        return None, ""
    level = {row["domain"]: row["value"] for row in reversed(rows) if row["h"] == first}
    order = sorted(level, key=lambda name: (name != away, -level[name]))
    note = ""
    if len(order) > _MOST_DOMAINS:
        note = f"Of {len(order)} domains, the {_MOST_DOMAINS} easiest and hardest are shown."
        half = _MOST_DOMAINS // 2
        order = order[:half] + order[-half:]
    rows = [row for row in rows if row["domain"] in set(order)]
    names = [result.name for result in series]
    legend = alt.Legend(title=None, orient="top", labelLimit=200, symbolOpacity=1)
    scale = alt.Scale(domain=names)
    y = alt.Y("domain:N", sort=order, title=None, axis=alt.Axis(domain=False, ticks=False, grid=True, labelLimit=150))
    offset = alt.YOffset("name:N", sort=names, scale=alt.Scale(domain=names, paddingInner=0.2))
    zoom = alt.Scale(zero=False)
    title, axis = "recall@K, %", alt.Axis(tickCount=8)
    base = alt.Chart(table()).transform_filter("datum.h === horizon")
    color = alt.Color("name:N", scale=scale, legend=legend)
    chart = alt.layer(
        base.mark_rule(strokeWidth=2, opacity=0.55).encode(
            x=alt.X("low:Q", scale=zoom, title=title, axis=axis), x2="high:Q", y=y, yOffset=offset, color=color
        ),
        base.mark_point(size=48, filled=True, opacity=1).encode(
            x=alt.X("value:Q", scale=zoom, title=title, axis=axis),
            y=y,
            yOffset=offset,
            color=color,
            shape=alt.Shape(
                "name:N",
                scale=alt.Scale(domain=names, range=["circle", "square", "diamond"][: len(names)]),
                legend=legend,
            ),
            tooltip=[
                alt.Tooltip("domain:N", title="domain"),
                alt.Tooltip("name:N", title="predictor"),
                alt.Tooltip("label:N", title="recall@K, %"),
            ],
        ),
    ).properties(width="container", height=(11 + 9 * len(names)) * len(order))
    return finish(structure(chart), {"rows": rows}, first), note
