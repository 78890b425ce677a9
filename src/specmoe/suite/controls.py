"""Checks whose outcome is known beforehand. If one does not hold, no other number is worth reading."""

from __future__ import annotations

import torch

from specmoe.dataset import Windows
from specmoe.evaluation import Ratios, evaluate, paired_difference
from specmoe.predictors.base import Knowledge
from specmoe.predictors.layer_frequency import LayerFrequency
from specmoe.predictors.ridge import Ridge
from specmoe.results import Control, Interval
from specmoe.suite.data import SuiteData, with_shuffled_hidden

__all__ = ["controls_of"]

_FEWEST_DOCUMENTS = 5


def controls_of(data: SuiteData) -> list[Control]:
    """Run every control that the trace allows."""
    controls = []
    true_router = true_router_recall(data)
    if true_router is not None:
        controls.append(
            Control(
                name="h = 0: the true router on its recorded input",
                expected="100.0 % of the recorded experts; ties within the rounding of the stored inputs count",
                value=round(100 * true_router, 3),
                holds=round(100 * true_router, 1) == 100.0,
            )
        )
    gap = shuffled_gap(data)
    if gap is not None:
        controls.append(
            Control(
                name="ridge on router inputs of other tokens, minus layer frequency (h = 1, recall@K)",
                expected="nothing to learn: not above layer frequency by more than 1 point, at 95 % confidence",
                value=round(100 * gap.value, 3),
                unit="points",
                holds=gap.low < 0.01,
            )
        )
    return controls


def true_router_recall(data: SuiteData) -> float | None:
    """Share of the recorded experts that the model's routers choose again from the recorded inputs.

    The inputs were rounded when they were stored, which moves a logit by at most u Σ |w| |x| (u the unit
    roundoff of the stored type); an expert that misses the K by no more than that counts as chosen. None
    where the trace keeps no routers or no inputs, or where the choice is not the top-k of the logits (correction
    biases, group limits).
    """
    settings = data.trace.manifest.source.settings
    if settings.get("correction_bias") or settings.get("group_limited"):
        return None
    weight, bias = data.knowledge.router_weight_LED, data.knowledge.router_bias_LE
    windows = data.evaluated["test"]
    if weight is None or bias is None or windows.hidden is None:
        return None
    stored = data.trace.read(data.split.parts["test"][0], ("hidden",)).hidden
    unit = torch.finfo(stored.dtype if stored is not None else torch.float32).eps / 2
    hits = needed = 0
    for window in windows.batches(8):
        assert window.hidden_BTLD is not None
        logits = torch.einsum("btld,led->btle", window.hidden_BTLD, weight) + bias
        moved = unit * torch.einsum("btld,led->btle", window.hidden_BTLD.abs(), weight.abs())
        bar = (logits - moved).topk(data.topology.top_k, -1).values[..., -1:]
        chosen = logits + moved >= bar
        ids = torch.where(window.valid_BT[..., None, None], window.expert_ids_BTLK, -1)
        hits += int((chosen.gather(-1, ids.clamp_min(0)) & (ids >= 0)).sum())
        needed += int((ids >= 0).sum())
    return hits / max(1, needed)


def shuffled_gap(data: SuiteData) -> Interval | None:
    """recall@K at h = 1 of ridge regression on shuffled router inputs, minus that of layer frequency.

    None where the trace keeps no inputs, or has too few validation documents for an interval to mean something.
    """
    if data.train.hidden is None or len(data.split.parts["validation"]) < _FEWEST_DOCUMENTS:
        return None
    horizons = data.horizons[:1]
    train: Windows = with_shuffled_hidden(data.train)
    validation = with_shuffled_hidden(data.validation, seed=1)
    knowledge = Knowledge(lambda: train.batches(32))
    recalls = []
    for kind in (Ridge, LayerFrequency):
        predictor = kind(data.topology, horizons)
        predictor.prepare(knowledge)
        recalls.append(Ratios.of([evaluate(predictor, validation, only_recall=True)], "recall@K"))
    ridge, frequency = recalls
    return paired_difference(ridge, frequency, horizons).get(horizons[0])
