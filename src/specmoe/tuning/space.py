"""A predictor's search space, as Optuna wants it, and what a trial's parameters change in its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from specmoe.errors import unknown_name
from specmoe.predictors.base import Predictor, Recipe
from specmoe.predictors.recipes import CHANGEABLE
from specmoe.predictors.search import Choice, SearchSpace

__all__ = ["changes_of", "distributions_of", "space_of", "start_of"]


def space_of(kind: type[Predictor], *, soft: bool) -> SearchSpace:
    """Where to look: the recipe's search space without what has no effect, widened to hold the recipe in force.

    Args:
        kind: the predictor under the recipe in force. soft: whether the trace has router logits to aim at.

    Raises:
        SpecmoeError: the space names something that cannot be changed.
    """
    recipe = kind.recipe
    space = recipe.search
    for name in space:
        if name not in CHANGEABLE:
            raise unknown_name(f"recipe field in the search space of {kind.__name__}", name, CHANGEABLE)
    if "soft_targets" not in space:
        # Soft targets are not smoothed, and hard ones have no sharpness.
        space = space.but(**{"label_smoothing" if soft and recipe.soft_targets else "sharpness": None})
    if recipe.scheduler != "cosine" and "scheduler" not in space:
        space = space.but(warmup=None)
    return SearchSpace(**{name: place.holding(getattr(recipe, name)) for name, place in space.items()})


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The same for Optuna."""
    found: dict[str, BaseDistribution] = {}
    for name, place in space.items():
        if isinstance(place, Choice):
            found[name] = CategoricalDistribution(place.values)
        elif place.whole:
            found[name] = IntDistribution(int(place.low), int(place.high), log=place.log)
        else:
            found[name] = FloatDistribution(place.low, place.high, log=place.log)
    return found


def start_of(space: SearchSpace, recipe: Recipe) -> dict[str, Any]:
    """The recipe in force as a point of the space."""
    return {name: getattr(recipe, name) for name in space}


def changes_of(parameters: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What a trial's parameters change in the recipe in force, rounded to four digits that a person can read."""
    changes = {}
    for name, value in parameters.items():
        if value != getattr(recipe, name):
            changes[name] = float(f"{value:.4g}") if isinstance(value, float) else value
    return changes
