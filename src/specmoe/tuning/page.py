"""The picture of a search: one self-contained page that opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import altair as alt

from specmoe.files import write_text
from specmoe.report.charts import Row, Spec, finish, structure, table
from specmoe.report.page import page_parts
from specmoe.tuning.outcome import Search, evidence_in_words, gain_in_words

__all__ = ["picture", "write_picture"]

_WIDTH, _HEIGHT = 720, 230
_STATES = ("complete", "pruned", "recipe in force")
_COLOURS = alt.Scale(domain=list(_STATES), range="diverging")
_SHAPES = alt.Scale(domain=list(_STATES), range=["circle", "cross", "diamond"])
_COLUMNS = 3
# Everything is in the file and nothing may be fetched; the charts follow the reader's light or dark setting.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Search for recipes</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval';
 style-src 'unsafe-inline'; img-src data:">
<style>:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
.chart{overflow-x:auto}h2{margin-top:2.5rem}</style></head>
<body><h1>Search for recipes</h1>@BODY@
<script>@LIBRARY@</script>
<script>
const charts = @CHARTS@, themes = @THEMES@, dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  for (const [id, spec] of Object.entries(charts)) {
    const config = themes[dark.matches ? "dark" : "light"];
    window.vegaEmbed("#" + id, spec, {actions: false, renderer: "svg", config});
  }
}
dark.addEventListener("change", draw);
draw();
</script></body></html>
"""


