"""The only training loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.checkpoint import load_checkpoint, save_checkpoint
from specmoe.dataset import Window, Windows, ahead, known_ahead, sharpen, targets_of, tokens_at_once
from specmoe.errors import SpecmoeError
from specmoe.metrics import ranks
from specmoe.predictors.base import Knowledge, Predictor, Recipe

__all__ = ["EpochReport", "FitResult", "TrainingFailed", "fit", "loss_of", "training_target"]

# Of a target distribution, where there is a teacher.
TEACHER_SHARE = 0.5


class TrainingFailed(SpecmoeError):
    """A run whose loss became NaN or Inf; the message names the cause. Other runs go on."""


@dataclass(frozen=True)
class EpochReport:
    """One point of the learning curve. Losses in nats an event, recall@K over all horizons."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_recall: float
    learning_rate: float


@dataclass
class FitResult:
    """How training went. The predictor holds the weights of the best epoch."""

    curve: list[EpochReport] = field(default_factory=list)
    best_epoch: int = 0
    stopped: str = "no training needed"
    seconds: float = 0.0


def fit(
    predictor: Predictor,
    train: Windows,
    validation: Windows,
    knowledge: Knowledge,
    *,
    seed: int,
    device: str = "cpu",
    checkpoint: Path | None = None,
    teacher: Callable[[Window], Tensor] | None = None,
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
) -> FitResult:
    """Train ``predictor`` by its own recipe: prepare, then epochs until the recipe or its patience ends.

    Everything random depends on ``seed`` and the epoch's number alone, so a run that continues from its
    checkpoint gives the same weights as one that was never stopped.

    Args:
        train, validation: windows; early stopping sees validation only.
        knowledge: what the predictor may prepare from.
        checkpoint: where the state is kept after every epoch; None to keep none.
        teacher: gives a second distribution to aim at for a training window, [B, T, S, H, E], mixed half and half
            with the trace's own (distillation, Hinton et al., 2015). Validation is judged by the trace's own alone.

    Raises:
        TrainingFailed: the loss is no longer finite.
        SpecmoeError: the windows are too short for the horizons.
    """
    recipe, started = predictor.recipe, time.perf_counter()
    result = FitResult()
    previous = load_checkpoint(checkpoint) if checkpoint is not None and checkpoint.exists() else None
    if previous is None:
        predictor.prepare(knowledge)
    predictor.to(device)
    if recipe.epochs == 0 or not any(True for _ in predictor.parameters()):
        result.seconds = time.perf_counter() - started
        return result

    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    temperature = train.router_temperature(recipe.sharpness) if recipe.soft_targets and train.soft else None
    membership = predictor.topology.top_k if recipe.objective == "membership" else None
    steps_per_epoch = math.ceil(len(train) / recipe.batch_windows)
    scheduler = build_scheduler(optimizer, recipe, steps_per_epoch)
    best_loss, best_state, elapsed = math.inf, copy.deepcopy(predictor.state_dict()), 0.0
    if previous is not None:
        predictor.load_state_dict(previous["predictor"])
        optimizer.load_state_dict(previous["optimizer"])
        scheduler.load_state_dict(previous["scheduler"])
        best_loss, best_state, elapsed = previous["best_loss"], previous["best_state"], previous["seconds"]
        result.curve = [EpochReport(**point) for point in previous["curve"]]
        result.best_epoch = previous["best_epoch"]

    result.stopped = f"all {recipe.epochs} epochs"
    for epoch in range(len(result.curve) + 1, recipe.epochs + 1):
        torch.manual_seed(seed * 1_000_003 + epoch)
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        predictor.train()
        total, events = 0.0, 0
        for window in train.batches(recipe.batch_windows, order):
            window = window.to(device)
            target, known = training_target(window, predictor.horizons, recipe, temperature)
            if teacher is not None:
                target = torch.lerp(target, teacher(window), TEACHER_SHARE)
            loss, count = loss_of(predictor(window), target, known, temperature, membership)
            besides = predictor.auxiliary_loss(window)
            (loss if besides is None else loss + besides).backward()
            norm = nn.utils.clip_grad_norm_(predictor.parameters(), recipe.clip)
            value = loss.item()
            if not math.isfinite(value) or not math.isfinite(norm.item()):
                raise TrainingFailed(cause_of_divergence(window, value, epoch, optimizer.param_groups[0]["lr"]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if recipe.scheduler == "cosine":
                scheduler.step()
            total, events = total + value * count, events + count
        if events == 0:
            raise SpecmoeError("the training documents hold nothing to foresee at these horizons; collect longer ones")
        validation_loss, recall = validate(predictor, validation, recipe, temperature, device)
        if not math.isfinite(validation_loss):
            whole = validation.batch(slice(0, len(validation)))
            raise TrainingFailed(cause_of_divergence(whole, validation_loss, epoch, optimizer.param_groups[0]["lr"]))
        report = EpochReport(epoch, total / events, validation_loss, recall, optimizer.param_groups[0]["lr"])
        result.curve.append(report)
        if recipe.scheduler == "plateau":
            scheduler.step(validation_loss)
        if validation_loss < best_loss:
            best_loss, best_state, result.best_epoch = validation_loss, copy.deepcopy(predictor.state_dict()), epoch
        on_epoch(report)
        if epoch - result.best_epoch >= recipe.patience:
            result.stopped = f"no better validation loss for {recipe.patience} epochs"
            break
        if checkpoint is not None:
            state = {"predictor": predictor.state_dict(), "optimizer": optimizer.state_dict()}
            best = {"best_loss": best_loss, "best_state": best_state, "best_epoch": result.best_epoch}
            curve = [vars(point) for point in result.curve]
            seconds = elapsed + time.perf_counter() - started
            progress = {"scheduler": scheduler.state_dict(), "curve": curve, "seconds": seconds}
            save_checkpoint(checkpoint, {**state, **best, **progress})
    predictor.load_state_dict(best_state)
    predictor.eval()
    result.seconds = elapsed + time.perf_counter() - started
    return result


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Any:
    """Cosine over all steps (after a linear warm-up), or halving when an epoch brings no better validation loss."""
    if recipe.scheduler == "cosine" and recipe.warmup > 0:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmed_cosine(step, recipe.epochs * steps_per_epoch, recipe.warmup)
        )
    if recipe.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=recipe.epochs * steps_per_epoch, eta_min=recipe.learning_rate * 0.02
        )
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.01)


