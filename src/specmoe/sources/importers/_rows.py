"""From rows of routed experts, in whatever order a text file has them, to a document's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources.fused_slots import FusedSlots, SlotUse
from specmoe.sources.importers._text import Lines, bad_line
from specmoe.sources.importers.base import UNKNOWN_TOKEN
from specmoe.sources.importers.cleaning import fused_warning
from specmoe.trace import RoutingRecord

__all__ = ["Entries", "Oddities", "Placed", "Survey", "document_name", "in_range"]

_LARGEST_EXPERT = 32766
_LARGEST_LAYER = 1 << 20
_LARGEST_SLOT = 32766
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
# A document's tensors may be this much larger than its rows; honest ones have a row for nearly every place.
_MOST_UNFOLDING = 64


def in_range(lines: Lines, values_N: np.ndarray, what: str, *, least: int, most: int = 1 << 52) -> np.ndarray:
    """``values_N`` as they are.

    Raises:
        SpecmoeError: one is out of range; the error names its line.
    """
    if len(values_N) and (values_N.min() < least or values_N.max() > most):
        at = int(((values_N < least) | (values_N > most)).argmax())
        raise bad_line(lines.path, int(lines.number_N[at]), f"{what} {values_N[at]}, expected {least} to {most}")
    return values_N


@dataclass(frozen=True)
class Entries:
    """Routed experts, one entry for each slot of each layer of each token. All arrays are [N].

    Attributes:
        path: the file they stand in. token_N: any numbers that rise in the order of the tokens.
        layer_N: the file's own numbers of layers. slot_N: place among the token's experts, from 0.
        expert_N: -1 where no expert served the slot. weight_N: gate weights, None if the file has none.
        line_N: where each entry stands.
    """

    path: Path
    token_N: np.ndarray
    layer_N: np.ndarray
    slot_N: np.ndarray
    expert_N: np.ndarray
    weight_N: np.ndarray | None
    line_N: np.ndarray

    def __post_init__(self) -> None:
        """Check every number's range.

        Raises:
            SpecmoeError: one is not possible, or a weight is NaN or infinite; the error names its line.
        """
        self._check("layer", self.layer_N, 0, _LARGEST_LAYER)
        self._check("slot", self.slot_N, 0, _LARGEST_SLOT)
        self._check("expert id", self.expert_N, -1, _LARGEST_EXPERT)
        if self.weight_N is not None and not (known_N := np.abs(self.weight_N) <= _LARGEST_FLOAT32).all():
            at = int(known_N.argmin())
            raise bad_line(self.path, int(self.line_N[at]), f"gate weight {self.weight_N[at]}")

    def _check(self, what: str, values_N: np.ndarray, least: int, most: int) -> None:
        if len(values_N) and (values_N.min() < least or values_N.max() > most):
            at = int(((values_N < least) | (values_N > most)).argmax())
            raise bad_line(self.path, int(self.line_N[at]), f"{what} {values_N[at]}, expected {least} to {most}")

    @classmethod
    def from_rows(
        cls,
        path: Path,
        token_R: np.ndarray,
        layer_R: np.ndarray,
        count_R: np.ndarray,
        expert_N: np.ndarray,
        weight_N: np.ndarray | None,
        line_R: np.ndarray,
    ) -> Entries:
        """From rows that hold all of a token's experts in a layer; row r has the next ``count_R[r]`` experts."""
        start_R = np.cumsum(count_R) - count_R
        slot_N = np.arange(len(expert_N)) - np.repeat(start_R, count_R)
        token_N, layer_N, line_N = (np.repeat(values_R, count_R) for values_R in (token_R, layer_R, line_R))
        return cls(path, token_N, layer_N, slot_N, expert_N, weight_N, line_N)

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """One after the other; all of one file and all with weights or all without."""
        names = ("token_N", "layer_N", "slot_N", "expert_N", "weight_N", "line_N")
        whole = {
            name: None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])
            for name in names
        }
        return cls(parts[0].path, **whole)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return len(self.token_N)

    def __getitem__(self, chosen: slice | np.ndarray) -> Entries:
        weight_N = None if self.weight_N is None else self.weight_N[chosen]
        return Entries(
            self.path,
            self.token_N[chosen],
            self.layer_N[chosen],
            self.slot_N[chosen],
            self.expert_N[chosen],
            weight_N,
            self.line_N[chosen],
        )

    def place(self, layers_L: np.ndarray, top_k: int) -> Placed:
        """Put every entry where it belongs; entries of other layers than ``layers_L`` (rising) are left out.

        Raises:
            SpecmoeError: two entries claim one place, or there are far too few of them for tensors of this shape.
        """
        entries = self if np.isin(self.layer_N, layers_L).all() else self[np.isin(self.layer_N, layers_L)]
        token_T, token_index_N = np.unique(entries.token_N, return_inverse=True)
        shape = (len(token_T), len(layers_L), top_k)
        size = int(np.prod(shape, dtype=np.float64))
        if size > _MOST_UNFOLDING * len(entries) + (1 << 16):
            raise SpecmoeError(
                f"{self.path}: {len(token_T):,} tokens, {len(layers_L)} layers and top-{top_k} make {size:,} places, "
                f"but there are only {len(entries):,} experts; layers or slots are numbered wrongly"
            )
        layer_index_N = np.searchsorted(layers_L, entries.layer_N)
        flat_N = (token_index_N * shape[1] + layer_index_N) * top_k + entries.slot_N
        taken = np.zeros(size, dtype=bool)
        taken[flat_N] = True
        if np.count_nonzero(taken) < len(flat_N):
            entries._refuse_repetition(flat_N)
        ids, weights = np.full(size, -1, np.int16), None
        ids[flat_N] = entries.expert_N
        if entries.weight_N is not None:
            weights = np.zeros(size, np.float32)
            weights[flat_N] = np.where(entries.expert_N < 0, 0, entries.weight_N)
            weights = weights.reshape(shape)
        return Placed(token_T, ids.reshape(shape), weights, np.any(taken.reshape(shape), axis=-1))

    def _refuse_repetition(self, flat_N: np.ndarray) -> None:
        order = np.argsort(flat_N, kind="stable")
        again = order[1:][flat_N[order[1:]] == flat_N[order[:-1]]].min()
        raise bad_line(
            self.path,
            int(self.line_N[again]),
            f"slot {self.slot_N[again]} of layer {self.layer_N[again]} for the same token a second time; "
            "keep each run in a file of its own",
        )


