"""The routing so far, and nothing else: for traces that keep expert ids only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.dataset import Window, routed_of
from specmoe.predictors._tables import layer_counts, target_layers
from specmoe.predictors.base import CompiledStep, Knowledge, Observation, Predictor, Recipe, State
from specmoe.predictors.blocks import PartlySharedLinear, PerLayerLinear
from specmoe.predictors.history import FADES, add_token, averages_so_far, fading_averages, no_tokens, normalised
from specmoe.predictors.search import DROPOUT, SHARED, WIDTH, Choice, Range
from specmoe.predictors.vocabulary import Vocabulary, routing_components
from specmoe.topology import Topology

__all__ = ["RouteHistoryPredictor"]

_ROWS = 8192
_EMBEDDING = 96
# Widths at 64 experts a layer; they grow with the square root of that number.
_WIDTH = 256
_TOKEN = 192
_LAYER = 96
_LAGS = 3
# The previous token, the fading averages, and earlier occurrences of the same id.
_CHANNELS = 2 + len(FADES)
# An id that is hidden now and then teaches what to do with ids that training never saw.
_HIDDEN_IDS = 0.05
_BEHIND = 3


class RouteHistoryPredictor(Predictor):
    """Token ids and the experts chosen so far: per source layer a small network on four summaries of them.

    An event (t, s) sees the ids of tokens t, t-1 and t-2; what token t was routed to at layers s, s-1 and s-2, and a
    sum over all its layers up to s; and, at the layers that the horizons point to, what the previous token was routed
    to, two fading averages over all earlier tokens, and the average over earlier tokens with the same id; of these four
    also a summary over all layers. Embeddings of ids start from the principal components of their mean routing in
    training. The layers' networks share a part of their weights, and the horizons that point to one layer a head.

    All that does not depend on token t's own routing is worked out once a token, for all layers, so an event costs
    four small products. A trace's gate weights, logits and hidden states are not looked at.
    """

    recipe = Recipe(
        category="edge",
        sees="context",
        source="routing history as in Pre-gated MoE (Hwang et al., 2024) and MoE-Infinity (Xue et al., 2024), "
        "token ids as in OpenMoE (Xue et al., 2024), learned together",
        learning_rate=4e-3,
        epochs=6,
        batch_windows=4,
        window=64,
        objective="membership",
        scheduler="cosine",
        warmup=0.05,
        weight_decay=0.5,
        soft_targets=False,
        label_smoothing=0.0,
        search=SHARED.but(
            batch_windows=Choice((2, 4, 8, 16)),
            weight_decay=Range(1e-2, 2.0, log=True),
            width=WIDTH,
            dropout=DROPOUT,
            sharpness=None,
        ),
    )
    memory = None
    # Inputs that an ablation leaves out: "token", "earlier" (tokens before), "same" (of them, those with the same id).
    without: ClassVar[frozenset[str]] = frozenset()

    layer_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        layers, experts = topology.layers, topology.experts
        factor = self.recipe.width * math.sqrt(experts / 64)
        self.width, self.token_width, self.layer_width = (
            max(16, 16 * round(width * factor / 16)) for width in (_WIDTH, _TOKEN, _LAYER)
        )
        self.vocabulary = Vocabulary(_ROWS)
        self.embedding = nn.Embedding(_ROWS, _EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.token_in = nn.Linear(_BEHIND * _EMBEDDING, self.token_width)
        self.past_in = nn.Linear(layers * _CHANNELS * experts, self.token_width)
        self.token_mix = nn.Linear(self.token_width, self.token_width)
        self.history = PerLayerLinear(layers, _CHANNELS * experts, self.layer_width)
        self.routes = PerLayerLinear(layers, experts, self.layer_width)
        self.sum_routes = nn.Parameter(torch.randn(layers, experts, self.token_width) * 0.3)
        self.from_token = PartlySharedLinear(
            layers, self.token_width + len(self.horizons) * self.layer_width, self.width
        )
        self.from_routes = PartlySharedLinear(layers, _LAGS * self.layer_width + self.token_width, self.width)
        self.norm_in, self.norm_out = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.mix_in = PartlySharedLinear(layers, self.width, self.width)
        self.mix_out = PartlySharedLinear(layers, self.width, self.width)
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)
        self.head = _TargetHead(self.layer_SH, self.width, experts)
        with torch.no_grad():
            self.routes.weight.mul_(3)
            self.mix_out.shared.mul_(0.3)
        self.dropout = nn.Dropout(self.recipe.dropout)
        # The sum over layers grows with their number; its scale should not.
        depth = (topology.top_k * torch.arange(1.0, layers + 1)).rsqrt()
        self.register_buffer("scale_L", depth, persistent=False)

    scale_L: Tensor

    def prepare(self, knowledge: Knowledge) -> None:
        """Give frequent ids a row, start their embeddings from their routing, and the biases from frequency."""
        self.vocabulary.prepare(knowledge.windows())
        components = routing_components(knowledge.windows(), self.vocabulary, _EMBEDDING)
        counts_LE = layer_counts(knowledge.windows(), self.topology).float()
        share_LE = (counts_LE + 1) / (counts_LE.sum(-1, keepdim=True) + self.topology.experts)
        with torch.no_grad():
            self.embedding.weight.copy_(components)
            self.head.bias.copy_(share_LE.log()[self.layer_SH.cpu()].flatten(1))

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E]; zero where a token is padding."""
        own_BT = window.valid_BT
        history = self._history(window)[own_BT]
        rows = self._hidden_now_and_then(self.vocabulary(_behind(window.token_ids_BT, _BEHIND)))[own_BT]
        routed_NLE = window.routed_BTLE[own_BT]
        known = self._known_before(rows, history)
        # Layers that do not exist count as no expert at all.
        recent = F.pad(self.routes(routed_NLE), (0, 0, _LAGS - 1, 0))
        layers = self.topology.layers
        lags = [recent[:, _LAGS - 1 - lag : _LAGS - 1 - lag + layers] for lag in range(_LAGS)]
        total = torch.bmm(routed_NLE.transpose(0, 1), self.sum_routes).cumsum(0).transpose(0, 1)
        logits = self._score(known, torch.cat([*lags, total * self.scale_L[:, None]], -1), None)
        shape = (*own_BT.shape, layers, len(self.horizons), self.topology.experts)
        scored = logits.new_zeros(*own_BT.shape, layers * len(self.horizons) * self.topology.experts)
        scored[own_BT] = logits.flatten(1)
        return scored.view(shape)

    def _known_before(self, rows_NB: Tensor, history_NLC: Tensor) -> Tensor:
        """The share of the first layer's input that is known when a token begins: [N, S, width].

        Args:
            rows_NB: of the current id and those before it. history_NLC: all channels of the history.
        """
        if "earlier" in self.without:
            history_NLC = torch.zeros_like(history_NLC)
        ids = self.token_in(self.dropout(self.embedding(rows_NB).flatten(-2)))
        if "token" in self.without:
            ids = torch.zeros_like(ids)
        token = ids + self.past_in(history_NLC.flatten(1))
        token = token + self.token_mix(F.gelu(token))
        at_targets = self.history(history_NLC)[:, self.layer_SH].flatten(-2)
        return self.from_token(torch.cat([token[:, None].expand(-1, self.topology.layers, -1), at_targets], -1))

    def _score(self, known: Tensor, routes: Tensor, layer: int | None) -> Tensor:
        """[N, S, width] and [N, S, C] → logits [N, S, H·E], for all source layers or for one."""
        features = known + self.from_routes(routes, layer)
        mixed = self.mix_in(self.norm_in(features), layer)
        features = features + self.mix_out(self.dropout(F.gelu(mixed)), layer)
        return self.head(self.dropout(F.gelu(self.norm_out(features))), layer)

    def _hidden_now_and_then(self, rows: Tensor) -> Tensor:
        if not self.training:
            return rows
        return rows.masked_fill(torch.rand(rows.shape, device=rows.device) < _HIDDEN_IDS, 0)

    def _history(self, window: Window) -> Tensor:
        """What each token knows of the routing of those before it: [B, T, L, channels · E]."""
        routed = window.routed_BTLE * window.valid_BT[..., None, None]
        ids, length = window.token_ids_BT, window.token_ids_BT.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril(-1)
        same = (ids[:, :, None] == ids[:, None]) & earlier & window.valid_BT[:, None]
        if "same" in self.without:
            same = torch.zeros_like(same)
        of_same = torch.bmm(normalised(same.float()), routed.flatten(2)).view_as(routed)
        previous = F.pad(routed, (0, 0, 0, 0, 1, 0))[:, :length]
        return torch.cat([previous, fading_averages(routed), of_same], -1)

    def start(self) -> State:
        """The state before the first token of a sequence."""
        return State(memory=no_tokens(self.topology))

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> Tensor:
        """Logits [H, E] of one event; what only earlier tokens decide is worked out at a token's first event."""
        memory, layer = state.memory, observation.layer
        if "routed" not in memory or layer <= int(memory["layer"]):
            self.begin_token(memory, observation.token_id)
        chosen = routed_of(observation.expert_ids, self.topology.experts)
        memory["routed"][layer] = chosen
        memory["layer"].fill_(layer)
        memory["recent"][layer + _LAGS - 1] = self.routes(chosen[None, None], layer)[0, 0]
        memory["total"] += chosen @ self.sum_routes[layer]
        recent = memory["recent"][layer : layer + _LAGS].flip(0).flatten()
        routes = torch.cat([recent, memory["total"] * self.scale_L[layer]])
        logits = self._score(memory["known"][layer][None, None], routes[None, None], layer)
        return logits.view(len(self.horizons), self.topology.experts)

    def compiled(self) -> CompiledStep:
        """One compiled call an event."""
        from specmoe.predictors.compiled.route_history import CompiledRouteHistory

        return CompiledRouteHistory(self)

    def begin_token(self, memory: dict[str, Tensor], token_id: int) -> None:
        """Work out what only earlier tokens decide, and take the token before into the history."""
        layers, experts = self.topology.layers, self.topology.experts
        nothing = torch.zeros(layers, experts)
        behind = torch.full((_BEHIND - 1,), -1)
        if "routed" in memory:
            add_token(memory, memory["routed"])
            last, behind = int(memory["ids"][0]), memory["ids"][:-1]
            memory[f"id {last}"] = memory.get(f"id {last}", nothing) + memory["routed"]
            memory[f"count {last}"] = memory.get(f"count {last}", torch.zeros(())) + 1
        memory["ids"] = torch.cat([torch.tensor([token_id]), behind])
        same = nothing if "same" in self.without else memory.get(f"id {token_id}", nothing)
        same = same / memory.get(f"count {token_id}", torch.ones(()))
        channels = torch.cat([memory.get("routed", nothing), averages_so_far(memory), same], -1)
        memory["known"] = self._known_before(self.vocabulary(memory["ids"])[None], channels[None])[0]
        memory["routed"] = nothing
        memory["recent"] = torch.zeros(layers + _LAGS - 1, self.layer_width)
        memory["total"] = torch.zeros(self.token_width)
        memory["layer"] = torch.zeros((), dtype=torch.long)


