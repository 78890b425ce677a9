"""The report: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from specmoe.files import write_text
from specmoe.report import charts, cost_charts, detail_charts
from specmoe.report.journey import journey_data
from specmoe.report.page import Figure, as_script, environment, made_facts, page_parts, trace_facts
from specmoe.report.questions import answers, headline
from specmoe.report.select import (
    CATEGORIES,
    COLD_RECALL,
    best,
    excludes_zero,
    far_horizon,
    finished,
    groups,
    recall,
    ridge,
    selection,
    strongest_training_free,
    train_seconds,
    unfinished,
)
from specmoe.report.text import NOT_MEASURED, count, duration, margin, microseconds, percent, percent_range, points
from specmoe.report.theme import CATEGORY_SHAPES
from specmoe.results import Interval, PredictorResult, Results

__all__ = ["render_report", "write_report"]

SEES_WORDS = {
    "context": "hidden states, routing and tokens of the past",
    "hidden": "the router's input at the source layer",
    "token": "token ids",
    "routing": "which experts were used before",
    "nothing": "nothing of the text",
}


class Cell(NamedTuple):
    """A cell of a sortable table. value: what to sort by. mark: ahead, behind or nothing."""

    text: str
    value: float | str
    mark: str = ""

    @property
    def numeric(self) -> bool:
        """Whether it holds a number."""
        return not isinstance(self.value, str)


def write_report(results: Results, path: Path) -> None:
    """Write the report of ``results`` to ``path``, atomically.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    write_text(path, render_report(results))


def render_report(results: Results) -> str:
    """The report as HTML, complete in itself: styles, scripts, charts and data are inside."""
    page = _Page(results)
    content = page.content()
    return (
        environment()
        .get_template("template.html.jinja")
        .render(**content, **page_parts(page.specs), journey_json=as_script(content["journey"]))
    )


