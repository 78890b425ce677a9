"""The three plots of a simulation: misses over capacity, tokens a second over bandwidth, gain over recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt

from specmoe.files import atomic_path
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.results import Gain, RunResult, SimulationResults
from specmoe.offload.words import capacity_text, gain_text
from specmoe.report.charts import Row, Spec, finish, structure, table
from specmoe.report.theme import LIGHT, vega_config

__all__ = ["bandwidth_chart", "curves_chart", "draw", "recall_chart"]

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")
_HEIGHT = 300
# Of a picture by itself, in pixels; in the page a chart takes the width that there is.
_WIDTH = 620


def curves_chart(results: SimulationResults) -> Spec | None:
    """Miss ratio of every policy over the share of the experts that the cache holds; Belady's dashed."""
    rows: list[Row] = [
        {
            "policy": curve.title,
            "share": 100 * point.share,
            "misses": 100 * point.miss_ratio,
            "label": f"{100 * point.miss_ratio:.1f} % at {capacity_text(point.capacity, results.machine.expert_bytes)}",
            "least": curve.policy.startswith("belady"),
        }
        for curve in results.curves
        for point in curve.points
    ]
    if not rows:
        return None
    titles = [curve.title for curve in results.curves if not curve.policy.startswith("belady")]
    x = alt.X("share:Q", title="experts that the cache holds, % of all", scale=alt.Scale(domain=[0, 100]))
    y = alt.Y("misses:Q", title="misses, % of the experts needed", scale=alt.Scale(domainMin=0))
    legend = alt.Legend(title=None, orient="bottom", columns=4, symbolOpacity=1)
    color = alt.Color("policy:N", scale=alt.Scale(domain=titles), legend=legend)
    symbols = [_SYMBOLS[place % len(_SYMBOLS)] for place in range(len(titles))]
    shape = alt.Shape("policy:N", scale=alt.Scale(domain=titles, range=symbols), legend=legend)
    tooltip = [alt.Tooltip("policy:N"), alt.Tooltip("label:N", title="misses")]
    online = alt.Chart(table()).transform_filter("!datum.least")
    least = alt.Chart(table()).transform_filter("datum.least")
    here = 100 * results.machine.share
    chart = alt.layer(
        alt.Chart(table("here")).mark_rule(style="reference").encode(x=alt.X("share:Q")),
        alt.Chart(table("here"))
        .mark_text(style="reference-text", align="left", dx=4, baseline="top")
        .encode(x="share:Q", y=alt.value(0), text="label:N"),
        least.mark_line(style="reference", point=False).encode(x=x, y=y, detail="policy:N", tooltip=tooltip),
        least.transform_filter("datum.last")
        .mark_text(style="reference-text", align="right", dx=-6, dy=10)
        .encode(x=x, y=y, text="policy:N"),
        online.mark_line(strokeWidth=1.5).encode(x=x, y=y, color=color),
        online.mark_point(size=40, filled=True, opacity=0.9).encode(
            x=x, y=y, color=color, shape=shape, tooltip=tooltip
        ),
    ).properties(width="container", height=_HEIGHT)
    # With bypass and without run so close together that one name must do.
    named = [row for row in rows if row["policy"] == POLICIES["belady"].title]
    named[len(named) // 3]["last"] = True
    return finish(structure(chart), {"rows": rows, "here": [{"share": here, "label": "simulated"}]})


def bandwidth_chart(results: SimulationResults) -> Spec | None:
    """Tokens a second over the bandwidth of the link, prefetching by nothing, the best predictor and the oracle."""
    link = results.machine.hardware.links[-1]
    rows: list[Row] = [
        {
            "of": _title(run),
            "bandwidth": run.x * link.bandwidth / 1e9,
            "rate": run.tokens_per_second,
            "label": f"{run.tokens_per_second:,.4g} ({_gain(run.against.gain) if run.against else '–'})",
        }
        for run in results.runs
        if run.group == "bandwidth" and run.x is not None
    ]
    if not rows:
        return None
    x = alt.X(
        "bandwidth:Q",
        title="bandwidth of the link, GB/s (log scale); all links change together",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(values=sorted({row["bandwidth"] for row in rows}), format=".3~g", grid=False),
    )
    order = list(dict.fromkeys(row["of"] for row in rows))
    y = alt.Y("rate:Q", title="tokens a second", scale=alt.Scale(zero=False))
    chart = alt.layer(
        _rule_here("bandwidth"),
        _line(x, y, order),
        _points(
            x, y, order, [alt.Tooltip("of:N", title="prefetches by"), alt.Tooltip("label:N", title="tokens/s (gain)")]
        ),
    ).properties(width="container", height=_HEIGHT)
    return finish(structure(chart), {"rows": rows, "here": [{"bandwidth": link.bandwidth / 1e9}]})


def recall_chart(results: SimulationResults) -> Spec | None:
    """Gain over no prefetching of made-up predictions of a stated recall, and of the real predictors at theirs."""
    made = [run for run in results.runs if run.group == "recall" and run.x is not None]
    real = [
        run
        for run in results.main
        if run.kind == "predictor" and run.policy == results.machine.policy and run.admission == results.admission
    ]
    rows = [_recall_row(run, "even mistakes") for run in made if run.against]
    marks = [_recall_row(run, "predictor") for run in real if run.against and run.recall]
    if not rows:
        return None
    x = alt.X("recall:Q", title="recall, mean over horizons, %", scale=alt.Scale(domain=[0, 100]))
    y = alt.Y("gain:Q", title="tokens/s gained over no prefetching, %", scale=alt.Scale(zero=True))
    tooltip = [
        alt.Tooltip("name:N", title="prefetches by"),
        alt.Tooltip("recall:Q", title="recall, %", format=".1f"),
        alt.Tooltip("label:N", title="gain"),
    ]
    names = alt.Chart(table("marks"))
    chart = alt.layer(
        alt.Chart(table("zero")).mark_rule(style="reference").encode(y="zero:Q"),
        alt.Chart(table()).mark_line(style="quiet").encode(x=x, y=y),
        alt.Chart(table()).mark_point(size=30, filled=True, style="quiet").encode(x=x, y=y, tooltip=tooltip),
        names.mark_point(size=70, filled=True, opacity=1).encode(
            x=x,
            y=y,
            tooltip=tooltip,
            color=alt.Color("name:N", legend=_LEGEND),
            shape=alt.Shape("name:N", legend=_LEGEND),
        ),
    ).properties(width="container", height=_HEIGHT)
    return finish(structure(chart), {"rows": rows, "marks": marks, "zero": [{"zero": 0}]})


def draw(spec: Spec, path: Path) -> None:
    """Write a chart as a picture on white: SVG or, by the suffix of ``path``, PNG.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    import vl_convert

    config: dict[str, Any] = vega_config(LIGHT)
    config["background"] = "white"
    # A renderer outside of a browser knows no system fonts.
    config["font"] = config["text"]["font"] = "Helvetica, Arial, sans-serif"
    fixed = {**spec, "width": _WIDTH, "config": config, "padding": 12}
    with atomic_path(path) as temporary:
        if path.suffix == ".png":
            temporary.write_bytes(vl_convert.vegalite_to_png(fixed, scale=2))
        else:
            temporary.write_text(vl_convert.vegalite_to_svg(fixed), encoding="utf-8")


_LEGEND = alt.Legend(title=None, orient="bottom", columns=3, symbolOpacity=1)


def _title(run: RunResult) -> str:
    return {"none": "nothing", "oracle": "oracle"}.get(run.kind, run.predictor)


def _gain(gain: Gain) -> str:
    return f"{gain_text(gain)} %{', no interval' if gain.low is None else ''}"


def _recall_row(run: RunResult, kind: str) -> Row:
    assert run.against is not None
    recall = sum(run.recall.values()) / max(1, len(run.recall))
    gain = run.against.gain
    name = kind if run.group == "recall" else run.predictor
    return {"name": name, "recall": 100 * recall, "gain": 100 * gain.value, "label": _gain(gain)}


def _rule_here(field: str) -> alt.Chart:
    return alt.Chart(table("here")).mark_rule(style="reference").encode(x=alt.X(f"{field}:Q"))


def _line(x: alt.X, y: alt.Y, order: list[str]) -> alt.Chart:
    color = alt.Color("of:N", scale=alt.Scale(domain=order), legend=_LEGEND)
    return alt.Chart(table()).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=color)


def _points(x: alt.X, y: alt.Y, order: list[str], tooltip: list[alt.Tooltip]) -> alt.Chart:
    chart = alt.Chart(table()).mark_point(size=52, filled=True, opacity=1)
    color = alt.Color("of:N", scale=alt.Scale(domain=order), legend=_LEGEND)
    shape = alt.Shape("of:N", scale=alt.Scale(domain=order, range=list(_SYMBOLS[: len(order)])), legend=_LEGEND)
    return chart.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip)
