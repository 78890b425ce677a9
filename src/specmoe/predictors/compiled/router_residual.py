"""A compiled ``step`` of the router-residual predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from specmoe.errors import SpecmoeError
from specmoe.predictors.base import CompiledStep, Observation, State
from specmoe.predictors.compiled.kernels import F32, add_product, gelu, mixed, scaled_norm

if TYPE_CHECKING:
    from specmoe.predictors.router_residual import RouterResidualPredictor

__all__ = ["CompiledRouterResidual"]


class CompiledRouterResidual(CompiledStep):
    """Everything linear in the router input folded into one map a layer, and one compiled call an event.

    Baseline, its default vectors and factors, the standardisation, the compression and the linear correction are one
    matrix [D, H·E + rank]. What is worked out once a token is left to PyTorch.
    """

    @torch.no_grad()
    def __init__(self, predictor: RouterResidualPredictor) -> None:
        self.predictor = predictor
        topology = predictor.topology
        self.shape = (len(predictor.horizons), topology.experts)
        scale_LD1 = predictor.scale_LD[..., None]
        compress_LDR = predictor.compress.weight / scale_LD1
        offset_LR = predictor.compress.bias - torch.einsum("ld,ldr->lr", predictor.mean_LD, compress_LDR)
        linear_LRX = predictor.linear.weight
        maps, offsets = [], []
        for layer in range(topology.layers):
            weight_HED, default_HE = predictor.early_routers(layer)
            straight_DX = weight_HED.flatten(0, 1).T + compress_LDR[layer] @ linear_LRX[layer]
            bias_X = default_HE.flatten() + offset_LR[layer] @ linear_LRX[layer] + predictor.linear.bias[layer]
            maps.append(torch.cat([straight_DX, compress_LDR[layer]], 1))
            offsets.append(torch.cat([bias_X + predictor.head.bias[layer], offset_LR[layer]]))
        mix_in, mix_out, lens, following = predictor.mix_in, predictor.mix_out, predictor.lens, predictor.from_next
        rows = len(predictor.unembedding_VD)
        parts = (torch.stack(maps), torch.stack(offsets), mix_in.weight, mix_in.bias, mix_out.weight, mix_out.bias)
        parts += (predictor.norm.weight, predictor.norm.bias, predictor.head.weight)
        parts += (lens.weight, lens.bias, predictor.lens_gain_LD, predictor.unembedding_VD.T)
        parts += (predictor.embedding.weight[:rows], following.weight, following.bias)
        self.weights = tuple(np.ascontiguousarray(part.detach().cpu().float().numpy()) for part in parts)
        self.spare = np.empty((3, predictor.rank), np.float32)
        self.tokens = np.empty(rows, np.float32)

    def start(self) -> State:
        """The state before the first token of a sequence."""
        return self.predictor.start()

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> F32:
        """Logits [H, E] float32 of one event.

        Raises:
            SpecmoeError: the observation has no hidden state.
        """
        memory, layer = state.memory, observation.layer
        if observation.hidden is None:
            raise SpecmoeError("RouterResidualPredictor needs the router input of every event")
        if "routed" not in memory or layer <= int(memory["layer"]):
            self.predictor.begin_token(memory, observation.token_id)
            state.views = tuple(memory[name].numpy() for name in ("known", "routed", "compressed", "layer"))
        known, routed, compressed, last = state.views
        last[()] = layer
        for expert in observation.expert_ids.tolist():
            if 0 <= expert < routed.shape[1]:
                routed[layer, expert] = 1
        out = self.weights[1][layer].copy()
        looking = layer - self.predictor.lens_from if len(self.tokens) else -1
        hidden = observation.hidden.numpy()
        _event(layer, looking, hidden, known, compressed, self.spare, self.tokens, out, *self.weights)
        return out[: self.shape[0] * self.shape[1]].reshape(self.shape)


@njit(fastmath=True)
def _event(
    layer: int,
    looking: int,
    hidden: F32,
    known: F32,
    compressed: F32,
    spare: F32,
    tokens: F32,
    out: F32,
    straight: F32,
    offset: F32,
    mix_in: F32,
    mix_in_bias: F32,
    mix_out: F32,
    mix_out_bias: F32,
    norm: F32,
    norm_bias: F32,
    head: F32,
    lens: F32,
    lens_bias: F32,
    lens_gain: F32,
    unembedding: F32,
    embedding: F32,
    following: F32,
    following_bias: F32,
) -> None:
    rank = known.shape[1]
    logits = out[: out.shape[0] - rank]
    features, normal, inner = spare[0], spare[1], spare[2]
    add_product(hidden, straight[layer], out)
    compressed[layer] = out[out.shape[0] - rank :]
    features[:] = compressed[layer] + known[layer]
    if looking >= 0:
        seen = hidden + lens_bias[looking]
        add_product(compressed[layer], lens[looking], seen)
        square = np.float32(0.0)
        for i in range(seen.shape[0]):
            square += seen[i] * seen[i]
        seen *= lens_gain[looking] / np.sqrt(square / seen.shape[0] + np.float32(1.1920929e-07))
        tokens[:] = 0
        add_product(seen, unembedding, tokens)
        highest = tokens.max()
        total = np.float32(0.0)
        for i in range(tokens.shape[0]):
            tokens[i] = np.exp(tokens[i] - highest)
            total += tokens[i]
        expected = np.zeros(embedding.shape[1], np.float32)
        add_product(tokens, embedding, expected)
        expected /= total
        features += following_bias[looking]
        add_product(expected, following[looking], features)
    gelu(features)
    scaled_norm(features, norm, norm_bias, normal)
    mixed(features, mix_in[layer], mix_in_bias[layer], mix_out[layer], mix_out_bias[layer], normal, inner)
    add_product(features, head[layer], logits)
