"""One trial: train with the recipe it stands for, judge on the validation part, stop early if it falls behind."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.study import Study
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from specmoe.checkpoint import load_checkpoint
from specmoe.errors import SpecmoeError
from specmoe.evaluation import Ratios, evaluate
from specmoe.files import atomic_path
from specmoe.predictors.recipes import values_of, with_recipe
from specmoe.suite.data import SuiteData
from specmoe.threads import one_thread
from specmoe.training import EpochReport, TrainingFailed, fit
from specmoe.tuning.outcome import Outcome
from specmoe.tuning.space import changes_of
from specmoe.tuning.storage import OUTCOME

__all__ = ["Task", "ratios_of", "run_trial"]

IN_FORCE = "in_force"
# Trials differ in their number of epochs, and one with fewer has its low learning rates earlier: they are compared
# at the same share of their own schedule, not at the same epoch.
_QUARTERS = 4


@dataclass(frozen=True)
class Task:
    """What all trials of a search share. study: its name. seed: of the weights and of the proposals."""

    predictor: str
    study: str
    out: Path
    seed: int
    device: str


class _FellBehind(Exception):
    """Ends the training of a trial that is pruned."""


@one_thread()
def run_trial(
    number: int, study: Study, task: Task, data: SuiteData, on_epoch: Callable[[EpochReport], None] = lambda _: None
) -> Outcome:
    """Run a trial that the study has asked for, and tell the study how it ended.

    A trial that was interrupted goes on from its last epoch when its parameters are tried again.

    Raises:
        SpecmoeError: a full disk or a damaged trace; the trial then counts as interrupted.
    """
    trial = study.get_trials(deepcopy=False)[number]
    in_force = bool(trial.user_attrs.get(IN_FORCE))
    base = data.kind(task.predictor)
    kind = with_recipe(base, **changes_of(trial.params, base.recipe))
    values = values_of(kind.recipe)
    facts: dict[str, Any] = {
        "number": number,
        "in_force": in_force,
        "values": {name: values[name] for name in trial.params},
    }
    digest = hashlib.sha256(repr((task.study, sorted(values.items()))).encode()).hexdigest()[:16]
    checkpoint = task.out / "trials" / f"checkpoint-{digest}.safetensors"
    trained: list[EpochReport] = []
    started = time.perf_counter()
    told = set(trial.intermediate_values)

    def tell(report: EpochReport) -> int:
        trained.append(report)
        quarter = _QUARTERS * report.epoch // kind.recipe.epochs
        if 0 < quarter < _QUARTERS and quarter not in told and math.isfinite(report.validation_recall):
            told.add(quarter)
            study._storage.set_trial_intermediate_value(trial._trial_id, quarter, report.validation_recall)
            return quarter
        return 0

    def report(epoch: EpochReport) -> None:
        quarter = tell(epoch)
        on_epoch(epoch)
        now = study.get_trials(deepcopy=False)[number]
        # What everything is measured against runs to its end.
        if quarter and not in_force and study.pruner.prune(study, now):
            raise _FellBehind(f"in the lowest quarter of the trials after {quarter} of {_QUARTERS} parts of its epochs")

    for earlier in _curve_of(checkpoint):
        tell(earlier)
    torch.manual_seed(task.seed)
    predictor = kind(data.topology, data.horizons)
    try:
        fitted = fit(
            predictor,
            data.training(kind),
            data.validation,
            data.knowledge,
            seed=task.seed,
            device=task.device,
            checkpoint=checkpoint,
            on_epoch=report,
        )
    except (_FellBehind, TrainingFailed) as error:
        fell = isinstance(error, _FellBehind)
        recall = trained[-1].validation_recall if fell and trained else None
        facts |= {"state": "pruned" if fell else "failed", "epochs": len(trained), "reason": str(error)}
        outcome = Outcome(**facts, recall=recall, seconds=round(time.perf_counter() - started, 3))
        # To the study both are trials that are better not repeated nearby.
        _end(study, outcome, TrialState.PRUNED)
    else:
        tally = evaluate(predictor, data.validation, task.device, only_recall=True)
        ratios = Ratios.of([tally], "recall@K")
        path = _sums_path(task, number)
        with atomic_path(path) as temporary:
            save_file({"sums": ratios.sums_SGH.contiguous(), "events": ratios.events_GH.contiguous()}, str(temporary))
        recalls = {h: r for h, r in zip(data.horizons, ratios.estimate().tolist(), strict=True) if math.isfinite(r)}
        outcome = Outcome(
            **facts,
            state="complete",
            recall=sum(recalls.values()) / len(recalls) if recalls else 0.0,
            by_horizon=recalls,
            epochs=len(fitted.curve),
            best_epoch=fitted.best_epoch,
            seconds=round(fitted.seconds, 3),
        )
        _end(study, outcome, TrialState.COMPLETE)
    checkpoint.unlink(missing_ok=True)
    return outcome


def ratios_of(task: Task, number: int) -> Ratios:
    """A complete trial's recall@K sums by validation document: [1, G, H] and its events [G, H]."""
    path = _sums_path(task, number)
    try:
        tensors = load_file(str(path))
    except Exception as error:
        raise SpecmoeError(f"{path} cannot be read ({error}); delete the folder's journal to search anew") from error
    return Ratios(tensors["sums"], tensors["events"])


def _sums_path(task: Task, number: int) -> Path:
    return task.out / "trials" / f"{task.study.replace(' ', '-')}-{number:04}.safetensors"


def _end(study: Study, outcome: Outcome, state: TrialState) -> None:
    trial_id = study.get_trials(deepcopy=False)[outcome.number]._trial_id
    study._storage.set_trial_user_attr(trial_id, OUTCOME, json.loads(outcome.model_dump_json()))
    study.tell(outcome.number, outcome.recall if state == TrialState.COMPLETE else None, state=state)


def _curve_of(checkpoint: Path) -> list[EpochReport]:
    """The epochs that an interrupted trial has behind it; a checkpoint that cannot be read is thrown away."""
    if not checkpoint.exists():
        return []
    try:
        return [EpochReport(**point) for point in load_checkpoint(checkpoint)["curve"]]
    except (SpecmoeError, KeyError, TypeError):
        checkpoint.unlink()
        return []
