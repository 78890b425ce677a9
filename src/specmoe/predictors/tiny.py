"""One narrow layer, for devices where a kilobyte counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specmoe.predictors.base import Recipe
from specmoe.predictors.blocks import HiddenInput, LayerHead, RouteInput, scaled_width
from specmoe.predictors.neural import Events, NeuralPredictor
from specmoe.predictors.search import SHARED, WIDTH
from specmoe.topology import Topology

__all__ = ["TinySpeculationModel"]


class TinySpeculationModel(NeuralPredictor):
    """A bottleneck on the router input, the last two router outputs and the layer's number.

    About 17 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="edge",
        sees="hidden",
        needs=frozenset({"hidden"}),
        source="bottleneck classifier on the router input, as in MoE-Infinity's and Fate's smallest predictors",
        learning_rate=6e-3,
        epochs=8,
        batch_windows=32,
        search=SHARED.but(width=WIDTH),
    )

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width = scaled_width(24, topology, self.recipe.width)
        self.hidden = HiddenInput(topology, width)
        self.routes = RouteInput(topology, width, depth=2)
        self.layer = nn.Embedding(topology.layers, width)
        self.head = LayerHead(topology, horizons, width)

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers = events.layers_S
        features = self.hidden(events.hidden_BTSD) + self.routes(events.routes_BTLE, layers) + self.layer(layers)
        return self.head(torch.relu(features), layers)
