"""The experts that a layer uses most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specmoe.dataset import Window
from specmoe.predictors._tables import for_all_events, layer_counts, shares, target_layers
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["LayerFrequency"]


class LayerFrequency(Predictor):
    """Each expert's share of its layer's routing on the training windows, whatever the event.

    Buffers: share_LE float32.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free", sees="nothing", source="control: static hot experts, as in Fiddler (2024)"
    )

    share_LE: Tensor
    layer_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        self.register_buffer("share_LE", torch.full((topology.layers, topology.experts), 1 / topology.experts))
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)

    def prepare(self, knowledge: Knowledge) -> None:
        """Count the routing of the training windows."""
        self.share_LE.copy_(shares(layer_counts(knowledge.windows(), self.topology)))

    def forward(self, window: Window) -> Tensor:
        """Log-probabilities [B, T, S, H, E]."""
        return for_all_events(self.share_LE[self.layer_SH].log(), window)