def warmed_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: up linearly over ``warmup`` of all steps, then half a cosine down to 2 %."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    share = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2


def training_target(
    window: Window, horizons: Sequence[int], recipe: Recipe, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """The distribution to aim at [B, T, S, H, E], and where there is one [B, T, S, H].

    The router's own distribution at a temperature (distillation, Hinton et al., 2015), or, without one, the
    K experts in equal parts with a share spread evenly over all (label smoothing, Szegedy et al., 2016; a
    soft target says by itself how sure the router was).
    """
    if temperature is None:
        target = window.routed_BTLE / window.routed_BTLE.sum(-1, keepdim=True).clamp_min(1.0)
        target = torch.lerp(target, torch.full_like(target, 1 / target.shape[-1]), recipe.label_smoothing)
    else:
        target = sharpen(window.router_BTLE, temperature)
    # Everything about one place is worked out once, before it is looked up from every horizon.
    return ahead(target, horizons), known_ahead(window, horizons)


def loss_of(
    logits_BTSHE: Tensor,
    target_BTSHE: Tensor,
    known_BTSH: Tensor,
    temperature: float | None,
    membership: int | None = None,
) -> tuple[Tensor, int]:
    """Cross-entropy to the target distribution, in nats, averaged over the known events and horizons.

    Args:
        membership: K, if each expert's membership among the K is to be learned by itself: binary cross-entropy to K
            times the target distribution, over K; None for the distribution as a whole.
        temperature: of the target, None for hard targets. It is applied to the prediction too, so that the
            prediction at temperature 1 estimates the router's distribution.

    Returns:
        The loss and the number of (event, horizon) pairs.
    """
    logits = logits_BTSHE / (temperature or 1.0)
    # As the target sums to 1, this is -Σ target log_softmax(logits) without the tensor of log-probabilities.
    if membership is None:
        losses = logits.logsumexp(-1) - (target_BTSHE * logits).sum(-1)
    else:
        among_BTSHE = (membership * target_BTSHE).clamp_max(1.0)
        losses = (F.softplus(logits) - among_BTSHE * logits).sum(-1) / membership
    count = int(known_BTSH.sum())
    return (losses * known_BTSH).sum() / max(1, count), count


@torch.no_grad()
def validate(
    predictor: Predictor, windows: Windows, recipe: Recipe, temperature: float | None, device: str
) -> tuple[float, float]:
    """Loss and recall@K over ``windows``."""
    predictor.eval()
    total, hits, needed, events = 0.0, 0, 0, 0
    membership = predictor.topology.top_k if recipe.objective == "membership" else None
    for _, window in windows.by_length(tokens_at_once(predictor.topology, len(predictor.horizons), device)):
        moved = window.to(device)
        targets = targets_of(moved, predictor.horizons)
        logits = predictor(moved)
        target, known = training_target(moved, predictor.horizons, recipe, temperature)
        loss, count = loss_of(logits, target, known, temperature, membership)
        wanted = (targets.expert_ids_BTSHK >= 0) & targets.known_BTSH[..., None]
        found = (ranks(logits, targets.expert_ids_BTSHK) < predictor.topology.top_k) & wanted
        total, events = total + loss.item() * count, events + count
        hits, needed = hits + int(found.sum()), needed + int(wanted.sum())
    return total / max(1, events), hits / max(1, needed)


def cause_of_divergence(window: Window, loss: float, epoch: int, rate: float) -> str:
    """One line that says why a loss may not be finite."""
    for name in ("hidden_BTLD", "router_BTLE"):
        tensor = getattr(window, name)
        if tensor is not None and not torch.isfinite(tensor).all():
            return f"{name.split('_')[0]} in the trace holds NaN or Inf (epoch {epoch})"
    return f"loss {loss} or its gradient is not finite in epoch {epoch} at learning rate {rate:.2g}; lower the rate"
