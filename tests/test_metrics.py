"""The protocol's numbers, held against slow and obvious versions of themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specmoe.dataset import Targets, routed_of
from specmoe.metrics import (
    CALIBRATION_BINS,
    budgets_of,
    calibration_sums,
    event_metrics,
    inclusion_probabilities,
    ranks,
    recall_at_k,
)

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def targets(events: int, experts: int, top_k: int, seed: int, *, gaps: bool = True) -> Targets:
    """Targets [N, 1, 1, 1, ...] with empty slots and unknown events among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(events, experts, generator=generator).argsort(-1)[:, :top_k]
    if gaps:
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.25, -1, ids)
    router = torch.rand(events, experts, generator=generator).square().softmax(-1)
    known = (ids >= 0).any(-1)
    shape = (events, 1, 1, 1)
    routed = routed_of(ids, experts)
    return Targets(ids.view(*shape, -1), routed.view(*shape, -1), router.view(*shape, -1), known.view(shape))


def random_logits(events: int, experts: int, seed: int, *, ties: bool) -> Tensor:
    logits = 2 * torch.randn(events, experts, generator=torch.Generator().manual_seed(seed))
    return (logits.round() if ties else logits).view(events, 1, 1, 1, experts)


def metrics(logits: Tensor, wanted: Targets, top_k: int) -> dict[str, Tensor]:
    return event_metrics(logits, inclusion_probabilities(logits, top_k), wanted, top_k)


sizes = st.integers(1, 12).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e)))


def test_budgets() -> None:
    assert budgets_of(2, 16) == {"K": 2, "1.5K": 3, "2K": 4, "3K": 6, "4K": 8}
    assert budgets_of(1, 16) == {"K": 1, "1.5K": 2, "2K": 2, "3K": 3, "4K": 4}
    assert budgets_of(6, 16) == {"K": 6, "1.5K": 9, "2K": 12, "3K": 16, "4K": 16}
    assert budgets_of(3, 3) == {"K": 3, "1.5K": 3, "2K": 3, "3K": 3, "4K": 3}


@given(sizes, st.integers(0, 1000), st.booleans())
@quick
def test_ranks_are_positions_in_a_stable_order(size: tuple[int, int], seed: int, ties: bool) -> None:
    experts, top_k = size
    logits = random_logits(9, experts, seed, ties=ties)
    ids = targets(9, experts, top_k, seed).expert_ids_BTSHK
    position = logits.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    expected = torch.where(ids >= 0, position.gather(-1, ids.clamp_min(0)), experts)
    assert torch.equal(ranks(logits, ids), expected)


def test_the_fetch_order_is_a_permutation_even_among_equals() -> None:
    every = torch.arange(6)
    for logits in (torch.zeros(6), torch.tensor([1.0, 1, 0, 0, 1, -math.inf]), torch.full((6,), -math.inf)):
        assert sorted(ranks(logits, every).tolist()) == list(range(6))


def test_what_is_not_a_number_is_fetched_last() -> None:
    # Else a predictor that puts out nothing but NaN would look perfect.
    every = torch.arange(4)
    assert ranks(torch.tensor([math.nan, 1.0, 2.0, math.nan]), every)[1:3].tolist() == [1, 0]
    assert sorted(ranks(torch.full((4,), math.nan), every).tolist()) == [0, 1, 2, 3]


