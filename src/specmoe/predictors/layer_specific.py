"""A separate model for each layer transition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.predictors.base import Recipe
from specmoe.predictors.blocks import LayerHead, LinearSkip, RouteInput, layerwise, past_tokens, scaled_width
from specmoe.predictors.neural import Context, Events, NeuralPredictor
from specmoe.predictors.search import SHARED, WIDTH
from specmoe.topology import Topology

__all__ = ["LayerSpecificPredictor"]


class LayerSpecificPredictor(NeuralPredictor):
    """For every source layer a network of its own; nothing is shared between layers.

    Each sees its router input, the router outputs so far and the previous token's routing. All of them
    run in one batched multiplication. 600 to 780 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="ensemble",
        sees="context",
        source="one predictor a layer, as in Pre-gated MoE (Hwang et al., 2024) and ProMoE (Song et al., 2024)",
        learning_rate=2.5e-3,
        epochs=7,
        batch_windows=32,
        search=SHARED.but(width=WIDTH),
    )
    memory = 1

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width, narrow = (scaled_width(each, topology, self.recipe.width) for each in (128, 48))
        self.hidden = _PerLayer(topology.layers, topology.hidden_size, width)
        self.missing_hidden = nn.Parameter(torch.zeros(topology.layers, width))
        self.routes = RouteInput(topology, narrow, depth=4)
        self.previous = nn.Linear(topology.layers * topology.experts, narrow)
        self.no_past = nn.Parameter(torch.zeros(narrow))
        self.past = _PerLayer(topology.layers, 2 * narrow, width)
        self.mix = _PerLayer(topology.layers, width, width)
        self.head = LayerHead(topology, horizons, width)
        self.skip = LinearSkip(topology, horizons)

    def encode_tokens(self, routes_BTLE: Tensor, hidden_BTLD: Tensor | None) -> Tensor:
        """A token's routing at all layers: [B, T, C]."""
        del hidden_BTLD
        return self.previous(routes_BTLE.flatten(2))

    def encode_context(self, tokens_BTC: Tensor) -> Context:
        """The previous token's routing: [B, T, C]."""
        windows, known_TW = past_tokens(tokens_BTC, 1)
        return (torch.where(known_TW[..., None], windows, self.no_past)[:, :, 0],)

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers, (previous,) = events.layers_S, events.context
        routes = self.routes(events.routes_BTLE, layers)
        past = torch.cat([routes, previous[:, :, None].expand_as(routes)], -1)
        if events.hidden_BTSD is None:
            features = self.missing_hidden[layers]
        else:
            features = self.hidden(events.hidden_BTSD, layers)
        features = F.gelu(features + self.past(past, layers))
        features = features + F.gelu(self.mix(features, layers))
        return self.head(features, layers) + self.skip(events.hidden_BTSD, layers)


class _PerLayer(nn.Module):
    """A linear layer with other weights for every source layer."""

    def __init__(self, layers: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max(1, inputs))
        self.weight = nn.Parameter(torch.empty(layers, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(layers, outputs))

    def forward(self, inputs_BTSC: Tensor, layers_S: Tensor) -> Tensor:
        return layerwise(inputs_BTSC, self.weight[layers_S], self.bias[layers_S])
