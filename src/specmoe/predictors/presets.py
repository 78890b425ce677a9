"""Recipes of earlier times, to be had by name: what is measured now can be measured under them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specmoe.errors import unknown_name
from specmoe.predictors.recipes import Recipes

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True)
class Preset:
    """Overrides by predictor, and what is known of where they come from."""

    note: str
    recipes: Recipes


_ATTENTION = ("ContextualGatingPredictor", "TransformerGatingPredictor", "HierarchicalGatingPredictor")
_OTHERS = (
    "LayerSpecificPredictor",
    "HierarchicalEnsemble",
    "ImprovedPredictor",
    "TinySpeculationModel",
    "SmallSpeculationModel",
    "RegularizedSpeculationModel",
)
_SEED: dict[str, Any] = {"label_smoothing": 0.1, "clip": 1.0, "patience": 7, "soft_targets": True}


def _release(rate: float, epochs: int, batch: int = 32, scheduler: str = "plateau", **more: Any) -> dict[str, Any]:
    fixed = {"sharpness": 0.66, "weight_decay": 0.01, "warmup": 0.0, "width": 1.0, "dropout": 0.0}
    fixed |= {"window": 16, "objective": "distribution"}
    named = {"learning_rate": rate, "epochs": epochs, "batch_windows": batch, "scheduler": scheduler}
    return {**_SEED, **fixed, **named, **more}


PRESETS: dict[str, Preset] = {
    "seed": Preset(
        "the original research script's ingredients: batch, scheduler, label smoothing, clipping, patience, soft "
        "targets; its learning rates and epochs are not on record, so those of the recipe in force stand",
        {
            **{name: {**_SEED, "batch_windows": 16, "scheduler": "cosine"} for name in _ATTENTION},
            **{name: {**_SEED, "batch_windows": 32, "scheduler": "plateau"} for name in _OTHERS},
        },
    ),
    "0.1.0": Preset(
        "every value as it was in version 0.1.0",
        {
            "ContextualGatingPredictor": _release(2.5e-3, 5, 16, "cosine"),
            "TransformerGatingPredictor": _release(2e-3, 6, 16, "cosine"),
            "HierarchicalGatingPredictor": _release(2.5e-3, 6, 16, "cosine"),
            "LayerSpecificPredictor": _release(2.5e-3, 7),
            "HierarchicalEnsemble": _release(2.5e-3, 4),
            "ImprovedPredictor": _release(3e-3, 6),
            "TinySpeculationModel": _release(6e-3, 8),
            "SmallSpeculationModel": _release(5e-3, 8),
            "RegularizedSpeculationModel": _release(3e-3, 7, weight_decay=0.05, dropout=0.1),
        },
    ),
}


def preset(name: str) -> Recipes:
    """The overrides of a preset.

    Raises:
        SpecmoeError: there is none of this name.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name].recipes
