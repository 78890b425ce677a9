"""Which of the experts that are needed a small cache would hold anyway: the ground that cold-miss recall stands on.

The cache is stated, not tuned: in every layer the n experts used last (least recently used leaves first), on
demand only, empty at the start. All tokens pass it, prefill and decode alike, one document after the other. The experts
of one token in one layer are one access: none of them can push another out, and none counts as used later than another,
so where two were last used by the same token the one with the larger id leaves first.

An event is made when its router has run, and its own experts have then been asked for. So the cache of the layer that
is foreseen has seen that layer's accesses up to the event: with L layers and a horizon of h, the last of them lies
⌈h / L⌉ tokens before the place that is foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specmoe.dataset import Window, Windows, ahead
from specmoe.errors import SpecmoeError
from specmoe.topology import Topology

__all__ = ["Residency", "cache_size", "cold_in_stream", "replay", "sizes_by_layer"]

# Tokens x layers x experts looked at in one go: what stays in the processor's cache.
_CHUNK = 1 << 18


def cache_size(topology: Topology, experts: int | None = None) -> int:
    """Experts that the stated cache holds in every layer: a quarter of them, but at least K; or the number asked for.

    Where layers have different numbers of experts, that is what it holds in the largest: see :func:`sizes_by_layer`.

    Raises:
        SpecmoeError: fewer than K, which one access needs, or more than there are.
    """
    if experts is None:
        return max(topology.top_k, math.ceil(topology.experts / 4))
    if not topology.top_k <= experts <= topology.experts:
        raise SpecmoeError(
            f"a cache of {experts} experts a layer does not suit {topology.model_id}: "
            f"choose {topology.top_k} (what a token uses) to {topology.experts} (all)"
        )
    return experts


def sizes_by_layer(topology: Topology, cache_experts: int) -> Tensor:
    """Experts that the stated cache holds in each layer: int64 [L].

    Where it holds a quarter of the largest layer's experts it holds a quarter of each layer's, but at least K; else the
    number asked for, or all of a layer that has fewer.
    """
    if topology.experts_per_layer is None:
        return torch.full((topology.layers,), cache_experts)
    if cache_experts == cache_size(topology):
        return torch.tensor([max(topology.top_k, math.ceil(experts / 4)) for experts in topology.experts_L])
    return torch.tensor(topology.experts_L).clamp_max(cache_experts)


def cold_in_stream(
    expert_ids_NLK: Tensor, experts: int, cache_experts: int | Tensor, lags: Sequence[int] = (1,)
) -> dict[int, Tensor]:
    """Replay a stream of tokens: which experts does the cache not hold shortly before they are needed?

    The content of an LRU cache is at any time the n experts used last (Mattson et al., 1970), so an expert is held
    if fewer than n others were used since: no cache has to be simulated step by step.

    Args:
        expert_ids_NLK: integers; negative numbers and those from ``experts`` on are no expert.
        experts: E. cache_experts: n, at least K; or int64 [L], one for each layer.
        lags: how many tokens before the access the cache is looked at; 1 is the miss at the access itself.

    Returns:
        Lag → [N, L, K] bool, True where an expert is needed and not held.
    """
    tokens, layers, top_k = expert_ids_NLK.shape
    reach = max(lags)
    found = {lag: torch.zeros(tokens, layers, top_k, dtype=torch.bool) for lag in lags}
    # Half the memory traffic where it is enough to count the tokens.
    dtype = torch.int32 if (tokens + 1) * experts < 2**31 else torch.int64
    # When each expert was last used, as of each of the `reach` tokens before the chunk; -1 for never.
    before = torch.full((reach, layers, experts), -1, dtype=dtype)
    tie = torch.arange(experts, dtype=dtype).flip(0)
    step = max(1, _CHUNK // (layers * experts))
    for first in range(0, tokens, step):
        ids = expert_ids_NLK[first : first + step].long()
        is_expert = (ids >= 0) & (ids < experts)
        slots = torch.where(is_expert, ids, experts)
        used = torch.zeros(len(ids), layers, experts + 1, dtype=torch.bool).scatter_(-1, slots, True)[..., :experts]
        time = torch.arange(first, first + len(ids), dtype=dtype).view(-1, 1, 1) * experts + tie
        last_used = torch.cat([before, torch.where(used, time, -1)]).cummax(0).values
        slots = slots.clamp_max(experts - 1)
        for lag in lags:
            # Row i of `last_used` stands for the state after token first + i - reach.
            state = last_used[reach - lag : reach - lag + len(ids)]
            for slot in range(top_k):
                own = state.gather(-1, slots[..., slot : slot + 1])
                held = (own[..., 0] >= 0) & ((state > own).sum(-1, dtype=torch.int32) < cache_experts)
                found[lag][first : first + len(ids), :, slot] = is_expert[..., slot] & ~held
        before = last_used[-reach:]
    return found


@dataclass(frozen=True)
class Residency:
    """What the cache lacks at every event of some windows.

    Attributes:
        cache_experts: n, in every layer; in the largest where they differ. layers: L.
        cold_NLK: by lag (tokens between the state of the cache and the place foreseen), see :func:`cold_in_stream`.
        start_W: for each window, the number in the stream of its first token.
        needed: experts that were needed in the whole stream. missed: of these, how many the cache lacked.
    """

    cache_experts: int
    layers: int
    cold_NLK: dict[int, Tensor]
    start_W: Tensor
    needed: int
    missed: int

    def cold(self, rows: Tensor, window: Window, horizons: Sequence[int]) -> Tensor:
        """Which needed experts are cold: [B, T, S, H, K] bool, in the order of ``Targets.expert_ids_BTSHK``.

        Args:
            rows: numbers of the windows in the batch. horizons: those the replay was made for.
        """
        tokens = window.valid_BT.shape[1]
        place_BT = self.start_W[rows][:, None] + torch.arange(tokens)
        place_BT = place_BT.clamp_max(len(self.cold_NLK[1]) - 1)
        by_lag = {
            lag: cold_NLK[place_BT].to(window.valid_BT.device) & window.valid_BT[..., None, None]
            for lag, cold_NLK in self.cold_NLK.items()
        }
        return torch.cat([ahead(by_lag[_lag(h, self.layers)], [h]) for h in horizons], 3)


def replay(windows: Windows, horizons: Iterable[int], cache_experts: int) -> Residency:
    """Send every token of some documents through the cache, in the order of the windows.

    Args:
        windows: of whole documents. horizons: those that will be asked for. cache_experts: n, at least K.
    """
    layers = windows.topology.layers
    # Every token of a document is scored in one window, and windows lie in the order of the documents.
    stream_NLK = windows.expert_ids[windows.scored]
    lags = sorted({1, *(_lag(h, layers) for h in horizons)})
    cold = cold_in_stream(stream_NLK, windows.topology.experts, sizes_by_layer(windows.topology, cache_experts), lags)
    scored_W = windows.scored.sum(1)
    context_W = (windows.valid & ~windows.scored).sum(1)
    needed = int(((stream_NLK >= 0) & (stream_NLK < windows.topology.experts)).sum())
    start_W = scored_W.cumsum(0) - scored_W - context_W
    return Residency(cache_experts, layers, cold, start_W, needed, int(cold[1].sum()))


def _lag(horizon: int, layers: int) -> int:
    """Tokens from the last access to a layer that an event knows of to the place it foresees there."""
    return max(1, math.ceil(horizon / layers))
