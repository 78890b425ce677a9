"""Parts that several learned predictors are built from.

Widths follow from the topology: a width is stated at the reference hidden size of 512 and grows with the
square root of the model's own, so that a predictor stays small beside the model it serves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specmoe.predictors._linear import LinearProbe
from specmoe.topology import REFERENCE, Topology

__all__ = [
    "HiddenInput",
    "LayerHead",
    "LinearSkip",
    "PerLayerLinear",
    "ResidualBlock",
    "RouteInput",
    "past_tokens",
    "scaled_width",
]


def scaled_width(width: float, topology: Topology, factor: float = 1.0) -> int:
    """``width`` at the reference topology, scaled to this one and by ``factor``; a multiple of 8, at least 16."""
    scaled = factor * width * math.sqrt((topology.hidden_size or REFERENCE.hidden_size) / REFERENCE.hidden_size)
    return max(16, 8 * round(scaled / 8))


class HiddenInput(nn.Module):
    """Project router inputs [..., D] to [..., width]; a learned vector stands in where there are none."""

    def __init__(self, topology: Topology, width: int) -> None:
        super().__init__()
        # A trace without hidden states may not even say how wide they were.
        self.project = nn.Linear(topology.hidden_size, width) if topology.hidden_size else None
        self.missing = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor | None) -> Tensor:
        """[..., D] → [..., width]; None → [width], which broadcasts."""
        return self.missing if hidden is None or self.project is None else self.project(hidden)


class RouteInput(nn.Module):
    """Project the router outputs of layers s, s-1, … s-J+1 of the current token, aligned by recency.

    Layers before the first are replaced by learned values.

    Args:
        depth: J, how many layers back.
    """

    def __init__(self, topology: Topology, width: int, depth: int) -> None:
        super().__init__()
        self.depth = min(depth, topology.layers)
        self.missing_JE = nn.Parameter(torch.zeros(self.depth, topology.experts))
        self.project = nn.Linear(self.depth * topology.experts, width, bias=False)

    def forward(self, routes_BTLE: Tensor, layers_S: Tensor) -> Tensor:
        """[B, T, S, width]."""
        routes, known_SJ = self.by_recency(routes_BTLE, layers_S)
        # Router outputs are about 1/E each; brought to the scale of the other inputs.
        routes = torch.where(known_SJ[..., None], routes * routes.shape[-1] ** 0.5, self.missing_JE)
        return self.project(routes.flatten(-2))

    def by_recency(self, routes_BTLE: Tensor, layers_S: Tensor) -> tuple[Tensor, Tensor]:
        """Router outputs [B, T, S, J, E] and whether each exists [S, J]."""
        back = layers_S[:, None] - torch.arange(self.depth, device=layers_S.device)
        return routes_BTLE[:, :, back.clamp_min(0)], back >= 0


class LayerHead(nn.Module):
    """Logits of all horizons from features, with weights of its own for every source layer and horizon.

    Expert numbers mean something else in each layer, so nothing is shared between them.
    """

    def __init__(self, topology: Topology, horizons: Sequence[int], width: int) -> None:
        super().__init__()
        self.shape_HE = (len(horizons), topology.experts)
        outputs = len(horizons) * topology.experts
        self.weight = nn.Parameter(torch.empty(topology.layers, width, outputs))
        self.bias = nn.Parameter(torch.zeros(topology.layers, outputs))
        # Small, so that a warm-started linear skip is not drowned by noise at the first step.
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(width))

    def forward(self, features_BTSC: Tensor, layers_S: Tensor) -> Tensor:
        """[B, T, S, width] → [B, T, S, H, E]."""
        return layerwise(features_BTSC, self.weight[layers_S], self.bias[layers_S]).unflatten(-1, self.shape_HE)


class LinearSkip(nn.Module):
    """A linear path from the router input straight to the logits: [L, H] maps from D to E.

    It can start from the closed-form probe, so that training begins where ridge regression ends.
    """

    def __init__(self, topology: Topology, horizons: Sequence[int]) -> None:
        super().__init__()
        self.shape_HE = (len(horizons), topology.experts)
        outputs = len(horizons) * topology.experts
        self.weight = nn.Parameter(torch.zeros(topology.layers, topology.hidden_size, outputs))
        self.bias = nn.Parameter(torch.zeros(topology.layers, outputs))

    @torch.no_grad()
    def warm_start(self, probe: LinearProbe) -> None:
        """Take over the weights of a probe of the same layers and horizons."""
        self.weight.copy_(probe.weight_LHDE.transpose(1, 2).flatten(2))
        self.bias.copy_(probe.bias_LHE.flatten(1))

    def forward(self, hidden_BTSD: Tensor | None, layers_S: Tensor) -> Tensor:
        """[B, T, S, D] → [B, T, S, H, E]; without router inputs only the biases."""
        if hidden_BTSD is None:
            return self.bias[layers_S].unflatten(-1, self.shape_HE)
        return layerwise(hidden_BTSD, self.weight[layers_S], self.bias[layers_S]).unflatten(-1, self.shape_HE)


def layerwise(inputs_BTSC: Tensor, weight_SCX: Tensor, bias_SX: Tensor | None = None) -> Tensor:
    """A linear map with other weights for each layer: [B, T, S, C] → [B, T, S, X]."""
    batch, tokens, layers, width = inputs_BTSC.shape
    by_layer = inputs_BTSC.permute(2, 0, 1, 3).reshape(layers, batch * tokens, width)
    outputs = (
        torch.bmm(by_layer, weight_SCX) if bias_SX is None else torch.baddbmm(bias_SX[:, None], by_layer, weight_SCX)
    )
    return outputs.view(layers, batch, tokens, -1).permute(1, 2, 0, 3)


class PerLayerLinear(nn.Module):
    """A linear map with weights of its own for every layer."""

    def __init__(self, layers: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max(1, inputs))
        self.weight = nn.Parameter(torch.empty(layers, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(layers, outputs))

    def forward(self, inputs_NLC: Tensor, layer: int | None = None) -> Tensor:
        """[N, L, C] → [N, L, X]; given a layer, [N, 1, C] → [N, 1, X] by that layer's weights."""
        if layer is not None:
            return inputs_NLC @ self.weight[layer] + self.bias[layer]
        return torch.baddbmm(self.bias[:, None], inputs_NLC.transpose(0, 1), self.weight).transpose(0, 1)