class _TargetHead(nn.Module):
    """Logits of the layers that the horizons point to.

    The weights of source layer s and horizon h are those of the layer pointed to, with a gain for each input, plus a
    part of their own that starts at zero: what all horizons need to know of a layer is learned once.
    """

    layer_SH: Tensor

    def __init__(self, layer_SH: Tensor, width: int, experts: int) -> None:
        super().__init__()
        layers, horizons = layer_SH.shape
        self.register_buffer("layer_SH", layer_SH, persistent=False)
        self.target = nn.Parameter((torch.rand(layers, width, experts) * 2 - 1) * 0.3 * width**-0.5)
        self.gain = nn.Parameter(torch.ones(layers, horizons, width))
        self.weight = nn.Parameter(torch.zeros(layers, width, horizons * experts))
        self.bias = nn.Parameter(torch.zeros(layers, horizons * experts))

    def whole(self, layer: int | None = None) -> Tensor:
        """The weights of all source layers [S, width, H·E], or of one [1, width, H·E]."""
        which = slice(None) if layer is None else slice(layer, layer + 1)
        tied_SHWE = self.target[self.layer_SH[which]] * self.gain[which, :, :, None]
        return self.weight[which] + tied_SHWE.transpose(1, 2).flatten(2)

    def forward(self, inputs_NSC: Tensor, layer: int | None = None) -> Tensor:
        """[N, S, width] → [N, S, H·E]; given a layer, [N, 1, width] → [N, 1, H·E] by that layer's weights."""
        if layer is not None:
            return inputs_NSC @ self.whole(layer)[0] + self.bias[layer]
        return torch.baddbmm(self.bias[:, None], inputs_NSC.transpose(0, 1), self.whole()).transpose(0, 1)


def _behind(ids_BT: Tensor, count: int) -> Tensor:
    """Each token's id and those before it, [B, T, count], -1 before the beginning."""
    padded = F.pad(ids_BT, (count - 1, 0), value=-1)
    return torch.stack([padded[:, count - 1 - back : padded.shape[1] - back] for back in range(count)], -1)
