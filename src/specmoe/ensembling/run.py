"""The whole of ``specmoe ensemble``: blend, select, teach, judge on the test part."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from specmoe.calibration import Calibration, fit_calibration
from specmoe.ensembling.blend import UNREADABLE, Blend, SavedBlend, Seat, load_blend, save_blend
from specmoe.ensembling.judging import Judged, assemble
from specmoe.ensembling.members import (
    FinishedRun,
    Member,
    choose_members,
    load_member,
    model_path,
    open_run,
    seeds_of,
)
from specmoe.ensembling.outcome import Check, EnsembleResult, Key, save_ensemble
from specmoe.ensembling.student import Trained, choose_student, read_tally, save_tally, taught, untaught
from specmoe.ensembling.weights import Opinions, fit_weights, gather, log_loss, recall_of, select_greedily
from specmoe.errors import SpecmoeError
from specmoe.evaluation import Tally, evaluate
from specmoe.files import disk_errors, sha256_file
from specmoe.locks import writes
from specmoe.predictors.base import Predictor
from specmoe.results import METRIC_VERSION
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import Job, load_predictor, load_tally
from specmoe.threads import one_thread
from specmoe.training import EpochReport

__all__ = ["ensemble"]

# Raised whenever blends of the same members would come out otherwise.
_VERSION = 1


@dataclass(frozen=True)
class Mixed:
    """What was made of the members of one seed."""

    blend: SavedBlend
    greedy: SavedBlend
    check: Check


@writes("ensemble")
@one_thread()
def ensemble(
    run: Path,
    out: Path,
    *,
    trace: Path | None = None,
    members: Sequence[str] | None = None,
    top: int = 5,
    picks: int = 12,
    student: str | None = None,
    seeds: int | None = None,
    device: str = "cpu",
    on_stage: Callable[[str], None] = lambda _: None,
    on_epoch: Callable[[str, EpochReport, int], None] = lambda *_: None,
) -> EnsembleResult:
    """Blend a run's strongest predictors, select among them, teach a student, and write ``out/ensemble.json``.

    Weights are learned on the validation part, everything is judged on the test part. Killed and started again, it
    continues: blends and students that are done are kept, a student's training goes on from its last epoch.

    Args:
        run: folder of a finished ``specmoe train``. trace: its trace; None to look for it.
        members: names; None for the ``top`` strongest on the validation part.
        picks: of the greedy selection, at most. student: a predictor of the registry; None for the default.
        seeds: runs at most; None for all that the members have in common.
        on_epoch: told of a student's title, its epoch and its number of epochs.

    Raises:
        SpecmoeError: a folder without models, another trace, fewer than two members, a damaged file, a full disk.
    """
    started = time.monotonic()
    on_stage("reading the run and its trace")
    opened = open_run(run, trace)
    data = opened.data
    chosen, left_out = choose_members(opened, members, top)
    pupil = choose_student(data, student)
    used = seeds_of(chosen)[:seeds]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    judged: dict[Key, Judged] = {}
    checks: list[Check] = []
    weights: list[Tensor] = []
    for seed in used:
        of_seed = f" (seed {seed})" if len(used) > 1 else ""
        mixed = _mix(opened, chosen, seed, picks, out, device, lambda text, end=of_seed: on_stage(text + end))
        checks.append(mixed.check)
        weights.append(_weights(mixed.blend, chosen))
        _add_best(judged, opened, chosen[0].job(seed))
        made: tuple[tuple[Key, str, SavedBlend], ...] = (
            ("blend", "blend", mixed.blend),
            ("greedy", "greedy selection", mixed.greedy),
        )
        for key, title, saved in made:
            path = _blend_path(out, key, seed)
            on_stage(f"judging the {title} on the test part{of_seed}")
            tally = _judge(saved, path, data, device)
            names = tuple(seat.predictor for seat in saved.seats)
            judged.setdefault(key, Judged(title, names, saved.blend)).add(tally, path.name)
        _add_students(judged, opened, pupil, seed, mixed.blend, out, device, on_stage, on_epoch)
    on_stage("drawing intervals and timing predictions")
    result = assemble(opened, chosen, left_out, checks, weights, judged, used, pupil)
    seconds = round(time.monotonic() - started, 1)
    result = result.model_copy(update={"made": result.made.model_copy(update={"seconds": seconds})})
    save_ensemble(result, out / "ensemble.json")
    return result


def _mix(
    run: FinishedRun,
    chosen: Sequence[Member],
    seed: int,
    picks: int,
    out: Path,
    device: str,
    on_stage: Callable[[str], None],
) -> Mixed:
    """Both blends of one seed, made or read if they were made before from the same weights."""
    jobs = [member.job(seed) for member in chosen]
    files = [(job.predictor, job.seed, _sha256(model_path(run, job))) for job in jobs]
    parts = (_VERSION, run.data.fingerprint, METRIC_VERSION, files, picks)
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    kept = [_kept_blend(_blend_path(out, key, seed), fingerprint) for key in ("blend", "greedy")]
    if kept[0] is not None and kept[1] is not None:
        return Mixed(kept[0], kept[1], Check.model_validate(kept[0].facts["check"]))
    on_stage(f"asking {len(jobs)} members about the validation part")
    loaded = [load_member(run, job) for job in jobs]
    for predictor, _ in loaded:
        predictor.to(device)
    opinions = gather(loaded, run.data.validation, device=device)
    on_stage("learning the weights")
    weight_MH, picked_MH, check = _learn(opinions, picks, seed, [job.predictor for job in jobs])
    facts = {"fingerprint": fingerprint, "check": check.model_dump(mode="json")}

    def save(key: str, weights_MH: Tensor) -> SavedBlend:
        return _save(loaded, jobs, weights_MH, run.data, _blend_path(out, key, seed), device, facts)

    return Mixed(save("blend", weight_MH), save("greedy", picked_MH), check)


def _learn(opinions: Opinions, picks: int, seed: int, names: Sequence[str]) -> tuple[Tensor, Tensor, Check]:
    """Weights of blend and greedy selection [M, H], checked on one half of the documents and refitted on all."""
    count, events, horizons, _ = opinions.logits_MNHE.shape
    facts: dict[str, Any] = {"seed": seed, "documents": 0, "events": events, "share": opinions.share}
    halves = opinions.halves()
    length = picks
    if halves is not None:
        fitted, held = halves
        weight_MH, selection = fit_weights(fitted), select_greedily(fitted, picks, held)
        length = len(selection.picks)
        alone_MH = torch.zeros(count, horizons)
        alone_MH[select_greedily(fitted, 1).picks[0].member] = 1.0
        facts |= {
            "documents": held.documents,
            "single": recall_of(held, alone_MH),
            "blend": recall_of(held, weight_MH),
            "greedy": recall_of(held, selection.weights(count, horizons)),
            "single_loss": _finite_mean(log_loss(held, alone_MH)),
            "blend_loss": _finite_mean(log_loss(held, weight_MH)),
        }
    selection = select_greedily(opinions, length)
    facts["picks"] = tuple(names[pick.member] for pick in selection.picks)
    return fit_weights(opinions), selection.weights(count, horizons), Check(**facts)


def _save(
    loaded: Sequence[tuple[Predictor, Calibration]],
    jobs: Sequence[Job],
    weight_MH: Tensor,
    data: SuiteData,
    path: Path,
    device: str,
    facts: dict[str, Any],
) -> SavedBlend:
    """Build a blend of those members that have a weight, calibrate it, and keep it."""
    kept = [index for index in range(len(jobs)) if bool((weight_MH[index] > 0).any())]
    seats = [Seat(jobs[i].predictor, jobs[i].seed, tuple(weight_MH[i].tolist())) for i in kept]
    # In the mean the members' factors are of no account: the calibration below finds the right ones for the sum.
    factors = torch.stack([weight_MH[i] * loaded[i][1].scale_SH for i in kept])
    blend = Blend([loaded[i][0] for i in kept], factors).to(device)
    calibration = fit_calibration(blend, data.validation, device)
    save_blend(blend, seats, calibration, path, facts)
    return SavedBlend(blend.eval(), tuple(seats), calibration, facts)


def _kept_blend(path: Path, fingerprint: str) -> SavedBlend | None:
    if not path.exists():
        return None
    try:
        saved = load_blend(path)
    except SpecmoeError:
        return None
    return saved if saved.facts.get("fingerprint") == fingerprint else None


def _judge(saved: SavedBlend, path: Path, data: SuiteData, device: str) -> Tally:
    """Its sums over the test part, kept beside the blend."""
    kept, fingerprint = path.with_name(f"{path.stem}-tally.safetensors"), saved.facts["fingerprint"]
    try:
        with safe_open(str(kept), framework="pt") as file:
            same = (file.metadata() or {}).get("fingerprint") == fingerprint
        if same:
            tensors = load_file(str(kept))
            return Tally.of({name.removeprefix("test "): tensor for name, tensor in tensors.items()})
    except UNREADABLE:
        pass
    tally = evaluate(saved.blend.to(device), data.evaluated["test"], device, only_recall=True)
    save_tally(tally, kept, fingerprint)
    return tally


def _add_best(judged: dict[Key, Judged], run: FinishedRun, job: Job) -> None:
    """Add the strongest single member as the run left it; one that is not trained ran once, whatever the seed."""
    path = model_path(run, job)
    if "best" in judged and str(path) in judged["best"].files:
        return
    tally = read_tally(lambda: load_tally(job, run.folder, "test"), path.with_name("tally.safetensors"))
    entry = judged.setdefault("best", Judged(job.predictor, (job.predictor,), load_member(run, job)[0]))
    entry.add(tally, str(path))


def _add_students(
    judged: dict[Key, Judged],
    run: FinishedRun,
    pupil: str,
    seed: int,
    teacher: SavedBlend,
    out: Path,
    device: str,
    on_stage: Callable[[str], None],
    on_epoch: Callable[[str, EpochReport, int], None],
) -> None:
    job, epochs = Job(pupil, seed), run.data.kind(pupil).recipe.epochs

    def add(key: Key, title: str, done: Trained) -> None:
        predictor = load_predictor(job, done.folder.parent.parent, run.data)
        path = done.folder / "model.safetensors"
        entry = judged.setdefault(key, Judged(title, (pupil,), predictor))
        entry.add(done.tally, str(path.relative_to(out) if path.is_relative_to(out) else path))

    alone, with_teacher = f"{pupil} without teacher", f"{pupil} taught by the blend"
    on_stage(f"{alone}, seed {seed}")
    add("student", alone, untaught(run, job, out, device, lambda report: on_epoch(alone, report, epochs)))
    on_stage(f"{with_teacher}, seed {seed}")
    add(
        "taught",
        with_teacher,
        taught(run, job, out, teacher, device, lambda report: on_epoch(with_teacher, report, epochs)),
    )


def _weights(saved: SavedBlend, chosen: Sequence[Member]) -> Tensor:
    """Each member's share of a blend's weights at each horizon, [M, H]."""
    of = {seat.predictor: torch.tensor(seat.weight_H) for seat in saved.seats}
    nothing = torch.zeros(len(saved.blend.horizons))
    weight_MH = torch.stack([of.get(member.name, nothing) for member in chosen])
    return weight_MH / weight_MH.sum(0).clamp_min(1e-9)


def _blend_path(out: Path, key: str, seed: int) -> Path:
    return out / f"{key}-seed{seed}.safetensors"


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise SpecmoeError(f"{path} cannot be read ({error}); run `specmoe train` again") from error


def _finite_mean(values_H: Tensor) -> float | None:
    finite = values_H[values_H.isfinite()]
    mean = float(finite.mean()) if len(finite) else math.nan
    return mean if math.isfinite(mean) else None
