"""``specmoe hardware``: the machines to simulate, and measuring the one at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specmoe.cli.options import LARGEST_EXPERT, AsJson, print_json

if TYPE_CHECKING:
    from specmoe.offload.hardware.profile import Hardware

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    verbs = typer.Typer(help="Machines to simulate: ready profiles, and measuring this one.", no_args_is_help=True)
    verbs.command("list")(list_)
    verbs.command("show")(show)
    verbs.command("measure")(measure)
    app.add_typer(verbs, name="hardware")


def list_(json: AsJson = False) -> None:
    """Every ready profile with its links and its device."""
    from rich.table import Table

    from specmoe.cli.terminal import SafeConsole
    from specmoe.offload.hardware.profile import load_hardware, ready_hardware

    profiles = [load_hardware(name) for name in ready_hardware()]
    if json:
        print_json([profile.model_dump(mode="json") for profile in profiles])
        return
    table = Table(title="Ready hardware profiles (specmoe hardware show NAME has the sources)")
    for column in ("name", "what", "links, GB/s", "fixed cost, µs", "memory, GB/s", "TFLOP/s"):
        table.add_column(column, justify="left" if column in {"name", "what"} else "right")
    for profile in profiles:
        table.add_row(
            profile.name,
            profile.description,
            ", ".join(f"{link.bandwidth / 1e9:.3g}" for link in profile.links),
            ", ".join(f"{link.latency * 1e6:.3g}" for link in profile.links),
            f"{profile.compute.memory_bandwidth / 1e9:,.4g}",
            f"{profile.compute.flops / 1e12:,.4g}",
        )
    SafeConsole().print(table)


def show(
    name: Annotated[str, typer.Argument(help="A ready profile's name, or a file that measure wrote.")],
    json: AsJson = False,
) -> None:
    """One profile with the source of every figure."""
    from specmoe.offload.hardware.profile import load_hardware

    profile = load_hardware(name)
    if json:
        print_json(profile.model_dump(mode="json"))
        return
    _tell(profile)


def measure(
    out: Annotated[Path, typer.Option("--out", help="File to write the profile to (JSON).")],
    folder: Annotated[
        Path | None, typer.Option(help="On the disk that would hold the experts; default: where --out lies.")
    ] = None,
    expert_bytes: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST_EXPERT, help="Also read in this size; default: that of --model's experts."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory, hub id or 'bundled': time its layers and experts too.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of --model: float32, bfloat16, float16, or auto: as stored.")] = "float32",
    name: Annotated[str | None, typer.Option(help="Of the profile; default: the file's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, shorter: a look, not a measurement.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no profile.")] = False,
    json: AsJson = False,
) -> None:
    """Measure this machine's disk, memory, GPU and computing, and save the profile."""
    from specmoe.cli.progress import ProgressLine
    from specmoe.errors import SpecmoeError
    from specmoe.files import disk_errors, may_replace, remove_leftovers
    from specmoe.offload.hardware.measure.run import FULL, QUICK, measure_hardware
    from specmoe.offload.hardware.profile import is_profile

    if out.is_dir():
        raise SpecmoeError(f"{out} is a folder; name a file with --out, such as {out / 'this-machine.json'}")
    # A place that cannot be written to should be known before the measurement, not after.
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    may_replace(out, is_ours=is_profile, force=force)
    remove_leftovers(out.parent, out.name)
    with ProgressLine("measuring") as line:
        profile = measure_hardware(
            folder if folder is not None else out.parent,
            name=name or out.stem,
            expert_bytes=expert_bytes,
            model=model,
            dtype=dtype,
            plan=QUICK if quick else FULL,
            on_progress=line.update,
        )
    profile.save(out)
    if json:
        print_json(profile.model_dump(mode="json"))
        return
    _tell(profile)
    typer.echo(f"written to {out}")


def _tell(profile: Hardware) -> None:
    typer.echo(f"{profile.name}: {profile.description}\n  {profile.source}")
    for link in profile.links:
        typer.echo(
            f"  {link.name}: {link.bandwidth / 1e9:.3g} GB/s, {link.latency * 1e6:.3g} µs for each transfer, "
            f"{link.parallelism} at once\n    {link.source}"
        )
    compute = profile.compute
    typer.echo(
        f"  computing: reads {compute.memory_bandwidth / 1e9:,.4g} GB/s, {compute.flops / 1e12:,.3g} TFLOP/s, "
        f"{compute.kernel_seconds * 1e6:.3g} µs to start a layer\n    {compute.source}"
    )
    for cost in compute.models:
        typer.echo(
            f"  {cost.model_id}: layer {cost.layer_seconds * 1e6:,.4g} µs, expert {cost.expert_seconds * 1e6:,.3g} µs "
            f"and {cost.token_seconds * 1e6:,.3g} µs for each further token, "
            f"rest of a step {cost.other_seconds * 1e6:,.4g} µs"
        )
    if profile.memory_bytes is not None:
        typer.echo(f"  device memory: {profile.memory_bytes / 1e9:,.0f} GB")
    copy = (profile.measured or {}).get("host_copy")
    if copy:
        typer.echo(f"  copies in host memory: {copy['bandwidth'] / 1e9:.3g} GB/s on one thread")
    disk = (profile.measured or {}).get("disk")
    if disk:
        typer.echo(
            f"  disk: {disk['best_throughput'] / 1e9:.3g} GB/s at best with {disk['best_depth']} reads at once "
            f"({disk['best_throughput_over_bandwidth']:.2f} × the link's bandwidth); "
            f"a lone read is within {100 * disk['largest_error_alone']:.0f} % of the link"
        )
