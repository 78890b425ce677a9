"""``specmoe train`` and ``specmoe demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specmoe.cli.options import (
    AsJson,
    Device,
    Horizons,
    Only,
    Out,
    PresetName,
    RecipeFile,
    Seeds,
    TracePath,
    Workers,
    parse_horizons,
    print_json,
    resolve_device,
    resolve_recipes,
)
from specmoe.errors import SpecmoeError
from specmoe.locks import writes

__all__ = ["register"]


# Of each document: what trains everything within minutes on two cores.
_TOKENS = 384


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("train")(train)
    app.command("demo")(demo)


CacheExperts = Annotated[
    int | None,
    typer.Option(help="Experts a layer in the cache that cold-miss recall supposes; default: a quarter, at least K."),
]

Replace = Annotated[
    bool, typer.Option("--replace", help="Replace results in --out, whatever settings and predictors they are of.")
]


@writes("train")
def train(
    trace: TracePath,
    out: Out,
    only: Only = None,
    seeds: Seeds = 3,
    horizons: Horizons = "1-4",
    control: Annotated[Path | None, typer.Option(help="Trace of an untrained model, shown beside.")] = None,
    recipes: RecipeFile = None,
    preset: PresetName = None,
    cache_experts: CacheExperts = None,
    workers: Workers = None,
    device: Device = "auto",
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Train and judge predictors on a trace; killed and started again, it continues; trained before, they stay."""
    from specmoe.cli.steps import train_on
    from specmoe.cli.terminal import SafeConsole
    from specmoe.predictors.registry import select
    from specmoe.report.html import write_report
    from specmoe.report.terminal import print_results

    names = select(only or ())
    results = train_on(
        trace,
        out,
        names,
        seeds=tuple(range(seeds)),
        horizons=parse_horizons(horizons),
        control=control,
        recipes=resolve_recipes(recipes, preset),
        cache_experts=cache_experts,
        workers=workers,
        device=resolve_device(device),
        replace=replace,
    )
    kept = [predictor.name for predictor in results.predictors if predictor.name not in names]
    if kept:
        typer.echo(f"results also hold what was trained there before: {', '.join(kept)}", err=True)
    write_report(results, out / "report.html")
    if json:
        print_json(results.model_dump(mode="json"))
        return
    print_results(results, SafeConsole())
    typer.echo(f"\nresults: {out / 'results.json'}\nreport:  {out / 'report.html'}")
    if not any(predictor.status == "ok" for predictor in results.predictors):
        raise SpecmoeError("no run finished; the table above says why")


@writes("demo")
def demo(
    out: Out = Path("runs/demo"),
    seeds: Seeds = 3,
    workers: Workers = None,
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """The whole chain on the bundled model: read text, train everything, write the report."""
    from specmoe.cli.steps import collect_trace
    from specmoe.sources.corpus import standard_library

    documents = standard_library("held-out")
    trace, control = out / "trace", out / "control-trace"
    collect_trace("bundled", documents, trace, title="the model reads", max_tokens_per_document=_TOKENS)
    options = {"untrained": True, "max_tokens_per_document": _TOKENS // 2}
    collect_trace("bundled", documents, control, title="an untrained one too", **options)
    train(trace, out, seeds=seeds, control=control, workers=workers, device="cpu", replace=replace, json=json)
