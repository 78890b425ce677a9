"""Options that several verbs share, and how their texts become values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from specmoe.errors import SpecmoeError

__all__ = [
    "LARGEST_EXPERT",
    "LARGEST_SEED",
    "AsJson",
    "Device",
    "Horizons",
    "Only",
    "Out",
    "PresetName",
    "RecipeFile",
    "Seeds",
    "TracePath",
    "Workers",
    "finite",
    "parse_horizons",
    "print_json",
    "resolve_device",
    "resolve_recipes",
]

# Times the million by which seeds are spread, still one that PyTorch's generators take.
LARGEST_SEED = 1 << 42
# Bytes, as a topology has it; importing that here would make every --help wait for pydantic.
LARGEST_EXPERT = 1 << 35
_MOST_HORIZON = 1024

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]

TracePath = Annotated[Path, typer.Argument(help="Directory of a trace.")]
Only = Annotated[list[str] | None, typer.Option(help="Names or patterns like 'Tiny*'; may be given several times.")]
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Runs of each learned predictor.")]
Horizons = Annotated[str, typer.Option(help="MoE layers ahead, like 1-4 or 1,3,5.")]
Workers = Annotated[int | None, typer.Option(min=1, max=4096, help="Processes; default: one a core.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipes", help="JSON file of changed recipes, as `specmoe tune` writes.")
]
PresetName = Annotated[str | None, typer.Option("--preset", help="Named recipes, like seed; --recipes goes on top.")]


def parse_horizons(text: str) -> tuple[int, ...]:
    """``1-4`` or ``1,3,5`` as sorted numbers.

    Raises:
        SpecmoeError: it is neither.
    """
    horizons: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            low, high = int(first), int(last or first)
            # Before the range is built, which may be as long as memory is large.
            if low < 1 or high > _MOST_HORIZON:
                raise SpecmoeError(f"--horizons {text!r}: each must lie between 1 and {_MOST_HORIZON}")
            horizons.update(range(low, high + 1))
    except ValueError as error:
        raise SpecmoeError(f"--horizons {text!r} is not a list like 1-4 or 1,3,5") from error
    if not horizons:
        raise SpecmoeError(f"--horizons {text!r} names none; give a list like 1-4 or 1,3,5")
    return tuple(sorted(horizons))


def finite(value: float | None) -> float | None:
    """Callback of options whose value is a number: NaN passes every bound, and what is too large becomes infinite.

    Raises:
        typer.BadParameter: it is NaN or infinite.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number to work with.")
    return value


def resolve_device(device: str) -> str:
    """``auto`` becomes what is there.

    Raises:
        SpecmoeError: unknown, or a GPU was asked for and there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not device.startswith("cuda"):
        raise SpecmoeError(f"--device {device!r} is not known; use auto, cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SpecmoeError("--device cuda: torch sees no GPU here; use --device cpu")
    return device


def resolve_recipes(file: Path | None, preset: str | None) -> dict[str, dict[str, Any]]:
    """What recipes are changed to: those of a preset, and on top of them those of a file.

    Raises:
        SpecmoeError: an unknown preset, or a file whose names or values do not hold.
    """
    from specmoe.predictors.presets import preset as preset_of
    from specmoe.predictors.recipes import load_recipes, merged

    return merged(preset_of(preset) if preset else {}, load_recipes(file) if file else {})


def print_json(value: Any) -> None:
    """Print JSON for scripts."""
    print(json.dumps(value, indent=1, allow_nan=False))
