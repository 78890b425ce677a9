"""How fast the simulator is: events a second with and without prefetching, beside a replay of the cache alone.

A stream is made up (skewed, with repeats from token to token, at DeepSeek-V2-Lite's shape) or taken from a trace.
Ratios are to the cache replay of the same stream in the same process.

    python benchmarks/simulation.py [--trace DIR] [--tokens 20000] [--repeats 5] [--save FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specmoe.files import write_json
from specmoe.offload.admission.registry import parse_admission
from specmoe.offload.cache import replay_cache
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.profile import load_hardware
from specmoe.offload.prefetchers.predictions import with_recall
from specmoe.offload.simulator import Machine, Run, simulate
from specmoe.topology import Topology
from specmoe.trace import Trace

SHAPE = Topology(model_id="made up", layers=26, experts=64, top_k=6, hidden_size=2048, bytes_per_expert=17_301_504)


def made_up(tokens: int) -> Demand:
    """Each layer keeps two of a token's six experts for the next one and draws the rest by skewed popularity."""
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(SHAPE.experts, 0.5), SHAPE.layers)
    keys = np.log(popularity)[None] + rng.gumbel(size=(tokens, SHAPE.layers, SHAPE.experts))
    ids = np.argsort(-keys, -1)[..., : SHAPE.top_k].astype(np.int16)
    for token in range(1, tokens):
        ids[token, :, :2] = ids[token - 1, :, 2:4]
    return Demand.of_records(SHAPE, [ids], [np.ones(tokens, dtype=np.uint8)])


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """After one run that compiles."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.trace:
        trace = Trace.open(options.trace)
        taken, tokens = [], 0
        for index, document in enumerate(trace.documents):
            taken.append(index)
            tokens += document.tokens
            if tokens >= options.tokens:
                break
        demand = Demand.of_trace(trace, taken, replay="decode")
    else:
        demand = made_up(options.tokens)
    topology = demand.topology
    capacity = topology.layers * topology.experts // 4
    machine = Machine(load_hardware("rtx-4090"), topology.bytes_per_expert or SHAPE.bytes_per_expert or 1, capacity)
    foreseen = with_recall(demand, (1, 2, 3, 4), 0.7)
    top, worth = (parse_admission(text, topology.top_k) for text in ("top", "expected-value"))
    rows = {
        "cache replay, LRU": lambda: replay_cache(demand, "lru", capacity),
        "simulation, LRU, no prefetching": lambda: simulate(demand, machine),
        "simulation, top-K at 4 horizons": lambda: simulate(demand, machine, Run("top", foreseen, top)),
        "simulation, expected value at 4 horizons": lambda: simulate(demand, machine, Run("worth", foreseen, worth)),
    }
    print(f"{demand.tokens:,} tokens, {demand.events:,} events, {demand.accesses:,} accesses, n = {options.repeats}")
    found, first = [], 0.0
    for name, work in rows.items():
        seconds = median_seconds(work, options.repeats)
        first = first or seconds
        found.append(
            {"what": name, "seconds": seconds, "events_per_second": demand.events / seconds, "ratio": seconds / first}
        )
        speed = f"{demand.events / seconds:12,.0f} events/s {demand.accesses / seconds / 1e6:7.1f} M accesses/s"
        print(f"{name:42} {speed}   {seconds / first:5.1f} × the time of the cache alone")
    if options.save:
        write_json(options.save, {"tokens": demand.tokens, "repeats": options.repeats, "rows": found})


if __name__ == "__main__":
    main()
