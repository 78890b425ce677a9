"""A compiled ``step`` of the route-history predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from specmoe.predictors.base import CompiledStep, Observation, State
from specmoe.predictors.compiled.kernels import F32, add_product, gelu, mixed, scaled_norm

if TYPE_CHECKING:
    from specmoe.predictors.route_history import RouteHistoryPredictor

__all__ = ["CompiledRouteHistory"]


class CompiledRouteHistory(CompiledStep):
    """Weights as arrays, and one compiled call an event; what is worked out once a token is left to PyTorch."""

    def __init__(self, predictor: RouteHistoryPredictor) -> None:
        self.predictor = predictor
        self.shape = (len(predictor.horizons), predictor.topology.experts)
        routes, mix_in, mix_out, head = predictor.routes, predictor.mix_in, predictor.mix_out, predictor.head
        into = predictor.from_routes
        norms = (predictor.norm_in, predictor.norm_out)
        layered = (routes.weight, routes.bias, predictor.sum_routes, predictor.scale_L, into.weight, into.bias)
        layered += (mix_in.weight, mix_in.bias, mix_out.weight, mix_out.bias, head.weight, head.bias)
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
            state.views = tuple(memory[name].numpy() for name in ("known", "routed", "recent", "total", "layer"))
        known, routed, recent, total, last = state.views
        last[()] = layer
        logits = self.weights[11][layer].copy()
        _event(layer, observation.expert_ids.numpy(), known, routed, recent, total, self.spare, logits, *self.weights)
        return logits.reshape(self.shape)


@njit(fastmath=True)
def _event(
    layer: int,
    expert_ids: NDArray[np.int64],
    known: F32,
    routed: F32,
    recent: F32,
    total: F32,
    spare: F32,
    logits: F32,
    routes: F32,
    routes_bias: F32,
    sum_routes: F32,
    scale: F32,
    into: F32,
    into_bias: F32,
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
    lags, width = recent.shape[0] - known.shape[0] + 1, recent.shape[1]
    here = layer + lags - 1
    recent[here] = routes_bias[layer]
    for expert in expert_ids:
        # What is no expert of this layer, an empty slot or a zero expert, counts nothing; a repeated one counts once.
        if expert >= 0 and expert < routed.shape[1] and routed[layer, expert] == 0:
            routed[layer, expert] = 1
            recent[here] += routes[layer, expert]
            total += sum_routes[layer, expert]
    features, normal, inner = spare[0], spare[1], spare[2]
    features[:] = known[layer] + into_bias[layer]
    for lag in range(lags):
        add_product(recent[here - lag], into[layer, lag * width : (lag + 1) * width], features)
    add_product(total * scale[layer], into[layer, lags * width :], features)
    scaled_norm(features, norm_in, norm_in_bias, normal)
    mixed(features, mix_in[layer], mix_in_bias[layer], mix_out[layer], mix_out_bias[layer], normal, inner)
    scaled_norm(features, norm_out, norm_out_bias, normal)
    gelu(normal)
    add_product(normal, head[layer], logits)
