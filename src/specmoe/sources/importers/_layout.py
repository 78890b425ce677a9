"""How rows of a table hold routing: a token with its layers, a layer of a token, or one expert of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from specmoe.sources.importers._columns import Columns, plain
from specmoe.sources.importers._tables import Table, lists, nested_values, reals, wholes
from specmoe.sources.importers.base import UNKNOWN_TOKEN
from specmoe.trace import Phase

__all__ = ["Layout", "Rows", "layout_of"]

_PHASES = {
    **dict.fromkeys(("prefill", "prompt", "context", "extend", "input", "0"), int(Phase.PREFILL)),
    **dict.fromkeys(("decode", "decoding", "generate", "generation", "generated", "output", "1"), int(Phase.DECODE)),
}
_ROWS_TO_LOOK_AT = 100
_ONE_NUMBER = re.compile(r"\s*-?\d+(\.0*)?\s*")


@dataclass(frozen=True)
class Rows:
    """What some rows hold: R rows, P pairs of a token and a layer, N experts.

    Attributes:
        token_R: None if tokens are not numbered. token_id_R, phase_R: of each row.
        slot_R: of rows of one expert; None if rows hold all of a pair's experts or do not number them.
        row_P, layer_P, count_P: each pair's row, layer, and number of experts.
        expert_N, weight_N: of the pairs in turn; weight_N is None if there are none.
    """

    token_R: np.ndarray | None
    token_id_R: np.ndarray
    phase_R: np.ndarray
    slot_R: np.ndarray | None
    row_P: np.ndarray
    layer_P: np.ndarray
    count_P: np.ndarray
    expert_N: np.ndarray
    weight_N: np.ndarray | None


@dataclass(frozen=True)
class Layout:
    """Which columns of a table hold what.

    Attributes:
        document, domain, group, token, layer, slot, token_id, phase: columns; None if there is none. A token's layers
            are within ``experts`` if there is none for them.
        experts: one column, or one per slot. weights: likewise; empty if there are none.
        single: whether a row is one expert. inner: columns of the objects within ``experts``, if it holds such.
    """

    document: str | None = None
    domain: str | None = None
    group: str | None = None
    token: str | None = None
    layer: str | None = None
    slot: str | None = None
    token_id: str | None = None
    phase: str | None = None
    experts: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    single: bool = False
    inner: Columns | None = None

    @property
    def _column(self) -> str:
        return next(iter(self.experts))

    @property
    def weighted(self) -> bool:
        """Whether there are gate weights."""
        return bool(self.weights) or (self.inner is not None and self.inner.get("weights") is not None)

    def used(self) -> dict[str, str]:
        """Field → column."""
        names = ("document", "domain", "group", "token", "layer", "slot", "token_id", "phase")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        many = {"experts": ", ".join(self.experts), "weights": ", ".join(self.weights)}
        return found | {name: columns for name, columns in many.items() if columns}

    @property
    def expected(self) -> str:
        """What a row must be like, for errors."""
        whole = [name for name in (self.token, self.layer, self.slot, self.token_id) if name is not None]
        parts = [f"whole numbers in {', '.join(whole)}"] if whole else []
        experts, weights = ", ".join(self.experts)[:100], ", ".join(self.weights)[:100]
        if self.layer is None:
            parts.append(f"the experts of each layer in {experts}")
        else:
            parts.append(f"{'a number' if self.single or len(self.experts) > 1 else 'a list of experts'} in {experts}")
        if self.weights:
            parts.append(f"just as many numbers in {weights} (--map weights= leaves it out)")
        if self.phase is not None:
            parts.append(f"prefill or decode, or 0 or 1, in {self.phase}")
        return " and ".join(parts)

    def read(self, table: Table, count: int) -> Rows:
        """The first ``count`` rows.

        Raises:
            ValueError, TypeError, KeyError: a row is not as :attr:`expected`.
        """

        def whole(name: str, missing: int | None = None) -> np.ndarray:
            return wholes(table.cells(name, count), table.text, missing)

        slot_R, row_P, one_weight = None, np.arange(count), next(iter(self.weights), None)
        if self.layer is None:
            row_P, layer_P, experts, weights = self._nested(table, count)
            count_P, expert_N, weight_N = _flat(experts, weights)
        elif self.single or len(self.experts) > 1:
            layer_P = whole(self.layer)
            missing = None if self.single else -1
            expert_N = np.stack([whole(name, missing) for name in self.experts], 1).reshape(-1)
            count_P = np.full(count, len(self.experts))
            weight_N = None
            if self.weights:
                columns = [reals(table.cells(name, count), table.text) for name in self.weights]
                weight_N = np.where(expert_N < 0, 0, np.stack(columns, 1).reshape(-1))
            slot_R = whole(self.slot) if self.slot is not None else None
        else:
            layer_P = whole(self.layer)
            experts = lists(table.cells(self._column, count), table.text)
            weights = None if one_weight is None else lists(table.cells(one_weight, count), table.text)
            count_P, expert_N, weight_N = _flat(experts, weights)
        return Rows(
            token_R=None if self.token is None else whole(self.token),
            token_id_R=np.full(count, UNKNOWN_TOKEN) if self.token_id is None else whole(self.token_id, UNKNOWN_TOKEN),
            phase_R=np.zeros(count, np.int64) if self.phase is None else _phases(table.cells(self.phase, count)),
            slot_R=slot_R,
            row_P=row_P,
            layer_P=layer_P,
            count_P=count_P,
            expert_N=expert_N,
            weight_N=weight_N,
        )

    def _nested(
        self, table: Table, count: int
    ) -> tuple[np.ndarray, np.ndarray, list[list[Any]], list[list[Any]] | None]:
        """Each pair's row, layer, experts and weights, from rows that hold all layers of a token."""
        values = nested_values(table.cells(self._column, count), table.text)
        row_P, layer_P, parts = _pairs(values)
        weights = None
        if self.inner is not None:
            layer, experts, weight = self.inner.get("layer"), self.inner.need("experts"), self.inner.get("weights")
            if layer is not None:
                layer_P = wholes([part[layer] for part in parts], text=False)
            if weight is not None:
                weights = [part[weight] for part in parts]
            parts = [part[experts] for part in parts]
        elif self.weights:
            row_W, layer_W, weights = _pairs(nested_values(table.cells(self.weights[0], count), table.text))
            if not np.array_equal(row_W, row_P) or not np.array_equal(layer_W, layer_P):
                raise ValueError("weights of other layers than the experts")
        return row_P, layer_P, lists(parts, text=False), None if weights is None else lists(weights, text=False)


