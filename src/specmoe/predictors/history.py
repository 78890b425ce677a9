"""Fading averages over the routing of earlier tokens: for whole windows at once, and token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe.topology import Topology

__all__ = ["FADES", "add_token", "averages_so_far", "fading_averages", "no_tokens", "normalised"]

# What a token still counts one token later: half after two tokens, and after twenty-three.
FADES = (0.7, 0.97)


def fading_averages(routed_BTLE: Tensor) -> Tensor:
    """For every token, averages over the tokens before it: [B, T, L, len(FADES) · E]. Zero for the first."""
    batch, length, layers, experts = routed_BTLE.shape
    position = torch.arange(length, device=routed_BTLE.device)
    back = (position[:, None] - position - 1).float()
    weights = [normalised(torch.where(back >= 0, fade ** back.clamp_min(0), 0.0)) for fade in FADES]
    averages = torch.stack(weights).flatten(0, 1) @ routed_BTLE.flatten(2)
    return averages.view(batch, len(FADES), length, layers, experts).permute(0, 2, 3, 1, 4).flatten(-2)


def no_tokens(topology: Topology) -> dict[str, Tensor]:
    """The memory from which :func:`averages_so_far` are worked out, before the first token."""
    return {
        "faded": torch.zeros(topology.layers, len(FADES), topology.experts),
        "weight": torch.zeros(len(FADES), 1),
    }


def averages_so_far(memory: dict[str, Tensor]) -> Tensor:
    """The averages that the next token knows: [L, len(FADES) · E]."""
    return (memory["faded"] / memory["weight"].clamp_min(1e-9)).flatten(1)


def add_token(memory: dict[str, Tensor], routed_LE: Tensor) -> None:
    """Take a finished token into the averages."""
    fade = torch.tensor(FADES)[:, None]
    memory["faded"] = memory["faded"] * fade + routed_LE[:, None]
    memory["weight"] = memory["weight"] * fade + 1


def normalised(weights: Tensor) -> Tensor:
    """Rows that sum to 1, or to 0 where there is nothing to weigh."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)
