"""What capturing costs: the capture loop (hooks, records, files) against plain forward passes.

Both read the same batches with the same model, in the order plain, capture, capture, plain, so that a
machine that slows down or speeds up along the way favours neither. Prints one JSON object; the ratio is
capture over plain, its interval the 95 % bootstrap interval of the mean over rounds.

    python benchmarks/capture.py [--model DIR] [--rounds 6] [--tokens 16384] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from specmoe.sources.batches import batched, encode_documents
from specmoe.sources.bundled import bundled_model
from specmoe.sources.capture import SHARD_BYTES, Keep, write_routes
from specmoe.sources.corpus import standard_library
from specmoe.sources.loading import load_model
from specmoe.sources.recording import run_model
from specmoe.sources.timing import machine_name
from specmoe.trace import Manifest, Source, TraceWriter
from specmoe.trace.writer import fields_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model directory; default: the bundled model")
    parser.add_argument("--rounds", type=int, default=6, help="ABBA rounds")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens read in each pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder on the disk to write to; default: temporary")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    loaded = load_model(options.model or bundled_model())
    encoded, _ = encode_documents(loaded, standard_library("held-out"), 512, options.tokens, seed=0)
    batches = batched(encoded, 2048, seed=0)
    fields = fields_of(["gate_weights", "router_logits", "hidden"])
    manifest = Manifest(topology=loaded.topology, source=Source(kind="capture"), fields=fields)
    keep = Keep("all", torch.float16, logits=True)

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                run_model(loaded.model, loaded.family, [entry.ids for entry in batch])

    def capture() -> None:
        # The traces are removed at the end: deleting them is no part of capturing.
        directory = Path(tempfile.mkdtemp(dir=folder))
        with TraceWriter(directory, manifest, shard_bytes=SHARD_BYTES) as writer:
            write_routes(loaded, batches, writer, keep)

    rounds: list[tuple[Cost, Cost]] = []
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        plain()
        capture()
        for _ in range(options.rounds):
            first, second, third, fourth = (cost(run) for run in (plain, capture, capture, plain))
            rounds.append((first + fourth, second + third))
    ratios = [captured.wall / bare.wall for bare, captured in rounds]
    low, high = bootstrap(ratios)
    tokens = sum(len(entry.ids) for entry in encoded)
    result = {
        "ratio": round(statistics.fmean(ratios), 4),
        "interval": [round(low, 4), round(high, 4)],
        "median_ratio": round(statistics.median(ratios), 4),
        "n": len(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "cpu_time_ratio": round(statistics.median(captured.cpu / bare.cpu for bare, captured in rounds), 4),
        "tokens": tokens,
        "plain_tokens_per_second": round(2 * tokens / statistics.median(bare.wall for bare, _ in rounds)),
        "threads": options.threads,
        "machine": machine_name("cpu"),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))


@dataclass(frozen=True)
class Cost:
    """Seconds: on the clock, and of this process's own computing (which other work on the machine sways less)."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def cost(run: Callable[[], None]) -> Cost:
    """What one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean."""
    generator = random.Random(0)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


if __name__ == "__main__":
    main()
