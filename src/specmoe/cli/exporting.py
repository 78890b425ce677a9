"""``specmoe export-trace``: our traces for other people's tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specmoe.cli.options import AsJson, print_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export-trace")(export_trace)


def export_trace(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    format: Annotated[str | None, typer.Option(help="parquet or npz; default: by the file's name.")] = None,
    hidden: Annotated[bool, typer.Option(help="Whether hidden states go along, where the trace keeps them.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: AsJson = False,
) -> None:
    """Write a trace as Parquet (one row per token) or .npz (which specmoe import reads back)."""
    from specmoe.cli.progress import ProgressLine
    from specmoe.trace import Trace
    from specmoe.trace.export import export_trace, format_of

    chosen = format_of(out, format)
    with Trace.open(trace) as opened, ProgressLine("exporting") as line:
        export_trace(opened, out, format=chosen, hidden=hidden, force=force, on_progress=line.update)
        facts = {"file": str(out), "format": chosen, "documents": len(opened), "tokens": opened.tokens}
    facts["bytes"] = out.stat().st_size
    if json:
        print_json(facts)
        return
    typer.echo(
        f"{out}: {facts['tokens']:,} tokens in {facts['documents']} documents, {facts['bytes']:,} bytes, {chosen}"
    )
