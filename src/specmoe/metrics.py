"""The protocol's numbers as pure functions on tensors, one value an event.

Everything that counts hits is derived from one quantity, the rank of each needed expert in the order in
which a predictor would fetch: comparing K logits with E others costs far less than sorting E.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specmoe.dataset import Targets

__all__ = ["CALIBRATION_BINS", "budgets_of", "calibration_sums", "event_metrics", "inclusion_probabilities", "ranks"]

CALIBRATION_BINS = 15
_TOP = (1, 3, 5, 10)


def budgets_of(top_k: int, experts: int) -> dict[str, int]:
    """Budgets by label: how many experts are fetched at K, 1.5K, 2K, 3K and 4K (at most all of them)."""
    shares = {"K": 1.0, "1.5K": 1.5, "2K": 2.0, "3K": 3.0, "4K": 4.0}
    return {label: min(experts, math.ceil(share * top_k)) for label, share in shares.items()}


def ranks(logits: Tensor, expert_ids: Tensor) -> Tensor:
    """Rank of each needed expert, 0 for the one fetched first.

    Args:
        logits: [..., E]. expert_ids: [..., K], -1 where there is none.

    Returns:
        [..., K] int64; E (beyond every budget) where there is no expert. Equal logits rank by expert id.
    """
    experts = logits.shape[-1]
    ids = expert_ids.clamp_min(0)
    own = logits.gather(-1, ids)[..., None]
    others = logits[..., None, :]
    before = torch.arange(experts, device=logits.device) < ids[..., None]
    rank = ((others > own) | ((others == own) & before)).sum(-1)
    return torch.where(expert_ids >= 0, rank, experts)


def event_metrics(logits: Tensor, targets: Targets, top_k: int, scale: float = 1.0) -> dict[str, Tensor]:
    """All per-event numbers.

    Args:
        logits: [..., E]; ``targets``: of the same leading shape. top_k: K.
        scale: factor on the logits for the inclusion probabilities.

    Returns:
        Name → [...] float32. ``recall@b``: share of the needed experts among the first b; ``coverage@b``:
        1 if all are; ``precision@2K``: share of the fetched that are needed; ``gate_mass@K``: share of
        the needed experts' router weight that is foreseen; ``top1`` …: 1 if the heaviest needed expert is
        among the first n; ``kl``: nats from the router's distribution to the softmax of the logits;
        ``brier``: mean squared error of the inclusion probabilities. Meaningless where
        ``targets.known`` is False.
    """
    experts = logits.shape[-1]
    budgets = budgets_of(top_k, experts)
    ids, router = targets.expert_ids_BTSHK, targets.router_BTSHE
    rank = ranks(logits, ids)
    needed = (ids >= 0).sum(-1).clamp_min(1)
    weight = torch.where(ids >= 0, router.gather(-1, ids.clamp_min(0)).clamp_min(1e-9), 0.0)
    values: dict[str, Tensor] = {}
    for label, budget in budgets.items():
        hits = rank < budget
        values[f"recall@{label}"] = hits.sum(-1) / needed
        if label in {"K", "2K"}:
            values[f"coverage@{label}"] = (hits.sum(-1) == needed).float()
        if label == "2K":
            values["precision@2K"] = hits.sum(-1) / budget
        if label == "K":
            values["gate_mass@K"] = (weight * hits).sum(-1) / weight.sum(-1).clamp_min(1e-9)
    heaviest = rank.gather(-1, weight.argmax(-1, keepdim=True))[..., 0]
    for n in _TOP:
        values[f"top{n}"] = (heaviest < n).float()
    values["kl"] = torch.special.xlogy(router, router).sum(-1) - (router * logits.log_softmax(-1)).sum(-1)
    probability = inclusion_probabilities(logits * scale, top_k)
    values["brier"] = (probability - targets.routed_BTSHE).square().mean(-1)
    return values


def inclusion_probabilities(logits: Tensor, top_k: int, iterations: int = 12) -> Tensor:
    """Probability that each expert is among the K: sigmoid(logit - τ) with τ such that they sum to K.

    This is the distribution of largest entropy with the given log-odds and a mean set size of K
    (Poisson sampling; Hájek, 1964). τ is found by Newton's method on the log of the sum, which is
    monotone.

    Args:
        logits: [..., E]. top_k: K.

    Returns:
        [..., E] in [0, 1].
    """
    if top_k >= logits.shape[-1]:
        return torch.ones_like(logits)
    logits = logits.float().clamp(-1e4, 1e4)
    # Bracket: at the highest logit minus logit(K/E) the sum is at most K, at the K-th highest at least K/2.
    low = logits.amin(-1, keepdim=True) - 20.0
    high = logits.amax(-1, keepdim=True) + 20.0
    tau = logits.topk(top_k + 1, -1).values[..., -2:].mean(-1, keepdim=True)
    for _ in range(iterations):
        probability = torch.sigmoid(logits - tau)
        excess = probability.sum(-1, keepdim=True) - top_k
        low = torch.where(excess > 0, tau, low)
        high = torch.where(excess > 0, high, tau)
        slope = (probability * (1 - probability)).sum(-1, keepdim=True)
        newton = tau + excess / slope.clamp_min(1e-6)
        tau = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    return torch.sigmoid(logits - tau)


def calibration_sums(logits: Tensor, targets: Targets, top_k: int) -> Tensor:
    """Sums for a reliability curve: [N, bins, 3] of (predicted, observed, count) over the experts of an event.

    Args:
        logits: [..., E]; the leading dimensions are flattened to N. Unknown targets count nothing.
    """
    probability = inclusion_probabilities(logits, top_k).flatten(0, -2)
    observed = targets.routed_BTSHE.flatten(0, -2)
    known = targets.known_BTSH.flatten().float()[:, None].expand_as(probability)
    index = (probability * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    sums = torch.zeros(len(probability), CALIBRATION_BINS, 3, device=logits.device)
    for column, values in enumerate((probability * known, observed * known, known)):
        sums[..., column].scatter_add_(1, index, values)
    return sums
