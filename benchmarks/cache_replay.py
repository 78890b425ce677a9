"""How fast caches are replayed: accesses a second of each eviction policy, side by side with libCacheSim.

Three figures for each policy, all in processor time, which a busy machine does not change much:

- on the stream of events as the simulator sees it;
- on the same accesses one by one, which is all that libCacheSim knows;
- libCacheSim on these, by its own loop in C over its own binary format (which it maps into memory).

The last two take turns, and their ratio is taken in each round. Misses of both are compared; libCacheSim's LFU with
ageing is left out, as its values grow without bounds and so does the time that it takes. At the end a whole sweep, in
seconds by the clock. Without --trace the stream is synthetic, in the shape of DeepSeek-V2-Lite (26 layers, 64 experts,
top 6).

    python benchmarks/cache_replay.py [--trace DIR] [--tokens 40000] [--share .25] [--rounds 5] [--save FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.files import write_json
from specmoe.offload.cache import miss_ratio_curves, replay_cache
from specmoe.offload.demand import Demand
from specmoe.offload.policies.registry import POLICIES
from specmoe.suite.assemble import made_now
from specmoe.topology import Topology
from specmoe.trace import Trace
from specmoe.trace.record import Phase

THEIRS = {"lru": "LRU", "lfu": "LFU", "slru": "SLRU", "s3-fifo": "S3FIFO", "sieve": "Sieve", "belady": "Belady"}
SWEPT = ("lru", "lfu", "lfu-aged", "slru", "s3-fifo", "sieve", "least-stale", "belady")
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
TOPOLOGY = Topology(model_id="synthetic", layers=26, experts=64, top_k=6, hidden_size=0)
REQUEST = np.dtype([("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="replay this trace; default: synthetic routing")
    parser.add_argument("--tokens", type=int, default=40_000, help="of the synthetic stream")
    parser.add_argument("--share", type=float, default=0.25, help="of all experts that the cache holds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="threads of the sweep")
    parser.add_argument("--save", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()

    if options.trace is None:
        demand = Demand.of_records(TOPOLOGY, [synthetic(options.tokens)], [np.ones(options.tokens, dtype=np.uint8)])
    else:
        trace = Trace.open(options.trace)
        demand = Demand.of_trace(trace, range(len(trace)))
    topology = demand.topology
    everything = topology.layers * topology.experts
    capacity = max(topology.top_k, round(options.share * everything))
    print(f"{demand.accesses:,} accesses, {demand.events:,} events, a cache of {capacity} of {everything} experts")
    one_by_one = single(demand)
    _ = demand.next_use_M, one_by_one.next_use_M
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests"
        write_requests(one_by_one, path)
        for name in POLICIES:
            rows[name] = measure(name, demand, one_by_one, path, capacity, options.rounds)
            print(said(name, rows[name]), flush=True)
    sizes = [max(topology.top_k, round(share * everything)) for share in SHARES]
    begin = time.perf_counter()
    miss_ratio_curves(demand, SWEPT, sizes, workers=options.workers)
    sweep = time.perf_counter() - begin
    print(f"{len(SWEPT)} policies x {len(sizes)} capacities on {options.workers} threads: {sweep:.1f} s")
    if options.save is not None:
        content = {
            "stream": "synthetic" if options.trace is None else options.trace.name,
            "topology": topology.model_dump(mode="json"),
            "accesses": demand.accesses,
            "events": demand.events,
            "capacity": capacity,
            "rounds": options.rounds,
            "policies": rows,
            "sweep": {"policies": SWEPT, "capacities": sizes, "workers": options.workers, "seconds": round(sweep, 2)},
        }
        write_json(options.save, content | {"made": made_now(sweep).model_dump(mode="json")})


def measure(
    name: str, demand: Demand, one_by_one: Demand, path: Path, capacity: int, rounds: int
) -> dict[str, float | int | bool]:
    """Medians over the rounds: millions of accesses a second, and the ratio to libCacheSim."""
    wanted = None
    if POLICIES[name].needs == "predictor":
        wanted = np.random.default_rng(0).random((demand.events, demand.topology.experts), dtype=np.float32)
    replay_cache(demand, name, capacity, wanted=wanted)  # compiled by now
    events = [seconds_of(lambda: replay_cache(demand, name, capacity, wanted=wanted))[0] for _ in range(rounds)]
    row: dict[str, float | int | bool] = {"events_millions": rate(demand, events)}
    if wanted is not None:
        return row
    ours, theirs, ratios = [], [], []
    for _ in range(rounds):
        mine, counts = seconds_of(lambda: replay_cache(one_by_one, name, capacity))
        ours.append(mine)
        row["misses"] = counts.misses
        if name in THEIRS and importlib.util.find_spec("libcachesim") is not None:
            other, misses = libcachesim_run(THEIRS[name], path, one_by_one.accesses, capacity)
            theirs.append(other)
            ratios.append(other / mine)
            row["same_misses"] = misses == counts.misses
    row["single_millions"] = rate(one_by_one, ours)
    if theirs:
        row["libcachesim_millions"] = rate(one_by_one, theirs)
        row["ratio"] = round(statistics.median(ratios), 2)
        row["ratio_lowest"], row["ratio_highest"] = round(min(ratios), 2), round(max(ratios), 2)
    return row


def libcachesim_run(name: str, path: Path, accesses: int, capacity: int) -> tuple[float, int]:
    """Seconds and misses; the cache and the reader are made before the clock starts."""
    library: Any = importlib.import_module("libcachesim")
    reader = library.TraceReader(str(path), library.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(library, name)(capacity, hashpower=12)
    seconds, (ratio, _) = seconds_of(lambda: cache.process_trace(reader))
    return seconds, round(ratio * accesses)


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.thread_time()
    result = work()
    return time.thread_time() - begin, result


def rate(demand: Demand, seconds: list[float]) -> float:
    return round(demand.accesses / statistics.median(seconds) / 1e6, 2)


def said(name: str, row: dict[str, float | int | bool]) -> str:
    text = f"{name:14} {row['events_millions']:6.1f} M/s in events"
    if "single_millions" in row:
        text += f"  {row['single_millions']:6.1f} one by one"
    if "ratio" in row:
        same = "same misses" if row["same_misses"] else "other misses"
        text += f"  libCacheSim {row['libcachesim_millions']:6.1f}"
        text += f"  ratio {row['ratio']} ({row['ratio_lowest']} to {row['ratio_highest']}), {same}"
    return text


def synthetic(tokens: int) -> np.ndarray[Any, Any]:
    """Expert ids [T, L, K]: uneven, and half of a token's experts are those of the token before."""
    rng = np.random.default_rng(0)
    layers, experts, top_k = TOPOLOGY.layers, TOPOLOGY.experts, TOPOLOGY.top_k
    liking = rng.gumbel(size=(layers, experts)).astype(np.float32)
    noise = rng.gumbel(size=(tokens, layers, experts)).astype(np.float32)
    for token in range(1, tokens):
        again = rng.random((layers, experts)) < 0.5
        noise[token][again] = noise[token - 1][again]
    return np.argpartition(-(liking + noise), top_k, -1)[..., :top_k].astype(np.int16)


def single(demand: Demand) -> Demand:
    """The same accesses, each an event of its own, in a model of one layer with as many experts."""
    count = demand.accesses
    topology = demand.topology
    experts = topology.layers * topology.experts
    return Demand(
        topology=Topology(model_id="one by one", layers=1, experts=experts, top_k=1, hidden_size=0),
        replay="decode",
        batch=1,
        keys_M=demand.keys_M,
        tokens_M=demand.tokens_M,
        starts_V=np.arange(count + 1),
        phase_J=np.full(count, Phase.DECODE, dtype=np.uint8),
        group_J=np.zeros(count, dtype=np.int32),
        order_N=np.arange(count),
        first_J=np.arange(count + 1),
    )


def write_requests(demand: Demand, path: Path) -> None:
    """As libCacheSim's "oracleGeneral" file: experts of one byte, and of each access the next to the same expert."""
    requests = np.zeros(demand.accesses, dtype=REQUEST)
    requests["key"] = demand.keys_M + 1
    requests["size"] = 1
    requests["next"] = np.where(demand.next_use_M < demand.events, demand.next_use_M + 1, -1)
    requests.tofile(path)


if __name__ == "__main__":
    main()
