"""A whole search: trials one after another or side by side, kept so that it can go on after a kill."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import PercentilePruner
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import TrialState

from specmoe.errors import SpecmoeError
from specmoe.evaluation import interval_of, paired_difference
from specmoe.files import disk_errors
from specmoe.predictors.recipes import Recipes, values_of
from specmoe.predictors.registry import PREDICTORS
from specmoe.predictors.search import Choice, Place, SearchSpace
from specmoe.results import METRIC_VERSION
from specmoe.suite.cut import Cut
from specmoe.suite.data import SuiteData
from specmoe.suite.run import leave_with, parent_of_worker
from specmoe.training import EpochReport
from specmoe.tuning.outcome import Outcome, Search, save_search
from specmoe.tuning.space import distributions_of, space_of, start_of
from specmoe.tuning.storage import OUTCOME, ask_again_for_interrupted, at_work, counted, mend, only_search, open_study
from specmoe.tuning.trial import IN_FORCE, Task, ratios_of, run_trial

__all__ = ["FEWEST_FOR_IMPORTANCE", "TrialNews", "tune"]

FEWEST_FOR_IMPORTANCE = 8
# Drawn at random before the estimator has something to go by; few, as searches of some twenty trials are usual.
_RANDOM_TRIALS = 6
_TRIALS_BEFORE_PRUNING = 4


@dataclass(frozen=True)
class TrialNews:
    """News of a search: how far it is, and an epoch's report or the end of a trial.

    Attributes:
        number: of the trial. share: of its epochs that are behind it. done: trials that came to an end. trials: in all.
        best: the highest recall so far, None if no trial is complete.
    """

    number: int
    done: int
    trials: int
    share: float = 0.0
    epoch: EpochReport | None = None
    outcome: Outcome | None = None
    best: float | None = None


def tune(
    trace: Path,
    out: Path,
    predictor: str,
    *,
    trials: int,
    horizons: tuple[int, ...] = (1, 2, 3, 4),
    recipes: Recipes | None = None,
    workers: int = 1,
    timeout: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_news: Callable[[TrialNews], None] = lambda _: None,
) -> Search:
    """Look for a recipe under which ``predictor`` foresees more of the validation part; the test part is not read.

    The first trial is the recipe in force. Called again, it goes on to ``trials`` in all. With one worker a search
    that was interrupted gives the same as one that was not; with more, proposals depend on which trial ends first.

    Args:
        trace: directory of the trace. out: folder of the search; it may hold searches for other predictors.
        trials: that come to an end: complete, pruned or failed.
        recipes: changes to recipes from which the search starts.
        timeout: no trial is begun after so many seconds; one that runs then is finished.
        seed: of the weights and of the proposals.

    Returns:
        What was found so far; it is kept in ``out/tuning.json`` too.

    Raises:
        SpecmoeError: the predictor is not trained or cannot run on this trace, another search is at work in the
            folder, the disk is full.
        KeyboardInterrupt: passed on; what had come to an end is kept.
    """
    data = SuiteData.load(trace, horizons, recipes=recipes)
    kind = data.kind(predictor)
    if kind.recipe.epochs == 0:
        learned = ", ".join(name for name, each in PREDICTORS.items() if each.recipe.epochs > 0)
        raise SpecmoeError(f"{predictor} is not trained, so it has nothing to tune; these are: {learned}")
    if reason := data.lacks(kind):
        raise SpecmoeError(f"{predictor} cannot run on this trace: {reason}")
    space = space_of(kind, soft=data.train.soft)
    parts = (
        predictor,
        sorted(values_of(kind.recipe).items()),
        sorted((name, repr(place)) for name, place in space.items()),
        data.fingerprint,
        seed,
        METRIC_VERSION,
    )
    task = Task(predictor, f"{predictor} {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}", out, seed, device)
    with disk_errors(out), only_search(out):
        mend(out)
        study = open_study(out, task.study, pruner=_pruner())
        ask_again_for_interrupted(study, list(space))
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(start_of(space, kind.recipe), user_attrs={IN_FORCE: True})
        search = _Searching(study, task, data, space, trials, trace, on_news)
        found = search.found()
        if len(found.trials) < trials:
            deadline = None if timeout is None else time.monotonic() + timeout
            runner = _in_this_process if workers <= 1 else _in_workers
            for outcome in runner(search, workers, deadline):
                found = search.found()
                save_search(out, found)
                search.tell(outcome.number, outcome=outcome, share=1.0)
        save_search(out, found)
    return found


def _pruner() -> PercentilePruner:
    """Stops a trial whose best recall at a half or three quarters of its epochs is among the lowest quarter.

    Only complete trials are compared with, and these are the better ones: the median would end nearly all. After a
    quarter of the epochs the order says little, as those with a low learning rate are ahead.
    """
    return PercentilePruner(75.0, n_startup_trials=_TRIALS_BEFORE_PRUNING, n_warmup_steps=2)


@dataclass
class _Searching:
    """A search at work."""

    study: Study
    task: Task
    data: SuiteData
    space: SearchSpace
    trials: int
    trace: Path
    on_news: Callable[[TrialNews], None]

    def ask(self, running: int) -> int | None:
        """The number of the next trial, None if there are enough with those that run."""
        known = self.study.get_trials(deepcopy=False)
        if len(counted(known)) + running >= self.trials:
            return None
        # Proposals depend on the seed and on how many there were: not on how often the search was interrupted.
        drawn = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) for t in known)
        self.study.sampler = TPESampler(seed=self.task.seed * 1_000_003 + drawn, n_startup_trials=_RANDOM_TRIALS)
        return self.study.ask(distributions_of(self.space)).number

    def tell(self, number: int, **news: Any) -> None:
        """Pass news on."""
        ended = counted(self.study.get_trials(deepcopy=False))
        recalls = [t.value for t in ended if t.state == TrialState.COMPLETE and t.value is not None]
        self.on_news(TrialNews(number, len(ended), self.trials, best=max(recalls, default=None), **news))

    def epoch(self, number: int, report: EpochReport) -> None:
        """Pass an epoch's report on."""
        epochs = self.study.get_trials(deepcopy=False)[number].params.get("epochs")
        whole = epochs or self.data.kind(self.task.predictor).recipe.epochs
        self.tell(number, epoch=report, share=report.epoch / whole)

    def found(self) -> Search:
        """What is known now."""
        data, task = self.data, self.task
        known = self.study.get_trials(deepcopy=False)
        ended = sorted(
            (Outcome.model_validate(t.user_attrs[OUTCOME]) for t in counted(known)), key=lambda each: each.number
        )
        complete = [trial for trial in ended if trial.state == "complete"]
        # Of equal ones the first, so that the recipe in force stays where nothing beats it.
        best = max(complete, key=lambda trial: (trial.recall or 0.0, -trial.number), default=None)
        in_force = next((trial for trial in complete if trial.in_force), None)
        start = values_of(data.kind(task.predictor).recipe)
        facts: dict[str, Any] = {}
        if best is not None:
            overrides = dict(data.recipes.get(task.predictor, {}))
            facts["best"] = best.number
            facts["changes"] = overrides if best.in_force else {**overrides, **best.values}
        if best is not None and in_force is not None:
            ours, theirs = ratios_of(task, best.number), ratios_of(task, in_force.number)
            facts["gain_by_horizon"] = paired_difference(ours, theirs, data.horizons)
            draws = (ours.draws() - theirs.draws())[:, ours.estimate().isfinite()].mean(1)
            facts["gain"] = interval_of((best.recall or 0.0) - (in_force.recall or 0.0), draws)
        return Search(
            predictor=task.predictor,
            study=task.study,
            trace=str(self.trace),
            split_hash=data.split.hash,
            horizons=data.horizons,
            seed=task.seed,
            documents=len(data.validation.documents.unique()),
            start=start,
            space={name: _described(place) for name, place in self.space.items()},
            trials=tuple(ended),
            interrupted=sum(bool(t.user_attrs.get("interrupted")) for t in known),
            importance=self._importance(len(complete)),
            **facts,
        )

    def _importance(self, complete: int) -> dict[str, float]:
        if complete < FEWEST_FOR_IMPORTANCE:
            return {}
        try:
            return dict(optuna.importance.get_param_importances(self.study))
        except (ValueError, RuntimeError):  # Trials that all came to the same recall have no important field.
            return {}