class _Page:
    """Collects the charts while the sections are put together."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.first = results.protocol.horizons[0]
        self.specs: dict[str, Any] = {}

    def figure(self, id: str, spec: charts.Spec | None, label: str, title: str = "", note: str = "") -> list[Figure]:
        """Add a chart, if there is one."""
        if spec is None:
            return []
        # Vega labels what it draws with the description.
        self.specs[f"chart-{id}"] = {**spec, "description": label}
        return [Figure(f"chart-{id}", label, title, note)]

    def content(self) -> dict[str, Any]:
        """What the template fills in."""
        results = self.results
        shown = finished(results)
        learned = [r for r in shown if r.learned]
        picked = selection(results)
        levels = [100 * v for r in picked for row in r.per_layer for v in row if v is not None]
        heat = (min(levels, default=0.0), max(levels, default=100.0))
        curve = [100 * e.validation_recall for r in learned for s in r.seeds for e in s.curve if e.epoch > 1]
        lowest = 10 * (min(curve, default=0.0) // 10)
        span = (lowest, min(100.0, 5 * (max(curve, default=100.0) // 5 + 1)))
        parts = groups(results)
        by_domain, left_out = detail_charts.domains(results)
        return {
            "results": results,
            "headline": headline(results),
            "tiles": _tiles(results),
            "broken": [c for c in results.controls if not c.holds],
            "horizons": results.protocol.horizons,
            "first": self.first,
            "far": far_horizon(results),
            "categories": [(name, CATEGORY_SHAPES[name]) for name in CATEGORIES],
            "ranking": [
                (
                    sees,
                    SEES_WORDS.get(sees, ""),
                    self.figure(
                        f"ranking-{number}",
                        charts.ranking(results, part, last=number == len(parts) - 1),
                        f"Recall at K of predictors that see {sees}: {self._said(part)}",
                    ),
                )
                for number, (sees, part) in enumerate(parts)
            ],
            "ranking_columns": _ranking_columns(results),
            "ranking_rows": [(r, _ranking_cells(results, r)) for _, part in parts for r in part],
            "unfinished": unfinished(results),
            "failed_seeds": [(r, s) for r in shown for s in r.seeds if s.status == "failed"],
            "over_ridge": self.figure(
                "over-ridge",
                charts.over_ridge(results, learned),
                "Difference from ridge in points: "
                + ", ".join(
                    f"{r.name} {points(r.over_ridge[self.first])}" for r in learned if self.first in r.over_ridge
                ),
            ),
            "fronts": [
                *self.figure(
                    "front-parameters",
                    cost_charts.parameter_front(results),
                    f"Recall against trained parameters: {self._said(learned)}",
                    "Recall against parameters",
                    "Top left is best. The dashed line is the strongest predictor that trains nothing.",
                ),
                *self.figure(
                    "front-latency",
                    cost_charts.latency_front(results),
                    f"Recall against latency: {self._said(shown)}",
                    "Recall against latency",
                    "Top left is best. Left of the dashed line a prediction takes less time than a layer computes. "
                    "Left out are those with less than half the best recall.",
                ),
            ],
            "heat": [
                f
                for n, r in enumerate(picked)
                for f in self.figure(
                    f"layers-{n}",
                    detail_charts.layers(r, results.protocol.horizons, heat),
                    f"Recall at K of {r.name} by source layer and horizon",
                    r.name,
                )
            ],
            "curves": [
                f
                for n, r in enumerate(learned)
                for f in self.figure(
                    f"curve-{n}",
                    detail_charts.learning_curves(r, span),
                    f"Validation recall of {r.name} over {max((len(s.curve) for s in r.seeds), default=0)} epochs",
                    r.name,
                )
            ],
            "calibration": [
                f
                for n, r in enumerate(picked)
                for f in self.figure(
                    f"calibration-{n}",
                    detail_charts.calibration(r, results),
                    f"Calibration of {r.name}; calibration error {_plain(recall(r, self.first, 'ece'))}",
                    r.name,
                )
            ],
            "domains": self.figure(
                "domains", by_domain, "Recall at K by domain of the text, with 95 % intervals", note=left_out
            ),
            "untrained": self.figure(
                "untrained",
                charts.untrained(results),
                "Recall at K of training-free predictors on the trained model and on the untrained control: "
                + ", ".join(
                    f"{name} {percent(i[self.first])}" for name, i in results.untrained.items() if self.first in i
                ),
            ),
            "journey": journey_data(results),
            "answers": answers(results),
            "facts": _facts(results),
            "count": count,
            "duration": duration,
        }

    def _said(self, part: Iterable[PredictorResult]) -> str:
        return ", ".join(f"{r.name} {percent(recall(r, self.first))}" for r in part)


def _tiles(results: Results) -> list[tuple[str, str, str, str]]:
    """The figures at the top: number, unit, what it is, and whether it is good news."""
    tiles: list[tuple[str, str, str, str]] = []
    probe = ridge(results)
    for h in dict.fromkeys((results.protocol.horizons[0], far_horizon(results))):
        winner = best(finished(results), h, learned=True) or strongest_training_free(results, h)
        if winner is None:
            continue
        tiles.append((percent(recall(winner, h)), "%", f"recall@K at h={h}, {winner.name}", ""))
        difference = winner.over_ridge.get(h)
        if probe is not None and difference is not None:
            mark = ("ahead" if difference.value > 0 else "behind") if excludes_zero(difference) else "open"
            said = {"ahead": "more than ridge", "behind": "less than ridge", "open": "from ridge, not settled"}[mark]
            tiles.append((margin(difference), "points", f"{said}, at h={h}", mark))
    return tiles


def _ranking_columns(results: Results) -> list[tuple[str, bool]]:
    """Headings of the ranking table and whether the column holds numbers."""
    horizons = results.protocol.horizons
    return [
        ("predictor", False),
        ("sees", False),
        ("parameters", True),
        *((f"recall@K h={h}, %", True) for h in horizons),
        *((f"over ridge h={h}, points", True) for h in dict.fromkeys((horizons[0], far_horizon(results)))),
        (f"recall@2K h={horizons[0]}, %", True),
        *([(f"cold-miss recall@K h={horizons[0]}, %", True)] if _has_cold(results) else []),
        ("p50", True),
        ("training a seed", True),
    ]


def _ranking_cells(results: Results, result: PredictorResult) -> list[Cell]:
    horizons = results.protocol.horizons
    p50 = result.latency.p50_us if result.latency else None
    seconds = train_seconds(result)
    cells = [
        Cell(result.sees, result.sees),
        Cell(count(result.parameters), result.parameters),
        *(_score_cell(recall(result, h), percent) for h in horizons),
    ]
    for h in dict.fromkeys((horizons[0], far_horizon(results))):
        difference = result.over_ridge.get(h)
        mark = ""
        if difference is not None and excludes_zero(difference):
            mark = "ahead" if difference.value > 0 else "behind"
        cells.append(_score_cell(difference, margin)._replace(mark=mark))
    return [
        *cells,
        _score_cell(recall(result, horizons[0], "recall@2K"), percent),
        *([_score_cell(recall(result, horizons[0], COLD_RECALL), percent)] if _has_cold(results) else []),
        Cell(microseconds(p50), -1.0 if p50 is None else p50),
        Cell(duration(seconds), -1.0 if seconds is None else seconds),
    ]


def _has_cold(results: Results) -> bool:
    return any(COLD_RECALL in result.scores for result in results.predictors)


def _cache(results: Results) -> str:
    """The cache of cold-miss recall in words."""
    if results.protocol.cache_experts is None:
        return "none replayed"
    share = results.cold_share.get(results.protocol.horizons[0])
    lacks = f"; lacks {percent_range(share)} of the experts needed" if share else ""
    return f"LRU of {results.protocol.cache_experts} experts a layer, on demand, empty at the start{lacks}"


def _score_cell(interval: Interval | None, written: Any) -> Cell:
    # What was not measured sorts below everything that was.
    return Cell(written(interval), -1e9 if interval is None else interval.value)


def _plain(interval: Interval | None) -> str:
    return NOT_MEASURED if interval is None else percent_range(interval)


def _facts(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Protocol and provenance: headings, each with names and values."""
    trace, split, protocol = results.trace, results.split, results.protocol
    topology, (heading, rows) = trace.topology, trace_facts(results.trace)
    tokens = ", ".join(f"{part.replace('_', ' ')} {number:,}" for part, number in split.tokens.items())
    documents = ", ".join(f"{part.replace('_', ' ')} {number:,}" for part, number in split.documents.items())
    budgets = ", ".join(f"{label} = {number}" for label, number in protocol.budgets.items())
    return [
        (
            heading,
            [
                *rows,
                ("hidden size", f"{topology.hidden_size:,}"),
                ("fields", ", ".join(trace.fields)),
                ("a layer's own compute time", microseconds(trace.layer_us_p50)),
                *((f"source: {name}", str(value)) for name, value in trace.source.items()),
            ],
        ),
        (
            "Protocol",
            [
                ("split", f"by document, seed {split.seed}, hash {split.hash}"),
                ("documents", documents),
                ("tokens", tokens),
                ("held-out domain", split.held_out_domain or "none"),
                ("horizons", ", ".join(str(h) for h in protocol.horizons)),
                ("experts fetched", budgets),
                ("seeds", ", ".join(str(seed) for seed in protocol.seeds)),
                ("bootstrap draws", f"{protocol.bootstrap_draws:,}, over documents and seeds"),
                ("cache of cold-miss recall", _cache(results)),
                ("metric version", str(protocol.metric_version)),
            ],
        ),
        made_facts(results.made),
    ]
