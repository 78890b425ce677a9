"""How much of a training step of the smallest predictor goes into making its batch.

Alternates the two measurements (batch only; the whole step) and prints the median share with its spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from specmoe.predictors.registry import PREDICTORS
from specmoe.sources.bundled import bundled_model
from specmoe.sources.capture import collect
from specmoe.sources.corpus import standard_library
from specmoe.suite.data import SuiteData
from specmoe.training import loss_of, training_target


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: 12,000 tokens read by the bundled model")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trace = arguments.trace or collect(
            bundled_model(), standard_library("held-out"), Path(folder) / "trace", max_tokens=12_000
        )
        data = SuiteData.load(trace, (1, 2, 3, 4))
        predictor = PREDICTORS["TinySpeculationModel"](data.topology, data.horizons)
        recipe = predictor.recipe
        predictor.prepare(data.knowledge)
        optimizer = torch.optim.AdamW(predictor.parameters(), lr=recipe.learning_rate, fused=True)
        temperature = data.train.router_temperature(recipe.sharpness)
        shares, steps = [], []
        for round_number in range(arguments.rounds):
            order = torch.Generator().manual_seed(round_number)
            begin = time.perf_counter()
            windows = data.train.batches(recipe.batch_windows, order)
            window = next(windows)
            batched = time.perf_counter()
            target, known = training_target(window, predictor.horizons, recipe, temperature)
            loss, _ = loss_of(predictor(window), target, known, temperature)
            loss.backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            end = time.perf_counter()
            shares.append((batched - begin) / (end - begin))
            steps.append(1000 * (end - begin))
    low, middle, high = statistics.quantiles(shares, n=4)
    print(
        json.dumps(
            {
                "predictor": "TinySpeculationModel",
                "windows_a_batch": recipe.batch_windows,
                "step_ms_median": round(statistics.median(steps), 2),
                "data_share_median": round(middle, 4),
                "data_share_quartiles": [round(low, 4), round(high, 4)],
                "rounds": arguments.rounds,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
