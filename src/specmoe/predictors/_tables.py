"""What the counting predictors share: places, counts, shares, and tables sized by what was seen.

A *place* is counted in MoE layers from layer 0 of the current token: place p is layer p mod L of the token
p // L ahead. The event at source layer s and horizon h points to place s + h, so that different events of
one token that point to the same place share one entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.dataset import Window
from specmoe.topology import Topology

__all__ = [
    "for_all_events",
    "grow_on_load",
    "layer_counts",
    "lookbacks",
    "place_count",
    "shares",
    "target_layers",
    "target_places",
    "unroll_places",
]


def target_places(topology: Topology, horizons: Sequence[int]) -> Tensor:
    """The place each event points to, [S, H] int64."""
    return torch.arange(topology.layers)[:, None] + torch.tensor(list(horizons))


def target_layers(topology: Topology, horizons: Sequence[int]) -> Tensor:
    """The layer each event points to, [S, H] int64."""
    return target_places(topology, horizons) % topology.layers


def place_count(topology: Topology, horizons: Sequence[int]) -> int:
    """How many places P a table needs so that every event's place is in it."""
    return topology.layers + max(horizons)


def lookbacks(topology: Topology, horizons: Sequence[int]) -> list[int]:
    """For each horizon the offset, 0 or less, from an event to the last known place of its target layer.

    From source layer s this is the current token for target layers up to s, else the token before.
    """
    return [horizon - -(-horizon // topology.layers) * topology.layers for horizon in horizons]


def unroll_places(values_BTLX: Tensor, places: int) -> Tensor:
    """What the first ``places`` places of every token hold, [B, T, P, X], zero beyond the window."""
    tokens, layers = values_BTLX.shape[1:3]
    ahead = [F.pad(values_BTLX, (0, 0, 0, 0, 0, n))[:, n : n + tokens] for n in range(-(-places // layers))]
    return torch.cat(ahead, 2)[:, :, :places]


def layer_counts(windows: Iterable[Window], topology: Topology) -> Tensor:
    """How often each expert was routed to, [L, E] float64; padding and context do not count."""
    counts_LE = torch.zeros(topology.layers, topology.experts, dtype=torch.float64)
    for window in windows:
        own_BT = window.valid_BT & window.scored_BT
        counts_LE += window.routed_BTLE[own_BT].sum(0, dtype=torch.float64).to(counts_LE.device)
    return counts_LE


def shares(counts: Tensor, prior: Tensor | None = None, strength: float | None = None) -> Tensor:
    """Counts as distributions over the last dimension, shrunk towards ``prior`` as ``strength`` counts would.

    Without a prior one count is added to every expert, so that no logarithm is infinite.
    """
    if prior is None:
        return (counts + 1) / (counts.sum(-1, keepdim=True) + counts.shape[-1])
    weight = 1.0 if strength is None else strength
    return (counts + weight * prior) / (counts.sum(-1, keepdim=True) + weight)


def for_all_events(logits_SHE: Tensor, window: Window) -> Tensor:
    """The same logits for every token, [B, T, S, H, E]."""
    return logits_SHE.expand(*window.token_ids_BT.shape, *logits_SHE.shape).contiguous()


def grow_on_load(module: nn.Module, *names: str) -> None:
    """Let buffers whose first dimension depends on the training data take the size a state dict brings."""
    module.register_load_state_dict_pre_hook(partial(_grow, names=names))


def _grow(module: nn.Module, state: dict[str, Any], prefix: str, *_: object, names: tuple[str, ...]) -> None:
    for name in names:
        saved, own = state.get(prefix + name), getattr(module, name)
        # Other dimensions follow from the topology: if they differ, loading is to fail as it always does.
        if saved is not None and saved.shape[1:] == own.shape[1:]:
            setattr(module, name, own.new_empty(saved.shape))
