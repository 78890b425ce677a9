"""The next layers' own routers, and what it takes to make them right early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.dataset import Window, routed_of
from specmoe.errors import SpecmoeError
from specmoe.predictors._linear import hidden_of
from specmoe.predictors._tables import grow_on_load, target_layers
from specmoe.predictors.base import CompiledStep, Knowledge, Observation, Predictor, Recipe, State
from specmoe.predictors.blocks import PerLayerLinear
from specmoe.predictors.history import FADES, add_token, averages_so_far, fading_averages, no_tokens
from specmoe.predictors.search import DROPOUT, SHARED, WIDTH
from specmoe.predictors.vocabulary import Vocabulary, routing_components
from specmoe.topology import Topology

__all__ = ["RouterResidualPredictor"]

# What the compression of router inputs may take of the two million parameters.
_COMPRESSION = 1_050_000
_LARGEST_RANK = 128
_ROWS = 2048
_EMBEDDING = 48
# Entries of the output embedding that the lens may read in one event: 1,024 rows at a width of 128.
_LENS_ENTRIES = 1 << 17
_LENS_WEIGHT = 0.1
_HIDDEN_IDS = 0.05
# Of the tokens before, and of the layers ahead of the source, whose router inputs enter the network.
_TOKENS_BACK = 1
_LAYERS_AHEAD = 4


class RouterResidualPredictor(Predictor):
    """The target layer's router on today's router input, plus learned corrections of low rank.

    Before training it *is* that baseline (:class:`~specmoe.predictors.next_router.NextRouter`). Training adds, for
    every source layer and horizon: a default vector for what the layers skipped over will add to the hidden state, a
    factor on the baseline, and a correction computed from a compressed router input, the token's id and the routing
    of the tokens before at the target layers, by one linear map and one small network.

    Past the last layer the baseline means little: what decides there is which token comes next. So, where the trace
    keeps the model's output embedding, the last source layers read the next token off their hidden state (a tuned
    lens, trained on the ids that did follow), and the expected embedding of that token enters the network.

    At most 2 million parameters at 16 layers, 64 experts and a hidden size of 2,048 (OLMoE-1B-7B).

    Buffers: router_LED, router_bias_LE, the model's routers; mean_LD, scale_LD of the training part's router inputs;
    unembedding_VD, rows of the model's output embedding, row 0 for all other ids.
    """

    recipe = Recipe(
        category="edge",
        sees="context",
        needs=frozenset({"hidden", "routers"}),
        source="early router (Fate, 2025; mixtral-offloading, 2023) with low-rank corrections (LoRA, Hu et al., 2022), "
        "default vectors and a tuned lens (Belrose et al., 2023)",
        learning_rate=3e-3,
        epochs=6,
        batch_windows=32,
        scheduler="cosine",
        warmup=0.05,
        dropout=0.1,
        weight_decay=0.02,
        search=SHARED.but(width=WIDTH, dropout=DROPOUT),
    )
    memory = None
    # Inputs that an ablation leaves out: "token", "routing", "past" (earlier tokens' router inputs), "lens".
    without: ClassVar[frozenset[str]] = frozenset()

    router_LED: Tensor
    router_bias_LE: Tensor
    mean_LD: Tensor
    scale_LD: Tensor
    unembedding_VD: Tensor
    layer_SH: Tensor
    passed_SHL: Tensor
    ahead_SA: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        layers, experts, width = topology.layers, topology.experts, topology.hidden_size
        self.rank = rank = _rank(topology, self.recipe.width)
        for name, shape in (("router_LED", (layers, experts, width)), ("router_bias_LE", (layers, experts))):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("mean_LD", torch.zeros(layers, width))
        self.register_buffer("scale_LD", torch.ones(layers, width))
        self.register_buffer("unembedding_VD", torch.zeros(0, width))
        grow_on_load(self, "unembedding_VD")
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)
        ahead = torch.arange(layers)[:, None] + torch.arange(1, _LAYERS_AHEAD + 1)
        self.register_buffer("ahead_SA", ahead % layers, persistent=False)
        self.register_buffer("passed_SHL", _layers_passed(topology, self.horizons), persistent=False)

        outputs = len(self.horizons) * experts
        self.gain_SH = nn.Parameter(torch.ones(layers, len(self.horizons)))
        self.default_LD = nn.Parameter(torch.zeros(layers, width))
        self.compress = PerLayerLinear(layers, width, rank)
        self.vocabulary = Vocabulary(_ROWS)
        self.embedding = nn.Embedding(_ROWS, _EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.from_token = PerLayerLinear(layers, _EMBEDDING, rank)
        self.history = PerLayerLinear(layers, len(FADES) * experts, rank)
        self.from_past = PerLayerLinear(layers, _TOKENS_BACK * _LAYERS_AHEAD * rank, rank)
        self.mix_in, self.mix_out = PerLayerLinear(layers, rank, rank), PerLayerLinear(layers, rank, rank)
        self.norm = nn.LayerNorm(rank)
        self.linear = PerLayerLinear(layers, rank, outputs)
        self.head = PerLayerLinear(layers, rank, outputs)
        self.dropout = nn.Dropout(self.recipe.dropout)
        # The sources from which some horizon reaches the next token.
        self.lens_from = max(0, layers - max(self.horizons))
        looking = layers - self.lens_from
        self.lens = PerLayerLinear(looking, rank, width)
        self.lens_gain_LD = nn.Parameter(torch.ones(looking, width))
        self.from_next = PerLayerLinear(looking, _EMBEDDING, rank)
        self._lens_logits: Tensor | None = None
        with torch.no_grad():
            # Corrections start from nothing, so that the first prediction is the baseline's.
            for module in (self.linear, self.head, self.lens):
                module.weight.zero_()
            self.mix_out.weight.mul_(0.3)

    def prepare(self, knowledge: Knowledge) -> None:
        """Take over the model's routers and what is known of its hidden states and tokens.

        Raises:
            SpecmoeError: the trace does not keep router weights or hidden states, or they do not fit.
        """
        weight, bias = knowledge.router_weight_LED, knowledge.router_bias_LE
        if weight is None:
            raise SpecmoeError(
                "RouterResidualPredictor needs the routers' weights, which this trace does not keep; capture it anew"
            )
        # A router may also choose zero experts, which are not predicted.
        weight = weight[:, : self.topology.experts]
        if weight.shape != self.router_LED.shape:
            expected = list(self.router_LED.shape)
            raise SpecmoeError(f"the trace's router weights have shape {list(weight.shape)}, expected {expected}")
        self.router_LED.copy_(weight)
        if bias is not None:
            self.router_bias_LE.copy_(bias[:, : self.topology.experts])
        probe = knowledge.linear_probe(self.horizons)
        if probe is None:
            raise SpecmoeError("RouterResidualPredictor needs the field hidden; capture the trace with hidden states")
        self.mean_LD.copy_(probe.mean_LD)
        self.scale_LD.copy_(probe.scale_LD)
        self.vocabulary.prepare(knowledge.windows())
        components = routing_components(knowledge.windows(), self.vocabulary, _EMBEDDING)
        with torch.no_grad():
            self.embedding.weight.copy_(components)
        self._prepare_lens(knowledge.unembedding_VD)

    def _prepare_lens(self, unembedding_VD: Tensor | None) -> None:
        if unembedding_VD is None or self.topology.hidden_size == 0 or "lens" in self.without:
            return
        rows = min(_ROWS, max(2, _LENS_ENTRIES // self.topology.hidden_size))
        row_V = self.vocabulary.row_V.long()
        ids = ((row_V > 0) & (row_V < rows)).nonzero()[:, 0]
        ids = ids[ids < len(unembedding_VD)]
        kept = unembedding_VD.new_zeros(rows, self.topology.hidden_size)
        kept[row_V[ids]] = unembedding_VD[ids]
        self.unembedding_VD = kept.to(self.mean_LD.device)

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E].

        Raises:
            SpecmoeError: the window has no hidden states.
        """
        hidden = hidden_of(window, "RouterResidualPredictor")
        rows = self.vocabulary(window.token_ids_BT)
        if self.training:
            rows = rows.masked_fill(torch.rand(rows.shape, device=rows.device) < _HIDDEN_IDS, 0)
        hidden_NLD = hidden.flatten(0, 1)
        compressed = self.compress((hidden_NLD - self.mean_LD) / self.scale_LD)
        past = _shifted(compressed.unflatten(0, hidden.shape[:2]), _TOKENS_BACK).flatten(0, 1)
        averages = fading_averages(window.routed_BTLE * window.valid_BT[..., None, None]).flatten(0, 1)
        known = self._known_before(rows.flatten(), averages, past)
        logits = self._baseline(hidden_NLD) + self._correction(hidden_NLD, compressed, known)
        return logits.unflatten(0, hidden.shape[:2])

    def _baseline(self, hidden_NLD: Tensor) -> Tensor:
        """The target layers' routers on what the hidden state will be by then: [N, S, H, E]."""
        layers, experts, width = self.router_LED.shape
        horizons = len(self.horizons)
        weight_SXD = self.router_LED[self.layer_SH].flatten(1, 2)
        logits = torch.bmm(hidden_NLD.transpose(0, 1), weight_SXD.transpose(1, 2)).transpose(0, 1)
        default_SHD = torch.einsum("shl,ld->shd", self.passed_SHL, self.default_LD)
        default_SHE = torch.einsum("shd,shed->she", default_SHD, weight_SXD.view(layers, horizons, experts, width))
        logits = logits.view(-1, layers, horizons, experts) + default_SHE
        return logits * self.gain_SH[..., None] + self.router_bias_LE[self.layer_SH]

    def _known_before(self, rows_N: Tensor, averages_NLC: Tensor, past_NLC: Tensor) -> Tensor:
        """What the token's id and the tokens before it add to the network's input: [N, S, rank].

        Args:
            rows_N: of the ids. averages_NLC: fading averages of the routing.
            past_NLC: compressed router inputs of the tokens before, nearest first, side by side.
        """
        known = past_NLC.new_zeros(len(rows_N), self.topology.layers, self.rank)
        if "token" not in self.without:
            known = known + self.from_token(self.embedding(rows_N)[:, None].expand(-1, self.topology.layers, -1))
        if "routing" not in self.without:
            known = known + self.history(averages_NLC)[:, self.layer_SH].sum(2)
        if "past" not in self.without:
            known = known + self.from_past(past_NLC[:, self.ahead_SA].flatten(2))
        return known

    def _correction(self, hidden_NLD: Tensor, compressed: Tensor, known_NSR: Tensor) -> Tensor:
        features = compressed + known_NSR
        if len(self.unembedding_VD):
            expected = self._look_ahead(hidden_NLD[:, self.lens_from :], compressed[:, self.lens_from :])
            features = features + F.pad(expected, (0, 0, self.lens_from, 0))
        features = self.dropout(F.gelu(features))
        features = features + self.mix_out(self.dropout(F.gelu(self.mix_in(self.norm(features)))))
        return (self.linear(compressed) + self.head(features)).unflatten(-1, (len(self.horizons), -1))

    def _look_ahead(self, hidden_NLD: Tensor, compressed_NLR: Tensor) -> Tensor:
        """The expected embedding of the next token, as input of the network: [N, looking layers, rank]."""
        seen = F.rms_norm(hidden_NLD + self.lens(compressed_NLR), hidden_NLD.shape[-1:]) * self.lens_gain_LD
        logits = seen @ self.unembedding_VD.T
        if self.training:
            self._lens_logits = logits
        return self.from_next(logits.softmax(-1) @ self.embedding.weight[: len(self.unembedding_VD)])

    def auxiliary_loss(self, window: Window) -> Tensor | None:
        """Cross-entropy of the lens against the ids that did follow, weighted, in nats."""
        logits, self._lens_logits = self._lens_logits, None
        if logits is None:
            return None
        following = self.vocabulary(window.token_ids_BT[:, 1:])
        following = torch.where(following < len(self.unembedding_VD), following, 0)
        known_BT = window.valid_BT[:, 1:] & window.scored_BT[:, :-1]
        logits = logits.unflatten(0, window.token_ids_BT.shape)[:, :-1][known_BT]
        if len(logits) == 0:
            return None
        target = following[known_BT][:, None].expand(-1, logits.shape[1])
        return _LENS_WEIGHT * F.cross_entropy(logits.flatten(0, 1), target.flatten())

    def start(self) -> State:
        """The state before the first token of a sequence."""
        past = torch.zeros(self.topology.layers, _TOKENS_BACK, self.rank)
        return State(memory=no_tokens(self.topology) | {"past": past})

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> Tensor:
        """Logits [H, E] of one event; what only earlier tokens decide is worked out at a token's first event.

        Raises:
            SpecmoeError: the observation has no hidden state.
        """
        memory, layer = state.memory, observation.layer
        if observation.hidden is None:
            raise SpecmoeError("RouterResidualPredictor needs the router input of every event")
        if "routed" not in memory or layer <= int(memory["layer"]):
            self.begin_token(memory, observation.token_id)
        memory["routed"][layer] = routed_of(observation.expert_ids, self.topology.experts)
        memory["layer"].fill_(layer)
        standard = (observation.hidden - self.mean_LD[layer]) / self.scale_LD[layer]
        compressed = self.compress(standard[None], layer)
        memory["compressed"][layer] = compressed[0]
        return self._one_event(observation.hidden, layer, compressed, memory["known"][layer])

    def compiled(self) -> CompiledStep:
        """One compiled call an event."""
        from specmoe.predictors.compiled.router_residual import CompiledRouterResidual

        return CompiledRouterResidual(self)

    def begin_token(self, memory: dict[str, Tensor], token_id: int) -> None:
        """Work out what only earlier tokens decide, and take the token before into the history."""
        if "routed" in memory:
            add_token(memory, memory["routed"])
            memory["past"] = torch.cat([memory["compressed"][:, None], memory["past"][:, :-1]], 1)
        rows = self.vocabulary(torch.tensor([token_id]))
        past = memory["past"].flatten(1)
        memory["known"] = self._known_before(rows, averages_so_far(memory)[None], past[None])[0]
        memory["routed"] = torch.zeros(self.topology.layers, self.topology.experts)
        memory["compressed"] = torch.zeros(self.topology.layers, self.rank)
        memory["layer"] = torch.zeros((), dtype=torch.long)

    def _one_event(self, hidden_D: Tensor, layer: int, compressed: Tensor, known_R: Tensor) -> Tensor:
        shape = (len(self.horizons), self.topology.experts)
        weight_HED, default_HE = self.early_routers(layer)
        logits = weight_HED @ hidden_D + default_HE
        features = compressed + known_R
        if layer >= self.lens_from and len(self.unembedding_VD):
            index = layer - self.lens_from
            seen = F.rms_norm(hidden_D + self.lens(compressed, index), hidden_D.shape) * self.lens_gain_LD[index]
            weights = (seen @ self.unembedding_VD.T).softmax(-1)
            features = features + self.from_next(weights @ self.embedding.weight[: len(self.unembedding_VD)], index)
        features = F.gelu(features)
        features = features + self.mix_out(F.gelu(self.mix_in(self.norm(features), layer)), layer)
        return logits + (self.linear(compressed, layer) + self.head(features, layer)).view(shape)

    def early_routers(self, layer: int) -> tuple[Tensor, Tensor]:
        """The baseline of one source layer as one map [H, E, D] and offset [H, E]."""
        targets = self.layer_SH[layer]
        weight_HED = self.router_LED[targets] * self.gain_SH[layer][:, None, None]
        default_HD = self.passed_SHL[layer] @ self.default_LD
        return weight_HED, torch.einsum("hd,hed->he", default_HD, weight_HED) + self.router_bias_LE[targets]


def _rank(topology: Topology, factor: float) -> int:
    affordable = _COMPRESSION / max(1, topology.layers * topology.hidden_size)
    return max(16, 8 * math.floor(factor * min(_LARGEST_RANK, affordable) / 8))


def _layers_passed(topology: Topology, horizons: Sequence[int]) -> Tensor:
    """How often an event's way to its target leads through each layer after its own: [S, H, L] float32."""
    source = torch.arange(topology.layers)[:, None, None]
    steps = torch.arange(1, max(horizons) + 1)
    passed = F.one_hot((source + steps) % topology.layers, topology.layers).float()[:, 0]
    return torch.stack([passed[:, :horizon].sum(1) for horizon in horizons], 1)


def _shifted(values_BTLX: Tensor, count: int) -> Tensor:
    """The values of the ``count`` tokens before each, nearest first, zero at the start: [B, T, L, count · X]."""
    length = values_BTLX.shape[1]
    return torch.cat([F.pad(values_BTLX, (0, 0, 0, 0, n, 0))[:, :length] for n in range(1, count + 1)], -1)
