"""A trace of millions of tokens: what writing, opening, validating and random access take in time and memory.

Routing follows a Markov-like process: a token's experts follow from its id and from the token before, half of the
time anew. It goes through the ordinary writer. Writing, validating, and reading documents at random each run in a
process of their own, so that the peak memory (``ru_maxrss``, mapped pages included) is that of the step. Random reads
come from the page cache as the machine has it: after writing, mostly warm.

    python benchmarks/large_trace.py [--tokens 10000000] [--out DIR] [--save FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specmoe.files import write_json
from specmoe.sources.timing import machine_name
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

TOPOLOGY = Topology(model_id="markov", layers=26, experts=64, top_k=6, hidden_size=0)
DOCUMENT_TOKENS = 500
VOCABULARY = 32_000
_REPEAT, _BY_TOKEN = 0.3, 0.4


def main() -> None:
    """Run every step in a process of its own and print what each takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, default=None, help="folder on the disk to write to; default: temporary")
    parser.add_argument("--reads", type=int, default=1000, help="documents read at random")
    parser.add_argument("--save", type=Path, default=None, help="also write the figures to this JSON file")
    parser.add_argument("--step", choices=("write", "validate", "random"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step is not None:
        print(json.dumps(run_step(options.step, options.out, options.tokens, options.reads)))
        return

    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        needed = options.tokens * (TOPOLOGY.layers * TOPOLOGY.top_k * 2 + 5)
        free = shutil.disk_usage(folder).free
        if free < 1.1 * needed:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB free, the trace takes {needed / 1e9:.1f} GB; choose --out")
        steps = {}
        for step in ("write", "validate", "random"):
            steps[step] = in_new_process(step, Path(folder) / "trace", options)
            print(f"{step}: {json.dumps(steps[step])}", file=sys.stderr, flush=True)
    result = {
        "tokens": options.tokens,
        "topology": TOPOLOGY.model_dump(mode="json"),
        **steps,
        "machine": machine_name("cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if options.save is not None:
        write_json(options.save, result)


def in_new_process(step: str, trace: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one step of this script afresh and take in what it prints."""
    command = [sys.executable, __file__, "--step", step, "--out", str(trace)]
    command += ["--tokens", str(options.tokens), "--reads", str(options.reads)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def run_step(step: str, trace: Path, tokens: int, reads: int) -> dict[str, Any]:
    """One step in this process: its figures, and the peak memory of the process."""
    begin = time.perf_counter()
    if step == "write":
        figures = write(trace, tokens)
    elif step == "validate":
        figures = validate(trace)
    else:
        figures = read_at_random(trace, reads)
    seconds = time.perf_counter() - begin
    figures = {"seconds": round(seconds, 2), **figures}
    if step != "random":
        figures["tokens_per_second"] = round(tokens / seconds)
    return {**figures, "peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)}


def write(trace: Path, tokens: int) -> dict[str, Any]:
    """Draw the routing and write it; how much of the time the writer took."""
    source = Source(kind="synthetic", settings={"process": "markov", "tokens": tokens, "seed": 0})
    manifest = Manifest(topology=TOPOLOGY, source=source, fields=("token_ids", "phase", "expert_ids"))
    writing, rng = 0.0, np.random.default_rng(0)
    experts_VLK = np.argsort(rng.random((VOCABULARY // 16, TOPOLOGY.layers, TOPOLOGY.experts), np.float32), -1)
    experts_VLK = experts_VLK[..., : TOPOLOGY.top_k].astype(np.int16)
    with TraceWriter(trace, manifest) as writer:
        for number, start in enumerate(range(0, tokens, DOCUMENT_TOKENS)):
            record = document(rng, experts_VLK, min(DOCUMENT_TOKENS, tokens - start))
            digest = hashlib.sha256(record.token_ids.numpy().data).hexdigest()
            begin = time.perf_counter()
            writer.add(f"document-{number:06d}", f"domain-{number % 5}", digest, record)
            writing += time.perf_counter() - begin
    size = sum(shard.bytes for shard in writer.manifest.shards)
    shards = len(writer.manifest.shards)
    return {"writer_seconds": round(writing, 2), "shards": shards, "GB": round(size / 1e9, 3)}


def document(rng: np.random.Generator, experts_VLK: np.ndarray, tokens: int) -> RoutingRecord:
    """One document: at each place the experts of the token before, those of the token id, or random ones."""
    token_ids_T = np.minimum(rng.zipf(1.3, tokens), VOCABULARY) - 1
    chance_TL = rng.random((tokens, TOPOLOGY.layers), np.float32)
    # Six different experts without sorting 64 numbers: steps around a circle of 64 by an odd number.
    start_TL = rng.integers(TOPOLOGY.experts, size=(tokens, TOPOLOGY.layers, 1), dtype=np.int16)
    step_TL = 2 * rng.integers(TOPOLOGY.experts // 2, size=(tokens, TOPOLOGY.layers, 1), dtype=np.int16) + 1
    ids_TLK = (start_TL + step_TL * np.arange(TOPOLOGY.top_k, dtype=np.int16)) % TOPOLOGY.experts
    by_token_TL = chance_TL < _BY_TOKEN
    ids_TLK = np.where(by_token_TL[..., None], experts_VLK[token_ids_T % len(experts_VLK)], ids_TLK)
    # A place that repeats takes what the last place that did not repeat has.
    fresh_TL = chance_TL < 1 - _REPEAT
    fresh_TL[0] = True
    origin_TL = np.maximum.accumulate(np.where(fresh_TL, np.arange(tokens)[:, None], 0), 0)
    ids_TLK = np.take_along_axis(ids_TLK, origin_TL[..., None], 0)
    return RoutingRecord(
        token_ids=torch.from_numpy(token_ids_T.astype(np.int32)),
        phase=torch.zeros(tokens, dtype=torch.uint8),
        expert_ids=torch.from_numpy(ids_TLK.astype(np.int16)),
    )


def validate(trace: Path) -> dict[str, Any]:
    """Open and validate, as the verb does."""
    from specmoe.diagnostics import validate_trace

    begin = time.perf_counter()
    documents = len(Trace.open(trace))
    opened = time.perf_counter() - begin
    result = validate_trace(trace)
    findings = {finding.code: finding.severity for finding in result.findings}
    return {"documents": documents, "open_seconds": round(opened, 2), "findings": findings}


def read_at_random(path: Path, reads: int) -> dict[str, Any]:
    """Open, and read documents in random order."""
    rng, times = np.random.default_rng(1), []
    with Trace.open(path) as trace:
        for index in rng.integers(len(trace), size=reads).tolist():
            begin = time.perf_counter()
            trace.read(index)
            times.append(1000 * (time.perf_counter() - begin))
    percentiles = statistics.quantiles(times, n=100)
    figures = {"p50": percentiles[49], "p99": percentiles[98], "max": max(times)}
    return {"reads": reads, **{f"{name}_ms": round(value, 2) for name, value in figures.items()}}


if __name__ == "__main__":
    main()
