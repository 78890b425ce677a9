"""``specmoe families`` and ``specmoe formats``: what traces can come from."""

from __future__ import annotations

import typer

from specmoe.cli.options import AsJson, print_json

__all__ = ["register"]

_FACTS = {
    "bias": "correction bias",
    "groups": "group limits",
    "shared": "shared experts",
    "dense": "dense layers",
    "zero": "zero experts",
}


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("families")(families)
    app.command("formats")(formats)


def families(json: AsJson = False) -> None:
    """List the model families that can be captured, and how each of them routes."""
    from specmoe.sources.families import EXCLUDED, FAMILIES

    rows = [
        {
            "family": family.name,
            "scoring": family.scoring,
            **{name: getattr(family, name) for name in _FACTS},
            "stacks": list(family.stacks),
            "note": family.note,
            "since": family.since,
        }
        for family in FAMILIES.values()
    ]
    if json:
        print_json({"families": rows, "left_out": EXCLUDED})
        return
    width = max(len(name) for name in FAMILIES)
    for family in FAMILIES.values():
        facts = [label for name, label in _FACTS.items() if getattr(family, name)]
        stacks = [f"stacks: {', '.join(family.stacks)}"] if len(family.stacks) > 1 else []
        notes = [family.note] if family.note else []
        typer.echo(f"{family.name:{width}}  {family.scoring:13}  {'; '.join([*facts, *stacks, *notes])}".rstrip())
    typer.echo(f"\n{len(FAMILIES)} families. Left out:")
    for name, reason in EXCLUDED.items():
        typer.echo(f"{name:{width}}  {reason}")
    typer.echo(
        "\nAnother family of the installed transformers is tried as most route, and captured if its routers, called "
        "again with what was recorded, give the recorded routes bit for bit."
    )


def formats(json: AsJson = False) -> None:
    """List the formats of other tools' traces that can be imported."""
    from specmoe.sources.importers import IMPORTERS

    if json:
        print_json([{"format": importer.name, "about": importer.about} for importer in IMPORTERS.values()])
        return
    width = max(len(name) for name in IMPORTERS)
    for importer in IMPORTERS.values():
        typer.echo(f"{importer.name:{width}}  {importer.about}")
