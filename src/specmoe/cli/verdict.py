"""``specmoe verdict``: whether to prefetch here, on one page, with an exit code for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specmoe.cli.options import LARGEST_EXPERT, AsJson, Device, Out, TracePath, finite, print_json, resolve_device
from specmoe.errors import SpecmoeError
from specmoe.locks import writes

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("verdict")(verdict)


@writes("verdict")
def verdict(
    trace: TracePath,
    out: Out,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of a finished `specmoe train` on this trace.")
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="The one to judge; default: the best on the validation part.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="A ready profile (`specmoe hardware list`) or a file of `specmoe hardware measure`.")
    ] = "rtx-4090",
    bandwidth: Annotated[
        float | None, typer.Option(callback=finite, help="GB/s of the link into the device, instead.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(callback=finite, help="µs that each of its transfers costs, instead.")
    ] = None,
    capacity: Annotated[str, typer.Option(help="That the device holds: 25% of all experts, 8GiB, or 32.")] = "25%",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Each layer has its own part of it.")] = False,
    host_capacity: Annotated[
        str | None, typer.Option(help="That the host holds, with three tiers; default: all.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Of eviction, as it is now.")] = "lru",
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences side by side.")] = 1,
    expert_bytes: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_EXPERT, help="Size of an expert; default: the trace's.")
    ] = None,
    predictor_seconds: Annotated[
        float | None,
        typer.Option(
            min=0, max=1e6, callback=finite, help="That a prediction takes; default: as measured in the run, else 0."
        ),
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            help="test: those that no predictor has seen; all: every one, without --run and --predictor for caches and "
            "the oracle alone. Default: test, or all where the trace is too small to be split."
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Whole documents up to so many tokens.")] = None,
    worth: Annotated[
        float, typer.Option(min=0, max=1000, callback=finite, help="% of tokens/s that make prefetching worth it.")
    ] = 3.0,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Should experts be prefetched here? Exit code 0: do, 1: don't, 3: not settled, 2: bad input."""
    from specmoe.cli.simulating import View, hardware_of
    from specmoe.offload.study import Settings
    from specmoe.offload.verdict.judge import judge

    if out.is_file():
        raise SpecmoeError(f"{out} is a file; name a folder with --out")
    machine, changed = hardware_of(hardware, bandwidth, latency)
    settings = Settings(
        hardware=machine,
        changed=changed,
        expert_bytes=expert_bytes,
        capacity=capacity,
        per_layer=per_layer,
        host_capacity=host_capacity,
        policy=policy,
        predictors=(predictor,) if predictor else (),
        prediction_seconds=predictor_seconds,
        part=documents,
        max_tokens=max_tokens,
        batch=batch,
    )
    with View() as view:
        judged = judge(
            trace,
            out,
            settings,
            run=run,
            worth=worth / 100,
            device=resolve_device(device),
            on_stage=view.stage,
            on_run=view.run,
        )
    if json:
        print_json(judged.as_json())
    else:
        typer.echo(judged.page)
        typer.echo(f"page: {out / 'verdict.md'}")
    raise typer.Exit(judged.verdict.answer.value)
