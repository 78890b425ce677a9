"""``specmoe validate``: is this trace worth anything?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specmoe.cli.options import AsJson, print_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("validate")(validate)


def validate(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    json: AsJson = False,
) -> None:
    """Say what a trace holds and what is wrong with it; exit code 1 if a finding is an error."""
    import torch

    from specmoe.cli.progress import ProgressLine
    from specmoe.diagnostics import validate_trace
    from specmoe.diagnostics.page import page

    # Documents are small beside what a second thread costs to wake; on a busy machine it makes reading slower.
    torch.set_num_threads(1)
    with ProgressLine("validating") as line:
        result = validate_trace(trace, lambda done, total: line.update(done, total, f"{done:,} tokens"))
    if json:
        print_json(result.model_dump(mode="json"))
    else:
        typer.echo(page(result))
    if result.has_errors:
        raise typer.Exit(1)
