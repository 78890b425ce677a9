"""A residual network with LayerNorm and dropout beside a linear skip."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from specmoe.predictors.base import Recipe
from specmoe.predictors.blocks import HiddenInput, LayerHead, LinearSkip, ResidualBlock, RouteInput, scaled_width
from specmoe.predictors.neural import Events, NeuralPredictor
from specmoe.predictors.search import DROPOUT, SHARED, WIDTH
from specmoe.topology import Topology

__all__ = ["RegularizedSpeculationModel"]


class RegularizedSpeculationModel(NeuralPredictor):
    """Two residual blocks on the event's own inputs; the linear skip carries what ridge regression finds.

    200 to 260 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="edge",
        sees="hidden",
        needs=frozenset({"hidden"}),
        source="residual perceptron (He et al., 2016) with LayerNorm and dropout on the router input",
        learning_rate=3e-3,
        epochs=7,
        batch_windows=32,
        weight_decay=0.05,
        dropout=0.1,
        search=SHARED.but(width=WIDTH, dropout=DROPOUT),
    )

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width = scaled_width(128, topology, self.recipe.width)
        self.hidden = HiddenInput(topology, width)
        self.routes = RouteInput(topology, width, depth=4)
        self.layer = nn.Embedding(topology.layers, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width, width // 2, self.recipe.dropout) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = LayerHead(topology, horizons, width)
        self.skip = LinearSkip(topology, horizons)

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers = events.layers_S
        features = self.hidden(events.hidden_BTSD) + self.routes(events.routes_BTLE, layers) + self.layer(layers)
        return self.head(self.norm(self.blocks(features)), layers) + self.skip(events.hidden_BTSD, layers)
