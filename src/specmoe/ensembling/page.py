"""The page of an ensemble: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path

import altair as alt

from specmoe.ensembling.outcome import Contender, EnsembleResult
from specmoe.ensembling.words import contender_table, found
from specmoe.files import write_text
from specmoe.report.charts import Row, Spec, finish, horizon_scale, names_axis, shown_base, structure
from specmoe.report.page import Figure, as_script, environment, made_facts, page_parts, trace_facts
from specmoe.report.study_charts import differences
from specmoe.report.text import microseconds, percent
from specmoe.report.theme import CATEGORY_SHAPES

__all__ = ["against_time", "member_shares", "render_ensemble", "write_ensemble_page"]

# Left of a latency axis to its first point, as a factor, and as much on the right.
_ROOM = 1.6


def write_ensemble_page(result: EnsembleResult, path: Path) -> None:
    """Write the page of ``result`` to ``path``, atomically.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    write_text(path, render_ensemble(result))


def render_ensemble(result: EnsembleResult) -> str:
    """The page as HTML, complete in itself."""
    horizons = result.protocol.horizons
    specs: dict[str, Spec] = {}

    def figure(id: str, spec: Spec | None, label: str, title: str = "") -> list[Figure]:
        if spec is None:
            return []
        specs[f"chart-{id}"] = {**spec, "description": label}
        return [Figure(f"chart-{id}", label, title)]

    rows = [(each.title, h, gain) for each in result.contenders for h, gain in each.difference.items()]
    rows += [("taught − without teacher", h, gain) for h, gain in result.taught_gain.items()]
    columns, numbers = contender_table(result)
    sentences = found(result)
    return (
        environment()
        .get_template("study.html.jinja")
        .render(
            study=result,
            first=horizons[0],
            kicker="Ensemble",
            title="Is a blend worth its time?",
            lead=sentences[0],
            more=sentences[1:],
            settled_title="What each gains",
            settled_note=f"Points of recall@K over the best single member, {result.best}, on the same test documents. "
            "Grey: the interval includes 0.",
            settled=figure(
                "gain",
                differences(rows, "points of recall@K gained", horizons, good=True),
                "Points of recall gained over the best single member",
            ),
            panels_title="Recall, time and weights",
            panels_note="Left: recall@K against the time of one step; bars are 95 % intervals. Right: each member's "
            "share of the blend.",
            panels=[
                *figure("time", against_time(result), "Recall at K against the time of one step", "Recall and time"),
                *figure("shares", member_shares(result), "Each member's share of the blend", "Shares of the blend"),
            ],
            columns=columns,
            rows=numbers,
            missing=[],
            left_out={},
            categories=list(CATEGORY_SHAPES.items()),
            facts=_facts(result),
            journey_json=as_script(None),
            **page_parts(specs),
        )
    )


def against_time(result: EnsembleResult) -> Spec:
    """recall@K of every contender against p50 of one step (log axis)."""
    rows: list[Row] = [
        {
            "h": h,
            "name": _short(each),
            "cost": each.latency.p50_us,
            "value": 100 * recall.value,
            "low": 100 * recall.low,
            "high": 100 * recall.high,
            "label": percent(recall),
            "time": microseconds(each.latency.p50_us),
            "verdict": "reference" if each.key in ("best", "student") else "new",
        }
        for each in result.contenders
        for h, recall in each.recall.items()
    ]
    costs = [row["cost"] for row in rows]
    scale = alt.Scale(type="log", domain=[min(costs) / _ROOM, max(costs) * _ROOM], nice=False)
    x = alt.X("cost:Q", title="p50 of one step, µs (log scale)", scale=scale, axis=alt.Axis(format="~s", tickCount=4))
    heights = horizon_scale(rows, 0.1, 0.16)

    def up(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title="recall@K, %", scale=heights, axis=alt.Axis(tickCount=5))

    color = alt.Color("verdict:N", scale=alt.Scale(domain=["new", "reference"], range="diverging"), legend=None)
    shape = alt.Shape("name:N", legend=alt.Legend(title=None, orient="bottom", columns=2))
    tooltip = [alt.Tooltip("name:N", title="of"), alt.Tooltip("label:N", title="recall@K, %"), alt.Tooltip("time:N")]
    base = shown_base()
    chart = alt.layer(
        base.mark_rule(strokeWidth=2.5, opacity=0.55).encode(x=x, y=up("low"), y2="high:Q", color=color),
        base.mark_point(size=70, filled=True, opacity=1).encode(
            x=x, y=up("value"), color=color, shape=shape, tooltip=tooltip
        ),
    ).properties(width="container", height=230)
    return finish(structure(chart), {"rows": rows}, result.protocol.horizons[0])


def member_shares(result: EnsembleResult) -> Spec:
    """Each member's share of the blend's weights, in %, at the horizon shown."""
    rows: list[Row] = [
        {"h": h, "name": member.name, "share": 100 * share, "label": f"{100 * share:.0f} %"}
        for member in result.members
        for h, share in member.weights.items()
    ]
    y = alt.Y("name:N", sort=[member.name for member in result.members], title=None, axis=names_axis(grid=True))
    x = alt.X("share:Q", title="share of the blend, %", scale=alt.Scale(domain=[0, 112]), axis=alt.Axis(tickCount=5))
    base = shown_base()
    color = alt.ColorDatum("new", scale=alt.Scale(domain=["new", "reference"], range="diverging"), legend=None)
    chart = alt.layer(
        base.mark_bar(height=12).encode(x=x, y=y, color=color),
        base.mark_text(align="left", dx=6, style="label").encode(x=x, y=y, text="label:N"),
    ).properties(width="container", height=26 * len(result.members))
    return finish(structure(chart), {"rows": rows}, result.protocol.horizons[0])


def _short(each: Contender) -> str:
    names = {"blend": "blend", "greedy": "greedy selection", "student": "student alone", "taught": "student, taught"}
    return names.get(each.key, each.title)


def _facts(result: EnsembleResult) -> list[tuple[str, list[tuple[str, str]]]]:
    check = result.checks[0]
    return [
        trace_facts(result.trace),
        (
            "Protocol",
            [
                ("split", result.split_hash),
                ("validation and test documents", f"{result.validation_documents} and {result.test_documents}"),
                ("members", ", ".join(member.name for member in result.members)),
                *((f"not a member: {name}", reason) for name, reason in result.left_out.items()),
                ("validation events for weights", f"{check.events:,} ({100 * check.share:.0f} %)"),
                ("greedy picks, first seed", ", ".join(check.picks)),
                ("seeds", ", ".join(map(str, result.protocol.seeds))),
                ("bootstrap draws", f"{result.protocol.bootstrap_draws:,}, over documents and seeds"),
                ("metric version", str(result.protocol.metric_version)),
            ],
        ),
        made_facts(result.made),
    ]
