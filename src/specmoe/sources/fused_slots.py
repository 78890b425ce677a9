"""A shared expert that an engine fused into the top-k: told from routing by which experts each slot ever holds.

SGLang and vLLM can compute a model's shared expert as one more slot of its routed ones. The slot then holds one id for
every token, usually E, or that of one of several replicas: E and above, or, where every rank of expert parallelism
counts its own experts and then its replica, in between. A router's own slots share their experts: which of them an
expert takes depends on the others' weights. That a slot shares none does not suffice, as some models choose from a
group of experts for each slot; so the other slots must share theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["FusedSlots", "SlotUse", "fused_slots"]

# With fewer rows, even a router may give a slot the same expert throughout, or slots no expert in common.
_ROWS_CONSTANT, _ROWS_REPLICAS = 64, 256
_ROWS_SUSPECT = 8
# A layer may have collapsed on one expert; that all have on the same one is this unlikely, in bits.
_BITS = 8.0
_MOST_CELLS, _CELLS_AT_ONCE = 1 << 26, 1 << 16


@dataclass(frozen=True)
class FusedSlots:
    """Slots that hold a shared expert.

    Attributes:
        slots: which, of ``top_k`` that hold anything. experts: their ids. rows: tokens of the layer that has fewest.
        certain: whether nothing but a shared expert can look like this. beyond: whether all their ids lie above all
            ids of the other slots.
    """

    slots: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: int
    rows: int
    certain: bool
    beyond: bool

    def kept(self, top_k: int) -> np.ndarray:
        """Of ``top_k`` slots, those that are routed: int64."""
        return np.setdiff1d(np.arange(top_k), self.slots)

    @property
    def words(self) -> str:
        """What they hold, as the beginning of a sentence."""
        slots = ", ".join(map(str, self.slots))
        if len(self.experts) > len(self.slots):
            first = ", ".join(map(str, self.experts[:8])) + (" …" if len(self.experts) > 8 else "")
            ids = f"one of {len(self.experts)} experts ({first})"
        else:
            ids = f"expert{'s' * (len(self.experts) > 1)} {', '.join(map(str, self.experts))}"
        which = f"slot{'s' * (len(self.slots) > 1)} {slots} of 0 to {self.top_k - 1}"
        return (
            f"{which} hold{'s' * (len(self.slots) == 1)} {ids} for every token in every layer, and no other slot does"
        )


def fused_slots(seen_LKE: np.ndarray, served_LK: np.ndarray) -> FusedSlots | None:
    """The slots that look like a shared expert.

    Args:
        seen_LKE: bool, whether a slot of a layer ever held an expert. served_LK: how many tokens a slot served.

    Returns:
        None where there are none. Never all slots: what is left chooses between experts.
    """
    used = np.flatnonzero(served_LK.any(0))
    # A dense layer that was numbered among the others holds one id in all slots.
    live = np.flatnonzero(seen_LKE.any(1).sum(1) > 1)
    if len(used) < 2 or not len(live):
        return None
    seen, served = seen_LKE[np.ix_(live, used)], served_LK[np.ix_(live, used)]
    shared_LE = seen.sum(1) > 1
    alone_K = ~(seen & shared_LE[:, None]).any((0, 2)) & (served == served.max(1, keepdims=True)).all(0)
    seen_KE: np.ndarray = np.asarray(seen.any(0))
    constant_K = alone_K & (seen_KE.sum(1) == 1)
    rest = np.flatnonzero(~constant_K)
    replicas = not constant_K.any()
    if replicas:
        rest, found = _replicas(seen, alone_K)
    else:
        found = np.flatnonzero(constant_K)
        if not (seen[:, rest].any(1).sum(1) > len(rest)).any():
            return None
    if not len(found):
        return None
    experts = np.flatnonzero(seen_KE[found].any(0))
    others = np.flatnonzero(seen_KE[rest].any(0))
    beyond = bool(experts.min() > others.max())
    rows, layers = int(served.max(1).min()), len(live)
    if rows < _ROWS_SUSPECT or not (beyond or layers > 1):
        return None
    bits = (layers - 1) * math.log2(len(others) + 1)
    certain = rows >= (_ROWS_REPLICAS if replicas else _ROWS_CONSTANT) and bits >= _BITS
    return FusedSlots(tuple(used[found].tolist()), tuple(experts.tolist()), int(used[-1]) + 1, rows, certain, beyond)


def _replicas(seen_LKE: np.ndarray, alone_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The routed slots, which share ids, and the one slot (or none) whose several ids are apart from theirs.

    They are the same in every layer, or above all others and most of them in every layer: of many, chance leaves out
    some, and favourites of layers are others in each.
    """
    none = np.zeros(0, np.int64)
    seen_KE: np.ndarray = np.asarray(seen_LKE.any(0))
    found = np.array([slot for slot in np.flatnonzero(alone_K).tolist() if _apart(seen_LKE, seen_KE, slot)], np.int64)
    rest = np.setdiff1d(np.arange(len(alone_K)), found)
    if len(found) != 1 or len(rest) < 2:
        return rest, none
    held = seen_LKE[:, rest].astype(np.float32)
    reach_KK: np.ndarray = np.asarray((held @ held.transpose(0, 2, 1)).any(0))
    for _ in range(len(rest).bit_length()):
        reach_KK = reach_KK @ reach_KK
    return rest, found if reach_KK.all() else none


