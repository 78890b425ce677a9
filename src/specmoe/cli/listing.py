"""``specmoe list``: what there is to choose from."""

from __future__ import annotations

import typer

from specmoe.cli.options import AsJson, print_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("list")(list_)


def list_(json: AsJson = False) -> None:
    """Every predictor with its category, what it needs, its size and its source."""
    from rich.table import Table

    from specmoe.cli.terminal import SafeConsole
    from specmoe.predictors.catalogue import catalogue

    entries = catalogue()
    if json:
        print_json([vars(entry) for entry in entries])
        return
    table = Table(title="Predictors (parameters at the reference topology and at the demo's)")
    for column in ("predictor", "category", "sees", "needs", "reference", "demo", "source"):
        table.add_column(column, justify="right" if column in {"reference", "demo"} else "left")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.category,
            entry.sees,
            ", ".join(entry.needs) or "–",
            f"{entry.reference_parameters:,}",
            f"{entry.demo_parameters:,}",
            entry.source,
        )
    SafeConsole().print(table)
