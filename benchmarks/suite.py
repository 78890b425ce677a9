"""The suite against the same runs made one by one with a plain Dataset/DataLoader loop, in one process run.

The plain way trains a model for each predictor, seed and horizon, with windows as dicts of tensors behind a
``DataLoader`` (batched by its default collate function, shuffled), the same recipe, optimizer, loss and
early stopping. Ours trains all horizons of a predictor in one pass on whole tensors, and runs two jobs side by
side. Printed as JSON: seconds of both, their ratio, and the recall that each reaches.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from specmoe.calibration import fit_calibration
from specmoe.dataset import Window, Windows
from specmoe.evaluation import evaluate
from specmoe.predictors.presets import PRESETS
from specmoe.predictors.registry import PREDICTORS
from specmoe.sources.bundled import bundled_model
from specmoe.sources.capture import collect
from specmoe.sources.corpus import standard_library
from specmoe.suite.data import SuiteData
from specmoe.suite.run import jobs_of, run_jobs
from specmoe.training import build_scheduler, loss_of, training_target, validate

# The nine of the original script, which trained them as the plain loop here does.
LEARNED = [name for name in PREDICTORS if name in PRESETS["0.1.0"].recipes]


class WindowDataset(Dataset[dict[str, Tensor]]):
    """One window an item, as a dict of tensors."""

    def __init__(self, windows: Windows) -> None:
        whole = windows.batch(slice(0, len(windows)))
        named = {field.name: getattr(whole, field.name) for field in fields(whole)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        self.items = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(len(windows))]
        self.soft = windows.soft

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


def plain_run(name: str, seed: int, horizon: int, data: SuiteData) -> float:
    """Train one predictor for one horizon the plain way; returns its recall@K on the test part."""
    torch.manual_seed(seed)
    predictor = PREDICTORS[name](data.topology, (horizon,))
    recipe = predictor.recipe
    predictor.prepare(data.knowledge)
    dataset = WindowDataset(data.train)
    loader: DataLoader[dict[str, Tensor]] = DataLoader(dataset, batch_size=recipe.batch_windows, shuffle=True)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    scheduler = build_scheduler(optimizer, recipe, math.ceil(len(dataset) / recipe.batch_windows))
    temperature = data.train.router_temperature(recipe.sharpness)
    best, best_state, best_epoch = math.inf, copy.deepcopy(predictor.state_dict()), 0
    for epoch in range(1, recipe.epochs + 1):
        predictor.train()
        for item in loader:
            window = Window(**item, soft=dataset.soft)
            target, known = training_target(window, predictor.horizons, recipe, temperature)
            loss, _ = loss_of(predictor(window), target, known, temperature)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), recipe.clip)
            optimizer.step()
            if recipe.scheduler == "cosine":
                scheduler.step()
        validation_loss, _ = validate(predictor, data.validation, recipe, temperature, "cpu")
        if recipe.scheduler == "plateau":
            scheduler.step(validation_loss)
        if validation_loss < best:
            best, best_state, best_epoch = validation_loss, copy.deepcopy(predictor.state_dict()), epoch
        if epoch - best_epoch >= recipe.patience:
            break
    predictor.load_state_dict(best_state)
    # Judged as a job of the suite is: every number on the test part and the held-out domain, recall on the others.
    calibration = fit_calibration(predictor, data.validation)
    recalls = {}
    for part, windows in data.evaluated.items():
        only_recall = part in {"train", "validation"}
        residency = data.residency.get(part)
        tally = evaluate(predictor, windows, calibration=calibration, residency=residency, only_recall=only_recall)
        recalls[part] = tally.recall()[0]
    return recalls["test"]


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: 6,000 tokens read by the bundled model")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=LEARNED)
    arguments = parser.parse_args()
    horizons, seeds = (1, 2, 3, 4), tuple(range(arguments.seeds))
    with tempfile.TemporaryDirectory() as folder:
        trace = arguments.trace
        if trace is None:
            trace = collect(
                bundled_model(),
                standard_library("held-out"),
                Path(folder) / "trace",
                max_tokens=arguments.tokens,
                max_tokens_per_document=128,
            )
        data = SuiteData.load(trace, horizons)

        started = time.perf_counter()
        jobs = jobs_of(arguments.only, seeds, data)
        results = run_jobs(jobs, trace, data, Path(folder) / "out", workers=os.cpu_count() or 1)
        ours_seconds = time.perf_counter() - started
        ours = {
            name: [
                sum(results[job].recall["test"][h] for job in jobs if job.predictor == name) / len(seeds)
                for h in horizons
            ]
            for name in arguments.only
        }

        torch.set_num_threads(os.cpu_count() or 1)
        started = time.perf_counter()
        plain = {
            name: [sum(plain_run(name, seed, h, data) for seed in seeds) / len(seeds) for h in horizons]
            for name in arguments.only
        }
        plain_seconds = time.perf_counter() - started
    rounded: dict[str, dict[str, Any]] = {
        name: {"ours": [round(100 * x, 2) for x in ours[name]], "plain": [round(100 * x, 2) for x in plain[name]]}
        for name in arguments.only
    }
    report = {
        "training_tokens": data.train.tokens,
        "runs": len(arguments.only) * len(seeds) * len(horizons),
        "ours_seconds": round(ours_seconds, 1),
        "plain_seconds": round(plain_seconds, 1),
        "ratio": round(plain_seconds / ours_seconds, 2),
        "recall_at_k_test_by_horizon": rounded,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