def _apart(seen_LKE: np.ndarray, seen_KE: np.ndarray, slot: int) -> bool:
    others = np.flatnonzero(np.delete(seen_KE, slot, 0).any(0))
    above = len(others) > 0 and int(seen_KE[slot].argmax()) > int(others[-1])
    fewest, all_of_them = int(seen_LKE[:, slot].sum(1).min()), int(seen_KE[slot].sum())
    return fewest > 1 and (2 * fewest > all_of_them if above else len(seen_LKE) > 1 and fewest == all_of_them)


class SlotUse:
    """Gathers, block by block, which experts each slot of each layer holds."""

    def __init__(self) -> None:
        self._seen = np.zeros((0, 0, 0), bool)
        self._served = np.zeros((0, 0), np.int64)
        self._place: dict[int, int] = {}
        self._too_large = False

    def add_rows(self, ids_TLK: np.ndarray) -> None:
        """Take in the ids of some tokens; -1 is no expert."""
        _, layers, top_k = ids_TLK.shape
        if not ids_TLK.size or not self._reserve(layers, top_k, int(ids_TLK.max()) + 1):
            return
        self._place = self._place or {layer: layer for layer in range(layers)}
        seen = self._seen
        cell_LK = ((np.arange(layers)[:, None] * seen.shape[1] + np.arange(top_k)) * seen.shape[2]).astype(np.int32)
        # Pieces that stay in the processor's cache.
        step = max(1, _CELLS_AT_ONCE // (layers * top_k))
        for piece_TLK in (ids_TLK[start : start + step] for start in range(0, len(ids_TLK), step)):
            cell_TLK = piece_TLK.astype(np.int32) + cell_LK
            if int(piece_TLK.min()) >= 0:
                self._served[:layers, :top_k] += len(piece_TLK)
                seen.reshape(-1)[cell_TLK.reshape(-1)] = True
            else:
                served_TLK = piece_TLK >= 0
                self._served[:layers, :top_k] += np.count_nonzero(served_TLK, axis=0)
                seen.reshape(-1)[cell_TLK[served_TLK]] = True

    def add_entries(self, layer_N: np.ndarray, slot_N: np.ndarray, expert_N: np.ndarray) -> None:
        """Take in ids one by one, with their layers' numbers and their slots."""
        served = expert_N >= 0
        layer_N, slot_N, expert_N = layer_N[served], slot_N[served], expert_N[served]
        if not len(layer_N):
            return
        numbers, index_N = np.unique(layer_N, return_inverse=True)
        places = np.array([self._place.setdefault(number, len(self._place)) for number in numbers.tolist()])
        if not self._reserve(len(self._place), int(slot_N.max()) + 1, int(expert_N.max()) + 1):
            return
        np.add.at(self._served, (places[index_N], slot_N), 1)
        self._seen[places[index_N], slot_N, expert_N] = True

    def _reserve(self, *shape: int) -> bool:
        wanted = np.maximum(self._seen.shape, shape)
        self._too_large |= math.prod(wanted.tolist()) > _MOST_CELLS
        if self._too_large:
            return False
        grow = [(0, int(more)) for more in wanted - self._seen.shape]
        if any(more for _, more in grow):
            self._seen, self._served = np.pad(self._seen, grow), np.pad(self._served, grow[:2])
        return True

    def fused(self, layers: np.ndarray | None = None) -> FusedSlots | None:
        """What :func:`fused_slots` says of the layers with these numbers, by default of all."""
        if self._too_large or not self._place:
            return None
        places = [self._place[layer] for layer in (self._place if layers is None else layers.tolist())]
        return fused_slots(self._seen[places], self._served[places])
