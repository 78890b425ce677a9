"""How long a step's computing takes on a machine, measured or estimated from its two rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.hardware.profile import Hardware
from specmoe.topology import Topology

__all__ = ["StepCost", "step_cost"]

# Query, key, value and output projections, each D × D.
_ATTENTION_MATRICES = 4


@dataclass(frozen=True)
class StepCost:
    """Compute times of a step in seconds, as straight lines in its tokens.

    A step of n tokens spends ``layer_seconds + (n - 1) · token_layer_seconds`` in each MoE layer outside the experts,
    ``expert_seconds + (m - 1) · token_seconds`` in an expert that m of them are routed to, and ``other_seconds`` once.
    Where experts differ in size, the two numbers are of the largest, and there is one of each for every layer.
    """

    layer_seconds: float
    token_layer_seconds: float
    expert_seconds: float
    token_seconds: float
    other_seconds: float
    expert_seconds_by_layer: tuple[float, ...] | None = None
    token_seconds_by_layer: tuple[float, ...] | None = None

    def layer(self, tokens: int) -> float:
        """The part of one MoE layer without its experts, for a step of ``tokens``."""
        return self.layer_seconds + (tokens - 1) * self.token_layer_seconds

    def expert(self, tokens: int, layer: int = 0) -> float:
        """One expert of a layer that ``tokens`` of a step are routed to."""
        expert_L, token_L = self.expert_L(layer + 1), self.token_L(layer + 1)
        return float(expert_L[layer] + (tokens - 1) * token_L[layer])

    def expert_L(self, layers: int) -> NDArray[np.float64]:
        """``expert_seconds`` of each layer: float64 [L]."""
        by_layer = self.expert_seconds_by_layer
        return np.full(layers, self.expert_seconds) if by_layer is None else np.array(by_layer)

    def token_L(self, layers: int) -> NDArray[np.float64]:
        """``token_seconds`` of each layer: float64 [L]."""
        by_layer = self.token_seconds_by_layer
        return np.full(layers, self.token_seconds) if by_layer is None else np.array(by_layer)


def step_cost(
    hardware: Hardware, topology: Topology, bytes_per_expert: int | tuple[int, ...], *, bytes_per_weight: float = 2.0
) -> StepCost:
    """What a step costs: as measured where the profile knows a model of this shape, else from the device's two rates.

    Measured times are taken as they are, whatever ``bytes_per_expert`` says: experts that are stored smaller, all or
    those of some layers, are taken to be computed with as the measured ones.

    The estimate is a roofline (Williams et al., 2009) made a straight line: the first token pays for reading the
    weights or for its arithmetic, whichever takes longer, each further one for its arithmetic. That is at most twice
    the roofline's own maximum, and equal to it at one token. It assumes that

    - an expert has ``bytes_per_expert / bytes_per_weight`` weights and two operations for each and token;
    - a layer has, besides its experts, attention of 4 D² weights (no grouped keys and values, no latent projections)
      and a router of D × E, all of ``bytes_per_weight``; where the hidden size D is unknown (0), nothing but
      ``kernel_seconds``;
    - reading the keys and values of earlier tokens, shared experts, dense layers, embedding and output head cost
      nothing.

    So it is an underestimate for models with long contexts, many shared experts or a large vocabulary.

    Args:
        hardware: profile. topology: shape of the model.
        bytes_per_expert: size of an expert as the device reads it; of each layer where they differ.
        bytes_per_weight: of one weight, 2 for bfloat16; a q-bit model has q / 8.

    Raises:
        ValueError: a size is not positive.
    """
    sizes = (bytes_per_expert,) if isinstance(bytes_per_expert, int) else bytes_per_expert
    if min(sizes) <= 0 or bytes_per_weight <= 0:
        raise ValueError("bytes_per_expert and bytes_per_weight must be positive")
    compute = hardware.compute
    measured = next((model for model in compute.models if model.is_of(topology)), None)
    if measured is not None:
        return StepCost(
            layer_seconds=measured.layer_seconds,
            token_layer_seconds=measured.token_layer_seconds,
            expert_seconds=measured.expert_seconds,
            token_seconds=measured.token_seconds,
            other_seconds=measured.other_seconds,
        )
    width = topology.hidden_size
    layer_bytes = (_ATTENTION_MATRICES * width**2 + width * topology.router_classes) * bytes_per_weight

    def arithmetic(size: float) -> float:
        return 2 * size / bytes_per_weight / compute.flops

    def first_token(size: float) -> float:
        return max(size / compute.memory_bandwidth, arithmetic(size))

    return StepCost(
        layer_seconds=compute.kernel_seconds + first_token(layer_bytes),
        token_layer_seconds=arithmetic(layer_bytes),
        expert_seconds=first_token(max(sizes)),
        token_seconds=arithmetic(max(sizes)),
        other_seconds=0.0,
        expert_seconds_by_layer=None if len(sizes) == 1 else tuple(map(first_token, sizes)),
        token_seconds_by_layer=None if len(sizes) == 1 else tuple(map(arithmetic, sizes)),
    )
