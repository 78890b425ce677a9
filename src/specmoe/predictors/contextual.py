"""Causal attention over recent tokens and over the router outputs of earlier layers."""

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
    past_tokens,
    scaled_width,
)
from specmoe.predictors.neural import Context, Events, NeuralPredictor
from specmoe.topology import Topology

__all__ = ["ContextualGatingPredictor"]


class ContextualGatingPredictor(NeuralPredictor):
    """The event asks, recent tokens and earlier layers answer: two multi-head attentions.

    Keys carry their distance: in tokens for the first, in layers for the second. A learned null key stands
    in where there is no past. 500 to 650 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="attention-based",
        sees="context",
        source="multi-head attention (Vaswani et al., 2017) over a sliding window, positions by recency",
        learning_rate=2.5e-3,
        epochs=9,
        batch_windows=16,
        scheduler="plateau",
    )
    memory = 16

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width = scaled_width(160, topology)
        self.hidden = HiddenInput(topology, width)
        self.routes = RouteInput(topology, width, depth=1)
        self.layer = nn.Embedding(topology.layers, width)
        self.token_routes = nn.Linear(topology.layers * topology.experts, width)
        self.token_hidden = HiddenInput(topology, width)
        self.token_attention = RecencyAttention(width, span=16)
        self.earlier = RouteInput(topology, width, depth=8)
        self.earlier_route = nn.Linear(topology.experts, width)
        self.layer_attention = RecencyAttention(width, span=self.earlier.depth)
        self.block = ResidualBlock(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = LayerHead(topology, horizons, width)
        self.skip = LinearSkip(topology, horizons)

    def encode_tokens(self, routes_BTLE: Tensor, hidden_BTLD: Tensor | None) -> Tensor:
        """A token's routing at all layers and its last router input: [B, T, C]."""
        last = None if hidden_BTLD is None else hidden_BTLD[:, :, -1]
        return F.gelu(self.token_routes(routes_BTLE.flatten(2)) + self.token_hidden(last))

    def encode_context(self, tokens_BTC: Tensor) -> Context:
        """Keys and values of the last 16 tokens [B, T, 17, 2 C] (the null key first), and which exist."""
        keys_values = self.token_attention.project(tokens_BTC)
        windows, known_TW = past_tokens(keys_values, self.token_attention.span)
        return self.token_attention.with_null(windows, known_TW.expand(*windows.shape[:-1]))

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers, (memory, memory_known) = events.layers_S, events.context
        query = self.hidden(events.hidden_BTSD) + self.routes(events.routes_BTLE, layers) + self.layer(layers)
        features = query + self.token_attention(query, memory, memory_known)
        routes, known_SJ = self.earlier.by_recency(events.routes_BTLE, layers)
        features = features + self._attend_layers(query, routes, known_SJ)
        features = self.norm(self.block(features))
        return self.head(features, layers) + self.skip(events.hidden_BTSD, layers)

    def _attend_layers(self, query_BTSC: Tensor, routes_BTSJE: Tensor, known_SJ: Tensor) -> Tensor:
        batch, tokens, count = query_BTSC.shape[:3]
        keys_values = self.layer_attention.project(self.earlier_route(routes_BTSJE).flatten(0, 2))
        known = known_SJ.expand(batch, tokens, *known_SJ.shape).flatten(0, 2)
        memory, known = self.layer_attention.with_null(keys_values, known)
        mixed = self.layer_attention(query_BTSC.reshape(-1, 1, 1, query_BTSC.shape[-1]), memory[:, None], known[:, None])
        return mixed.view(batch, tokens, count, -1)


class RecencyAttention(nn.Module):
    """Multi-head attention of events over a short memory whose slots are ordered by recency.

    Args:
        width: of queries and memory. span: slots, nearest first. heads: attention heads.
    """

    def __init__(self, width: int, span: int, heads: int = 4) -> None:
        super().__init__()
        self.span, self.heads = span, heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.recency = nn.Parameter(torch.zeros(heads, span + 1))
        self.null = nn.Parameter(torch.zeros(2 * width))
        self.out = nn.Linear(width, width)

    def project(self, tokens: Tensor) -> Tensor:
        """Keys and values side by side: [..., C] → [..., 2 C]."""
        return self.key_value(tokens)

    def with_null(self, memory: Tensor, known: Tensor) -> Context:
        """Put the null slot in front: [..., W, 2 C] → [..., W + 1, 2 C], and the mask likewise."""
        null = self.null.expand(*memory.shape[:-2], 1, -1)
        return torch.cat([null, memory], -2), F.pad(known, (1, 0), value=True)

    def forward(self, query_BTSC: Tensor, memory_BTWC: Tensor, known_BTW: Tensor) -> Tensor:
        """Events of one token share that token's memory: [B, T, S, C]."""
        batch, tokens, events, width = query_BTSC.shape
        slots = memory_BTWC.shape[2]
        query = self.query(query_BTSC).view(batch * tokens, events, self.heads, -1).transpose(1, 2)
        keys, values = memory_BTWC.reshape(batch * tokens, slots, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query @ keys.mT * (width / self.heads) ** -0.5 + self.recency[:, None, :slots]
        scores = scores.masked_fill(~known_BTW.reshape(batch * tokens, 1, 1, slots), float("-inf"))
        mixed = scores.softmax(-1) @ values
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, events, width))
