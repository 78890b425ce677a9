"""What every import takes out of a document's record: slots that hold a shared expert, and rows that are no routing.

Only what is certain is taken out, with the tokens it belongs to, and all of it is counted in warnings.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from specmoe.sources.fused_slots import FusedSlots
from specmoe.sources.importers.base import UNKNOWN_TOKEN
from specmoe.sources.unrouted import LEAST_RUN, alike_to_last, counting_layers, in_runs, run_bounds
from specmoe.topology import Topology
from specmoe.trace import RoutingRecord

__all__ = ["Cleaning", "fused_warning"]

# By chance a router chooses K given experts in a given order in all layers less often than once in 2 to this.
_CERTAIN_BITS = 32.0


def fused_warning(fused: FusedSlots) -> str:
    """Says which slots were left out, or why they were not."""
    looks = f"{fused.words}, as where an engine fuses a shared expert into the top-k"
    if fused.certain:
        return f"{looks}; it was left out"
    return f"{looks}; {fused.rows:,} tokens of so few layers and experts are too few to be sure, so it was kept"


class Cleaning:
    """Cleans records one after the other, and counts what that took.

    Args:
        topology: of the records as they go into the trace. fused: slots that are certainly a shared expert's.
    """

    def __init__(self, topology: Topology, fused: FusedSlots | None = None) -> None:
        self._top_k, self._experts = topology.top_k, topology.experts
        self._kept = None if fused is None else torch.from_numpy(fused.kept(topology.top_k + len(fused.slots)))
        orders = sum(math.log2(max(1, topology.experts - slot)) for slot in range(topology.top_k))
        # Where there are no more experts than K, any row is such a row.
        self._certain_layers = _CERTAIN_BITS / orders if topology.experts > topology.top_k else math.inf
        self._tails = self._zeros = self._counting = self._whole = self._inner = self._empty = self._alike = 0

    def __call__(self, record: RoutingRecord) -> RoutingRecord:
        """The record without those slots and rows; the same one where there is nothing to take out."""
        return self._only_routed(self._without_slots(record))

    def _without_slots(self, record: RoutingRecord) -> RoutingRecord:
        if self._kept is None:
            return record
        gates, logits = record.gate_weights, record.router_logits
        return replace(
            record,
            expert_ids=record.expert_ids[..., self._kept],
            gate_weights=None if gates is None else gates[..., self._kept],
            router_logits=None if logits is None else logits[..., : self._experts].contiguous(),
        )

    def _only_routed(self, record: RoutingRecord) -> RoutingRecord:
        ids_TLK = record.expert_ids.numpy()
        if not ids_TLK.size:
            return record
        empty_T, zero_T = _throughout(ids_TLK, -1), _throughout(ids_TLK, 0)
        # A top-1 router may choose expert 0; several slots never hold one and the same.
        zero_T &= self._top_k > 1
        tail = len(ids_TLK) - int((~empty_T[::-1]).argmax()) if not empty_T.all() else 0
        ends_T = np.arange(len(ids_TLK)) >= tail
        layers_T = counting_layers(ids_TLK)
        dropped_T = ends_T | zero_T | (in_runs(layers_T > 0) & (layers_T >= self._certain_layers))
        self._tails += int(ends_T.sum())
        self._zeros += int((zero_T & ~ends_T).sum())
        self._counting += int((dropped_T & ~zero_T & ~ends_T).sum())
        self._empty += int((empty_T & ~ends_T).sum())
        if dropped_T.any():
            kept = np.flatnonzero(~dropped_T)
            self._whole += not len(kept)
            self._inner += int(kept[-1] - kept[0] + 1 - len(kept)) if len(kept) else 0
            index = torch.from_numpy(kept)
            record = RoutingRecord(**{name: tensor[index] for name, tensor in record.tensors()})
        self._count_alike(record)
        return record

    def _count_alike(self, record: RoutingRecord) -> None:
        """Count rows in long runs of one routing, unless a run of one known token explains them."""
        ids_TLK, tokens_T = record.expert_ids.numpy(), record.token_ids.numpy()
        goes_on_T = alike_to_last(ids_TLK)
        begins, ends = run_bounds(goes_on_T)
        other_token_T = np.concatenate([[False], tokens_T[1:] != tokens_T[:-1]]) | (tokens_T == UNKNOWN_TOKEN)
        # The token that begins a run may differ from the one before it.
        other_token_T[begins] = tokens_T[begins] == UNKNOWN_TOKEN
        others = np.add.reduceat(other_token_T, begins) if len(begins) else begins
        odd = (ends - begins >= LEAST_RUN) & (others > 0) & ~_throughout(ids_TLK[begins], -1)
        self._alike += int((ends - begins)[odd].sum())

    def warnings(self) -> list[str]:
        """One line for each kind of row."""
        found = []
        if self._tails:
            found.append(
                f"{self._tails:,} tokens at the ends of documents hold no expert in any layer (-1); they were left out"
            )
        if self._zeros:
            found.append(
                f"{self._zeros:,} tokens hold expert 0 in every slot of every layer, as a buffer that was never "
                "written does; they were left out"
            )
        if self._counting:
            found.append(
                f"{self._counting:,} tokens, {LEAST_RUN} or more in a row, hold the experts 0 to {self._top_k - 1} in "
                "every layer, as padding and an engine's profiling pass do; they were left out"
            )
        if self._inner:
            found.append(
                f"{self._inner:,} of the tokens left out stood between others of their document; those around them "
                "became neighbours"
            )
        if self._whole:
            found.append(f"{self._whole:,} documents held nothing else and are not in the trace")
        if self._empty:
            found.append(
                f"{self._empty:,} tokens hold no expert in any layer (-1) before others that do; they were kept"
            )
        if self._alike:
            found.append(
                f"{self._alike:,} tokens stand in runs of {LEAST_RUN} or more that are routed alike in every layer, as "
                "a profiling pass or a buffer that was not written again leaves them; that is not certain, so they "
                "were kept: run specmoe validate on the trace"
            )
        return found


def _throughout(ids_TLK: np.ndarray, value: int) -> np.ndarray:
    """Rows [T] that hold ``value`` in every slot of every layer."""
    found_T = ids_TLK[:, 0, 0] == value
    if found_T.any():
        found_T[found_T] = (ids_TLK[found_T] == value).all((1, 2))
    return found_T