class PartlySharedLinear(PerLayerLinear):
    """A linear map whose weights are a part that all layers share plus each layer's own.

    The own parts start at zero, and weight decay pulls them back there: what little data there is for each layer is
    spent on how it differs from the others (regularised multi-task learning; Evgeniou & Pontil, 2004).
    """

    def __init__(self, layers: int, inputs: int, outputs: int) -> None:
        super().__init__(layers, inputs, outputs)
        self.shared = nn.Parameter(self.weight.detach()[0].clone())
        nn.init.zeros_(self.weight)

    def forward(self, inputs_NLC: Tensor, layer: int | None = None) -> Tensor:
        """[N, L, C] → [N, L, X]; given a layer, [N, 1, C] → [N, 1, X] by that layer's weights."""
        if layer is not None or len(inputs_NLC) == 1:
            return super().forward(inputs_NLC, layer) + inputs_NLC @ self.shared
        return torch.baddbmm(self.bias[:, None], inputs_NLC.transpose(0, 1), self.whole()).transpose(0, 1)

    def whole(self) -> Tensor:
        """Each layer's weights with the shared part: [L, C, X]."""
        return self.weight + self.shared


class ResidualBlock(nn.Module):
    """x + dropout(W₂ gelu(W₁ norm(x))): a pre-norm residual block (He et al., 2016; Xiong et al., 2020)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., width]."""
        return x + self.block(x)


def past_tokens(tokens_BTC: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """The ``span`` tokens before each token, nearest first.

    Returns:
        [B, T, span, C] with zeros before the beginning, and whether each exists [T, span].
    """
    length = tokens_BTC.shape[1]
    padded = torch.nn.functional.pad(tokens_BTC, (0, 0, span, 0))[:, : length + span - 1]
    # unfold puts the window last, oldest first.
    windows = padded.unfold(1, span, 1).flip(-1).transpose(-1, -2)
    position = torch.arange(length, device=tokens_BTC.device)[:, None]
    return windows, position > torch.arange(span, device=tokens_BTC.device)
