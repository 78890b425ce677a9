"""Measuring a machine: real reads of a small scratch file, real copies, the bundled model, the line through points."""

from __future__ import annotations

import errno
import os
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.offload.hardware.cost import step_cost
from specmoe.offload.hardware.measure import disk, run
from specmoe.offload.hardware.measure.compute import load_for_measuring, measure_model
from specmoe.offload.hardware.measure.device import copy_points, measure_device
from specmoe.offload.hardware.measure.memory import measure_memory
from specmoe.offload.hardware.measure.points import Point, best_depth, fit_line, fit_link
from specmoe.offload.hardware.profile import load_hardware
from specmoe.sources.families import FAMILIES
from specmoe.sources.loading import LoadedModel
from specmoe.sources.model_shape import topology_of_model
from specmoe.topology import REFERENCE
from tiny_models import tiny_model

TINY = run.Plan((8192, 65536), (1, 2), 0.02, 4 << 20, (1 << 16, 1 << 18), 1 << 20, 0.02, 4, 256)
Usage = namedtuple("Usage", "total used free")


def synthetic(latency: float, bandwidth: float, noise: float = 0.0, depth: int = 1) -> list[Point]:
    generator = np.random.default_rng(3)
    points = []
    for size in disk.SIZES:
        seconds = (latency + size / bandwidth) * (1 + noise * generator.standard_normal())
        points.append(Point(size, depth, 50, seconds, seconds, depth * size / seconds))
    return points


@pytest.mark.parametrize(("latency", "bandwidth"), [(1e-4, 1.3e9), (6e-6, 5.6e10), (0.0, 5e8)])
def test_the_line_finds_what_made_the_points(latency: float, bandwidth: float) -> None:
    found = fit_line(synthetic(latency, bandwidth))
    assert found == pytest.approx((latency, bandwidth), rel=1e-6, abs=1e-9)
    noisy = fit_line(synthetic(latency, bandwidth, 0.02))
    assert noisy[1] == pytest.approx(bandwidth, rel=0.06)
    assert noisy[0] == pytest.approx(latency, rel=0.3, abs=3e-5)


def test_a_line_is_never_nonsense() -> None:
    # Larger reads that are faster than small ones, and a single size.
    odd = [Point(1000, 1, 5, 2e-3, 2e-3, 5e5), Point(2000, 1, 5, 1e-3, 1e-3, 2e6)]
    for points in (odd, odd[:1]):
        latency, bandwidth = fit_line(points)
        assert latency >= 0
        assert bandwidth > 0
    # Times that grow faster than sizes would have a negative latency.
    assert fit_line([Point(1000, 1, 5, 1e-3, 1e-3, 1e6), Point(2000, 1, 5, 4e-3, 4e-3, 5e5)])[0] == 0


def test_slots_are_those_of_the_best_depth_but_for_noise() -> None:
    one = synthetic(1e-4, 1e9)
    two = [Point(p.size, 2, p.n, p.p50, p.p95, 1.5 * p.throughput) for p in one]
    four = [Point(p.size, 4, p.n, p.p50, p.p95, 1.52 * p.throughput) for p in one]
    assert best_depth([*one, *two, *four]) == 2
    link = fit_link("disk", [*one, *two, *four], "test")
    assert (link.parallelism, link.latency, link.bandwidth) == (2, pytest.approx(1e-4), pytest.approx(1e9))


def test_disk_reads_are_timed_and_leave_nothing(tmp_path: Path) -> None:
    told: list[tuple[float, float, str]] = []
    reads = disk.measure_disk(
        tmp_path, [5000, 1 << 16], (1, 2), seconds=0.02, file_bytes=4 << 20, on_progress=lambda *what: told.append(what)
    )
    assert list(tmp_path.iterdir()) == []
    # Sizes are made whole pages.
    assert [(p.size, p.depth) for p in reads.points] == [(8192, 1), (8192, 2), (65536, 1), (65536, 2)]
    assert all(0 < p.p50 <= p.p95 and p.throughput > 0 and p.n >= 5 for p in reads.points)
    assert [done for done, _, _ in told] == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["open", "read"])
