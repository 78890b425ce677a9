"""The whole of ``specmoe train``: jobs, then their assembled results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specmoe.errors import SpecmoeError
from specmoe.evaluation import Ratios, by_horizon, evaluate
from specmoe.locks import writes
from specmoe.predictors.recipes import Recipes
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import ByHorizon, Results, TraceFacts
from specmoe.suite.assemble import assemble, commit, made_now, trace_facts
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import Job
from specmoe.suite.keeping import Earlier
from specmoe.suite.run import JobEvent, cost, jobs_of, run_jobs
from specmoe.threads import one_thread

__all__ = ["Plan", "train_suite", "untrained_recall"]


@dataclass(frozen=True)
class Plan:
    """What is about to be run: the jobs, the work and the epochs (at most) of each, and why others are left out."""

    jobs: tuple[Job, ...]
    work: dict[Job, float]
    epochs: dict[Job, int]
    skipped: dict[str, str]


@writes("train")
def train_suite(
    trace: Path,
    out: Path,
    names: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    horizons: tuple[int, ...] = (1, 2, 3, 4),
    recipes: Recipes | None = None,
    cache_experts: int | None = None,
    control: Path | None = None,
    workers: int | None = None,
    device: str = "cpu",
    replace: bool = False,
    token_texts: Callable[[list[int]], list[str]] | None = None,
    on_plan: Callable[[Plan], None] = lambda _: None,
    on_event: Callable[[JobEvent], None] = lambda _: None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Results:
    """Train and judge predictors on a trace and write ``out/results.json``.

    Jobs that are already done under the same conditions are kept; interrupted ones go on. Predictors that were
    trained there before and are not asked for now stay in the results, which are then those of one call for all.

    Args:
        trace: directory of the trace. control: the trace of an untrained model, or None.
        recipes: by predictor, what its recipe is changed to.
        cache_experts: experts a layer in the cache of cold-miss recall; None for a quarter, at least K.
        names: predictors of the registry. seeds: one run each for what is trained.
        workers: processes; None for one a core (one in all on a GPU).
        replace: write only what is asked for, whatever lies in ``out``; else what would be lost is an error.
        token_texts: token ids to texts, for showing; None if no tokenizer is at hand.

    Raises:
        SpecmoeError: a damaged or too small trace, a full disk, no predictor can run on this trace, or ``out`` holds
            results under other settings or another run writes to it.
    """
    started = time.monotonic()
    commit()
    on_stage("reading the trace")
    earlier = Earlier.of(out, names, replace=replace)
    names = earlier.all_names
    data = SuiteData.load(trace, horizons, recipes=earlier.recipes(recipes or {}), cache_experts=cache_experts)
    jobs = jobs_of(names, seeds, data)
    skipped = {name: reason for name in names if (reason := data.lacks(PREDICTORS[name]))}
    if not jobs:
        raise SpecmoeError(f"no predictor can run: {'; '.join(f'{n}: {reason}' for n, reason in skipped.items())}")
    earlier.check(data, jobs, seeds, control)
    epochs = {job: data.kind(job.predictor).recipe.epochs for job in jobs}
    on_plan(Plan(tuple(jobs), {job: cost(job, data) for job in jobs}, epochs, skipped))
    if workers is None:
        workers = 1 if device.startswith("cuda") else os.cpu_count() or 1
    results = run_jobs(jobs, trace, data, out, workers=workers, device=device, on_event=on_event)
    untrained = None
    if control is not None:
        on_stage("measuring the untrained control")
        untrained = untrained_recall(control, [name for name in names if PREDICTORS[name].recipe.epochs == 0], horizons)
    on_stage("drawing intervals and timing predictions")
    assembled = assemble(
        data,
        out,
        results,
        names,
        made=made_now(0.0),
        seeds=seeds,
        control=untrained,
        tokens_of=token_texts,
    )
    if untrained is None and earlier.results is not None:
        measured = {name: getattr(earlier.results, name) for name in ("control_trace", "untrained")}
        assembled = assembled.model_copy(update=measured)
    seconds = round(time.monotonic() - started, 1)
    assembled = assembled.model_copy(update={"made": assembled.made.model_copy(update={"seconds": seconds})})
    assembled.save(out / "results.json")
    return assembled


@one_thread()
def untrained_recall(
    trace: Path, names: Sequence[str], horizons: tuple[int, ...]
) -> tuple[TraceFacts, dict[str, ByHorizon]]:
    """recall@K of training-free predictors on the trace of a model with random weights."""
    data = SuiteData.load(trace, horizons)
    recalls = {}
    for name in names:
        if not data.lacks(PREDICTORS[name]):
            predictor = PREDICTORS[name](data.topology, horizons)
            predictor.prepare(data.knowledge)
            recalls[name] = by_horizon(
                Ratios.of([evaluate(predictor, data.evaluated["test"], only_recall=True)], "recall@K"), horizons
            )
    return trace_facts(data.trace), recalls
