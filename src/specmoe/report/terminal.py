"""The results in a terminal: one ranking table, what has no result, and the five answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from specmoe.report.questions import answers, headline
from specmoe.report.select import (
    COLD_RECALL,
    RECALL,
    best_per_category,
    excludes_zero,
    groups,
    recall,
    train_seconds,
    unfinished,
)
from specmoe.report.text import NOT_MEASURED, count, duration, margin, microseconds, percent
from specmoe.results import PredictorResult, Results

__all__ = ["best_per_category", "print_results", "ranking_table", "unfinished_text"]

_RIDGE_HORIZONS = (1, 3)


def ranking_table(results: Results, width: int | None = None) -> Table:
    """The ranking: predictors grouped by what they may see, in each group best first at the first horizon.

    Recalls are in % on the test part, with the half-width of their 95 % interval; ``vs ridge`` is the paired
    difference in points, green or red where its interval excludes 0.

    Args:
        results: what was measured.
        width: columns of the terminal (default: this one's); less important columns are left out to fit.
    """
    room = shutil.get_terminal_size((100, 24)).columns if width is None else width
    parts = groups(results)
    ranked = [result for _, part in parts for result in part]
    table = Table(title=_title(results), title_justify="left", box=None, pad_edge=False, header_style="bold")
    columns = _fitting(_columns(results, ranked), ranked, room)
    for column in columns:
        table.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True)
    for _, part in parts:
        for result in part:
            table.add_row(*(column.cell(result) for column in columns))
        if part is not parts[-1][1]:
            table.add_row()
    return table


def unfinished_text(results: Results) -> str:
    """Predictors without a result and seeds that failed, each on a line with the reason; empty if none."""
    lines = [f"{r.name}: {_status(r)}: {r.reason or 'no reason given'}" for r in unfinished(results)]
    lines += [
        f"{r.name}: seed {seed.seed} failed: {seed.reason or 'no reason given'}"
        for r in results.predictors
        for seed in r.seeds
        if r.status == "ok" and seed.status == "failed"
    ]
    return "\n".join(lines)


def print_results(results: Results, console: Console | None = None) -> None:
    """Print the headline, the ranking, what has no result, and the answers to the five questions."""
    out = console or Console()
    parts: list[RenderableType] = [Text(headline(results)), "", ranking_table(results, out.width)]
    missing = unfinished_text(results)
    if missing:
        parts += ["", Text("Without a result", style="bold"), Text(missing)]
    broken = [control for control in results.controls if not control.holds]
    if results.controls:
        parts += ["", Text(f"Controls: {len(results.controls) - len(broken)} of {len(results.controls)} hold.")]
        parts += [
            Text(f"  does not hold: {c.name}: {c.value:g} {c.unit}, must be {c.expected}", style="bold red")
            for c in broken
        ]
    for number, answer in enumerate(answers(results), 1):
        parts += ["", Text(f"{number}. {answer.question}", style="bold"), Text(" ".join(answer.sentences))]
    out.print(Group(*parts), soft_wrap=False)


class _Column(NamedTuple):
    """rank: how early it is left out on a narrow terminal (0: never)."""

    heading: str
    right: bool
    rank: int
    cell: Callable[[PredictorResult], Text]


def _columns(results: Results, ranked: list[PredictorResult]) -> list[_Column]:
    horizons = results.protocol.horizons
    first = horizons[0]
    columns = [
        _Column("predictor", False, 0, lambda r: Text(r.name)),
        _Column("category", False, 60, lambda r: Text(r.category)),
        _Column("sees", False, 10, lambda r: Text(r.sees)),
        _Column("parameters", True, 40, lambda r: Text(count(r.parameters))),
    ]
    for place, h in enumerate(horizons):
        rank = 0 if h == first else 5 if h == 3 else 30 + place
        columns.append(_Column(f"h={h}, %", True, rank, partial(_recall_cell, horizon=h)))
    compared = [h for h in (_RIDGE_HORIZONS if set(_RIDGE_HORIZONS) & set(horizons) else horizons[:1]) if h in horizons]
    for h in compared:
        if any(h in r.over_ridge for r in ranked):
            columns.append(
                _Column(f"vs ridge h={h}", True, 4 if h == compared[0] else 25, partial(_ridge_cell, horizon=h))
            )
    if any("recall@2K" in r.scores for r in ranked):
        columns.append(_Column(f"2K h={first}, %", True, 45, partial(_recall_cell, horizon=first, metric="recall@2K")))
    if any(COLD_RECALL in r.scores for r in ranked):
        columns.append(
            _Column(f"cold h={first}, %", True, 42, partial(_recall_cell, horizon=first, metric=COLD_RECALL))
        )
    if any(r.latency for r in ranked):
        columns.append(
            _Column("latency", True, 20, lambda r: Text(microseconds(r.latency.p50_us if r.latency else None)))
        )
    if any(train_seconds(r) for r in ranked):
        columns.append(_Column("train/seed", True, 50, lambda r: Text(_training(r))))
    return columns


def _fitting(columns: list[_Column], ranked: list[PredictorResult], room: int) -> list[_Column]:
    """Leave out the least important columns until a row fits; 2 is the gap between columns."""
    kept = list(columns)

    def needed(column: _Column) -> int:
        return max([len(column.heading), *(column.cell(result).cell_len for result in ranked)]) + 2

    while sum(needed(column) for column in kept) - 2 > room:
        worst = max(kept, key=lambda column: column.rank)
        if worst.rank == 0:
            break
        kept.remove(worst)
    return kept


def _recall_cell(result: PredictorResult, horizon: int, metric: str = RECALL) -> Text:
    return Text(percent(recall(result, horizon, metric)))


def _ridge_cell(result: PredictorResult, horizon: int) -> Text:
    difference = result.over_ridge.get(horizon)
    style = ""
    if difference is not None and excludes_zero(difference):
        style = "green" if difference.value > 0 else "red"
    return Text(margin(difference), style=style)


def _training(result: PredictorResult) -> str:
    return duration(train_seconds(result)) if result.seeds else NOT_MEASURED


def _status(result: PredictorResult) -> str:
    return "no recall measured" if result.status == "ok" else result.status


def _title(results: Results) -> Text:
    top_k, experts = results.trace.topology.top_k, results.trace.topology.experts_text
    return Text(f"recall@K on the test part (K={top_k} of {experts} experts), by what a predictor may see")
