"""A small student of the blend, and the same one without a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from specmoe.calibration import fit_calibration
from specmoe.checkpoint import load_checkpoint
from specmoe.dataset import Window
from specmoe.ensembling.blend import SavedBlend
from specmoe.ensembling.members import FinishedRun
from specmoe.errors import SpecmoeError, unknown_name
from specmoe.evaluation import Tally, evaluate
from specmoe.files import atomic_path
from specmoe.predictors.recipes import values_of
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import METRIC_VERSION
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import (
    MODEL,
    TALLY,
    Job,
    finished,
    job_fingerprint,
    load_tally,
    publish,
    retract,
    run_job,
    save_predictor,
    vouched,
)
from specmoe.threads import one_thread
from specmoe.training import TEACHER_SHARE, EpochReport, fit

__all__ = ["choose_student", "taught", "teacher_of", "untaught"]

# Where the trace has router inputs and routers, and where it has ids only.
_STUDENTS = ("RouterResidualPredictor", "RouteHistoryPredictor")


def choose_student(data: SuiteData, name: str | None) -> str:
    """The student's name; None for the registry's strongest small one that this trace has the inputs for.

    Raises:
        SpecmoeError: unknown, not trained, or it lacks something on this trace.
    """
    if name is None:
        name = next(each for each in _STUDENTS if not data.lacks(PREDICTORS[each]) or each == _STUDENTS[-1])
    if name not in PREDICTORS:
        raise unknown_name("predictor", name, PREDICTORS)
    kind = data.kind(name)
    if kind.recipe.epochs == 0:
        learned = ", ".join(each for each, of in PREDICTORS.items() if of.recipe.epochs > 0)
        raise SpecmoeError(f"{name} is not trained, so it can learn nothing from a teacher; these can: {learned}")
    if reason := data.lacks(kind):
        raise SpecmoeError(f"{name} cannot be the student: {reason}")
    return name


def teacher_of(saved: SavedBlend) -> Callable[[Window], Tensor]:
    """The blend as a target: how probable each expert is at each event, as a distribution [B, T, S, H, E].

    Inclusion probabilities divided by their sum: what the trace's hard target would be on average, if the blend were
    right.
    """

    @torch.no_grad()
    def teach(window: Window) -> Tensor:
        probability = saved.calibration.apply(saved.blend(window)).clamp_min(1e-9)
        return probability / probability.sum(-1, keepdim=True)

    return teach


@dataclass(frozen=True)
class Trained:
    """A student that came to its end. folder: of its files. tally: its sums over the test part."""

    folder: Path
    tally: Tally
    job: Job


def untaught(
    run: FinishedRun, job: Job, out: Path, device: str, on_epoch: Callable[[EpochReport], None] = lambda _: None
) -> Trained:
    """The student as ``specmoe train`` makes it: the run's own where it has it, else trained now.

    Raises:
        SpecmoeError: its training failed, or the disk is full.
    """
    fingerprint = job_fingerprint(job, run.data)
    for root in (run.folder, out):
        done = finished(job, root, fingerprint)
        if done is not None and done.status == "ok":
            break
    else:
        root, done = out, run_job(job, run.data, out, device=device, on_epoch=on_epoch)
    if done.status != "ok":
        raise SpecmoeError(f"the student's training without teacher failed: {done.reason}")
    return Trained(job.folder(root), _tally(job, root), job)


@one_thread()
def taught(
    run: FinishedRun,
    job: Job,
    out: Path,
    teacher: SavedBlend,
    device: str,
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
) -> Trained:
    """The same student, same seed and epochs, with the blend's targets mixed in; interrupted, it goes on.

    Raises:
        SpecmoeError: its training failed, or the disk is full.
    """
    data, root = run.data, out / "taught"
    folder = job.folder(root)
    parts = (job_fingerprint(job, data), teacher.facts["fingerprint"], TEACHER_SHARE, METRIC_VERSION)
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    if (kept := vouched(folder)) is not None and kept.get("fingerprint") == fingerprint and TALLY in kept["files"]:
        return Trained(folder, _tally(job, root), job)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"checkpoint-{fingerprint}.safetensors"
    for stale in folder.glob("checkpoint-*.safetensors"):
        if stale != checkpoint or not _is_readable(stale):
            stale.unlink()
    torch.manual_seed(job.seed)
    predictor = data.kind(job.predictor)(data.topology, data.horizons)
    teacher.blend.to(device)
    fit(
        predictor,
        data.training(type(predictor)),
        data.validation,
        data.knowledge,
        seed=job.seed,
        device=device,
        checkpoint=checkpoint,
        teacher=teacher_of(teacher),
        on_epoch=on_epoch,
    )
    calibration = fit_calibration(predictor, data.validation, device)
    tally = evaluate(predictor, data.evaluated["test"], device, only_recall=True)
    retract(folder)
    save_predictor(predictor, folder / MODEL, calibration)
    save_tally(tally, folder / TALLY)
    publish(folder, {"fingerprint": fingerprint, "recipe": values_of(predictor.recipe)})
    checkpoint.unlink(missing_ok=True)
    return Trained(folder, tally, job)


def save_tally(tally: Tally, path: Path, fingerprint: str = "") -> None:
    """Keep the sums over the test part, as a job of a suite does."""
    tensors = {f"test {name}": tensor.contiguous() for name, tensor in tally.tensors().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"fingerprint": fingerprint})


def _tally(job: Job, root: Path) -> Tally:
    path = job.folder(root) / TALLY
    return read_tally(lambda: load_tally(job, root, "test"), path)


def read_tally(read: Callable[[], Tally | None], path: Path) -> Tally:
    """What ``read`` gives.

    Raises:
        SpecmoeError: the file is damaged or holds nothing of the test part.
    """
    try:
        tally = read()
    except Exception as error:  # safetensors has its own exceptions, and a damaged header ends in any of them.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecmoeError(f"{path} cannot be read ({line}); delete {path.parent} and make it again") from error
    if tally is None:
        raise SpecmoeError(f"{path} holds nothing of the test part; delete {path.parent} and make it again")
    return tally


def _is_readable(checkpoint: Path) -> bool:
    try:
        return isinstance(load_checkpoint(checkpoint), dict)
    except SpecmoeError:
        return False
