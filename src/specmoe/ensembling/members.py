"""Whom to blend: a finished run, the best of its predictors by the validation part, and their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from specmoe.calibration import Calibration
from specmoe.ensembling.blend import UNREADABLE
from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import regular_file
from specmoe.predictors.base import Predictor
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import PredictorResult, Results
from specmoe.suite.data import SuiteData, trace_fingerprint
from specmoe.suite.jobs import MODEL, Job, load_calibration, load_predictor, vouched
from specmoe.trace import Trace

__all__ = ["FinishedRun", "Member", "choose_members", "load_member", "members_of", "open_run", "seeds_of"]


@dataclass(frozen=True)
class FinishedRun:
    """What ``specmoe train`` left. folder: of the run. trace: directory of its trace. data: that trace, cut as then."""

    folder: Path
    trace: Path
    results: Results
    data: SuiteData


@dataclass(frozen=True)
class Member:
    """A predictor of a run that can be blended.

    Attributes:
        seeds: those that finished and whose weights are there. learned: whether seeds differ at all.
        validation: recall@K on the validation part, 0 to 1, mean over horizons and seeds.
    """

    name: str
    seeds: tuple[int, ...]
    learned: bool
    validation: float

    def job(self, seed: int) -> Job:
        """The run of it that goes with a seed; what is not trained ran once."""
        return Job(self.name, seed if self.learned else self.seeds[0])


def open_run(folder: Path, trace: Path | None = None) -> FinishedRun:
    """Read a run's results and the trace they were made from.

    Args:
        trace: its directory; None to look for one of its name inside the run's folder and beside it.

    Raises:
        SpecmoeError: no results or no models there, no trace found, or another trace than the run's.
    """
    results = Results.load(folder / "results.json")
    if not list(folder.glob(f"jobs/*/{MODEL}")):
        raise SpecmoeError(
            f"{folder} holds results but no trained models (jobs/*/{MODEL}); run `specmoe train` with --out {folder}"
        )
    facts = results.trace
    if trace is None:
        places = [folder / facts.name, folder.resolve().parent / facts.name]
        trace = next((place for place in places if (place / "manifest.json").exists()), None)
        if trace is None:
            raise SpecmoeError(f"the run's trace {facts.name!r} is not in or beside {folder}; say where with --trace")
    found = trace_fingerprint(Trace.open(trace))
    if found != facts.fingerprint:
        raise SpecmoeError(
            f"{trace} is not the trace of this run: its fingerprint is {found}, the run's is {facts.fingerprint}; "
            "give the right one with --trace"
        )
    recipes = {p.name: p.recipe for p in results.predictors if p.recipe and p.name in PREDICTORS}
    data = SuiteData.load(
        trace, results.protocol.horizons, recipes=recipes, cache_experts=results.protocol.cache_experts
    )
    if data.split.hash != results.split.hash:
        raise SpecmoeError(
            f"{folder} was made under split {results.split.hash}, this specmoe has {data.split.hash}; "
            "run `specmoe train` again"
        )
    return FinishedRun(folder, trace, results, data)


def choose_members(
    run: FinishedRun, names: Sequence[str] | None = None, top: int = 5
) -> tuple[list[Member], dict[str, str]]:
    """The members, best by the validation part first, and of those that cannot be one: name → why.

    Args:
        names: exactly these; None for the ``top`` best, trained or not.

    Raises:
        SpecmoeError: a name that the run does not have or that has no weights, or fewer than two members.
    """
    members, left_out = members_of(run, names)
    if not names:
        members = members[:top]
    if len(members) < 2:
        why = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise SpecmoeError(
            f"an ensemble needs at least two members, this run offers {len(members)}{why}; train more predictors"
            if not names
            else f"an ensemble needs at least two members, got {', '.join(dict.fromkeys(names))}"
        )
    return members, left_out


def members_of(run: FinishedRun, names: Sequence[str] | None = None) -> tuple[list[Member], dict[str, str]]:
    """Predictors of a run whose weights are there, best by the validation part first, and of the others: name → why.

    Args:
        names: exactly these; None for all.

    Raises:
        SpecmoeError: a name that the run does not have or that has no weights.
    """
    by_name = {p.name: p for p in run.results.predictors}
    left_out: dict[str, str] = {}
    members = []
    wanted = list(dict.fromkeys(names or by_name))
    for name in wanted:
        if name not in by_name:
            raise unknown_name("predictor of this run", name, by_name)
        seeds = _seeds_with_weights(run.folder, by_name[name])
        if by_name[name].status == "ok" and seeds and name in PREDICTORS:
            members.append(_member(by_name[name], seeds))
            continue
        file = Job(name, by_name[name].seeds[0].seed).folder(run.folder) / MODEL if by_name[name].seeds else run.folder
        gone = f"{file} no longer holds the weights that were judged; run `specmoe train` again"
        left_out[name] = by_name[name].reason or gone
        if names:
            raise SpecmoeError(f"{name} cannot be a member: {left_out[name]}")
    members.sort(key=lambda member: -member.validation)
    return members, left_out


def seeds_of(members: Sequence[Member]) -> tuple[int, ...]:
    """The seeds that all trained members have.

    Raises:
        SpecmoeError: there is none.
    """
    trained = [set(member.seeds) for member in members if member.learned]
    if not trained:
        return (members[0].seeds[0],)
    common = set.intersection(*trained)
    if not common:
        raise SpecmoeError("the members have no seed in common; run `specmoe train` again with all of them")
    return tuple(sorted(common))


def model_path(run: FinishedRun, job: Job) -> Path:
    """Where the weights of a run's job lie."""
    return job.folder(run.folder) / MODEL


def load_member(run: FinishedRun, job: Job) -> tuple[Predictor, Calibration]:
    """A member's weights and how to read its logits.

    Raises:
        SpecmoeError: the file is damaged or was made for other horizons or another model.
    """
    path = regular_file(model_path(run, job))
    again = f"delete {path.parent} and run `specmoe train` again"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        horizons = tuple(json.loads(metadata.get("horizons", "[]")))
        if horizons != run.data.horizons:
            raise SpecmoeError(f"{path} foresees horizons {list(horizons)}, not {list(run.data.horizons)}; {again}")
        return load_predictor(job, run.folder, run.data), load_calibration(path)
    except UNREADABLE as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecmoeError(f"{path} cannot be read ({line}); {again}") from error


def _member(predictor: PredictorResult, seeds: tuple[int, ...]) -> Member:
    recalls = [
        recall
        for seed in predictor.seeds
        if seed.seed in seeds
        for recall in seed.recall.get("validation", {}).values()
    ]
    mean = sum(recalls) / len(recalls) if recalls else 0.0
    return Member(predictor.name, seeds, predictor.learned, mean)


def _seeds_with_weights(folder: Path, predictor: PredictorResult) -> tuple[int, ...]:
    """Seeds whose files are those that the results are about: not damaged, not replaced by another training's."""
    return tuple(
        seed.seed
        for seed in predictor.seeds
        if seed.status == "ok"
        and (kept := vouched(Job(predictor.name, seed.seed).folder(folder))) is not None
        and MODEL in kept["files"]
        and kept.get("result", {}).get("recall") == seed.model_dump(mode="json")["recall"]
    )
