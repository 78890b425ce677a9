"""The floor: guesses that know nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specmoe.dataset import Window
from specmoe.predictors.base import Predictor, Recipe
from specmoe.topology import Topology

__all__ = ["RandomGuess"]

_MASK = (1 << 40) - 1
_ODD = (0x27D4EB2F165667C5, 0x1C69B3F74AC4AE35, 0x3C6EF372FE94F82B, 0x2545F4914F6CDD1D)


class RandomGuess(Predictor):
    """A new pseudo-random order of the experts for every event; its expected recall@b is b / E.

    The scores are a hash of the token id, the source layer and its routing, the horizon and the expert.
    A hash is not learned, so that it carries nothing of these; it makes the guess the same wherever the
    event is scored, and different from event to event.
    """

    recipe: ClassVar[Recipe] = Recipe(category="training-free", sees="nothing", source="control: chance")

    salt_SHE: Tensor
    salt_E: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        layers, experts = torch.arange(topology.layers), torch.arange(topology.experts)
        ahead = torch.tensor(self.horizons)
        salt = layers[:, None, None] * _ODD[0] + ahead[None, :, None] * _ODD[1] + experts * _ODD[2]
        self.register_buffer("salt_SHE", salt, persistent=False)
        self.register_buffer("salt_E", _mix((experts + 1) * _ODD[3]), persistent=False)

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E] in [0, 0.001): nearly even, in random order."""
        routed_BTS = (window.routed_BTLE.long() * self.salt_E).sum(-1)
        event_BTS = _mix(routed_BTS + window.token_ids_BT[..., None] * _ODD[3])
        hashed = _mix(event_BTS[..., None, None] + self.salt_SHE)
        return (hashed & 0xFFFFFF).float() * (1e-3 / (1 << 24))


def _mix(value: Tensor) -> Tensor:
    """Spread every bit of int64 numbers over all bits (wrapping multiplication and shifts)."""
    for odd in _ODD[:3]:
        value = (value ^ ((value >> 24) & _MASK)) * odd
    return value ^ ((value >> 24) & _MASK)
