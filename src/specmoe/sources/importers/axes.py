"""Which axis of an array of experts is which: as the user says, else as the number of tokens tells.

The usual order is [tokens, layers, k]. Engines' buffers are often [layers, tokens, k], and nothing in such an array
says so: imported as it stands, layers become tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError

__all__ = ["LAYERS_FIRST", "TurnedRows", "arranged", "axes_doubt", "axes_of", "layers_first", "order_of"]

LAYERS_FIRST = ("layers", "tokens", "k")
_USUAL = ("tokens", "layers", "k")
# No model has so many, and requests often have.
_MOST_LAYERS = 256


def axes_of(text: str) -> tuple[str, ...]:
    """The axes that ``--axes`` names, such as ``layers,tokens,k`` or ``batch,tokens,layers,k``.

    Raises:
        SpecmoeError: a name is unknown, missing or there twice.
    """
    names = tuple(name.strip().lower() for name in text.split(","))
    if sorted(set(names) - {"batch"}) != sorted(_USUAL) or len(set(names)) != len(names):
        raise SpecmoeError(
            f"--axes {text!r} must name tokens, layers and k once each, in the array's order, and perhaps batch"
        )
    return names


def order_of(shape: Sequence[int], name: str, axes: Sequence[str]) -> tuple[int, ...]:
    """Where tokens, layers and k are among an array's axes.

    Raises:
        SpecmoeError: it has another number of axes, or a batch of more than one.
    """
    if len(shape) != len(axes):
        raise SpecmoeError(f"{name} has shape {tuple(shape)}, but --axes names {len(axes)}: {','.join(axes)}")
    if "batch" in axes and shape[axes.index("batch")] != 1:
        raise SpecmoeError(
            f"{name} has shape {tuple(shape)}: a batch of {shape[axes.index('batch')]}; save each of its texts as an "
            "array of its own"
        )
    return tuple(axes.index(axis) for axis in _USUAL)


def arranged(array: np.ndarray, name: str, axes: Sequence[str]) -> np.ndarray:
    """A view [tokens, layers, k] of an array with these axes.

    Raises:
        SpecmoeError: as :func:`order_of`.
    """
    order = order_of(array.shape, name, axes)
    batch = tuple(axis for axis in range(array.ndim) if axis not in order)
    return array.transpose(*order, *batch).reshape(*(array.shape[axis] for axis in order))


def layers_first(shape: Sequence[int], tokens: Collection[int]) -> bool:
    """Whether the second axis has one of these numbers of tokens and the first one has none."""
    return len(shape) == 3 and shape[0] not in tokens and shape[1] in tokens


def axes_doubt(tokens: int, layers: int, top_k: int) -> list[str]:
    """A warning where an array, or the longest of several, has so many layers that they are probably tokens."""
    if layers <= max(1, tokens) and layers <= _MOST_LAYERS:
        return []
    return [
        f"the axes were read as tokens, layers, k = {tokens:,}, {layers:,}, {top_k}, which are many layers; if they "
        "are others, name them in the array's order, such as --axes layers,tokens,k"
    ]


class TurnedRows:
    """An array with axes in another order, whole in memory, for reading by rows [tokens, layers, ·]."""

    def __init__(self, array: np.ndarray, name: str, axes: Sequence[str]) -> None:
        self.name = name
        self._array = arranged(array, name, axes)
        self.shape: tuple[int, ...] = self._array.shape
        self.dtype: np.dtype[Any] = array.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``."""
        return np.ascontiguousarray(self._array[start:stop])
