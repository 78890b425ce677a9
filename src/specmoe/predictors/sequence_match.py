"""The known sequence that is most like the current one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specmoe.dataset import Window
from specmoe.predictors._tables import layer_counts, shares, target_layers
from specmoe.predictors.base import Knowledge, Observation, Predictor, Recipe, State
from specmoe.topology import Topology

__all__ = ["SequenceMatch"]

_CAPACITY = 256
_ROUNDS = 10
_CHUNK = 1024


class SequenceMatch(Predictor):
    """MoE-Infinity's sequence-level match of expert activations.

    A sequence's activation matrix counts how often each layer used each expert. A library holds those of
    the training documents; more than 256 are first clustered (spherical k-means), as the paper does. At an
    event the counts of the current sequence, up to what is known, are compared with each entry: cosine per
    layer, mean over the layers. The nearest entry's row of the target layer, shrunk towards the layer's
    frequency, is the prediction. The paper also lowers the priority of layers further ahead; this is the
    same factor for all experts of a layer, so it cannot change an order within one horizon and is left out.

    Buffers: unit_NLE float64 (rows of length 1, zero for unused entries) and share_NLE float32.
    """

    recipe: ClassVar[Recipe] = Recipe(category="training-free", sees="routing", source="MoE-Infinity (2024)")
    memory: int | None = None

    unit_NLE: Tensor
    share_NLE: Tensor
    layer_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        shape = (_CAPACITY, topology.layers, topology.experts)
        # Nearest is a hard choice: in float64 rounding cannot turn it between one event and a whole window.
        self.register_buffer("unit_NLE", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("share_NLE", torch.full(shape, 1 / topology.experts))
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)

    def prepare(self, knowledge: Knowledge) -> None:
        """Fill the library with the training documents' matrices, or their clusters."""
        counts, unit = _library(self._documents(knowledge))
        prior_LE = shares(layer_counts(knowledge.windows(), self.topology))
        self.share_NLE.copy_(prior_LE.expand(self.share_NLE.shape))
        self.unit_NLE.zero_()
        self.unit_NLE[: len(unit)] = unit.to(self.unit_NLE.device)
        self.share_NLE[: len(counts)] = shares(counts, prior_LE, self.topology.experts).to(self.share_NLE)

    def forward(self, window: Window) -> Tensor:
        """Log-probabilities [B, T, S, H, E]."""
        routed = (window.routed_BTLE * window.valid_BT[..., None, None]).double()
        upto = routed.cumsum(1)
        with_NLE = F.normalize(upto, dim=-1).flatten(0, 1)
        before_NLE = F.normalize(upto - routed, dim=-1).flatten(0, 1)
        pairs = zip(with_NLE.split(_CHUNK), before_NLE.split(_CHUNK), strict=True)
        nearest_BTS = torch.cat([self._nearest(*pair) for pair in pairs]).view(routed.shape[:3])
        return self.share_NLE[nearest_BTS[..., None], self.layer_SH].log()

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> Tensor:
        """Logits [H, E] of one event; the state is the sequence's counts alone."""
        counts_LE = state.memory.setdefault("counts_LE", torch.zeros_like(self.unit_NLE[0]))
        ids = observation.expert_ids
        # As in a window: an expert counts once, what is no expert of this layer not at all.
        served = ids[(ids >= 0) & (ids < self.topology.experts)].unique()
        counts_LE[observation.layer, served] += 1
        similarity_N = torch.einsum("le,nle->n", F.normalize(counts_LE, dim=-1), self.unit_NLE)
        nearest = int(_first_best(similarity_N))
        return self.share_NLE[nearest, self.layer_SH[observation.layer]].log()

    def _nearest(self, with_NLE: Tensor, before_NLE: Tensor) -> Tensor:
        """Library entry nearest to each event, [N, S]: layers up to s count with the current token."""
        library_LEM = self.unit_NLE.permute(1, 2, 0)
        with_NLM = (with_NLE.transpose(0, 1) @ library_LEM).transpose(0, 1)
        before_NLM = (before_NLE.transpose(0, 1) @ library_LEM).transpose(0, 1)
        upto = with_NLM.cumsum(1)
        after = before_NLM.sum(1, keepdim=True) - before_NLM.cumsum(1)
        return _first_best(upto + after)

    def _documents(self, knowledge: Knowledge) -> Tensor:
        """Activation matrices of the training documents, [documents, L, E] float64."""
        number: dict[int, int] = {}
        total = torch.zeros(0, self.topology.layers, self.topology.experts, dtype=torch.float64)
        for window in knowledge.windows():
            own = (window.valid_BT & window.scored_BT)[..., None, None]
            counts_BLE = (window.routed_BTLE * own).sum(1, dtype=torch.float64).to(total.device)
            rows = torch.tensor([number.setdefault(index, len(number)) for index in window.document_B.tolist()])
            total = F.pad(total, (0, 0, 0, 0, 0, len(number) - len(total)))
            total.index_add_(0, rows, counts_BLE)
        return total


def _first_best(similarity: Tensor) -> Tensor:
    """Index of the largest over the last dimension; of equal ones the first, whatever their last bits are."""
    return (similarity - 1e-9 * torch.arange(similarity.shape[-1], device=similarity.device)).argmax(-1)


def _library(counts_NLE: Tensor) -> tuple[Tensor, Tensor]:
    """At most ``_CAPACITY`` entries: their counts and their rows scaled to length 1, both [N, L, E]."""
    unit_NLE = F.normalize(counts_NLE, dim=-1)
    if len(counts_NLE) <= _CAPACITY:
        return counts_NLE, unit_NLE
    centres = unit_NLE[torch.linspace(0, len(counts_NLE) - 1, _CAPACITY).long()]
    cluster = torch.zeros(len(counts_NLE), dtype=torch.long)
    for _ in range(_ROUNDS):
        cluster = _first_best(unit_NLE.flatten(1) @ centres.flatten(1).T)
        moved = torch.zeros_like(centres).index_add_(0, cluster, unit_NLE)
        # A cluster that lost all its members keeps its centre.
        empty_N = cluster.bincount(minlength=_CAPACITY) == 0
        centres = torch.where(empty_N[:, None, None], centres, F.normalize(moved, dim=-1))
    cluster = _first_best(unit_NLE.flatten(1) @ centres.flatten(1).T)
    return torch.zeros_like(centres).index_add_(0, cluster, counts_NLE), centres
