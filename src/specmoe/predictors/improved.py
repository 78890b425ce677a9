"""Parallel feature extractors at several widths and time spans, fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.predictors.base import Recipe
from specmoe.predictors.blocks import (
    HiddenInput,
    LayerHead,
    LinearSkip,
    ResidualBlock,
    RouteInput,
    scaled_width,
)
from specmoe.predictors.neural import Context, Events, NeuralPredictor
from specmoe.predictors.search import SHARED, WIDTH
from specmoe.topology import Topology

__all__ = ["ImprovedPredictor"]

_SPANS = (1, 4, 16)


class ImprovedPredictor(NeuralPredictor):
    """Three widths look at the event, three time spans at the tokens before it; one layer fuses them.

    300 to 390 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="multi-scale",
        sees="context",
        source="parallel branches fused, as in Inception (Szegedy et al., 2015), over widths and time spans",
        learning_rate=3e-3,
        epochs=6,
        batch_windows=32,
        search=SHARED.but(width=WIDTH),
    )
    memory = max(_SPANS)

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        widths = [scaled_width(width, topology, self.recipe.width) for width in (32, 64, 96)]
        span_width, width = (scaled_width(each, topology, self.recipe.width) for each in (48, 128))
        self.branches = nn.ModuleList(HiddenInput(topology, branch) for branch in widths)
        self.routes = RouteInput(topology, span_width, depth=4)
        self.token_routes = nn.Linear(topology.layers * topology.experts, span_width)
        self.token_hidden = HiddenInput(topology, span_width)
        self.spans = nn.ModuleList(nn.Linear(span_width, span_width) for _ in _SPANS)
        self.layer = nn.Embedding(topology.layers, width)
        self.fuse_event = nn.Linear(sum(widths) + span_width, width)
        self.fuse_spans = nn.Linear(span_width * len(_SPANS), width, bias=False)
        self.block = ResidualBlock(width, width // 2)
        self.head = LayerHead(topology, horizons, width)
        self.skip = LinearSkip(topology, horizons)

    def encode_tokens(self, routes_BTLE: Tensor, hidden_BTLD: Tensor | None) -> Tensor:
        """A token's routing at all layers and its last router input: [B, T, C]."""
        last = None if hidden_BTLD is None else hidden_BTLD[:, :, -1]
        return F.gelu(self.token_routes(routes_BTLE.flatten(2)) + self.token_hidden(last))

    def encode_context(self, tokens_BTC: Tensor) -> Context:
        """Averages over the last 1, 4 and 16 tokens (of those that exist), projected apart: [B, T, 3 C]."""
        sums_BTC = F.pad(tokens_BTC, (0, 0, 1, 0)).cumsum(1)
        position = torch.arange(tokens_BTC.shape[1], device=tokens_BTC.device)
        views = []
        for span, project in zip(_SPANS, self.spans, strict=True):
            first = (position - span).clamp_min(0)
            count = (position - first).clamp_min(1)[:, None]
            views.append(F.gelu(project((sums_BTC[:, position] - sums_BTC[:, first]) / count)))
        return (torch.cat(views, -1),)

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers, (spans,) = events.layers_S, events.context
        routes = self.routes(events.routes_BTLE, layers)
        seen = [branch(events.hidden_BTSD).expand(*routes.shape[:-1], -1) for branch in self.branches]
        features = self.fuse_event(F.gelu(torch.cat([*seen, routes], -1)))
        features = self.block(features + self.fuse_spans(spans)[:, :, None] + self.layer(layers))
        return self.head(features, layers) + self.skip(events.hidden_BTSD, layers)
