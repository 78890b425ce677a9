"""Token-level, sequence-level and layer-level views, combined by weights that depend on the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.predictors.base import Recipe
from specmoe.predictors.blocks import HiddenInput, LayerHead, LinearSkip, ResidualBlock, RouteInput, scaled_width
from specmoe.predictors.neural import Context, Events, NeuralPredictor
from specmoe.predictors.search import SHARED, WIDTH
from specmoe.topology import Topology

__all__ = ["HierarchicalGatingPredictor"]


class HierarchicalGatingPredictor(NeuralPredictor):
    """Three views of an event, mixed by learned attention over the views.

    The token level sees the router input; the sequence level a causal pool over the tokens before; the
    layer level the router outputs of the current token's earlier layers. 400 to 520 thousand parameters
    at the reference topology.
    """

    recipe = Recipe(
        category="attention-based",
        sees="context",
        source="attention over hierarchical views (Yang et al., 2016, for documents)",
        learning_rate=2.5e-3,
        epochs=6,
        batch_windows=16,
        scheduler="cosine",
        search=SHARED.but(width=WIDTH),
    )
    memory = 32

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width = scaled_width(160, topology, self.recipe.width)
        self.token_level = HiddenInput(topology, width)
        self.token_block = ResidualBlock(width, width)
        self.token_routes = nn.Linear(topology.layers * topology.experts, width)
        self.token_hidden = HiddenInput(topology, width)
        self.no_past = nn.Parameter(torch.zeros(width))
        self.pool = nn.Linear(2 * width, width)
        self.layer_level = RouteInput(topology, width, depth=8)
        self.layer_block = ResidualBlock(width, width // 2)
        self.layer = nn.Embedding(topology.layers, width)
        self.view_weight = nn.Linear(width, 1, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = LayerHead(topology, horizons, width)
        self.skip = LinearSkip(topology, horizons)

    def encode_tokens(self, routes_BTLE: Tensor, hidden_BTLD: Tensor | None) -> Tensor:
        """A token's routing at all layers and its last router input: [B, T, C]."""
        last = None if hidden_BTLD is None else hidden_BTLD[:, :, -1]
        return F.gelu(self.token_routes(routes_BTLE.flatten(2)) + self.token_hidden(last))

    def encode_context(self, tokens_BTC: Tensor) -> Context:
        """The previous token and the running mean of the last 32: [B, T, C]."""
        length = tokens_BTC.shape[1]
        position = torch.arange(length, device=tokens_BTC.device)
        first = (position - self.span).clamp_min(0)
        sums = F.pad(tokens_BTC, (0, 0, 1, 0)).cumsum(1)
        mean = (sums[:, position] - sums[:, first]) / (position - first).clamp_min(1)[:, None]
        previous = F.pad(tokens_BTC, (0, 0, 1, 0))[:, :length]
        begun = (position > 0)[:, None]
        pooled = F.gelu(self.pool(torch.cat([previous, mean], -1)))
        return (torch.where(begun, pooled, self.no_past),)

    @property
    def span(self) -> int:
        """Tokens the running pool covers."""
        assert self.memory is not None
        return self.memory

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers, (sequence,) = events.layers_S, events.context
        layer_view = self.layer_block(self.layer_level(events.routes_BTLE, layers))
        token_view = self.token_block(self.token_level(events.hidden_BTSD)).expand_as(layer_view)
        views = torch.stack([token_view, sequence[:, :, None].expand_as(layer_view), layer_view], -2)
        views = views + self.layer(layers)[:, None]
        weights = self.view_weight(torch.tanh(views)).softmax(-2)
        mixed = self.norm((weights * views).sum(-2))
        return self.head(mixed, layers) + self.skip(events.hidden_BTSD, layers)
