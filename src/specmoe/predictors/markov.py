"""Which experts follow which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specmoe.dataset import Window, targets_of
from specmoe.predictors._tables import layer_counts, shares, target_layers
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["LayerMarkov"]

# Weight of the layer's frequency in a row of counts, in counts.
_STRENGTH = 1.0


class LayerMarkov(Predictor):
    """P(expert at the target | expert at the source), counted, and averaged over the source's K experts.

    One table for every source layer and horizon, so that longer horizons are counted and not multiplied
    out. A source that no expert served says nothing: the target layer's frequency stands in.

    Buffers: share_LE float32, the layer's frequency; share_SHIE float32 [L, H, E, E], a distribution over
    the last dimension for every source expert I.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free", sees="routing", source="inter-layer expert affinity: ExFlow (2024)"
    )

    share_LE: Tensor
    share_SHIE: Tensor
    layer_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        layers, experts = topology.layers, topology.experts
        shape = (layers, len(self.horizons), experts, experts)
        self.register_buffer("share_LE", torch.full((layers, experts), 1 / experts))
        self.register_buffer("share_SHIE", torch.full(shape, 1 / experts))
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)

    def prepare(self, knowledge: Knowledge) -> None:
        """Count pairs of source and target experts over all events whose target is known."""
        counts = torch.zeros(self.share_SHIE.shape, dtype=torch.float64)
        for window in knowledge.windows():
            targets = targets_of(window, self.horizons)
            followed = targets.routed_BTSHE * targets.known_BTSH[..., None]
            # Source layers lead, so that the counts of a batch are one batched product.
            source_SNI = window.routed_BTLE.flatten(0, 1).transpose(0, 1)
            target_SNX = followed.flatten(0, 1).transpose(0, 1).flatten(2)
            batch_SIX = source_SNI.transpose(1, 2) @ target_SNX
            batch_SIHE = batch_SIX.unflatten(-1, followed.shape[-2:])
            counts += batch_SIHE.transpose(1, 2).to(counts)
        share_LE = shares(layer_counts(knowledge.windows(), self.topology))
        self.share_LE.copy_(share_LE)
        prior_SHIE = share_LE[self.layer_SH.cpu()][:, :, None]
        self.share_SHIE.copy_(shares(counts, prior_SHIE, _STRENGTH))

    def forward(self, window: Window) -> Tensor:
        """Log-probabilities [B, T, S, H, E]."""
        routed = window.routed_BTLE
        batch, tokens, layers, experts = routed.shape
        served = routed.sum(-1)
        source_SNI = (routed / served.clamp_min(1)[..., None]).flatten(0, 1).transpose(0, 1)
        table_SIX = self.share_SHIE.transpose(1, 2).flatten(2)
        share = (source_SNI @ table_SIX).transpose(0, 1).reshape(batch, tokens, layers, -1, experts)
        missing = (served == 0)[..., None, None]
        return torch.where(missing, self.share_LE[self.layer_SH], share).log()
