"""Causal attention over recent tokens and over the router outputs of earlier layers."""

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

__all__ = ["ContextualGatingPredictor"]


class ContextualGatingPredictor(NeuralPredictor):
    """The event asks, recent tokens and earlier layers answer: two multi-head attentions.

    Positions are distances: in tokens for the first, in layers for the second. A learned null key stands in
    where there is no past. 500 to 650 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="attention-based",
        sees="context",
        source="multi-head attention (Vaswani et al., 2017), positions by distance (Shaw et al., 2018)",
        learning_rate=2.5e-3,
        epochs=5,
        batch_windows=16,
        scheduler="cosine",
        search=SHARED.but(width=WIDTH),
    )
    memory = 16

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width = scaled_width(160, topology, self.recipe.width)
        self.hidden = HiddenInput(topology, width)
        self.routes = RouteInput(topology, width, depth=1)
        self.layer = nn.Embedding(topology.layers, width)
        self.token_routes = nn.Linear(topology.layers * topology.experts, width)
        self.token_hidden = HiddenInput(topology, width)
        self.token_attention = _RecencyAttention(width, nearest=1, span=16)
        self.earlier_route = nn.Linear(topology.experts, width)
        self.layer_attention = _RecencyAttention(width, nearest=0, span=8)
        self.block = ResidualBlock(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = LayerHead(topology, horizons, width)
        self.skip = LinearSkip(topology, horizons)

    def encode_tokens(self, routes_BTLE: Tensor, hidden_BTLD: Tensor | None) -> Tensor:
        """A token's routing at all layers and its last router input: [B, T, C]."""
        last = None if hidden_BTLD is None else hidden_BTLD[:, :, -1]
        return F.gelu(self.token_routes(routes_BTLE.flatten(2)) + self.token_hidden(last))

    def encode_context(self, tokens_BTC: Tensor) -> Context:
        """Keys and values of all tokens [B, T, 2 C], and how far each lies back from each [1, T, T]."""
        position = torch.arange(tokens_BTC.shape[1], device=tokens_BTC.device)
        return self.token_attention.key_value(tokens_BTC), (position[:, None] - position)[None]

    def current(self, context: Context) -> Context:
        """All keys and values, and their distances from the last token."""
        keys_values, distance = context
        return keys_values, distance[:, -1:]

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers, (memory, distance) = events.layers_S, events.context
        query = self.hidden(events.hidden_BTSD) + self.routes(events.routes_BTLE, layers) + self.layer(layers)
        batch, tokens, count, width = query.shape
        recent = self.token_attention(
            query.reshape(batch, tokens * count, width), memory, distance[0].repeat_interleave(count, 0)
        )
        below = self.layer_attention.key_value(self.earlier_route(events.routes_BTLE)).flatten(0, 1)
        depth = torch.arange(below.shape[1], device=layers.device)
        earlier = self.layer_attention(query.flatten(0, 1), below, layers[:, None] - depth)
        features = query + recent.view_as(query) + earlier.view_as(query)
        return self.head(self.norm(self.block(features)), layers) + self.skip(events.hidden_BTSD, layers)


class _RecencyAttention(nn.Module):
    """Multi-head attention that knows of its keys only how far back they lie.

    Args:
        width: of queries and keys. nearest: smallest distance that may be seen. span: how many distances.
        heads: attention heads.
    """

    def __init__(self, width: int, nearest: int, span: int, heads: int = 4) -> None:
        super().__init__()
        self.nearest, self.span, self.heads = nearest, span, heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.null = nn.Parameter(torch.zeros(2 * width))
        self.bias = nn.Parameter(torch.zeros(heads, span))
        self.out = nn.Linear(width, width)

    def forward(self, query_BQC: Tensor, memory_BMC: Tensor, distance_QM: Tensor) -> Tensor:
        """[B, Q, C] over keys and values side by side [B, M, 2 C] → [B, Q, C]."""
        batch, queries, width = query_BQC.shape
        memory = torch.cat([self.null.expand(batch, 1, -1), memory_BMC], 1)
        key, value = memory.view(batch, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query = self.query(query_BQC).view(batch, queries, self.heads, -1).transpose(1, 2)
        back = distance_QM - self.nearest
        visible = (back >= 0) & (back < self.span)
        bias = self.bias[:, back.clamp(0, self.span - 1)].masked_fill(~visible, float("-inf"))
        # The null key comes first and is always visible.
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=F.pad(bias, (1, 0))[None])
        return self.out(mixed.transpose(1, 2).reshape(batch, queries, width))