def _pairs(values: list[Any]) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Row, layer and content of each layer that lists (by place) or objects (by name) hold."""
    size_R = np.fromiter(map(len, values), np.int64, len(values))
    known: dict[str, int] = {}
    layers: list[int] = []
    for value in values:
        layers += [_layer(name, known) for name in value] if isinstance(value, dict) else range(len(value))
    parts = chain.from_iterable(value.values() if isinstance(value, dict) else value for value in values)
    return np.repeat(np.arange(len(values)), size_R), np.array(layers, np.int64), list(parts)


def _layer(name: str, known: dict[str, int]) -> int:
    """The number in a layer's name, such as ``12``, ``layer_12`` or ``model.layers.12.mlp``."""
    if name not in known:
        (number,) = re.findall(r"\d+", name)
        known[name] = int(number)
    return known[name]


def _flat(
    experts: list[list[Any]], weights: list[list[Any]] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    count_P = np.fromiter(map(len, experts), np.int64, len(experts))
    expert_N = wholes(list(chain.from_iterable(experts)), text=False)
    if weights is None:
        return count_P, expert_N, None
    if list(map(len, weights)) != count_P.tolist():
        raise ValueError("not as many weights as experts")
    return count_P, expert_N, np.where(expert_N < 0, 0, reals(list(chain.from_iterable(weights)), text=False))


def _phases(cells: list[Any]) -> np.ndarray:
    known = {cell: _PHASES[plain(str(cell))] for cell in set(cells)}
    return np.fromiter((known[cell] for cell in cells), np.int64, len(cells))


# --- from the columns' names to a layout ----------------------------------------------------------------


def layout_of(table: Table, given: Mapping[str, str], where: str) -> Layout:
    """How a table holds routing.

    Args:
        table: its first rows. given: field → column, by the user. where: named in errors.

    Raises:
        SpecmoeError: a column that is needed is missing, or several may be it.
    """
    columns = Columns(table.names, given, where)
    nested = _nested_column(columns, table) if not columns.has("layer") or columns.get("layer") is None else None
    if nested is None:
        columns.need("layer")
    inner = nested[1] if nested is not None else None
    for name in given:
        if inner is None or given[name] not in inner.names:
            columns.candidates(name)  # which says that there is no such column
    group = columns.get("group")
    common = Layout(
        document=columns.get("document") or group,
        domain=columns.get("domain"),
        group=group,
        token=columns.get("token"),
        token_id=columns.get("token_id"),
        phase=columns.get("phase"),
    )
    weight = columns.get("weights") if inner is None else None
    if nested is not None:
        return replace(common, experts=(nested[0],), weights=() if weight is None else (weight,), inner=inner)
    columns.need("token")
    experts = columns.numbered("experts") or (columns.need("experts"),)
    weights = columns.numbered("weights") or (() if weight is None else (weight,))
    if len(experts) > 1 and len(weights) not in {0, len(experts)}:
        columns.refuse(f"{len(experts)} columns hold experts and {len(weights)} weights; --map weights= drops those")
    single = len(experts) == 1 and _holds_numbers(table, experts[0])
    slot = columns.get("slot") if single else None
    return replace(common, layer=columns.need("layer"), slot=slot, experts=experts, weights=weights, single=single)


def _nested_column(columns: Columns, table: Table) -> tuple[str, Columns | None] | None:
    """The column that holds all layers of a token, and the columns of the objects in it if it holds such."""
    for name in columns.nested():
        value = next((value for value in _values(table, name) if value), None)
        if isinstance(value, dict | list):
            first = next((part for part in (value.values() if isinstance(value, dict) else value) if part), None)
            if isinstance(first, dict):
                given = {field: column for field, column in columns.given.items() if column in first}
                return name, Columns(list(first), given, columns.where)
            if isinstance(first, list):
                return name, None
    return None


def _values(table: Table, name: str) -> list[Any]:
    cells = table.cells(name, _ROWS_TO_LOOK_AT)
    try:
        return [json.loads(cell) if table.text else cell for cell in cells if cell]
    except (ValueError, RecursionError):
        return []


def _holds_numbers(table: Table, name: str) -> bool:
    """Whether every cell is one number, so that a row is one expert."""
    cells = table.cells(name, _ROWS_TO_LOOK_AT)
    if table.text:
        return all(_ONE_NUMBER.fullmatch(cell) for cell in cells)
    return not any(isinstance(cell, list) or cell is None for cell in cells)