def write_picture(out: Path, searches: Mapping[str, Search]) -> Path:
    """Write ``out/tuning.html`` with a picture of every search.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    drawn = {name: spec for name, search in searches.items() if (spec := picture(search)) is not None}
    parts, specs = [], {}
    for index, (name, search) in enumerate(searches.items()):
        chart = "<p>No trial has a recall yet.</p>"
        if name in drawn:
            specs[f"chart-{index}"] = drawn[name]
            label = escape(f"The trials of the search for {name}", quote=True)
            chart = f'<div class="chart" id="chart-{index}" role="img" aria-label="{label}"></div>'
        parts.append(f"<h2>{escape(name)}</h2><p>{escape(summary(search))}</p>{chart}")
    filled = page_parts(specs)
    page = _PAGE
    for mark, text in {
        "BODY": "".join(parts),
        "LIBRARY": filled["library"],
        "CHARTS": filled["charts_json"],
        "THEMES": filled["themes_json"],
    }.items():
        page = page.replace(f"@{mark}@", text)
    path = out / "tuning.html"
    write_text(path, page)
    return path


def summary(search: Search) -> str:
    """A search in two sentences."""
    states = [trial.state for trial in search.trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed") if s in states) or "none yet"
    text = f"Trials: {counts}; {search.documents} validation documents of {Path(search.trace).name}."
    best = search.best_trial
    if best is not None and best.recall is not None:
        text += f" Best: trial {best.number} with {100 * best.recall:.2f} %"
        if best.in_force:
            text += ", the recipe in force."
        elif search.gain is not None:
            text += (
                f", {gain_in_words(search.gain)} points more than the recipe in force ({evidence_in_words(search)}; "
                "chosen as the best of all trials by these very documents, so expect less on others)."
            )
    return text


def picture(search: Search) -> Spec | None:
    """History with the running best, what matters, and recall along every field; None without a recall."""
    rows = [_row(search, place) for place in range(len(search.trials))]
    rows = [row for row in rows if row["recall"] is not None]
    if not rows:
        return None
    datasets: dict[str, Iterable[Row]] = {"rows": rows, "best": _running_best(search)}
    charts: list[Any] = [_history(rows)]
    if search.importance:
        datasets["importance"] = [{"field": n, "share": 100 * share} for n, share in search.importance.items()]
        charts.append(_importance())
    slices = [_slice(name, place) for name, place in search.space.items()]
    lines = [alt.hconcat(*slices[i : i + _COLUMNS], spacing=18) for i in range(0, len(slices), _COLUMNS)]
    body = alt.vconcat(*charts, *lines, spacing=26)
    spec = finish(structure(body.properties(padding=8)), datasets)
    return spec


def _row(search: Search, place: int) -> Row:
    trial = search.trials[place]
    # The recall of a pruned trial is pooled over horizons and early: near enough to be drawn beside the others.
    state = "recipe in force" if trial.in_force and trial.state == "complete" else trial.state
    changed = ", ".join(f"{n} {_said(v)}" for n, v in trial.values.items() if v != search.start.get(n))
    recall = None if trial.recall is None else 100 * trial.recall
    said = changed or "nothing"
    return {"trial": place + 1, "state": state, "recall": recall, "changed": said, **trial.values}


def _said(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _running_best(search: Search) -> list[Row]:
    rows, best = [], None
    for place, trial in enumerate(search.trials):
        if trial.state == "complete" and trial.recall is not None:
            best = trial.recall if best is None else max(best, trial.recall)
        if best is not None:
            rows.append({"trial": place + 1, "best": 100 * best})
    return rows


def _points(x: alt.X) -> alt.Chart:
    scale = alt.Scale(zero=False, nice=True)
    return (
        alt.Chart(table("rows"))
        .mark_point(size=60, filled=True, opacity=0.9)
        .encode(
            x=x,
            y=alt.Y("recall:Q", title="validation recall@K, %", scale=scale),
            color=alt.Color("state:N", scale=_COLOURS, legend=alt.Legend(title=None, orient="top")),
            shape=alt.Shape("state:N", scale=_SHAPES, legend=alt.Legend(title=None, orient="top")),
            tooltip=[
                alt.Tooltip("trial:Q"),
                alt.Tooltip("state:N"),
                alt.Tooltip("recall:Q", title="recall@K, %", format=".2f"),
                alt.Tooltip("changed:N", title="changed"),
            ],
        )
    )


def _history(rows: list[Row]) -> Any:
    x = alt.X("trial:Q", title="trial", axis=alt.Axis(format="d", tickMinStep=1), scale=alt.Scale(nice=False))
    line = alt.Chart(table("best")).mark_line(interpolate="step-after", style="quiet").encode(x=x, y="best:Q")
    layers: list[Any] = [line, _points(x)]
    if any(row["state"] == "recipe in force" for row in rows):
        level = alt.Chart(table("rows")).transform_filter("datum.state === 'recipe in force'")
        layers.insert(0, level.mark_rule(style="reference").encode(y="recall:Q"))
    title = "History: each trial, the best so far (line), the recipe in force (dashed)"
    return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT, title=title)


def _importance() -> Any:
    return (
        alt.Chart(table("importance"))
        .mark_bar(height=14)
        .encode(
            color=alt.ColorDatum("complete", scale=_COLOURS, legend=None),
            x=alt.X("share:Q", title="share of what made trials differ, %", axis=alt.Axis(tickCount=6)),
            y=alt.Y("field:N", sort="-x", title=None, axis=alt.Axis(ticks=False, domain=False)),
            tooltip=[alt.Tooltip("field:N"), alt.Tooltip("share:Q", format=".0f", title="share, %")],
        )
        .properties(
            width=_WIDTH - 110,
            height=alt.Step(22),
            title="What matters: a rough guide, the rougher the fewer trials there are",
        )
    )


def _slice(name: str, place: Mapping[str, Any]) -> Any:
    if place["kind"] == "choice":
        x = alt.X(f"{name}:O", title=name, sort=list(place["values"]), axis=alt.Axis(labelAngle=0))
    else:
        # The whole range: what lies at its edge asks for a wider one.
        domain = [place["low"], place["high"]]
        scale = alt.Scale(type="log" if place["log"] else "linear", domain=domain, zero=False, nice=False, padding=8)
        x = alt.X(f"{name}:Q", title=name, scale=scale, axis=alt.Axis(tickCount=4, grid=False))
    chart = _points(x).encode(y=alt.Y("recall:Q", title=None, scale=alt.Scale(zero=False)))
    return chart.properties(width=(_WIDTH - 36 * (_COLUMNS - 1)) // _COLUMNS, height=130)
