"""``specmoe compare``: two results, the difference and whether it is one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specmoe.cli.options import AsJson, print_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compare")(compare)


def compare(
    a: Annotated[str, typer.Argument(help="A results.json or its folder, :NAME added for one predictor of it.")],
    b: Annotated[str, typer.Argument(help="What to compare it with. With --results: two predictors' names.")],
    results: Annotated[Path | None, typer.Option(help="Compare two predictors of this results.json.")] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Only this many layers ahead.")] = None,
    metric: Annotated[str, typer.Option(help="A metric that the files keep per document.")] = "recall@K",
    json: AsJson = False,
) -> None:
    """Is A better than B? The paired difference with its interval; refused where the two do not compare."""
    from specmoe.report.comparison import compare as compared
    from specmoe.report.comparison import comparison_rows, read_side, side_of
    from specmoe.results import Results

    if results is None:
        sides = read_side(a), read_side(b)
    else:
        path = results / "results.json" if results.is_dir() else results
        loaded = Results.load(path)
        sides = side_of(path, loaded, a), side_of(path, loaded, b)
    found = compared(*sides, metric=metric, horizon=horizon)
    if json:
        print_json(found.as_json())
        return
    names = found.names()
    typer.echo(f"A: {names[0]}\nB: {names[1]}\n{metric} on the test part, 95 % intervals\n")
    rows = [("", "A", "B", "A − B"), *comparison_rows(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    typer.echo("\n" + "\n".join(found.sentences()))
