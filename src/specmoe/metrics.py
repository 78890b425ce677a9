"""The protocol's numbers as pure functions on tensors, one value an event.

Everything that counts hits is derived from one quantity, the rank of each needed expert in the order in
which a predictor would fetch: comparing K logits with E others costs far less than sorting E.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specmoe.dataset import Targets

__all__ = [
    "CALIBRATION_BINS",
    "budgets_of",
    "calibration_sums",
    "event_metrics",
    "inclusion_log_odds",
    "inclusion_probabilities",
    "ranks",
    "recall_at_k",
]

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
        [..., K] int64; E (beyond every budget) where there is no expert. Equal logits rank by expert id, NaN last.
    """
    experts = logits.shape[-1]
    # Nothing compares with NaN, which would put all experts first.
    logits = logits.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    number = torch.arange(experts, device=logits.device)
    rank = torch.empty_like(expert_ids)
    # One slot at a time: all K at once would hold K x E comparisons for every event.
    for slot in range(expert_ids.shape[-1]):
        own_id = expert_ids[..., slot : slot + 1].clamp_min(0)
        own = logits.gather(-1, own_id)
        rank[..., slot] = (logits > own).sum(-1) + ((logits == own) & (number < own_id)).sum(-1)
    return torch.where(expert_ids >= 0, rank, experts)


def recall_at_k(logits: Tensor, targets: Targets, top_k: int) -> Tensor:
    """``recall@K`` of :func:`event_metrics` alone."""
    ids = targets.expert_ids_BTSHK
    return (ranks(logits, ids) < top_k).sum(-1) / (ids >= 0).sum(-1).clamp_min(1)


def event_metrics(
    logits: Tensor, probability: Tensor, targets: Targets, top_k: int, cold: Tensor | None = None
) -> dict[str, Tensor]:
    """All per-event numbers.

    Args:
        logits: [..., E]; ``targets``: of the same leading shape. top_k: K.
        probability: [..., E], that each expert is among the K.
        cold: [..., K] bool, which needed experts the stated cache lacks (:mod:`specmoe.residency`); None where no
            cache was replayed.

    Returns:
        Name → [...] float32. For every budget b ``recall@b``: share of the needed experts among the first b;
        ``coverage@b``: 1 if all are; ``precision@b``: share of the fetched that are needed; ``gate_mass@b``: share
        of the needed experts' router weight that is foreseen. ``top1`` …: 1 if the heaviest needed expert is
        among the first n; ``kl``: nats from the router's distribution to the softmax of the logits;
        ``brier``: mean squared error of the inclusion probabilities. ``cold_recall@K`` and ``cold_recall@2K``: how
        many of the cold experts are among the first b, a count, to be divided by the number of cold experts.
        Meaningless where ``targets.known`` is False.
    """
    experts = logits.shape[-1]
    budgets = budgets_of(top_k, experts)
    ids, router = targets.expert_ids_BTSHK, targets.router_BTSHE
    rank = ranks(logits, ids)
    needed = (ids >= 0).sum(-1).clamp_min(1)
    weight = torch.where(ids >= 0, router.gather(-1, ids.clamp_min(0)).clamp_min(1e-9), 0.0)
    total_weight = weight.sum(-1).clamp_min(1e-9)
    values: dict[str, Tensor] = {}
    for label, budget in budgets.items():
        hits = rank < budget
        found = hits.sum(-1, dtype=torch.float32)
        values[f"recall@{label}"] = found / needed
        values[f"coverage@{label}"] = (found == needed).float()
        values[f"precision@{label}"] = found / budget
        values[f"gate_mass@{label}"] = (weight * hits).sum(-1) / total_weight
        if cold is not None and label in {"K", "2K"}:
            values[f"cold_recall@{label}"] = (hits & cold).sum(-1, dtype=torch.float32)
    heaviest = rank.gather(-1, weight.argmax(-1, keepdim=True))[..., 0]
    for n in _TOP:
        values[f"top{n}"] = (heaviest < n).float()
    values["kl"] = torch.special.xlogy(router, router).sum(-1) - (router * logits.log_softmax(-1)).sum(-1)
    values["brier"] = (probability - targets.routed_BTSHE).square().mean(-1)
    return values


def inclusion_probabilities(logits: Tensor, top_k: int, iterations: int = 8) -> Tensor:
    """Probability that each expert is among the K: sigmoid(logit - τ) with τ such that they sum to K.

    This is the distribution of largest entropy with the given log-odds and a mean set size of K
    (Poisson sampling; Hájek, 1964). τ is found by Newton's method, kept inside a bracket by bisection.

    Args:
        logits: [..., E]. top_k: K.

    Returns:
        [..., E] in [0, 1].
    """
    if top_k >= logits.shape[-1]:
        return torch.ones_like(logits)
    return torch.sigmoid(inclusion_log_odds(logits, top_k, iterations))


def inclusion_log_odds(logits: Tensor, top_k: int, iterations: int = 8) -> Tensor:
    """The log-odds of :func:`inclusion_probabilities`: logit - τ. ``top_k`` must be below E."""
    experts = logits.shape[-1]
    logits = logits.float().clamp(-1e4, 1e4)
    # τ lies between these: the first of each pair holds whatever the logits are, the second is tighter where
    # few experts stand out (K - 1 of them count at most 1 each, the others no more than the K-th; and so on).
    border = logits.topk(top_k + 1, -1).values[..., -2:]
    odds = math.log((experts - top_k) / top_k)
    low = torch.maximum(logits.amin(-1, keepdim=True) + odds, border[..., 1:] - math.log(top_k))
    high = torch.minimum(logits.amax(-1, keepdim=True) + odds, border[..., :1] + math.log(experts - top_k))
    tau = (low + high) / 2
    for _ in range(iterations):
        probability = torch.sigmoid(logits - tau)
        total = probability.sum(-1, keepdim=True)
        slope = total - probability.square().sum(-1, keepdim=True)
        low = torch.where(total > top_k, tau, low)
        high = torch.where(total > top_k, high, tau)
        newton = tau + (total - top_k) / slope.clamp_min(1e-6)
        tau = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    return logits - tau


def calibration_sums(probability_BTSHE: Tensor, targets: Targets) -> Tensor:
    """Sums for a reliability curve: [B, H, bins, 3] of (predicted, observed, count) over events and experts.

    Args:
        probability_BTSHE: :func:`inclusion_probabilities`. Unknown targets count nothing.
    """
    batch, _, _, horizons, _ = probability_BTSHE.shape
    # Unknown targets are weighted with 0: picking the known ones out by index would cost more than all the rest.
    known = targets.known_BTSH[..., None].expand_as(probability_BTSHE).float()
    cell = torch.arange(batch * horizons, device=known.device).view(batch, 1, 1, horizons, 1) * CALIBRATION_BINS
    index = cell + (probability_BTSHE * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    size = batch * horizons * CALIBRATION_BINS
    sums = [
        torch.bincount(index.flatten(), weights.flatten(), minlength=size).double()
        for weights in (probability_BTSHE * known, targets.routed_BTSHE * known, known)
    ]
    return torch.stack(sums, -1).view(batch, horizons, CALIBRATION_BINS, 3)
