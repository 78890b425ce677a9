"""``specmoe pretrain``: the recipe of the bundled models."""

from __future__ import annotations

from typing import Annotated

import typer

from specmoe.cli.options import LARGEST_SEED, AsJson, Device, Out, finite, print_json, resolve_device
from specmoe.locks import writes

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("pretrain")(pretrain)


@writes("pretrain")
def pretrain(
    out: Out,
    shape: Annotated[
        str, typer.Option(help="olmoe (8 layers × 16, top-2), olmoe-32x4 (top-4 of 32) or switch (top-1).")
    ] = "olmoe",
    steps: Annotated[
        int, typer.Option(min=1, max=10**9, help="Optimizer steps; about one a second on one core.")
    ] = 4400,
    batch: Annotated[int, typer.Option(min=1, max=1 << 16, help="Sequences a step.")] = 4,
    context: Annotated[int, typer.Option(min=16, max=1 << 17, help="Tokens a sequence.")] = 512,
    vocabulary: Annotated[int, typer.Option(min=300, max=1 << 20, help="Tokens of the byte-level BPE.")] = 2048,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, max=10.0, callback=finite, help="Peak learning rate.")
    ] = 3e-3,
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Of weights and order.")] = 0,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(min=1, max=4096, help="CPU threads; one is fastest beside other work.")] = 1,
    json: AsJson = False,
) -> None:
    """Train a small MoE language model on the standard library; killed and started again, it continues."""
    import torch

    from specmoe.cli.progress import ProgressLine
    from specmoe.sources.pretraining import PretrainConfig, Progress
    from specmoe.sources.pretraining import pretrain as run

    torch.set_num_threads(threads)
    config = PretrainConfig(
        shape=shape,
        steps=steps,
        batch=batch,
        context=context,
        vocabulary=vocabulary,
        learning_rate=learning_rate,
        seed=seed,
    )
    with ProgressLine(f"pretraining {shape}") as line:

        def show(progress: Progress) -> None:
            note = f"loss {progress.loss:.3f} nats/token, {100 * progress.dead_experts:.0f} % idle experts"
            line.update(progress.step, progress.steps, note)

        facts = run(out, config, device=resolve_device(device), on_step=show)
    if json:
        print_json(facts)
        return
    typer.echo(f"{out}: {facts['held_out']['bits_per_character']} bits a character on held-out files")
