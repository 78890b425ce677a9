"""Whose predictions are simulated: predictors of a finished run, or training-free ones prepared on the spot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from specmoe.calibration import Calibration, fit_calibration
from specmoe.dataset import Split, split_documents
from specmoe.ensembling.members import FinishedRun, load_member, members_of, model_path, open_run
from specmoe.errors import SpecmoeError
from specmoe.evaluation import evaluate
from specmoe.files import sha256_file
from specmoe.offload.demand import Demand
from specmoe.offload.prefetchers.predictions import Predictions, demand_table
from specmoe.predictors.base import Predictor
from specmoe.predictors.registry import PREDICTORS, select
from specmoe.suite.data import SuiteData
from specmoe.trace import Trace

__all__ = [
    "DEFAULT_FREE",
    "Candidate",
    "Opened",
    "candidates_of_run",
    "candidates_of_trace",
    "open_data",
    "open_trace",
    "recall_at_need",
]

# Those worth a simulation where nobody asks for certain ones, as far as the trace allows.
DEFAULT_FREE = ("TokenMarkov", "NextRouter", "Ridge", "LayerMarkov", "PreviousToken")
_MOST_LEARNED = 3
_FOREIGN_HORIZONS = (1, 2, 3, 4)
# Foresees no more than which experts a layer uses most.
_CONTROL = "LayerFrequency"
_NONE_LEFT = "all documents are replayed, so none is left to prepare a predictor from (--documents test leaves some)"


@dataclass(frozen=True)
class Candidate:
    """A predictor that can be simulated.

    Attributes:
        name: in the registry. learned: has trained weights. seed: of its training, 0 where nothing is drawn.
        validation: recall@K on the validation part, mean over horizons, 0 to 1.
        seconds: from a router's output to the prediction. timed: where that number is from.
        identity: changes whenever its predictions would.
        load: gives it with its calibration.
    """

    name: str
    learned: bool
    seed: int
    validation: float
    seconds: float
    timed: Literal["measured", "given", "unknown"]
    identity: str
    load: Callable[[], tuple[Predictor, Calibration]]


@dataclass(frozen=True)
class Opened:
    """A trace to replay, and who is asked to foresee what it needs.

    Attributes:
        trace: it. split: by document; None where none was made, and ``unsplit`` says why.
        part: of the documents that is to be replayed, ``test`` or ``all``. horizons: to prefetch for.
        candidates: best by the validation part first; none without a split.
        control: layer frequency, which shuffled predictions must not be above; None without a candidate.
        left_out: usual predictors that are not among the candidates, and why.
    """

    trace: Trace
    split: Split | None
    unsplit: str
    part: str
    horizons: tuple[int, ...]
    candidates: list[Candidate] = field(default_factory=list)
    control: Candidate | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> tuple[Candidate, ...]:
        """All whose predictions are wanted, each once."""
        control = () if self.control is None or self.control in self.candidates else (self.control,)
        return (*self.candidates, *control)


def open_trace(
    trace: Path,
    run: Path | None = None,
    *,
    part: str | None = None,
    horizons: tuple[int, ...] | None = None,
    patterns: Sequence[str] = (),
    seconds: float | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Opened:
    """Open a trace with the predictors of a run, or with training-free ones that are prepared from its training part.

    Caches, policies and oracles need no split. So without a run and without predictors asked for by name, none is made
    where all documents are to be replayed, or where the trace cannot be split; then nobody foresees.

    Args:
        part: ``test``, ``all``, or None for test where the trace can be split, else all.
        horizons, seconds: see :func:`open_data` and :func:`candidates_of_run`. patterns: of predictors' names.

    Raises:
        SpecmoeError: no such part, something that needs a split of a trace that cannot be split, or as
            :func:`open_data`, :func:`candidates_of_run` and :func:`candidates_of_trace`.
    """
    if part not in {None, "test", "all"}:
        raise SpecmoeError(f"--documents {part!r} is not known; use test or all")
    if run is None:
        opened = Trace.open(trace)
        impossible = _impossible_split(opened)
        if impossible and patterns:
            raise SpecmoeError(
                f"{impossible}; a predictor must be prepared and calibrated on documents other than those it is judged "
                "on: leave --predictor out to simulate caches and the oracle on all documents"
            )
        if impossible and part == "test":
            raise SpecmoeError(f"{impossible}, or use --documents all, for caches and the oracle without a predictor")
        if impossible or (part == "all" and not patterns):
            unsplit = impossible or _NONE_LEFT
            on_stage(f"without a predictor: {unsplit}")
            return Opened(
                opened,
                None,
                unsplit,
                "all",
                horizons or _FOREIGN_HORIZONS,
                left_out=dict.fromkeys(DEFAULT_FREE, unsplit),
            )
    data, finished, chosen = open_data(trace, run, horizons)
    if finished is None:
        found = candidates_of_trace(data, patterns, seconds, on_stage)
    else:
        found = candidates_of_run(finished, patterns, seconds)
    here = {each.name for each in found}
    left_out = {
        name: data.lacks(PREDICTORS[name]) or "not in the run, or without weights"
        for name in (() if patterns else DEFAULT_FREE)
        if name not in here
    }
    control = next((each for each in found if each.name == _CONTROL), None)
    if found and control is None:
        control = candidates_of_trace(data, (_CONTROL,), seconds, on_stage)[0]
    return Opened(data.trace, data.split, "", part or "test", chosen, found, control, left_out)


def _impossible_split(trace: Trace) -> str:
    """Why a trace cannot be split by document; empty if it can."""
    try:
        split_documents(trace.documents)
    except SpecmoeError as error:
        return str(error)
    return ""


def open_data(
    trace: Path, run: Path | None, horizons: tuple[int, ...] | None
) -> tuple[SuiteData, FinishedRun | None, tuple[int, ...]]:
    """The trace, cut by the protocol; the finished run, if one is given; and the horizons to prefetch for.

    Args:
        horizons: None for those of the run, or 1 to 4 without one.

    Raises:
        SpecmoeError: another trace than the run's, horizons that the run did not train, too few documents.
    """
    if run is None:
        chosen = horizons or _FOREIGN_HORIZONS
        return SuiteData.load(trace, chosen), None, chosen
    opened = open_run(run, trace)
    foreign = sorted(set(horizons or ()) - set(opened.data.horizons))
    if foreign:
        raise SpecmoeError(
            f"the run foresees horizons {list(opened.data.horizons)}, not {foreign}; choose --horizons among its own"
        )
    return opened.data, opened, horizons or opened.data.horizons


def candidates_of_run(run: FinishedRun, patterns: Sequence[str] = (), seconds: float | None = None) -> list[Candidate]:
    """Predictors of a run whose weights are there, best by the validation part first.

    Args:
        patterns: names or shell-style patterns; none for the best learned ones (at most three) and the usual
            training-free ones. seconds: of a prediction; None for the run's own measurement.

    Raises:
        SpecmoeError: a pattern matches nothing, or none of those asked for has weights in the run.
    """
    members, left_out = members_of(run)
    asked = set(select(patterns)) if patterns else None
    if asked is not None:
        chosen = [member for member in members if member.name in asked]
        if not chosen:
            why = "; ".join(f"{name}: {left_out.get(name, 'not in the run')}" for name in sorted(asked))
            raise SpecmoeError(f"no predictor asked for can be loaded from {run.folder} ({why})")
    else:
        learned = [member for member in members if member.learned][:_MOST_LEARNED]
        chosen = [member for member in members if member in learned or member.name in DEFAULT_FREE]
    latency = {p.name: p.latency for p in run.results.predictors}
    found = []
    for member in chosen:
        job, timed = member.job(member.seeds[0]), latency[member.name]
        lasting, source = _seconds(seconds, None if timed is None else timed.p50_us * 1e-6)
        found.append(
            Candidate(
                name=member.name,
                learned=member.learned,
                seed=job.seed,
                validation=member.validation,
                seconds=lasting,
                timed=source,
                identity=sha256_file(model_path(run, job)),
                load=lambda job=job: load_member(run, job),
            )
        )
    return found


def candidates_of_trace(
    data: SuiteData,
    patterns: Sequence[str] = (),
    seconds: float | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> list[Candidate]:
    """Training-free predictors, prepared from the training part and calibrated on the validation part; best first.

    Raises:
        SpecmoeError: a pattern matches nothing, or only what has to be trained, or what this trace has no fields for.
    """
    names = select(patterns) if patterns else list(DEFAULT_FREE)
    free = [name for name in names if PREDICTORS[name].recipe.epochs == 0]
    if patterns and not free:
        raise SpecmoeError(f"{', '.join(names)} must be trained; give the folder of `specmoe train` with --run")
    usable = [name for name in free if not data.lacks(PREDICTORS[name])]
    if patterns and not usable:
        raise SpecmoeError("; ".join(f"{name}: {data.lacks(PREDICTORS[name])}" for name in free))
    found = []
    for name in usable:
        on_stage(f"preparing {name}")
        predictor = PREDICTORS[name](data.topology, data.horizons)
        predictor.prepare(data.knowledge)
        recall_H = np.array(evaluate(predictor, data.validation, only_recall=True).recall())
        lasting, source = _seconds(seconds, None)
        found.append(
            Candidate(
                name=name,
                learned=False,
                seed=0,
                validation=float(np.nanmean(recall_H)) if np.isfinite(recall_H).any() else 0.0,
                seconds=lasting,
                timed=source,
                identity=hashlib.sha256(repr((name, data.fingerprint)).encode()).hexdigest(),
                load=lambda predictor=predictor: (predictor, fit_calibration(predictor, data.validation)),
            )
        )
    return sorted(found, key=lambda candidate: -candidate.validation)


def recall_at_need(predictions: Predictions, demand: Demand) -> dict[int, float]:
    """By horizon: of the experts that an event needs, the share among as many that were put first; 0 to 1.

    With one token a step that is recall@K.
    """
    table_VE, sizes_V = demand_table(demand), np.diff(demand.starts_V)
    found = {}
    for row, horizon in enumerate(predictions.horizons):
        if horizon >= demand.events:
            continue
        listed_VB = predictions.experts_VHB[:-horizon, row].astype(np.int64)
        first_VB = (np.arange(listed_VB.shape[1]) < sizes_V[horizon:, None]) & (listed_VB >= 0)
        hits_VB = np.take_along_axis(table_VE[horizon:], listed_VB.clip(0), 1) & first_VB
        found[horizon] = float(hits_VB.sum() / max(1, sizes_V[horizon:].sum()))
    return found


def _seconds(given: float | None, measured: float | None) -> tuple[float, Literal["measured", "given", "unknown"]]:
    if given is not None:
        return given, "given"
    return (measured, "measured") if measured is not None else (0.0, "unknown")
