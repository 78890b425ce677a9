"""One job of a suite: train a predictor with one seed, judge it, leave the result in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specmoe.calibration import Calibration, fit_calibration
from specmoe.checkpoint import load_checkpoint, save_tensors
from specmoe.errors import SpecmoeError
from specmoe.evaluation import Tally, evaluate
from specmoe.files import atomic_path, read_json, sha256_file, write_json
from specmoe.metrics import budgets_of
from specmoe.predictors.base import Predictor, parameter_count
from specmoe.predictors.recipes import CHANGEABLE, kind_of, values_of
from specmoe.results import METRIC_VERSION, Epoch, SeedResult
from specmoe.suite.data import REPORTED, SuiteData
from specmoe.threads import one_thread
from specmoe.training import EpochReport, TrainingFailed, fit

__all__ = [
    "MODEL",
    "TALLY",
    "Job",
    "finished",
    "job_fingerprint",
    "load_calibration",
    "load_predictor",
    "load_tally",
    "publish",
    "retract",
    "run_job",
    "vouched",
]

MODEL, TALLY = "model.safetensors", "tally.safetensors"
_VOUCHER = "job.json"


@dataclass(frozen=True)
class Job:
    """A predictor of the registry and a seed."""

    predictor: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where its files lie."""
        return out / "jobs" / f"{self.predictor}-seed{self.seed}"


def job_fingerprint(job: Job, data: SuiteData) -> str:
    """Hash of everything a job's result depends on, its recipe among it."""
    recipe = sorted(values_of(data.kind(job.predictor).recipe).items())
    parts = (job.predictor, job.seed, recipe, data.fingerprint, METRIC_VERSION)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def finished(job: Job, out: Path, fingerprint: str) -> SeedResult | None:
    """The result of a job that was done before under the same conditions, else None.

    A job whose files are missing, damaged or another's is one that is not done.
    """
    content = vouched(job.folder(out))
    if content is None or content.get("fingerprint") != fingerprint:
        return None
    try:
        result = SeedResult.model_validate(content["result"])
    except (ValueError, KeyError):
        return None
    return result if result.status != "ok" or {MODEL, TALLY} <= content["files"].keys() else None


