"""Where a search for a better recipe may look, as data beside the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["DROPOUT", "SHARED", "WIDTH", "Choice", "Place", "Range", "SearchSpace"]


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole ones if both ends are. log: even in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range needs low < high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range begins above 0, got {self.low}")

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holding(self, value: Any) -> Range:
        """This range, widened if need be so that it holds ``value``; one that is 0 makes it linear."""
        low, high = min(self.low, value), max(self.high, value)
        return Range(low, high, self.log and low > 0)


@dataclass(frozen=True)
class Choice:
    """One of some values: strings, numbers or booleans."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) != len(self.values) or len(self.values) < 2:
            raise ValueError(f"a choice needs at least two different values, got {self.values}")

    def holding(self, value: Any) -> Choice:
        """This choice, with ``value`` added if it is not there."""
        return self if value in self.values else Choice((*self.values, value))


Place: TypeAlias = Range | Choice


class SearchSpace(Mapping[str, Place]):
    """Field of a recipe → where to look for its value. It cannot be changed, and can be a part of what is hashed."""

    def __init__(self, **places: Place) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Place:
        return self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __hash__(self) -> int:
        return hash(frozenset(self._places.items()))

    def __repr__(self) -> str:
        return f"SearchSpace({', '.join(f'{name}={place}' for name, place in self._places.items())})"

    def but(self, **changes: Place | None) -> SearchSpace:
        """This space with other places for some fields; None takes a field out."""
        places = {**self._places, **changes}
        return SearchSpace(**{name: place for name, place in places.items() if place is not None})


# What every learned predictor has. Widths and dropout are added by those that read them. The label smoothing is
# searched on traces without router logits, the sharpness of soft targets on those with them; the warm-up acts under
# the cosine scheduler only.
SHARED = SearchSpace(
    learning_rate=Range(5e-4, 2e-2, log=True),
    batch_windows=Choice((8, 16, 32, 64)),
    epochs=Range(3, 16),
    scheduler=Choice(("plateau", "cosine")),
    warmup=Range(0.0, 0.3),
    weight_decay=Range(1e-3, 0.3, log=True),
    sharpness=Range(0.3, 0.95),
    label_smoothing=Range(0.0, 0.2),
)
# For those that read them: ``search=SHARED.but(width=WIDTH, dropout=DROPOUT)``.
WIDTH = Range(0.5, 2.0, log=True)
DROPOUT = Range(0.0, 0.4)
