"""The experts of the token before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specmoe.dataset import Window, ahead
from specmoe.predictors._tables import layer_counts, lookbacks, shares, target_layers
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["PreviousToken"]

# The tie-breaks must stay below the smallest distance between "was used" and "was not used".
_LEAST_GAP, _BY_ROUTER, _BY_FREQUENCY = 0.1, 0.05, 5e-4


class PreviousToken(Predictor):
    """The target layer's latest known experts come again.

    That is the current token's routing where the target (of the next token) lies at or before the source
    layer, else the token's before. Among the experts that were used, and among those that were not, the
    router's output at that place decides, then the layer's frequency. Where nothing earlier is known the
    layer's frequency stands alone. How far used experts stand above the others is the logarithm of how much
    more often they are used by the next token, measured per layer on the training windows.

    Buffers: share_LE float32, the layer's frequency; gap_L float32, that
    logarithm.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free", sees="routing", source="temporal locality: mixtral-offloading (2023)"
    )
    memory: int | None = 1

    share_LE: Tensor
    gap_L: Tensor
    layer_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        self._back = lookbacks(topology, self.horizons)
        self.register_buffer("share_LE", torch.full((topology.layers, topology.experts), 1 / topology.experts))
        self.register_buffer("gap_L", torch.ones(topology.layers))
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)

    def prepare(self, knowledge: Knowledge) -> None:
        """Measure the layers' frequency and how often a token's experts are used by the next one."""
        self.share_LE.copy_(shares(layer_counts(knowledge.windows(), self.topology)))
        again_L = torch.zeros(self.topology.layers, dtype=torch.float64)
        used_L = torch.zeros(self.topology.layers, dtype=torch.float64)
        for window in knowledge.windows():
            routed = window.routed_BTLE
            both_BT = window.valid_BT[:, :-1] & window.valid_BT[:, 1:] & window.scored_BT[:, 1:]
            both_BTL = both_BT[..., None] & routed[:, :-1].any(-1) & routed[:, 1:].any(-1)
            again_L += ((routed[:, 1:] * routed[:, :-1]).sum(-1) * both_BTL).sum((0, 1)).to(again_L)
            used_L += (routed[:, :-1].sum(-1) * both_BTL).sum((0, 1)).to(used_L)
        experts, top_k = self.topology.experts, self.topology.top_k
        return_L = (again_L + 1) / (used_L + 2)
        other_L = top_k * (1 - return_L) / max(1, experts - top_k)
        gap_L = return_L.log() - other_L.clamp_min(1e-6).log()
        self.gap_L.copy_(gap_L.clamp_min(_LEAST_GAP))

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E]; ties are broken by up to 0.0505."""
        layers, experts = self.topology.layers, self.topology.experts
        both = ahead(torch.cat([window.routed_BTLE, window.router_BTLE], -1), self._back)
        used, router = both[..., :experts], both[..., experts:]
        share_SHE = self.share_LE[self.layer_SH]
        logits = used * self.gap_L[self.layer_SH][..., None] + _BY_ROUTER * router + _BY_FREQUENCY * share_SHE
        missing = (both.sum(-1, keepdim=True) == 0).expand(-1, -1, layers, -1, 1)
        return torch.where(missing, share_SHE.log(), logits)
