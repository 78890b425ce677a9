"""Recipes that can be changed: overrides with checked values, files of them, and the class they make.

An override names a predictor and some fields of its recipe. It makes a class of the same name that differs in
nothing but its recipe, so that everything that works on a predictor works on one with another recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import read_json
from specmoe.predictors.base import Objective, Predictor, Recipe, Scheduler
from specmoe.predictors.registry import PREDICTORS

__all__ = ["CHANGEABLE", "Recipes", "kind_of", "load_recipes", "merged", "values_of", "with_recipe"]

Recipes: TypeAlias = Mapping[str, Mapping[str, Any]]

# Field → smallest and largest value, and whether it may be these.
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "learning_rate": (0.0, 10.0, "(]"),
    "epochs": (1, 100_000, "[]"),
    "batch_windows": (1, 1_000_000, "[]"),
    "window": (2, 1_000_000, "[]"),
    "label_smoothing": (0.0, 1.0, "[)"),
    "sharpness": (0.0, 1.0, "()"),
    "patience": (1, 100_000, "[]"),
    "clip": (0.0, math.inf, "()"),
    "weight_decay": (0.0, 10.0, "[]"),
    "warmup": (0.0, 1.0, "[)"),
    "width": (0.0, 64.0, "(]"),
    "dropout": (0.0, 1.0, "[)"),
}
_WHOLE = frozenset({"epochs", "batch_windows", "window", "patience"})
_NAMED: dict[str, tuple[Any, ...]] = {
    "scheduler": get_args(Scheduler),
    "objective": get_args(Objective),
    "soft_targets": (True, False),
}

CHANGEABLE: tuple[str, ...] = (*_BOUNDS, *_NAMED)


def with_recipe(kind: type[Predictor], **changes: Any) -> type[Predictor]:
    """A class of the same name whose recipe has other values; ``kind`` itself if there are none.

    Raises:
        SpecmoeError: a field that no recipe has or that cannot be changed, a value of the wrong type or out of its
            range, or a predictor that is not trained.
    """
    if not changes:
        return kind
    if kind.recipe.epochs == 0:
        raise SpecmoeError(f"{kind.__name__} has no recipe to change: it is not trained; take it out")
    recipe = replace(kind.recipe, **{name: _checked(kind, name, value) for name, value in changes.items()})
    facts = {"recipe": recipe, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), facts)


def values_of(recipe: Recipe) -> dict[str, Any]:
    """The fields that can be changed, with their values."""
    return {name: getattr(recipe, name) for name in CHANGEABLE}


def kind_of(name: str, recipes: Recipes) -> type[Predictor]:
    """The predictor of a name, under the recipe that ``recipes`` gives it, if any.

    Raises:
        SpecmoeError: no such predictor, or what :func:`with_recipe` raises.
    """
    if name not in PREDICTORS:
        raise unknown_name("predictor", name, PREDICTORS)
    return with_recipe(PREDICTORS[name], **recipes.get(name, {}))


def load_recipes(path: Path) -> Recipes:
    """Read a recipe file: JSON, ``{"TinySpeculationModel": {"learning_rate": 0.003}, …}``.

    Raises:
        SpecmoeError: missing, no such JSON, or a name or value that does not hold.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(changes, dict) for changes in content.values()):
        raise SpecmoeError(f'{path} is no recipe file: it must look like {{"PREDICTOR": {{"learning_rate": 0.003}}}}')
    for name in content:
        try:
            kind_of(name, content)
        except SpecmoeError as error:
            raise SpecmoeError(f"{path}: {error}") from error
    return content


def merged(*recipes: Recipes) -> dict[str, dict[str, Any]]:
    """Overrides laid over each other, field by field; later ones win."""
    result: dict[str, dict[str, Any]] = {}
    for some in recipes:
        for name, changes in some.items():
            result[name] = {**result.get(name, {}), **changes}
    return result


def _checked(kind: type[Predictor], name: str, value: Any) -> Any:
    """``value`` in the type that the recipe keeps it in."""
    where = f"{kind.__name__}.{name}"
    if name not in CHANGEABLE:
        raise unknown_name(f"recipe field of {kind.__name__}", name, CHANGEABLE)
    if name in _NAMED:
        options = _NAMED[name]
        if not any(value == option and type(value) is type(option) for option in options):
            said = " or ".join(str(option).lower() for option in options)
            raise SpecmoeError(f"{where} is {value!r}; it must be {said}")
        return value
    # Not math.isfinite: an integer may be too large for it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        raise SpecmoeError(f"{where} is {value!r}; it must be a number")
    if name in _WHOLE and value != int(value):
        raise SpecmoeError(f"{where} is {value!r}; it must be a whole number")
    low, high, ends = _BOUNDS[name]
    if value < low or value > high or (value == low and ends[0] == "(") or (value == high and ends[1] == ")"):
        least = f"{'more than' if ends[0] == '(' else 'at least'} {low:g}"
        most = f" and {'less than' if ends[1] == ')' else 'at most'} {high:g}" if math.isfinite(high) else ""
        raise SpecmoeError(f"{where} is {value!r}; it must be {least}{most}")
    return int(value) if name in _WHOLE else float(value)
