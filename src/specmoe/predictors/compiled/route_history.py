"""A compiled ``step`` of the route-history predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from specmoe.predictors.base import CompiledStep, Observation, State
from specmoe.predictors.compiled.kernels import F32, add_product, gelu, mixed, scaled_norm

if TYPE_CHECKING:
    from specmoe.predictors.route_history import RouteHistoryPredictor

__all__ = ["CompiledRouteHistory"]

# Where it stands among the weights.
_HEAD_BIAS = 10


class CompiledRouteHistory(CompiledStep):
    """Weights as arrays, and one compiled call an event; what is worked out once a token is left to PyTorch."""

    def __init__(self, predictor: RouteHistoryPredictor) -> None:
        self.predictor = predictor
        self.shape = (len(predictor.horizons), predictor.topology.experts)
        mix_in, mix_out, head = predictor.mix_in, predictor.mix_out, predictor.head
        norms = (predictor.norm_in, predictor.norm_out)
        layered = (*_lag_tables(predictor), predictor.sum_routes, predictor.scale_L)
        layered += (mix_in.whole(), mix_in.bias, mix_out.whole(), mix_out.bias, head.whole(), head.bias)
        shared = tuple(part for norm in norms for part in (norm.weight, norm.bias))
        self.weights = tuple(np.ascontiguousarray(part.detach().cpu().float().numpy()) for part in layered + shared)
        self.spare = np.empty((3, predictor.width), np.float32)

    def start(self) -> State:
        """The state before the first token of a sequence."""
        return self.predictor.start()

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> F32:
        """Logits [H, E] float32 of one event."""
        memory, layer = state.memory, observation.layer
        if "routed" not in memory or layer <= int(memory["layer"]):
            self.predictor.begin_token(memory, observation.token_id)
            state.views = tuple(memory[name].numpy() for name in ("known", "routed", "total", "layer"))
        known, routed, total, last = state.views
        last[()] = layer
        logits = self.weights[_HEAD_BIAS][layer].copy()
        _event(layer, observation.expert_ids.numpy(), known, routed, total, self.spare, logits, *self.weights)
        return logits.reshape(self.shape)


@torch.no_grad()
def _lag_tables(predictor: RouteHistoryPredictor) -> tuple[Tensor, Tensor, Tensor]:
    """What each expert chosen here or shortly before adds to the features, worked out ahead.

    Returns:
        [S, lags, E, width], the rest of that map's weights [S, C, width], and its bias [S, width].
    """
    routes, into = predictor.routes, predictor.from_routes.whole()
    layers, width = predictor.topology.layers, routes.weight.shape[-1]
    lags = (into.shape[1] - predictor.token_width) // width
    tables, bias = [], predictor.from_routes.bias.clone()
    for lag in range(lags):
        part = into[:, lag * width : (lag + 1) * width]
        before = (torch.arange(layers, device=into.device) - lag).clamp_min(0)
        tables.append(routes.weight[before] @ part)
        # Where there is no layer that far back, nothing is added.
        bias[lag:] += (routes.bias[before, None] @ part)[lag:, 0]
    return torch.stack(tables, 1), into[:, lags * width :], bias


@njit(fastmath=True)
def _event(
    layer: int,
    expert_ids: NDArray[np.int64],
    known: F32,
    routed: F32,
    total: F32,
    spare: F32,
    logits: F32,
    lagged: F32,
    into: F32,
    into_bias: F32,
    sum_routes: F32,
    scale: F32,
    mix_in: F32,
    mix_in_bias: F32,
    mix_out: F32,
    mix_out_bias: F32,
    head: F32,
    head_bias: F32,
    norm_in: F32,
    norm_in_bias: F32,
    norm_out: F32,
    norm_out_bias: F32,
) -> None:
    features, normal, inner = spare[0], spare[1], spare[2]
    for expert in expert_ids:
        # What is no expert of this layer, an empty slot or a zero expert, counts nothing; a repeated one counts once.
        if expert >= 0 and expert < routed.shape[1] and routed[layer, expert] == 0:
            routed[layer, expert] = 1
            total += sum_routes[layer, expert]
    features[:] = known[layer] + into_bias[layer]
    for lag in range(min(lagged.shape[1], layer + 1)):
        for expert in range(routed.shape[1]):
            if routed[layer - lag, expert] != 0:
                features += lagged[layer, lag, expert]
    add_product(total * scale[layer], into[layer], features)
    scaled_norm(features, norm_in, norm_in_bias, normal)
    mixed(features, mix_in[layer], mix_in_bias[layer], mix_out[layer], mix_out_bias[layer], normal, inner)
    scaled_norm(features, norm_out, norm_out_bias, normal)
    gelu(normal)
    add_product(normal, head[layer], logits)