def test_without_direct_reads_the_page_cache_is_emptied(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    opened, advise = os.open, os.posix_fadvise

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **named)

    def count(descriptor: int, place: int, size: int, advice: int) -> None:
        emptied.append(size)
        advise(descriptor, place, size, advice)

    if where == "open":
        monkeypatch.setattr(disk.os, "open", refuse)
    else:
        monkeypatch.setattr(disk, "_can_read", lambda _descriptor: False)
        monkeypatch.setattr(disk, "_open_past_cache", lambda path: (opened(path, os.O_RDONLY), "O_DIRECT"))
    monkeypatch.setattr(disk.os, "posix_fadvise", count)
    reads = disk.measure_disk(tmp_path, [1 << 16], (2,), seconds=0.01, file_bytes=1 << 20)
    assert reads.how == "posix_fadvise"
    assert len(emptied) == reads.points[0].n
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_a_missing_folder_and_a_failing_read_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecmoeError, match="is not a folder"):
        disk.measure_disk(tmp_path / "none")
    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", lambda _folder: Usage(10**9, 0, 10**8))
        with pytest.raises(SpecmoeError, match=r"not enough room .* 100 MB are free.*--folder"):
            disk.measure_disk(tmp_path)

    def full(_descriptor: int, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_write", full)
        with pytest.raises(SpecmoeError, match="no space left"):
            disk.measure_disk(tmp_path, file_bytes=1 << 20)

    def broken(_descriptor: int, _buffers: Any, _place: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_can_read", lambda _descriptor: True)
        patch.setattr(disk.os, "preadv", broken)
        with pytest.raises(SpecmoeError, match="cannot be read back"):
            disk.measure_disk(tmp_path, [1 << 16], (2,), seconds=0.01, file_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_memory_copies_are_timed() -> None:
    points = measure_memory([1 << 16, 1 << 20], seconds=0.02, buffer_bytes=4 << 20)
    assert [p.size for p in points] == [1 << 16, 1 << 20]
    assert all(1e8 < p.throughput < 1e12 for p in points)


def test_copies_are_started_together_and_waited_for() -> None:
    begun: list[int] = []
    waits: list[int] = []

    def copy(target: torch.Tensor, source: torch.Tensor, lane: int) -> None:
        begun.append(lane)
        target.copy_(source)

    def wait() -> None:
        waits.append(len(begun))
        time.sleep(1e-3)

    sources, targets = torch.zeros(2, 4096, dtype=torch.uint8), torch.zeros(2, 4096, dtype=torch.uint8)
    point = copy_points(list(sources), list(targets), copy, wait, seconds=0.01)
    assert (point.size, point.depth) == (4096, 2)
    assert point.n == 2 * (len(waits) - 1)
    assert waits == [2 * (turn + 1) for turn in range(len(waits))]
    assert point.p50 >= 1e-3
    assert point.throughput == pytest.approx(2 * 4096 / point.p50, rel=0.5)
    assert targets.tolist() == [[1] * 4096, [2] * 4096]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_copies_to_one() -> None:
    assert measure_device() is None


def test_a_models_parts_add_up_to_its_step() -> None:
    loaded = load_for_measuring("bundled")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = measure_model(loaded, steps=6, seconds=0.03)
    finally:
        torch.set_num_threads(threads)
    cost, shape = times.cost, loaded.topology
    assert set(times.expert) == {1, 2, 4, 16}
    assert set(times.experts) == {1, 2, 4, 8, 16}
    assert times.note == ""
    assert cost.expert_bytes == 4 * (256 * 128 + 128 * 128)
    assert cost.is_of(shape)
    layer = cost.layer_seconds + shape.top_k * cost.expert_seconds
    assert layer == pytest.approx(times.calls["layer"], rel=1e-6)
    assert shape.layers * layer + cost.other_seconds >= times.calls["step"] * 0.999


@pytest.mark.parametrize(("name", "one_by_one"), [("qwen3_moe", True), ("llama4", False), ("jetmoe", False)])
def test_other_families_are_measured_or_said_to_be_divided(name: str, one_by_one: bool) -> None:
    model, family = tiny_model(name), FAMILIES[name]
    stack = next(iter(family.stacks))
    shape = topology_of_model(model, family, stack, None).model_copy(update={"model_id": name})
    times = measure_model(LoadedModel(model, None, family, shape, stack, "", {}), steps=2, seconds=0.01)
    assert bool(times.note) is not one_by_one
    assert bool(times.expert) is one_by_one
    assert times.cost.expert_seconds > 0
    layer = times.cost.layer_seconds + shape.top_k * times.cost.expert_seconds
    assert layer == pytest.approx(times.calls["layer"], rel=1e-6)


def test_the_verb_measures_and_the_profile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "QUICK", TINY)
    out = tmp_path / "box.json"
    assert run_verb(["hardware", "measure", "--quick", "--expert-bytes", "20000", "--out", str(out)]) == 0
    assert "GB/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]
    profile = load_hardware(out)
    assert profile.name == "box"
    assert profile.measured is not None
    assert {point["size"] for point in profile.measured["disk"]["points"]} == {8192, 20480, 65536}
    assert profile.links[0].bandwidth > 0
    assert profile.compute.models == ()
    assert step_cost(profile, REFERENCE, 20000).expert_seconds > 0
    assert run_verb(["hardware", "measure", "--quick", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
