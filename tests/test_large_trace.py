"""Traces far larger than memory: what stays mapped is bounded, and the benchmark that measures it works."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from specmoe.errors import SpecmoeError
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter, reader

SHAPE = Topology(model_id="m", layers=2, experts=8, top_k=2, hidden_size=0)
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "large_trace.py"
TOKENS = 4096


def record(number: int) -> RoutingRecord:
    return RoutingRecord(
        token_ids=torch.full((TOKENS,), number, dtype=torch.int32),
        phase=torch.zeros(TOKENS, dtype=torch.uint8),
        expert_ids=torch.full((TOKENS, 2, 2), number % 8, dtype=torch.int16),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Forty documents, each in a shard of its own."""
    manifest = Manifest(topology=SHAPE, source=Source(kind="test"), fields=("token_ids", "phase", "expert_ids"))
    with TraceWriter(tmp_path, manifest, shard_bytes=1) as writer:
        for number in range(40):
            writer.add(f"doc-{number}", "d", str(number), record(number))
    return tmp_path


def mapped(directory: Path) -> int:
    return len(
        {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line}
    )


def test_shards_stay_mapped_up_to_a_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for _, tensor in record(0).tensors())
    monkeypatch.setattr(reader, "_RESIDENT_BYTES", 7 * size // 2)
    with Trace.open(path) as trace:
        assert mapped(path) == 0
        for round_number in range(2):
            for index in range(40):
                assert int(trace.read(index).token_ids[0]) == index
                assert mapped(path) == min(3, index + 1 + 40 * round_number)
        # The least recently read one goes first.
        for index in (7, 8, 9, 7, 10):
            trace.read(index)
        assert [file for file in range(40) if any(f"{path}/shard-{file:05d}" in line for line in maps())] == [7, 9, 10]
        # Reading one document again and again neither counts as more memory nor unmaps the others.
        for _ in range(20):
            trace.read(10)
        assert mapped(path) == 3
    assert mapped(path) == 0
    assert int(trace.read(3).token_ids[0]) == 3
    trace.close()
    assert mapped(path) == 0


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def test_a_shard_larger_than_the_bound_is_read_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_RESIDENT_BYTES", 1)
    trace = Trace.open(path)
    trace.verify()
    assert mapped(path) == 1


def test_a_shard_that_vanishes_while_the_trace_is_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_RESIDENT_BYTES", 1)
    trace = Trace.open(path)
    trace.read(0)
    (path / "shard-00001.safetensors").unlink()
    with pytest.raises(SpecmoeError, match="shard-00001"):
        trace.read(1)
    assert len(trace.read(2)) == TOKENS


def test_threads_may_read_one_trace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_RESIDENT_BYTES", 1)
    trace, wrong = Trace.open(path), []

    def read(first: int) -> None:
        for step in range(200):
            index = (first + 7 * step) % 40
            try:
                if int(trace.read(index).token_ids[-1]) != index:
                    wrong.append(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_benchmark_measures_every_step(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    command = [sys.executable, str(BENCHMARK), "--tokens", "20100", "--reads", "50", "--save", str(saved)]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    result = json.loads(saved.read_text())
    assert result["validate"]["documents"] == 41
    assert result["validate"]["findings"] == {}
    for step in ("write", "validate", "random"):
        assert 100 < result[step]["peak_MB"] < 2000
    assert 0 < result["random"]["p50_ms"] <= result["random"]["p99_ms"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
