"""The target layer's own router, asked early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specmoe.dataset import Window
from specmoe.errors import SpecmoeError
from specmoe.predictors._linear import hidden_of, per_layer_product
from specmoe.predictors._tables import target_layers
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["NextRouter"]


class NextRouter(Predictor):
    """The target layer's router, applied to the hidden state at the source layer.

    It works as far as the residual stream changes slowly from layer to layer. Past the last layer it is
    layer 0's router on the last hidden state of the token before, and means little.

    Buffers: weight_LED, bias_LE float32, the model's routers.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free",
        sees="hidden",
        needs=frozenset({"hidden", "routers"}),
        source="Fate (2025); mixtral-offloading (2023)",
    )

    weight_LED: Tensor
    bias_LE: Tensor
    layer_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        layers, experts = topology.layers, topology.experts
        self.register_buffer("weight_LED", torch.zeros(layers, experts, topology.hidden_size))
        self.register_buffer("bias_LE", torch.zeros(layers, experts))
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)

    def prepare(self, knowledge: Knowledge) -> None:
        """Take over the model's routers.

        Raises:
            SpecmoeError: the trace does not keep them, or they are of another shape.
        """
        weight, bias = knowledge.router_weight_LED, knowledge.router_bias_LE
        if weight is None:
            raise SpecmoeError("NextRouter needs the routers' weights, which this trace does not keep; capture it anew")
        # A router may also choose zero experts, which are not predicted.
        weight = weight[:, : self.topology.experts]
        if weight.shape != self.weight_LED.shape:
            expected = list(self.weight_LED.shape)
            raise SpecmoeError(f"the trace's router weights have shape {list(weight.shape)}, expected {expected}")
        self.weight_LED.copy_(weight)
        self.bias_LE.zero_()
        if bias is not None:
            self.bias_LE.copy_(bias[:, : self.topology.experts])

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E].

        Raises:
            SpecmoeError: the window has no hidden states.
        """
        weight_SHDE = self.weight_LED[self.layer_SH].transpose(-1, -2)
        return per_layer_product(hidden_of(window, "NextRouter"), weight_SHDE) + self.bias_LE[self.layer_SH]
