"""A meta-learner over several different predictors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.dataset import Window
from specmoe.predictors.base import Knowledge, Observation, Predictor, Recipe, State
from specmoe.predictors.blocks import ResidualBlock
from specmoe.predictors.hierarchical import HierarchicalGatingPredictor
from specmoe.predictors.improved import ImprovedPredictor
from specmoe.predictors.regularized import RegularizedSpeculationModel
from specmoe.topology import Topology

__all__ = ["HierarchicalEnsemble"]


class HierarchicalEnsemble(Predictor):
    """Three members and a small network that decides, event by event, how much each counts.

    The mixture is geometric (a weighted sum of log-probabilities), and members and meta-learner are trained
    together. 1.0 to 1.3 million parameters at the reference topology.
    """

    recipe = Recipe(
        category="ensemble",
        sees="context",
        needs=frozenset({"hidden"}),
        source="stacked generalisation (Wolpert, 1992) with input-dependent weights (Jacobs et al., 1991)",
        learning_rate=2.5e-3,
        epochs=4,
        batch_windows=32,
    )

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        kinds = (RegularizedSpeculationModel, ImprovedPredictor, HierarchicalGatingPredictor)
        self.members = nn.ModuleList(kind(topology, horizons) for kind in kinds)
        self.memory = max(member.memory or 0 for member in self._members())
        opinions = len(kinds) * topology.experts
        self.layer = nn.Embedding(topology.layers, 128)
        self.meta_in = nn.Linear(opinions, 128)
        self.meta_block = ResidualBlock(128, 128)
        self.meta_out = nn.Linear(128, len(kinds))
        nn.init.zeros_(self.meta_out.weight)

    def _members(self) -> list[Predictor]:
        return [member for member in self.members if isinstance(member, Predictor)]

    def prepare(self, knowledge: Knowledge) -> None:
        """Prepare every member."""
        for member in self._members():
            member.prepare(knowledge)

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E]."""
        layers = torch.arange(self.topology.layers, device=window.router_BTLE.device)
        return self._combine(torch.stack([member(window) for member in self.members], -2), layers)

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> Tensor:
        """Logits [H, E]: every member steps, then the meta-learner weighs them."""
        if not state.members:
            state.members = [member.start() for member in self._members()]
        pairs = zip(self._members(), state.members, strict=True)
        opinions = torch.stack([member.step(own, observation) for member, own in pairs], -2)
        return self._combine(opinions[None, None, None], torch.tensor([observation.layer]))[0, 0, 0]

    def _combine(self, logits_BTSHME: Tensor, layers_S: Tensor) -> Tensor:
        opinions = logits_BTSHME.log_softmax(-1)
        features = self.meta_in(opinions.exp().flatten(-2)) + self.layer(layers_S)[:, None]
        weights = self.meta_out(self.meta_block(F.gelu(features))).softmax(-1)
        return (weights[..., None] * opinions).sum(-2)