@given(sizes, st.integers(0, 1000), st.booleans())
@quick
def test_every_number_is_what_a_loop_finds(size: tuple[int, int], seed: int, ties: bool) -> None:
    experts, top_k = size
    wanted, logits = targets(7, experts, top_k, seed), random_logits(7, experts, seed + 1, ties=ties)
    cold = torch.rand(wanted.expert_ids_BTSHK.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    guessed = inclusion_probabilities(logits, top_k)
    found = {name: values.flatten() for name, values in event_metrics(logits, guessed, wanted, top_k, cold).items()}
    probabilities = inclusion_probabilities(logits, top_k).view(7, experts)
    for n in range(7):
        ids = [e for e in wanted.expert_ids_BTSHK[n].flatten().tolist() if e >= 0]
        if not ids:
            continue
        router = wanted.router_BTSHE[n].flatten().double()
        scores = logits[n].flatten().double()
        order = sorted(range(experts), key=lambda e: (-float(scores[e]), e))
        expected: dict[str, float] = {}
        for label, share in {"K": 1.0, "1.5K": 1.5, "2K": 2.0, "3K": 3.0, "4K": 4.0}.items():
            fetched = order[: math.ceil(share * top_k)]
            hits = [e for e in ids if e in fetched]
            expected[f"recall@{label}"] = len(hits) / len(ids)
            expected[f"coverage@{label}"] = float(len(hits) == len(ids))
            expected[f"precision@{label}"] = len(hits) / min(experts, math.ceil(share * top_k))
            expected[f"gate_mass@{label}"] = float(sum(router[e] for e in hits) / sum(router[e] for e in ids))
            if label in {"K", "2K"}:
                slots = wanted.expert_ids_BTSHK[n].flatten().tolist()
                expected[f"cold_recall@{label}"] = sum(
                    e in fetched and bool(cold[n].flatten()[slots.index(e)]) for e in ids
                )
        heaviest = max(ids, key=lambda e: float(router[e]))
        for first in (1, 3, 5, 10):
            expected[f"top{first}"] = float(heaviest in order[:first])
        guess = scores.softmax(-1)
        expected["kl"] = float((router * (router / guess).log()).sum())
        routed = torch.tensor([float(e in ids) for e in range(experts)])
        expected["brier"] = float((probabilities[n] - routed).square().mean())
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert float(found[name][n]) == pytest.approx(value, abs=2e-5), name


@given(sizes, st.integers(0, 1000))
@quick
def test_what_cannot_be_otherwise(size: tuple[int, int], seed: int) -> None:
    experts, top_k = size
    wanted, logits = targets(20, experts, top_k, seed), random_logits(20, experts, seed, ties=True)
    found = metrics(logits, wanted, top_k)
    known = wanted.known_BTSH
    assert all(torch.isfinite(values).all() for values in found.values())
    recalls = torch.stack([found[f"recall@{label}"] for label in budgets_of(top_k, experts)])
    assert (recalls.diff(dim=0) >= 0).all()
    tops = torch.stack([found[f"top{n}"] for n in (1, 3, 5, 10)])
    assert (tops.diff(dim=0) >= 0).all()
    assert (found["kl"][known] >= -1e-5).all()
    for name, values in found.items():
        if name != "kl":
            assert ((values[known] >= 0) & (values[known] <= 1 + 1e-6)).all(), name
    for label in budgets_of(top_k, experts):
        assert (found[f"coverage@{label}"][known] <= found[f"recall@{label}"][known]).all()
    assert not any(name.startswith("cold") for name in found)
    if experts <= 4 * top_k:
        assert (found["recall@4K"][known] == 1).all()


def test_an_oracle_is_perfect_and_its_opposite_is_not() -> None:
    wanted = targets(30, 12, 3, 0, gaps=False)
    best = metrics(10 * wanted.routed_BTSHE, wanted, 3)
    worst = metrics(-10 * wanted.routed_BTSHE, wanted, 3)
    for name in ("recall@K", "recall@4K", "coverage@K", "coverage@2K", "gate_mass@K", "top3", "top10"):
        assert (best[name] == 1).all(), name
    assert (best["precision@2K"] == 0.5).all()
    for name in ("recall@K", "recall@3K", "coverage@K", "gate_mass@K", "top1", "top5"):
        assert (worst[name] == 0).all(), name


def test_the_router_itself_has_no_divergence_even_where_it_gives_nothing() -> None:
    wanted = targets(30, 6, 2, 0)
    assert metrics(wanted.router_BTSHE.log(), wanted, 2)["kl"].abs().max() < 1e-6
    router = torch.tensor([0.5, 0.5, 0.0, 0.0]).view(1, 1, 1, 1, 4)
    certain = Targets(
        torch.tensor([0, 1]).view(1, 1, 1, 1, 2), (router > 0).float(), router, torch.ones(1, 1, 1, 1) > 0
    )
    assert float(metrics(torch.tensor([40.0, 40, -40, -40]).view(router.shape), certain, 2)["kl"]) == pytest.approx(
        0, abs=1e-6
    )
    assert float(metrics(torch.zeros(router.shape), certain, 2)["kl"]) == pytest.approx(math.log(2))


def test_an_expert_with_a_weight_of_nothing_still_counts_in_the_gate_mass() -> None:
    ids = torch.tensor([0, 1]).view(1, 1, 1, 1, 2)
    router = torch.zeros(1, 1, 1, 1, 4)
    wanted = Targets(ids, routed_of(ids, 4), router, torch.ones(1, 1, 1, 1) > 0)
    found = metrics(torch.tensor([2.0, 0, 1, 0]).view(router.shape), wanted, 2)
    assert float(found["gate_mass@K"]) == pytest.approx(0.5)


def test_the_scale_moves_probabilities_and_nothing_else() -> None:
    wanted, logits = targets(30, 8, 2, 1), random_logits(30, 8, 2, ties=False)
    scaled = event_metrics(logits, inclusion_probabilities(3.0 * logits, 2), wanted, 2)
    plain, other = metrics(logits, wanted, 2), metrics(3.0 * logits, wanted, 2)
    assert [name for name in plain if not torch.equal(plain[name], scaled[name])] == ["brier"]
    assert [name for name in other if not torch.equal(other[name], scaled[name])] == ["kl"]


# Inclusion probabilities


@given(st.integers(2, 24).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e - 1))), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_inclusion_probabilities_sum_to_k_and_follow_the_logits(size: tuple[int, int], seed: int) -> None:
    experts, top_k = size
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.linspace(-2, 1.3, 30)[:, None]
    logits = spread * torch.randn(30, experts, generator=generator)
    logits = torch.where(torch.rand(30, 1, generator=generator) < 0.3, logits.round(), logits)
    probability = inclusion_probabilities(logits, top_k)
    missed = (probability.sum(-1) - top_k).abs()
    # Five Newton steps leave a few parts in a thousand where many experts stand close behind a gap.
    assert missed.max() < 0.04
    assert missed.median() < 1e-3
    assert ((probability >= 0) & (probability <= 1)).all()
    assert (probability.gather(-1, logits.argsort(-1)).diff(dim=-1) >= -1e-6).all()
    torch.testing.assert_close(inclusion_probabilities(logits + 5, top_k), probability, rtol=0, atol=0.01)


