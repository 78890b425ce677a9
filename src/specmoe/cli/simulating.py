"""``specmoe simulate``: what prefetching brings on a stated machine, with everything charged for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specmoe.cli.options import (
    LARGEST_EXPERT,
    AsJson,
    Device,
    Out,
    TracePath,
    finite,
    parse_horizons,
    print_json,
    resolve_device,
)
from specmoe.cli.stages import StageLine
from specmoe.errors import SpecmoeError
from specmoe.locks import writes

if TYPE_CHECKING:
    from specmoe.offload.hardware.profile import Hardware
    from specmoe.offload.results import SimulationResults

__all__ = ["View", "hardware_of", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("simulate")(simulate)


@writes("simulate")
def simulate(
    trace: TracePath,
    out: Out,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of a finished `specmoe train` on this trace.")
    ] = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option(help="Names or patterns like 'Token*', may be given several times; default: the best ones."),
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
    policy: Annotated[str, typer.Option(help="Of eviction, wherever nothing else is said.")] = "lru",
    policies: Annotated[
        str | None, typer.Option(help="Of the miss-ratio curves, like lru,slru,sieve; default: all.")
    ] = None,
    admission: Annotated[
        list[str] | None,
        typer.Option(
            help="What is prefetched: top:b, confidence:p or expected-value; may be given several times. Default: "
            "all three for the best predictor, expected-value for the others."
        ),
    ] = None,
    horizons: Annotated[
        str | None, typer.Option(help="MoE layers ahead, like 1-4; default: those of the run, or 1-4.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences side by side.")] = 1,
    replay: Annotated[
        str | None,
        typer.Option(help="trace: prompts at once, as recorded; decode: all token by token. Default: what fits."),
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, max=1 << 30, help="Tokens of a prompt in one step, at most.")
    ] = 512,
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
    timeline: Annotated[
        int, typer.Option(min=0, max=10_000_000, help="Spans of OUT/timeline.json, for ui.perfetto.dev; 0: none.")
    ] = 0,
    figures: Annotated[str | None, typer.Option(help="svg or png: also write the three plots as pictures.")] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Simulate caches, links and prefetches: hits, bytes, stalls, tokens/s; started again after a kill, it goes on."""
    from specmoe.offload.page import write_figures, write_simulation_page
    from specmoe.offload.study import Settings, simulate_trace

    if replay not in (None, "trace", "decode"):
        raise SpecmoeError(f"--replay {replay!r} is not known; use trace or decode")
    if figures not in (None, "svg", "png"):
        raise SpecmoeError(f"--figures {figures!r} is not known; use svg or png")
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
        policies=tuple(name.strip() for name in policies.split(",")) if policies else (),
        predictors=tuple(predictor or ()),
        admissions=tuple(admission or ()),
        horizons=parse_horizons(horizons) if horizons else None,
        prediction_seconds=predictor_seconds,
        part=documents,
        max_tokens=max_tokens,
        replay=replay,
        batch=batch,
        prefill_chunk=prefill_chunk,
    )
    with View() as view:
        results = simulate_trace(
            trace,
            out,
            settings,
            run=run,
            device=resolve_device(device),
            timeline=timeline,
            on_stage=view.stage,
            on_run=view.run,
        )
    page = out / "simulation.html"
    write_simulation_page(results, page)
    pictures = write_figures(results, out, figures) if figures else []
    if json:
        print_json(results.model_dump(mode="json"))
        return
    _tell(results)
    typer.echo(f"\nresults: {out / 'simulation.json'}\nreport:  {page}")
    for picture in pictures:
        typer.echo(f"figure:  {picture}")
    if timeline:
        typer.echo(f"timeline (open in ui.perfetto.dev): {out / 'timeline.json'}")


def hardware_of(name: str, bandwidth: float | None, latency: float | None) -> tuple[Hardware, tuple[str, ...]]:
    """The profile with the link into the device changed, and in words what was changed."""
    from specmoe.offload.hardware.profile import load_hardware

    hardware, changed, update = load_hardware(name), [], {}
    if bandwidth is not None:
        if not 1e-9 <= bandwidth < 1e9:
            raise SpecmoeError(f"--bandwidth {bandwidth:g}: give GB/s above 0 (0.000000001 is one byte a second)")
        update["bandwidth"] = bandwidth * 1e9
        changed.append(f"bandwidth of the link into the device: {bandwidth:g} GB/s")
    if latency is not None:
        if not 0 <= latency < 1e9:
            raise SpecmoeError(f"--latency {latency:g}: give µs, 0 or more")
        update["latency"] = latency * 1e-6
        changed.append(f"fixed cost of its transfers: {latency:g} µs")
    links = (*hardware.links[:-1], hardware.links[-1].model_copy(update=update))
    return hardware.model_copy(update={"links": links}), tuple(changed)


def _tell(results: SimulationResults) -> None:
    from rich.table import Table

    from specmoe.cli.terminal import SafeConsole
    from specmoe.offload.words import found, run_table

    columns, rows = run_table(results)
    table = Table(title=f"{results.demand.tokens:,} tokens of {results.trace.topology.model_id}")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = SafeConsole()
    # In a pipe nothing may be cut to the width of a terminal that is not there.
    (console if console.is_terminal else SafeConsole(width=200)).print(table)
    typer.echo("\n".join(found(results)))


class View(StageLine):
    """What is done now, and how many runs are done."""

    def run(self, done: int, total: int, key: str) -> None:
        """Say which run is next."""
        self.show("simulating", done, total, key)
