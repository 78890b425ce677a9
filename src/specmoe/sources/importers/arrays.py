"""From other tools' arrays to a record's tensors: ranges are checked, nothing is rounded or wrapped in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.sources.fused_slots import FusedSlots, SlotUse
from specmoe.sources.importers.base import UNKNOWN_TOKEN
from specmoe.sources.importers.cleaning import fused_warning
from specmoe.sources.unrouted import blank_rows

__all__ = ["IdSurvey", "UniqueNames", "float_rows", "id_rows", "no_more_than", "opened", "token_rows"]

_LARGEST_ID = 32766  # ids are int16, and there is one expert more than the largest id
_MOST_UNFOLDING = 64
_UNFOLDING_SLACK = 1 << 28


@contextmanager
def opened(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into a :class:`SpecmoeError` that names ``path``."""
    try:
        yield
    except SpecmoeError as error:
        if str(path) in str(error):
            raise
        raise SpecmoeError(f"{path}: {error}") from error
    except OSError as error:
        raise SpecmoeError(f"{path} cannot be read: {_one_line(error.strerror or error)}") from error
    except Exception as error:  # a damaged archive can raise anything, also MemoryError and RecursionError
        reason = _one_line(str(error) or type(error).__name__)
        raise SpecmoeError(f"{path} is damaged or of another format ({reason})") from error


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]


def no_more_than(file_bytes: int, wanted: int, what: str) -> None:
    """Refuse to unfold a file into far more than it holds, which honest data never asks for.

    Raises:
        SpecmoeError: ``wanted`` bytes are too many for a file of ``file_bytes``.
    """
    if wanted > _MOST_UNFOLDING * file_bytes + _UNFOLDING_SLACK:
        raise SpecmoeError(f"{what} unfolds to {wanted:,} bytes, far more than the file holds")


def id_rows(array: np.ndarray, name: str) -> Tensor:
    """Expert ids as int16; -1 (no expert) is the only negative number that is let through.

    Raises:
        SpecmoeError: the array holds something other than whole numbers from -1 to 32,766.
    """
    return torch.from_numpy(_whole(array, name, -1, _LARGEST_ID).astype(np.int16))


def token_rows(array: np.ndarray | None, length: int, name: str = "token_ids") -> Tensor:
    """Token ids [length] int32; -1 throughout where the file has none.

    Raises:
        SpecmoeError: another shape, or something other than whole numbers from -1 to 2³¹ - 1.
    """
    if array is None:
        return torch.full((length,), UNKNOWN_TOKEN, dtype=torch.int32)
    if array.shape != (length,):
        raise SpecmoeError(f"{name} has shape {array.shape}, expected ({length},)")
    return torch.from_numpy(_whole(array, name, UNKNOWN_TOKEN, (1 << 31) - 1).astype(np.int32))


def float_rows(array: np.ndarray, name: str, *, keep_half: bool = False) -> Tensor:
    """Floating-point rows as float32, or as float16 where they are stored so and ``keep_half``.

    Raises:
        SpecmoeError: the array is of another kind, or a float64 value is not finite as float32.
    """
    if array.dtype.kind != "f":
        raise SpecmoeError(f"{name} has dtype {array.dtype}, expected floating-point numbers")
    if keep_half and array.dtype.itemsize == 2:
        return torch.from_numpy(array.astype(np.float16))
    # A comparison with NaN is false, too.
    if array.dtype.itemsize > 4 and array.size and not float(np.abs(array).max()) <= float(np.finfo(np.float32).max):
        raise SpecmoeError(f"{name} holds NaN, Inf or numbers beyond float32")
    return torch.from_numpy(array.astype(np.float32))


def _whole(array: np.ndarray, name: str, lowest: int, highest: int) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise SpecmoeError(f"{name} has dtype {array.dtype}, expected whole numbers")
    if array.size:
        smallest, largest = int(array.min()), int(array.max())
        if smallest < lowest or largest > highest:
            wrong = smallest if smallest < lowest else largest
            raise SpecmoeError(f"{name} holds {wrong}, expected numbers from {lowest} to {highest}")
    return array