def _described(place: Place) -> dict[str, Any]:
    """A place as JSON has it."""
    if isinstance(place, Choice):
        return {"kind": "choice", "values": list(place.values)}
    return {"kind": "range", **asdict(place)}


_Runner = Iterator[Outcome]


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _in_this_process(search: _Searching, workers: int, deadline: float | None) -> _Runner:
    del workers
    while not _late(deadline) and (number := search.ask(0)) is not None:

        def report(epoch: EpochReport, number: int = number) -> None:
            search.epoch(number, epoch)

        yield run_trial(number, search.study, search.task, search.data, report)


def _in_workers(search: _Searching, workers: int, deadline: float | None) -> _Runner:
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    data = search.data
    arguments = (Path(search.trace), data.horizons, data.cut, data.recipes, search.task, news)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    pool = ProcessPoolExecutor(min(workers, search.trials), context, initializer=_start_worker, initargs=arguments)
    running: set[Future[Outcome]] = set()
    try:
        while True:
            while len(running) < workers and not _late(deadline) and (number := search.ask(len(running))) is not None:
                running.add(pool.submit(_work, number))
            if not running:
                break
            ended, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            _pass_on(news, search)
            for future in ended:
                yield future.result()
        pool.shutdown(wait=True)
    except BrokenProcessPool as error:
        raise SpecmoeError(
            "a trial's process was killed (out of memory?); run the same command again to continue, with --workers 1"
        ) from error
    finally:
        # Private, but the only way to stop a worker in the middle of an epoch; what it had saved stays.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        news.close()
        news.cancel_join_thread()


def _pass_on(news: Any, search: _Searching) -> None:
    while True:
        try:
            search.epoch(*news.get_nowait())
        except queue.Empty:
            return


_worker: dict[str, Any] = {}


def _start_worker(trace: Path, horizons: tuple[int, ...], cut: Cut, recipes: Recipes, task: Task, news: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(parent_of_worker(),), daemon=True).start()
    data = SuiteData.load(trace, horizons, cut, recipes)
    _worker.update(data=data, task=task, news=news, study=open_study(task.out, task.study, pruner=_pruner()))


def _work(number: int) -> Outcome:
    task: Task = _worker["task"]
    with closing(at_work(task.out)), disk_errors(task.out):
        return run_trial(
            number, _worker["study"], task, _worker["data"], lambda epoch: _worker["news"].put((number, epoch))
        )
