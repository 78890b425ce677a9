"""Live progress on standard error: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from specmoe.cli.terminal import SafeConsole
from specmoe.suite.jobs import Job
from specmoe.suite.run import JobEvent
from specmoe.suite.train import Plan

__all__ = ["ProgressLine", "TrainingView"]

_LINE_SECONDS = 10.0


class ProgressLine:
    """One bar with a note, for work whose size is known.

    Used as a context manager; ``update(done, total, note)`` from within.
    """

    def __init__(self, title: str) -> None:
        self._console = SafeConsole(stderr=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=None, note="")
        self._title, self._said = title, 0.0

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Show how far it is; without a total, only that it goes on."""
        self._progress.update(self._task, completed=done, total=total, note=note)
        finished = total is not None and done >= total
        if not self._console.is_terminal and (time.monotonic() - self._said > _LINE_SECONDS or finished):
            self._said = time.monotonic()
            so_far = f"{done:,.0f}" if total is None else f"{100 * done / max(total, 1e-9):.0f} %"
            self._console.print(f"{self._title}: {so_far}  {note}", highlight=False, markup=False)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(f"note: {text}", highlight=False, markup=False)


class TrainingView:
    """What runs, how well each learns, and how long it will take."""

    def __init__(self) -> None:
        self._console = SafeConsole(stderr=True, soft_wrap=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[done]}/{task.fields[jobs]} runs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        self._task = self._bar.add_task("training", total=None, done=0, jobs=0)
        self._live = Live(self._picture(), console=self._console, refresh_per_second=4, transient=True)
        self._work: dict[Job, float] = {}
        self._epochs: dict[Job, int] = {}
        self._spent: dict[Job, float] = {}
        self._latest: dict[Job, JobEvent] = {}
        self._done = 0
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> TrainingView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        """Say what happens now, outside of training."""
        self._console.print(Text(text, style="dim"))

    def plan(self, plan: Plan) -> None:
        """Take in what will be run."""
        self._work, self._epochs = dict(plan.work), plan.epochs
        for name, reason in plan.skipped.items():
            self._console.print(Text(f"skipped {name}: {reason}", style="yellow"))
        self._show()

    def event(self, event: JobEvent) -> None:
        """Take in an epoch's report or a result."""
        job = event.job
        if event.result is not None:
            self._done += 1
            self._latest.pop(job, None)
            self._spent[job] = self._work[job]
            if event.reused:
                # Nothing was spent on it: leaving it out keeps the estimate of the time left honest.
                self._work.pop(job)
                self._spent.pop(job)
            if event.result.status == "failed":
                self._console.print(Text(f"failed {job.predictor} seed {job.seed}: {event.result.reason}", style="red"))
            elif not event.reused:
                self._say_result(event)
        elif event.epoch is not None:
            self._latest[job] = event
            share = event.epoch.epoch / max(1, self._epochs[job])
            self._spent[job] = share * self._work[job]
        self._show()

    def _say_result(self, event: JobEvent) -> None:
        assert event.result is not None
        recall = event.result.recall.get("validation", {})
        scores = "  ".join(f"h={h} {100 * r:.1f}" for h, r in recall.items())
        name = f"{event.job.predictor} seed {event.job.seed}"
        line = f"{name:<36} validation recall@K  {scores}  ({event.result.train_seconds:.0f} s)"
        self._console.print(Text(line, style="dim"))

    def _show(self) -> None:
        total, spent = sum(self._work.values()), sum(self._spent.values())
        jobs = self._done + len(self._work) - sum(1 for job in self._spent if self._spent[job] >= self._work[job])
        self._bar.update(self._task, total=total or 1, completed=spent, done=self._done, jobs=jobs)
        self._live.update(self._picture())
        if not self._console.is_terminal and time.monotonic() - self._said > _LINE_SECONDS and total:
            self._said = time.monotonic()
            elapsed = self._said - self._begun
            left = elapsed * (total - spent) / max(spent, 1e-9)
            self._console.print(f"training: {100 * spent / total:.0f} %, about {left:.0f} s left", highlight=False)

    def _picture(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for job, event in getattr(self, "_latest", {}).items():
            if event.epoch is not None:
                table.add_row(
                    f"  {job.predictor} seed {job.seed}",
                    f"epoch {event.epoch.epoch}",
                    f"loss {event.epoch.validation_loss:.4f}",
                    f"recall@K {100 * event.epoch.validation_recall:.1f} %",
                )
        return Group(table, self._bar)