class IdSurvey:
    """What a first pass over all expert ids tells: how many experts there are, and which layers and slots route at all.

    Engines that number all layers of a model fill the dense ones with one number, 0 or -1, in every slot. Rows that are
    no routing in any layer say nothing of that.

    Attributes:
        shape: layers and slots of all blocks, None before the first. rows: tokens so far.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.rows = 0
        self._routes = self._routes_if_blank = np.zeros(0, bool)
        self._largest = np.zeros(0, np.int64)
        self._layers: np.ndarray | None = None
        self._slots = SlotUse()
        self._fused: FusedSlots | None = None

    def add(self, ids_TLK: np.ndarray, name: str) -> None:
        """Take in a block of rows.

        Raises:
            SpecmoeError: it is not [T, L, K], has another L or K than the blocks before, or holds an impossible id.
        """
        if ids_TLK.ndim != 3:
            raise SpecmoeError(f"{name} has shape {ids_TLK.shape}, expected [tokens, layers, k]")
        _, layers, top_k = ids_TLK.shape
        if not layers or not top_k:
            raise SpecmoeError(f"{name} has shape {ids_TLK.shape}: no layer, or no expert per token")
        if self.shape is None:
            self.shape = (layers, top_k)
            self._routes, self._largest = np.zeros(layers, bool), np.full(layers, -1, np.int64)
            self._routes_if_blank = np.zeros(layers, bool)
        if self.shape != (layers, top_k):
            raise SpecmoeError(
                f"{name} has {layers} layers, top-{top_k}; the data before it {self.shape[0]}, top-{self.shape[1]} "
                "(axes were read as tokens, layers, k)"
            )
        _whole(ids_TLK, name, -1, _LARGEST_ID)
        if not len(ids_TLK):
            return
        self.rows += len(ids_TLK)
        self._largest = np.maximum(self._largest, ids_TLK.max((0, 2)))
        blank_T = blank_rows(ids_TLK)
        if blank_T.any() and top_k > 1:
            self._routes_if_blank |= ~_idle(ids_TLK[blank_T])
            ids_TLK = ids_TLK[~blank_T]
        if len(ids_TLK):
            self._routes |= ~_idle(ids_TLK)
            self._slots.add_rows(ids_TLK)

    def moe_layers(self, warnings: list[str]) -> np.ndarray:
        """Indices of the layers that route; a warning names those left out.

        Raises:
            SpecmoeError: there is no row, or no layer routes.
        """
        if not self.rows:
            raise SpecmoeError("there is no token in it")
        kept = self._layers = np.flatnonzero(self._routes if self._routes.any() else self._routes_if_blank)
        if not len(kept):
            raise SpecmoeError("no layer routes anything: every id is 0 or -1")
        if dropped := sorted(set(range(len(self._routes))) - set(kept.tolist())):
            warnings.append(f"layers {dropped[:20]} hold one id throughout, as dense layers do, and were left out")
        return kept

    def fused_slots(self, warnings: list[str]) -> FusedSlots | None:
        """Slots of a shared expert, which :attr:`experts` and :attr:`top_k` count no longer; a warning names them.

        Call it after :meth:`moe_layers`. What merely looks like such a slot is warned of and stays.
        """
        found = self._slots.fused(self._layers)
        if found is not None:
            warnings.append(fused_warning(found))
            self._fused = found if found.certain else None
        return self._fused

    @property
    def experts(self) -> int:
        """One more than the largest id of a router's own slots."""
        if self._fused is not None and self._fused.beyond:
            return self._fused.experts[0]
        return int(self._largest.max(initial=0)) + 1

    @property
    def top_k(self) -> int:
        """Slots that are a router's own; 0 before the first block."""
        return 0 if self.shape is None else self.shape[1] - (0 if self._fused is None else len(self._fused.slots))


def _idle(ids_TLK: np.ndarray) -> np.ndarray:
    """Layers [L] that hold 0 or -1 throughout.

    A top-1 router may really choose expert 0 every time; with several slots a repeated id is no choice.
    """
    largest, smallest = ids_TLK.max((0, 2)), ids_TLK.min((0, 2))
    return (largest <= 0) & (largest == smallest) if ids_TLK.shape[2] > 1 else largest < 0


class UniqueNames:
    """Makes names unique by numbering repeated ones."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self.repeated = 0

    def __call__(self, name: str) -> str:
        """``name``, or ``name#2`` and so on if it was given out before."""
        chosen, number = name, 1
        while chosen in self._taken:
            number += 1
            chosen = f"{name}#{number}"
        self.repeated += number > 1
        self._taken.add(chosen)
        return chosen