@dataclass(frozen=True)
class Placed:
    """A document's routing.

    Attributes:
        token_T: the file's numbers of the tokens, rising. ids_TLK: int16. weights_TLK: float32, None if not known.
        present_TL: where the file has anything.
    """

    token_T: np.ndarray
    ids_TLK: np.ndarray
    weights_TLK: np.ndarray | None
    present_TL: np.ndarray

    def only(self, chosen_T: np.ndarray) -> Placed:
        """Some of the tokens."""
        weights_TLK = None if self.weights_TLK is None else self.weights_TLK[chosen_T]
        return Placed(self.token_T[chosen_T], self.ids_TLK[chosen_T], weights_TLK, self.present_TL[chosen_T])

    def record(self, phase_T: np.ndarray, token_ids_T: np.ndarray | None = None) -> RoutingRecord:
        """As it goes into a trace."""
        known = np.full(len(self.token_T), UNKNOWN_TOKEN) if token_ids_T is None else token_ids_T
        return RoutingRecord(
            token_ids=torch.from_numpy(known.astype(np.int32)),
            phase=torch.from_numpy(phase_T.astype(np.uint8)),
            expert_ids=torch.from_numpy(self.ids_TLK),
            gate_weights=None if self.weights_TLK is None else torch.from_numpy(self.weights_TLK),
        )


@dataclass
class Survey:
    """What the first pass over a source learns of the model's shape.

    Attributes:
        rows: (token, layer) pairs or entries seen in each layer. experts: one more than the largest id. top_k: one
            more than the largest slot.
    """

    rows: Counter[int] = field(default_factory=Counter)
    experts: int = 0
    top_k: int = 0
    _slots: SlotUse = field(default_factory=SlotUse)

    def add(self, entries: Entries) -> None:
        """Take some entries into account."""
        if len(entries) == 0:
            return
        layers, counts = np.unique(entries.layer_N, return_counts=True)
        self.rows.update(dict(zip(layers.tolist(), counts.tolist(), strict=True)))
        self.experts = max(self.experts, int(entries.expert_N.max()) + 1)
        self.top_k = max(self.top_k, int(entries.slot_N.max()) + 1)
        self._slots.add_entries(entries.layer_N, entries.slot_N, entries.expert_N)

    def fused_slots(self, layers_L: np.ndarray, warnings: list[str]) -> FusedSlots | None:
        """Slots of a shared expert, which ``experts`` and ``top_k`` count no longer; a warning names them.

        What merely looks like such a slot is warned of and stays.
        """
        found = self._slots.fused(layers_L)
        if found is not None:
            warnings.append(fused_warning(found))
        if found is None or not found.certain:
            return None
        self.top_k -= len(found.slots)
        self.experts = found.experts[0] if found.beyond else self.experts
        return found

    def layers_L(self, path: Path) -> np.ndarray:
        """The numbers of all layers seen, rising.

        Raises:
            SpecmoeError: there was none, or no expert.
        """
        if self.experts == 0:
            raise SpecmoeError(f"{path} holds no routed expert")
        return np.array(sorted(self.rows))


@dataclass
class Oddities:
    """Counts, over all documents, of what a user should be told."""

    places: int = 0
    holes: int = 0
    gaps: int = 0

    def count(self, placed: Placed, *, numbered: bool = True) -> None:
        """Count a document's places that the file has nothing for, and, if its tokens are numbered, missing tokens."""
        self.places += placed.present_TL.size
        self.holes += placed.present_TL.size - int(np.count_nonzero(placed.present_TL))
        if numbered and len(placed.token_T):
            span = int(placed.token_T[-1] - placed.token_T[0]) + 1
            self.gaps += max(0, span - len(placed.token_T))

    def warnings(self) -> list[str]:
        """One line each."""
        found = []
        if self.holes:
            found.append(
                f"{self.holes:,} of {self.places:,} (token, layer) places have no row; they hold no expert (-1)"
            )
        if self.gaps:
            found.append(f"{self.gaps:,} tokens are missing by their numbers; those around them became neighbours")
        return found


def document_name(root: Path, file: Path) -> str:
    """What a file's document is called: the file's name, in a folder its path from there."""
    return str(file.relative_to(root)) if root.is_dir() else file.name
