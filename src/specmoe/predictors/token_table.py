"""Which experts a token id is routed to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specmoe.dataset import Window
from specmoe.predictors._tables import grow_on_load, layer_counts, place_count, shares, target_places, unroll_places
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["TokenTable"]

_STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class TokenTable(Predictor):
    """Counts of the routing per token id and place, shrunk towards the layer's frequency.

    For places of the next token the key is still the current token's id, so that the table is a bigram
    there. An id that was not seen in training gets the layer's frequency. How strongly rare ids are drawn
    towards it is chosen, out of a short list, by the leave-one-out likelihood of the training windows.

    Buffers, where V is one more than the ids seen in training and P is layers + the largest horizon:
    ids_V int64, ascending, the first -1 for ids never seen; share_VPE float32.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free", sees="token", source="token-id lookup: routing by token, OpenMoE (2024)"
    )

    ids_V: Tensor
    share_VPE: Tensor
    strength: Tensor
    place_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        places, experts = place_count(topology, self.horizons), topology.experts
        self.register_buffer("ids_V", torch.full((1,), -1))
        self.register_buffer("share_VPE", torch.full((1, places, experts), 1 / experts))
        self.register_buffer("strength", torch.tensor(1.0))
        self.register_buffer("place_SH", target_places(topology, self.horizons), persistent=False)
        grow_on_load(self, "ids_V", "share_VPE")

    def prepare(self, knowledge: Knowledge) -> None:
        """Collect the ids, then count their routing, then choose the shrinkage."""
        device = self.ids_V.device
        seen = [w.token_ids_BT[w.valid_BT & w.scored_BT].unique() for w in knowledge.windows()]
        ids = torch.cat([torch.full((1,), -1), *(part.cpu() for part in seen)]).unique()
        self.ids_V = ids.to(device)
        places = self.share_VPE.shape[1]
        counts = torch.zeros(len(ids), places, self.topology.experts, device=device)
        for window in knowledge.windows():
            own_BT = window.valid_BT & window.scored_BT
            routed = unroll_places(window.routed_BTLE * window.valid_BT[..., None, None], places)
            counts.index_add_(0, self._rows(window.token_ids_BT[own_BT]), routed[own_BT].to(device))
        share_LE = shares(layer_counts(knowledge.windows(), self.topology)).to(counts)
        prior_PE = share_LE[torch.arange(places, device=device) % self.topology.layers]
        strength = max(_STRENGTHS, key=lambda s: _left_out(counts, prior_PE, s, self.topology.top_k))
        self.strength.fill_(strength)
        self.share_VPE = shares(counts, prior_PE, strength)

    def forward(self, window: Window) -> Tensor:
        """Log-probabilities [B, T, S, H, E]."""
        return self.share_VPE[self._rows(window.token_ids_BT)].log()[:, :, self.place_SH]

    def _rows(self, token_ids: Tensor) -> Tensor:
        """Each id's row of the table, 0 for ids that are not in it."""
        token_ids = token_ids.to(self.ids_V.device).contiguous()
        row = torch.searchsorted(self.ids_V, token_ids).clamp_max(len(self.ids_V) - 1)
        return torch.where(self.ids_V[row] == token_ids, row, 0)


def _left_out(counts_VPE: Tensor, prior_PE: Tensor, strength: float, top_k: int) -> float:
    """Log-likelihood of every counted expert under the table without the token it was counted for."""
    others_VPE = (counts_VPE - 1).clamp_min(0) + strength * prior_PE
    total_VP = (counts_VPE.sum(-1, keepdim=True) - top_k).clamp_min(0) + strength
    return float((counts_VPE * (others_VPE / total_VP).log()).sum(dtype=torch.float64))
