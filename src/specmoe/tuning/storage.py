"""The journal of a search: it outlives a kill at any moment, and several processes write to it.

Every operation is one line that is appended and flushed under a lock of the operating system, which a killed process
cannot keep. A line that was cut off is taken out at the next start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path, regular_file
from specmoe.locks import take

__all__ = ["OUTCOME", "ask_again_for_interrupted", "at_work", "counted", "mend", "only_search", "open_study"]

JOURNAL = "trials.journal"
INTERRUPTED, AGAIN_OF, OUTCOME = "interrupted", "again_of", "outcome"
_ORPHAN_SECONDS = 30.0


class _Lock(JournalFileOpenLock):
    """A lock that the kernel takes back from a process that has ended, however it ended."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._stream: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._stream = self._path.open("ab")
        take(self._stream.fileno(), wait=True)
        return True

    def release(self) -> None:
        if self._stream is not None:
            self._stream.close()


def open_study(out: Path, name: str, sampler: Any = None, pruner: Any = None) -> Study:
    """The study of this name, made if it is not there. Any process may open it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(_backend(out)),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        sampler=sampler,
        pruner=pruner,
    )


def _backend(out: Path) -> BaseJournalBackend:
    return JournalFileBackend(str(out / JOURNAL), lock_obj=_Lock(out / f".{JOURNAL}.lock"))


def mend(out: Path) -> int:
    """Take lines out of the journal that were not written to their end; returns how many there were."""
    path = out / JOURNAL
    if not path.exists():
        return 0
    lines = regular_file(path).read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n") and _is_json(line)]
    if len(whole) < len(lines):
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(whole))
    return len(lines) - len(whole)


def _is_json(line: bytes) -> bool:
    with suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False


@contextmanager
def only_search(out: Path) -> Iterator[None]:
    """Hold the folder for this process; waits until workers of a killed one have ended.

    Raises:
        SpecmoeError: another search is at work in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".search.lock").open("ab") as stream:
        if not take(stream.fileno()):
            raise SpecmoeError(f"another search is at work in {out}; wait for it or choose another --out")
        with (out / ".workers.lock").open("ab") as workers:
            deadline = time.monotonic() + _ORPHAN_SECONDS
            while not take(workers.fileno()):
                if time.monotonic() > deadline:
                    raise SpecmoeError(f"workers of an earlier search are still at work in {out}; end them first")
                time.sleep(0.1)
        yield


def at_work(out: Path) -> IO[bytes]:
    """Show that a worker lives, for as long as the stream that is returned is open."""
    stream = (out / ".workers.lock").open("ab")
    take(stream.fileno(), shared=True, wait=True)
    return stream


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that came to an end: all but those that were interrupted, run now, or wait."""
    return [t for t in trials if t.state.is_finished() and not t.user_attrs.get(INTERRUPTED)]


def ask_again_for_interrupted(study: Study, names: Sequence[str]) -> int:
    """End the trials that a killed process left running, and put their parameters first in the queue.

    To be called while nobody works on the study. A kill in the midst of it does no harm.

    Args:
        study: it. names: the parameters of a whole trial; one that was not yet given all of them is drawn anew.

    Returns:
        How many there were.
    """
    trials = study.get_trials(deepcopy=False)
    repeated = {trial.user_attrs.get(AGAIN_OF) for trial in trials}
    stale = [trial for trial in trials if trial.state == TrialState.RUNNING]
    for trial in stale:
        parameters = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if trial.number not in repeated and set(parameters) == set(names):
            kept = {name: value for name, value in trial.user_attrs.items() if name != OUTCOME}
            study.enqueue_trial(parameters, user_attrs={**kept, AGAIN_OF: trial.number})
        study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
        study.tell(trial.number, state=TrialState.FAIL)
    return len(stale)
