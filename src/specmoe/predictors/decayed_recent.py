"""The experts of recent tokens, the latest counting most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specmoe.dataset import Window, ahead
from specmoe.predictors._tables import layer_counts, lookbacks, shares, target_layers
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["DecayedRecent"]

_DECAYS = (0.3, 0.6, 0.8, 0.9, 0.97)
_STRENGTHS = (1.0, 8.0, 32.0)
# Tokens that the choice is made on, about.
_SAMPLE = 8192


class DecayedRecent(Predictor):
    """The target layer's routing of the last 32 tokens, each weighing ``decay`` times the next one.

    The sums are shrunk towards the layer's frequency. The decay and the strength of the shrinkage, out of
    short lists, are those with the best recall@K of the next token on (a sample of) the training windows.

    Buffers: share_LE float32, the layer's frequency; decay and strength float32 scalars.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free", sees="routing", source="LRFU (Lee et al., 2001), kept per layer"
    )
    memory: int | None = 32

    share_LE: Tensor
    decay: Tensor
    strength: Tensor
    layer_SH: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        self._back = lookbacks(topology, self.horizons)
        self.register_buffer("share_LE", torch.full((topology.layers, topology.experts), 1 / topology.experts))
        self.register_buffer("decay", torch.tensor(0.9))
        self.register_buffer("strength", torch.tensor(1.0))
        self.register_buffer("layer_SH", target_layers(topology, self.horizons), persistent=False)

    def prepare(self, knowledge: Knowledge) -> None:
        """Count the layers' frequency, then choose the decay and the shrinkage by recall@K."""
        self.share_LE.copy_(shares(layer_counts(knowledge.windows(), self.topology)))
        batches = tokens = 0
        for window in knowledge.windows():
            batches, tokens = batches + 1, tokens + int(window.valid_BT.sum())
        # Two numbers out of short lists need no more than this; taken from all over the text.
        stride = max(1, min(batches, tokens // _SAMPLE))
        hits = torch.zeros(len(_DECAYS), len(_STRENGTHS), dtype=torch.float64)
        for window in itertools.islice(knowledge.windows(), 0, None, stride):
            recent = self._recent(window.routed_BTLE, torch.tensor(_DECAYS))[:, :, :-1]
            target = window.routed_BTLE[:, 1:] * (window.valid_BT & window.scored_BT)[:, 1:, None, None]
            for i, strength in enumerate(_STRENGTHS):
                score = recent + strength * self.share_LE
                chosen = score.topk(self.topology.top_k, -1).indices
                found = target.expand(score.shape).gather(-1, chosen)
                hits[:, i] += found.sum((1, 2, 3, 4), dtype=torch.float64).to(hits.device)
        best = int(hits.argmax())
        self.decay.fill_(_DECAYS[best // len(_STRENGTHS)])
        self.strength.fill_(_STRENGTHS[best % len(_STRENGTHS)])

    def forward(self, window: Window) -> Tensor:
        """Log-probabilities [B, T, S, H, E]."""
        recent = ahead(self._recent(window.routed_BTLE, self.decay[None])[0], self._back)
        share_SHE = self.share_LE[self.layer_SH]
        return ((recent + self.strength * share_SHE) / (recent.sum(-1, keepdim=True) + self.strength)).log()

    def _recent(self, routed_BTLE: Tensor, decays_N: Tensor) -> Tensor:
        """Decayed sums over the last tokens up to and with each token, [N, B, T, L, E]."""
        tokens, layers, experts = routed_BTLE.shape[1:]
        span = int(self.memory or 1)
        # Blocks of as many tokens as are remembered: each needs the block itself and the span - 1 tokens before.
        flat = F.pad(routed_BTLE.flatten(2), (0, 0, span - 1, -tokens % span))
        blocks_BCXW = flat.unfold(1, 2 * span - 1, span)
        at, of = torch.arange(span)[:, None], torch.arange(2 * span - 1) - (span - 1)
        age = (at - of).to(routed_BTLE.device)
        within = (age >= 0) & (age < span)
        kernel_NJW = torch.where(within, decays_N.to(age.device)[:, None, None] ** age.clamp_min(0), 0.0)
        sums_BCXNJ = (blocks_BCXW @ kernel_NJW.flatten(0, 1).T).unflatten(-1, (len(decays_N), span))
        sums_NBTX = sums_BCXNJ.permute(3, 0, 1, 4, 2).flatten(2, 3)[:, :, :tokens]
        return sums_NBTX.unflatten(-1, (layers, experts))
