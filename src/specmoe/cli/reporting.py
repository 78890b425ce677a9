"""``specmoe report``: the report of a results file, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specmoe.cli.options import AsJson, print_json
from specmoe.errors import SpecmoeError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report")(report)


def report(
    results: Annotated[Path, typer.Argument(help="A results.json.")],
    html: Annotated[Path | None, typer.Option(help="Where the page goes; default: beside the results.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw the ranking as a PNG or SVG file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that this command did not make.")] = False,
    json: AsJson = False,
) -> None:
    """Show results again: the table here, the page as a file."""
    from specmoe.cli.terminal import SafeConsole
    from specmoe.files import may_replace, remove_leftovers
    from specmoe.report.charts import is_figure, ranking_figure
    from specmoe.report.html import write_report
    from specmoe.report.page import is_page
    from specmoe.report.terminal import print_results
    from specmoe.results import Results

    loaded = Results.load(results)
    page = html or results.with_name("report.html")
    may_replace(page, is_ours=is_page, force=force, read=(results,))
    if figure is not None:
        may_replace(figure, is_ours=is_figure, force=force, read=(results, page))
        if figure.resolve() == page.resolve():
            raise SpecmoeError(f"--html and --figure are both {figure}; name two files")
    for file in filter(None, (page, figure)):
        remove_leftovers(file.parent, file.name)
    write_report(loaded, page)
    if figure is not None:
        ranking_figure(loaded, figure)
    if json:
        print_json(loaded.model_dump(mode="json"))
        return
    print_results(loaded, SafeConsole())
    typer.echo(f"\nreport: {page}")
