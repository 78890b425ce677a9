"""Many jobs on several processes, each with one thread: two small trainings side by side beat one on two threads."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specmoe.errors import SpecmoeError
from specmoe.locks import at_work
from specmoe.predictors.recipes import Recipes
from specmoe.results import SeedResult
from specmoe.suite.cut import Cut
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import Job, finished, job_fingerprint, run_job
from specmoe.training import EpochReport

__all__ = ["JobEvent", "jobs_of", "run_jobs"]


@dataclass(frozen=True)
class JobEvent:
    """News of a job: an epoch's report, or its result. ``reused``: it had been done before."""

    job: Job
    epoch: EpochReport | None = None
    result: SeedResult | None = None
    reused: bool = False


def jobs_of(names: Sequence[str], seeds: Sequence[int], data: SuiteData) -> list[Job]:
    """The jobs of a suite, costly ones first; predictors without trained parameters run once."""
    jobs = []
    for name in names:
        kind = data.kind(name)
        if not data.lacks(kind):
            learned = kind.recipe.epochs > 0
            jobs += [Job(name, seed) for seed in (seeds if learned else seeds[:1])]
    return sorted(jobs, key=lambda job: -cost(job, data))


def cost(job: Job, data: SuiteData) -> float:
    """A rough measure of a job's work, for ordering and for the time left."""
    kind = data.kind(job.predictor)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(data.topology, data.horizons).parameters())
    return (kind.recipe.epochs + 0.3) * (size + 60_000)


def run_jobs(
    jobs: Sequence[Job],
    trace: Path,
    data: SuiteData,
    out: Path,
    *,
    workers: int,
    device: str = "cpu",
    on_event: Callable[[JobEvent], None] = lambda _: None,
) -> dict[Job, SeedResult]:
    """Run what is not done yet.

    Raises:
        SpecmoeError: a full disk, a damaged trace, or a worker that was killed; finished jobs stay finished.
        KeyboardInterrupt: passed on after the workers were stopped.
    """
    results: dict[Job, SeedResult] = {}
    waiting = []
    for job in jobs:
        done = finished(job, out, job_fingerprint(job, data))
        if done is None:
            waiting.append(job)
        else:
            results[job] = done
            for stale in job.folder(out).glob("checkpoint-*.safetensors"):  # Of other settings, and killed.
                stale.unlink()
            on_event(JobEvent(job, result=done, reused=True))
    runner = _in_this_process if workers <= 1 or len(waiting) <= 1 else _in_workers
    for job, result in runner(waiting, trace, data, out, workers, device, on_event):
        results[job] = result
        on_event(JobEvent(job, result=result))
    # In the order asked for, not in which they happened to finish.
    return {job: results[job] for job in jobs}


_Runner = Iterator[tuple[Job, SeedResult]]


def _in_this_process(
    jobs: list[Job],
    trace: Path,
    data: SuiteData,
    out: Path,
    workers: int,
    device: str,
    on_event: Callable[[JobEvent], None],
) -> _Runner:
    del trace, workers
    for job in jobs:
        yield (
            job,
            run_job(job, data, out, device=device, on_epoch=lambda epoch, job=job: on_event(JobEvent(job, epoch))),
        )


def _in_workers(
    jobs: list[Job],
    trace: Path,
    data: SuiteData,
    out: Path,
    workers: int,
    device: str,
    on_event: Callable[[JobEvent], None],
) -> _Runner:
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    arguments = (trace, data.horizons, data.cut, data.recipes, data.cache_experts, out, device, news)
    # Passive waiting: a spinning OpenMP thread would take the core from the other worker.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker, initargs=arguments)
    try:
        futures: dict[Future[SeedResult], Job] = {pool.submit(_work, job): job for job in jobs}
        pending = set(futures)
        while pending:
            finished_now, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            _pass_on(news, on_event)
            for future in finished_now:
                yield futures[future], future.result()
        pool.shutdown(wait=True)
    except BrokenProcessPool as error:
        raise SpecmoeError(
            "a training process was killed (out of memory?); run the same command again to continue, with --workers 1"
        ) from error
    finally:
        # Private, but the only way to stop a worker in the middle of an epoch; what it had saved stays.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        news.close()
        news.cancel_join_thread()


def _pass_on(news: Any, on_event: Callable[[JobEvent], None]) -> None:
    while True:
        try:
            on_event(news.get_nowait())
        except queue.Empty:
            return


_worker: dict[str, Any] = {}


def _start_worker(
    trace: Path,
    horizons: tuple[int, ...],
    cut: Cut,
    recipes: Recipes,
    cache_experts: int,
    out: Path,
    device: str,
    news: Any,
) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(parent_of_worker(),), daemon=True).start()
    _worker["at_work"] = at_work(out)
    _worker.update(data=SuiteData.load(trace, horizons, cut, recipes, cache_experts), out=out, device=device, news=news)


def parent_of_worker() -> int:
    """The process that started this worker, also if it is gone by now and the worker is somebody else's child."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is no worker"
    assert parent.pid is not None
    return parent.pid


def leave_with(parent: int) -> None:
    """End this process when its parent is gone: one that was killed could not end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(job: Job) -> SeedResult:
    def report(epoch: EpochReport) -> None:
        _worker["news"].put(JobEvent(job, epoch))

    return run_job(job, _worker["data"], _worker["out"], device=_worker["device"], on_epoch=report)
