"""The registry as a table: what every predictor is, needs and weighs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from specmoe.predictors.base import parameter_count
from specmoe.predictors.presets import PRESETS
from specmoe.predictors.recipes import values_of
from specmoe.predictors.registry import PREDICTORS
from specmoe.topology import REFERENCE, Topology

__all__ = ["DEMO", "CatalogueEntry", "catalogue"]

# The bundled model's shape.
DEMO = Topology(model_id="olmoe-stdlib", layers=8, experts=16, top_k=2, hidden_size=128)


@dataclass(frozen=True)
class CatalogueEntry:
    """One predictor. Parameters are counted at the reference topology and at the demo's.

    Attributes:
        recipe: the fields that can be changed, with their values; empty if it is not trained.
        search: field → where a search looks. presets: preset → what it changes in the recipe.
    """

    name: str
    category: str
    sees: str
    needs: tuple[str, ...]
    source: str
    reference_parameters: int
    demo_parameters: int
    learning_rate: float
    epochs: int
    recipe: dict[str, Any]
    search: dict[str, dict[str, Any]]
    presets: dict[str, dict[str, Any]]


def catalogue() -> list[CatalogueEntry]:
    """All predictors, in the registry's order."""
    entries = []
    for name, predictor in PREDICTORS.items():
        recipe = predictor.recipe
        # On the meta device nothing is allocated or initialised: only shapes count.
        with torch.device("meta"):
            sizes = [parameter_count(predictor(topology)) for topology in (REFERENCE, DEMO)]
        needs = tuple(sorted(recipe.needs))
        rate, epochs = recipe.learning_rate, recipe.epochs
        learned = epochs > 0
        entries.append(
            CatalogueEntry(
                name,
                recipe.category,
                recipe.sees,
                needs,
                recipe.source,
                sizes[0],
                sizes[1],
                rate,
                epochs,
                recipe=values_of(recipe) if learned else {},
                search={field: asdict(place) for field, place in recipe.search.items()} if learned else {},
                presets={title: dict(each.recipes[name]) for title, each in PRESETS.items() if name in each.recipes},
            )
        )
    return entries
