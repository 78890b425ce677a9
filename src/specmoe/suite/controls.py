"""Checks whose outcome is known beforehand. If one does not hold, no other number is worth reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from specmoe.dataset import Windows
from specmoe.evaluation import Ratios, evaluate, paired_difference
from specmoe.predictors.base import Knowledge, Predictor
from specmoe.predictors.layer_frequency import LayerFrequency
from specmoe.predictors.ridge import Ridge
from specmoe.predictors.token_markov import TokenMarkov
from specmoe.results import Control, Interval
from specmoe.suite.causality import TOLERANCE, largest_leak, probed_events, stretch_of
from specmoe.suite.data import SuiteData, with_shuffled_hidden, with_shuffled_routing
from specmoe.suite.synthetic_control import synthetic_controls
from specmoe.threads import one_thread

__all__ = ["causality_control", "controls_of", "routing_gap", "shuffled_gap", "true_router_recall"]

_FEWEST_DOCUMENTS = 5
# What a difference from layer frequency must not reach, at 95 % confidence.
_NOISE = 0.01
# Of each part: enough to see a point of recall, and done in a second.
_SHUFFLED_TOKENS = 6000
_PROBED_TOKENS = 32


@one_thread()
def controls_of(data: SuiteData, trained: Iterable[tuple[str, Predictor]] = ()) -> list[Control]:
    """Run every control that the trace allows.

    Args:
        trained: names and predictors of the run, with the weights that were judged.
    """
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
                name="ridge on router inputs of other tokens, minus layer frequency (first horizon, recall@K)",
                expected="nothing to learn: not above layer frequency by more than 1 point, at 95 % confidence",
                value=round(100 * gap.value, 3),
                unit="points",
                holds=gap.low < _NOISE,
            )
        )
    gap = routing_gap(data)
    if gap is not None:
        controls.append(
            Control(
                name="token table × Markov on routing of other tokens, minus layer frequency (first horizon, recall@K)",
                expected="nothing to learn: not above layer frequency by more than 1 point, at 95 % confidence",
                value=round(100 * gap.value, 3),
                unit="points",
                holds=gap.low < _NOISE,
            )
        )
    causality = causality_control(data, trained)
    return [*controls, *([causality] if causality else []), *synthetic_controls()]


def causality_control(data: SuiteData, trained: Iterable[tuple[str, Predictor]]) -> Control | None:
    """Change everything that is not yet known at some events of a test document: no logit of theirs may move.

    None where no predictor was trained.
    """
    window = stretch_of(data.journey[1], _PROBED_TOKENS)
    events = probed_events(*window.router_BTLE.shape[1:3])
    leaks = {name: largest_leak(predictor, window, events) for name, predictor in trained}
    if not leaks:
        return None
    moved = sorted(name for name, leak in leaks.items() if leak > TOLERANCE)
    worst = max(leaks, key=lambda name: leaks[name])
    return Control(
        name="causality: predictors whose logits move when what is not yet known is changed",
        expected=f"0; changes up to {TOLERANCE:g} of the largest logit are rounding",
        value=len(moved),
        unit=f"of {len(leaks)}",
        holds=not moved,
        note=(
            f"{len(events)} events of a test document; largest change {leaks[worst]:.1e} ({worst})"
            + (f"; moved: {', '.join(moved)}" if moved else "")
        ),
    )


def true_router_recall(data: SuiteData) -> float | None:
    """Share of the recorded experts that the model's routers choose again from the recorded inputs.

    The inputs were rounded when they were stored, which moves a logit by at most u Σ |w| |x| (u the unit
    roundoff of the stored type); an expert that misses the K by no more than that counts as chosen. None
    where the trace keeps no routers or no inputs, or where the choice is not the top-k of the logits (correction
    biases, group limits, or a replay has shown it).
    """
    settings = data.trace.manifest.source.settings
    by_other_rule = settings.get("choice_is_top_k") is False
    if settings.get("correction_bias") or settings.get("group_limited") or by_other_rule:
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
    return _gap(data, Ridge, with_shuffled_hidden(data.train), with_shuffled_hidden(data.validation, seed=1))


def routing_gap(data: SuiteData) -> Interval | None:
    """recall@K at h = 1 of token table × Markov on shuffled routing, minus that of layer frequency.

    It needs token ids and routing only, so every trace has it. None where there are too few validation documents.
    """
    if len(data.split.parts["validation"]) < _FEWEST_DOCUMENTS:
        return None
    train = with_shuffled_routing(data.train, tokens=_SHUFFLED_TOKENS)
    return _gap(data, TokenMarkov, train, with_shuffled_routing(data.validation, seed=1, tokens=_SHUFFLED_TOKENS))


def _gap(data: SuiteData, kind: Callable[..., Predictor], train: Windows, validation: Windows) -> Interval | None:
    horizons = data.horizons[:1]
    knowledge = Knowledge(lambda: train.batches(32))
    recalls = []
    for each in (kind, LayerFrequency):
        predictor = each(data.topology, horizons)
        predictor.prepare(knowledge)
        recalls.append(Ratios.of([evaluate(predictor, validation, only_recall=True)], "recall@K"))
    ours, frequency = recalls
    return paired_difference(ours, frequency, horizons).get(horizons[0])
