"""The model that comes with the package, so that a demonstration needs no download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from specmoe.errors import SpecmoeError

__all__ = ["bundled_model"]

_NAME = "olmoe-stdlib"


def bundled_model() -> Path:
    """Directory of the bundled model: weights, configuration, tokenizer and card.

    Raises:
        SpecmoeError: this installation lacks its weights.
    """
    directory = Path(str(files("specmoe"))) / "assets" / _NAME
    if not (directory / "model.safetensors").is_file():
        raise SpecmoeError(
            f"the bundled model is missing ({directory} has no model.safetensors); "
            "install the package again, or make one with: specmoe pretrain"
        )
    return directory
