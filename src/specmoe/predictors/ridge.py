"""The linear probe: how far a straight line gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specmoe.dataset import Targets, Window, targets_of
from specmoe.predictors._linear import (
    PENALTIES,
    LinearProbe,
    TargetKind,
    choose_penalty,
    collect_moments,
    held_back,
    hidden_of,
    solve_probe,
)
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["Ridge"]

_SCALES = (1.0, 0.5, 0.7, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)


class Ridge(Predictor):
    """Ridge regression from the hidden state, one map per source layer and horizon.

    It fits the 0/1 routing or, where the trace has router logits, the logarithm of the router's
    distribution: at each horizon whichever has the better recall@K on held-back training documents. A
    factor per horizon, chosen there by cross-entropy, makes the outputs logits.

    Buffers, float32: mean_LD, scale_LD, weight_LHDE, bias_LHE as in
    :class:`~specmoe.predictors._linear.LinearProbe`, the factor multiplied in.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free",
        sees="hidden",
        needs=frozenset({"hidden"}),
        source="linear probe: ridge regression (Hoerl and Kennard, 1970)",
    )

    mean_LD: Tensor
    scale_LD: Tensor
    weight_LHDE: Tensor
    bias_LHE: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        layers, experts, width = topology.layers, topology.experts, topology.hidden_size
        self.register_buffer("mean_LD", torch.zeros(layers, width))
        self.register_buffer("scale_LD", torch.ones(layers, width))
        self.register_buffer("weight_LHDE", torch.zeros(layers, len(self.horizons), width, experts))
        self.register_buffer("bias_LHE", torch.zeros(layers, len(self.horizons), experts))
        self.targets: tuple[TargetKind, ...] = ()

    def prepare(self, knowledge: Knowledge) -> None:
        """Solve the probes; ``targets`` then says which kind of target was taken at each horizon.

        Raises:
            SpecmoeError: the trace keeps no hidden states, or they are not finite.
        """
        soft = all(window.soft for window in knowledge.windows())
        kinds: list[TargetKind] = ["log_router", "routed"] if soft else ["routed"]
        fitted, held = collect_moments(knowledge.windows, self.horizons, kinds)
        penalties = {kind: choose_penalty(fitted, held, kind, PENALTIES) for kind in kinds}
        trials = {kind: solve_probe(fitted, kind, penalties[kind]) for kind in kinds}
        hits_NH, losses_NHC = self._try_out(knowledge, list(trials.values()))
        probes = {kind: solve_probe(fitted + held, kind, penalties[kind]) for kind in kinds}
        best_H = hits_NH.argmax(0).tolist()
        self.targets = tuple(kinds[best] for best in best_H)
        for h, (best, kind) in enumerate(zip(best_H, self.targets, strict=True)):
            scale = _SCALES[int(losses_NHC[best, h].argmin())]
            self.weight_LHDE[:, h] = probes[kind].weight_LHDE[:, h] * scale
            self.bias_LHE[:, h] = probes[kind].bias_LHE[:, h] * scale
        # Both kinds standardise alike: it depends on the hidden states only.
        self.mean_LD.copy_(probes[kinds[0]].mean_LD)
        self.scale_LD.copy_(probes[kinds[0]].scale_LD)

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E].

        Raises:
            SpecmoeError: the window has no hidden states.
        """
        probe = LinearProbe(self.mean_LD, self.scale_LD, self.weight_LHDE, self.bias_LHE)
        return probe(hidden_of(window, "Ridge"))

    def _try_out(self, knowledge: Knowledge, trials: list[LinearProbe]) -> tuple[Tensor, Tensor]:
        """On the held-back documents: experts found among the K, and cross-entropies of the scales.

        Returns:
            Sums over the events, [trials, H] and [trials, H, scales] float64.
        """
        hits = torch.zeros(len(trials), len(self.horizons), dtype=torch.float64)
        losses = torch.zeros(len(trials), len(self.horizons), len(_SCALES), dtype=torch.float64)
        for window, held_B in held_back(knowledge.windows()):
            if not bool(held_B.any()):
                continue
            hidden = hidden_of(window, "Ridge")[held_B]
            targets = Targets(*(part[held_B] for part in targets_of(window, self.horizons)))
            routed = targets.routed_BTSHE * targets.known_BTSH[..., None]
            aim = targets.router_BTSHE * targets.known_BTSH[..., None]
            for n, probe in enumerate(trials):
                output = probe(hidden)
                found = routed.gather(-1, output.topk(self.topology.top_k, -1).indices)
                hits[n] += found.sum((0, 1, 2, 4), dtype=torch.float64).to(hits)
                for i, scale in enumerate(_SCALES):
                    loss = -(aim * (output * scale).log_softmax(-1)).sum((0, 1, 2, 4), dtype=torch.float64)
                    losses[n, :, i] += loss.to(losses)
        return hits, losses