def test_inclusion_probabilities_keep_the_log_odds() -> None:
    logits = torch.tensor([1.5, 0.3, -0.4, -2.0, 0.0])
    odds = torch.logit(inclusion_probabilities(logits, 2).double())
    torch.testing.assert_close(odds - odds[0], (logits - logits[0]).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inclusion_probabilities(torch.zeros(8), 2), torch.full((8,), 0.25))


@pytest.mark.parametrize("top_k", [1, 2, 8, 63])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0, 9000.0])
@pytest.mark.parametrize("shape", ["normal", "heavy", "steps", "one far", "one low"])
def test_inclusion_probabilities_of_extreme_logits(top_k: int, spread: float, shape: str) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(50, 64, generator=generator)
    logits = {
        "normal": normal / 4,
        "heavy": (normal.pow(3) / 30).clamp(-1, 1),
        "steps": torch.linspace(-1, 1, 64).expand(50, 64),
        "one far": torch.cat([torch.ones(50, 1), normal[:, 1:] / 1000], -1),
        "one low": torch.cat([-torch.ones(50, 1), normal[:, 1:] / 1000], -1),
    }[shape] * spread
    probability = inclusion_probabilities(logits, top_k)
    assert torch.isfinite(probability).all()
    assert (probability.sum(-1) - top_k).abs().max() < 0.02


def test_infinite_logits_mean_surely_and_never() -> None:
    logits = torch.tensor([math.inf, 0.0, 0.0, 0.0, -math.inf])
    assert inclusion_probabilities(logits, 2).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 0], abs=1e-3)
    assert inclusion_probabilities(torch.full((4,), -math.inf), 1).tolist() == pytest.approx([0.25] * 4, abs=1e-3)


def test_all_experts_are_surely_needed_where_k_is_all() -> None:
    assert inclusion_probabilities(torch.tensor([[-50.0, 0.0, 50.0]]), 3).tolist() == [[1, 1, 1]]
    wanted = targets(5, 3, 3, 0, gaps=False)
    found = metrics(random_logits(5, 3, 0, ties=False), wanted, 3)
    assert (found["recall@K"] == 1).all()
    assert (found["brier"] == 0).all()


# Calibration


@given(sizes, st.integers(0, 1000))
@quick
def test_calibration_sums_are_what_a_loop_finds(size: tuple[int, int], seed: int) -> None:
    experts, top_k = size
    # Of 12 events three batches of two tokens, one layer and two horizons are made.
    flat = targets(12, experts, top_k, seed)
    wanted = Targets(*(part.view(3, 2, 1, 2, *part.shape[4:]) for part in flat))
    probability = inclusion_probabilities(random_logits(12, experts, seed, ties=False), top_k).view(3, 2, 1, 2, experts)
    sums = calibration_sums(probability, wanted)
    assert sums.shape == (3, 2, CALIBRATION_BINS, 3)
    expected = torch.zeros(sums.shape, dtype=torch.float64)
    for b, t, h, e in itertools.product(range(3), range(2), range(2), range(experts)):
        if bool(wanted.known_BTSH[b, t, 0, h]):
            value = float(probability[b, t, 0, h, e])
            # In float32, as the bins are cut.
            row = min(CALIBRATION_BINS - 1, int(probability[b, t, 0, h, e] * CALIBRATION_BINS))
            expected[b, h, row] += torch.tensor([value, float(wanted.routed_BTSHE[b, t, 0, h, e]), 1.0])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_calibration_totals() -> None:
    wanted = targets(40, 10, 3, 0, gaps=False)
    probability = inclusion_probabilities(random_logits(40, 10, 1, ties=False), 3)
    predicted, observed, count = calibration_sums(probability, wanted).sum((0, 1, 2)).tolist()
    assert predicted == pytest.approx(40 * 3, rel=1e-4)
    assert observed == 40 * 3
    assert count == 40 * 10
    unknown = wanted._replace(known_BTSH=torch.zeros_like(wanted.known_BTSH))
    assert not calibration_sums(probability, unknown).any()


def test_recall_alone_is_the_same_recall() -> None:
    wanted, logits = targets(40, 10, 3, 0), random_logits(40, 10, 1, ties=True)
    assert torch.equal(recall_at_k(logits, wanted, 3), metrics(logits, wanted, 3)["recall@K"])