def vouched(folder: Path) -> dict[str, Any] | None:
    """What ``job.json`` says of a job's folder, if the files there are those that it was written for; else None."""
    try:
        content = read_json(folder / _VOUCHER)
        files = content["files"]
        same = all(sha256_file(folder / name) == checksum for name, checksum in files.items())
    except (SpecmoeError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if same else None


def publish(folder: Path, content: dict[str, Any]) -> None:
    """Say that a job is done: the last thing it writes, with the checksums of what lies there.

    Raises:
        SpecmoeError: the disk is full.
    """
    files = {name: sha256_file(folder / name) for name in (MODEL, TALLY) if (folder / name).exists()}
    write_json(folder / _VOUCHER, {**content, "files": files})


def retract(folder: Path) -> None:
    """Withdraw what was said of a job's files, before the first of them is replaced."""
    for name in (_VOUCHER, MODEL, TALLY):
        (folder / name).unlink(missing_ok=True)


@one_thread()
def run_job(
    job: Job,
    data: SuiteData,
    out: Path,
    *,
    device: str = "cpu",
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
) -> SeedResult:
    """Train and judge. A job that was interrupted goes on from its last epoch.

    Returns:
        Its result; ``status`` is ``failed`` if the loss diverged.

    Raises:
        SpecmoeError: the disk is full, or the trace is damaged.
    """
    folder, fingerprint = job.folder(out), job_fingerprint(job, data)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"checkpoint-{fingerprint}.safetensors"
    for stale in folder.glob("checkpoint-*.safetensors"):
        if stale != checkpoint or not _is_readable(stale):
            stale.unlink()
    torch.manual_seed(job.seed)
    predictor = data.kind(job.predictor)(data.topology, data.horizons)
    try:
        fitted = fit(
            predictor,
            data.training(type(predictor)),
            data.validation,
            data.knowledge,
            seed=job.seed,
            device=device,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
    except TrainingFailed as error:
        result = SeedResult(seed=job.seed, status="failed", reason=str(error))
        retract(folder)
        publish(folder, {"fingerprint": fingerprint, "result": result.model_dump(mode="json")})
        checkpoint.unlink(missing_ok=True)
        return result

    calibration = fit_calibration(predictor, data.validation, device)
    tallies = {
        part: evaluate(
            predictor,
            windows,
            device,
            calibration=calibration,
            residency=data.residency.get(part),
            only_recall=part not in REPORTED,
        )
        for part, windows in data.evaluated.items()
    }
    recall = {
        part: {
            h: round(recall, 6)
            for h, recall in zip(data.horizons, tally.recall(), strict=True)
            if math.isfinite(recall)
        }
        for part, tally in tallies.items()
    }
    kept = {
        f"{part} {name}": tensor
        for part in REPORTED
        if part in tallies
        for name, tensor in tallies[part].tensors().items()
    }
    kept["journey"] = foreseen(predictor, data, device)
    retract(folder)
    save_predictor(predictor, folder / MODEL, calibration)
    with atomic_path(folder / TALLY) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, str(temporary))
    result = SeedResult(
        seed=job.seed,
        best_epoch=fitted.best_epoch,
        stopped=fitted.stopped,
        train_seconds=round(fitted.seconds, 3),
        curve=tuple(Epoch(**vars(point)) for point in fitted.curve),
        recall=recall,
    )
    publish(folder, {"fingerprint": fingerprint, "result": result.model_dump(mode="json")})
    checkpoint.unlink(missing_ok=True)
    return result


@torch.no_grad()
def foreseen(predictor: Predictor, data: SuiteData, device: str) -> Tensor:
    """The K experts put first at each event of the journey's window: [T, S, H, K] int16."""
    _, window = data.journey
    logits = predictor(window.to(device))[0]
    return logits.topk(budgets_of(data.topology.top_k, data.topology.experts)["K"], -1).indices.short().cpu()


def save_predictor(predictor: Predictor, path: Path, calibration: Calibration) -> None:
    """Write a predictor's weights with what is needed to build it again and to read its logits."""
    facts = {
        "predictor": type(predictor).__name__,
        "topology": predictor.topology.model_dump_json(),
        "horizons": json.dumps(predictor.horizons),
        "parameters": str(parameter_count(predictor)),
        "calibration": calibration.to_json(),
    }
    if predictor.recipe.epochs > 0:
        facts["recipe"] = json.dumps(values_of(predictor.recipe))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in predictor.state_dict().items()}
    save_tensors(tensors, path, facts)


def load_predictor(job: Job, out: Path, data: SuiteData) -> Predictor:
    """The trained predictor of a finished job, built by the recipe that lies with its weights."""
    path = job.folder(out) / MODEL
    with safe_open(str(path), framework="pt") as file:
        recipe = json.loads((file.metadata() or {}).get("recipe", "{}"))
    # A field that later versions no longer know cannot have shaped the module that this version builds.
    recipe = {name: value for name, value in recipe.items() if name in CHANGEABLE}
    predictor = kind_of(job.predictor, {job.predictor: recipe})(data.topology, data.horizons)
    predictor.load_state_dict(load_file(str(path)))
    return predictor.eval()


def load_calibration(path: Path) -> Calibration:
    """How to read the logits of a predictor saved by :func:`save_predictor`.

    Raises:
        SpecmoeError: the file holds none.
    """
    with safe_open(str(path), framework="pt") as file:
        return Calibration.from_json((file.metadata() or {}).get("calibration", ""))


def load_tally(job: Job, out: Path, part: str) -> Tally | None:
    """A finished job's sums over one part, None if the part is empty."""
    tensors = load_file(str(job.folder(out) / TALLY))
    of_part = {name.removeprefix(f"{part} "): tensor for name, tensor in tensors.items() if name.startswith(f"{part} ")}
    return Tally.of(of_part) if of_part else None


def load_foreseen(job: Job, out: Path) -> Tensor:
    """What :func:`foreseen` gave when the job was run."""
    return load_file(str(job.folder(out) / TALLY))["journey"]


def _is_readable(checkpoint: Path) -> bool:
    try:
        state: Any = load_checkpoint(checkpoint)
    except SpecmoeError:
        return False
    return isinstance(state, dict)
