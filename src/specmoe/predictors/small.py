"""Two narrow layers, for edge devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.predictors.base import Recipe
from specmoe.predictors.blocks import HiddenInput, LayerHead, RouteInput, scaled_width
from specmoe.predictors.neural import Events, NeuralPredictor
from specmoe.predictors.search import SHARED, WIDTH
from specmoe.topology import Topology

__all__ = ["SmallSpeculationModel"]


class SmallSpeculationModel(NeuralPredictor):
    """A two-layer perceptron on the router input, the last two router outputs and the layer's number.

    About 38 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="edge",
        sees="hidden",
        needs=frozenset({"hidden"}),
        source="two-layer perceptron on the router input (pre-gating: Hwang et al., 2024)",
        learning_rate=5e-3,
        epochs=8,
        batch_windows=32,
        search=SHARED.but(width=WIDTH),
    )

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width = scaled_width(48, topology, self.recipe.width)
        self.hidden = HiddenInput(topology, width)
        self.routes = RouteInput(topology, width, depth=2)
        self.layer = nn.Embedding(topology.layers, width)
        self.mix = nn.Linear(width, width)
        self.head = LayerHead(topology, horizons, width)

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers = events.layers_S
        features = self.hidden(events.hidden_BTSD) + self.routes(events.routes_BTLE, layers) + self.layer(layers)
        return self.head(F.gelu(self.mix(F.gelu(features))), layers)
