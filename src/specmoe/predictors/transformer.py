"""A causal transformer over tokens and an LSTM over the layers' routing history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.predictors.base import Recipe
from specmoe.predictors.blocks import HiddenInput, LayerHead, LinearSkip, ResidualBlock, scaled_width
from specmoe.predictors.neural import Context, Events, NeuralPredictor
from specmoe.predictors.search import SHARED, WIDTH
from specmoe.topology import Topology

__all__ = ["TransformerGatingPredictor"]

_SPAN = 16
_DEPTH = 2


class TransformerGatingPredictor(NeuralPredictor):
    """A transformer encoder reads the tokens before, an LSTM the router outputs layer by layer.

    The encoder is causal and looks at most 16 tokens back in each of its two layers, so it is exact with a
    bounded memory. 800 to 1,040 thousand parameters at the reference topology.
    """

    recipe = Recipe(
        category="attention-based",
        sees="context",
        source="transformer encoder (Vaswani et al., 2017) and LSTM (Hochreiter & Schmidhuber, 1997)",
        learning_rate=2e-3,
        epochs=6,
        batch_windows=16,
        scheduler="cosine",
        search=SHARED.but(width=WIDTH),
    )
    memory = _SPAN * _DEPTH + 1

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        width, history = (scaled_width(each, topology, self.recipe.width) for each in (160, 96))
        self.token_routes = nn.Linear(topology.layers * topology.experts, width)
        self.token_hidden = HiddenInput(topology, width)
        self.encoder = nn.ModuleList(_EncoderLayer(width, heads=4, span=_SPAN) for _ in range(_DEPTH))
        self.no_past = nn.Parameter(torch.zeros(width))
        self.history = nn.LSTM(topology.experts, history, batch_first=True)
        self.hidden = HiddenInput(topology, width)
        self.layer = nn.Embedding(topology.layers, width)
        self.fuse_history = nn.Linear(history, width, bias=False)
        self.fuse_past = nn.Linear(width, width, bias=False)
        self.block = ResidualBlock(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = LayerHead(topology, horizons, width)
        self.skip = LinearSkip(topology, horizons)

    def encode_tokens(self, routes_BTLE: Tensor, hidden_BTLD: Tensor | None) -> Tensor:
        """A token's routing at all layers and its last router input: [B, T, C]."""
        last = None if hidden_BTLD is None else hidden_BTLD[:, :, -1]
        return self.token_routes(routes_BTLE.flatten(2)) + self.token_hidden(last)

    def encode_context(self, tokens_BTC: Tensor) -> Context:
        """The encoder's output at the previous token: [B, T, C]."""
        encoded = tokens_BTC
        for layer in self.encoder:
            encoded = layer(encoded)
        length = tokens_BTC.shape[1]
        shifted = F.pad(encoded, (0, 0, 1, 0))[:, :length]
        begun = (torch.arange(length, device=tokens_BTC.device) > 0)[:, None]
        return (torch.where(begun, shifted, self.no_past),)

    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers, (past,) = events.layers_S, events.context
        batch, tokens, _, experts = events.routes_BTLE.shape
        seen = int(layers.max()) + 1
        routes = events.routes_BTLE[:, :, :seen].reshape(batch * tokens, seen, experts)
        history, _ = self.history(routes * experts**0.5)
        history = history.view(batch, tokens, seen, -1)[:, :, layers]
        features = self.hidden(events.hidden_BTSD) + self.layer(layers) + self.fuse_history(history)
        features = self.norm(self.block(features + self.fuse_past(past)[:, :, None]))
        return self.head(features, layers) + self.skip(events.hidden_BTSD, layers)


class _EncoderLayer(nn.Module):
    """Pre-norm transformer layer with causal attention over a sliding window, distances learned."""

    def __init__(self, width: int, heads: int, span: int) -> None:
        super().__init__()
        self.heads, self.span = heads, span
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(heads, span))
        self.block = ResidualBlock(width, 2 * width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, length, width = x_BTC.shape
        projected = self.query_key_value(self.norm(x_BTC)).view(batch, length, 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        position = torch.arange(length, device=x_BTC.device)
        back = position[:, None] - position
        visible = (back >= 0) & (back < self.span)
        bias = self.distance[:, back.clamp(0, self.span - 1)].masked_fill(~visible, float("-inf"))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.block(x_BTC + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
