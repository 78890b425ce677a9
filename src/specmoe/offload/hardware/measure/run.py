"""One measurement of a machine, from its disk to its device."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specmoe.errors import SpecmoeError
from specmoe.offload.hardware.measure.compute import (
    ModelTimes,
    Rates,
    at_best_threads,
    load_for_measuring,
    measure_model,
    measure_rates,
)
from specmoe.offload.hardware.measure.device import DeviceCopies, measure_device
from specmoe.offload.hardware.measure.disk import SIZES, DiskReads, measure_disk
from specmoe.offload.hardware.measure.memory import measure_memory
from specmoe.offload.hardware.measure.points import Point, best_depth, fit_line, fit_link
from specmoe.offload.hardware.profile import Compute, Hardware, Link
from specmoe.sources.timing import machine_name

__all__ = ["FULL", "QUICK", "Plan", "measure_hardware"]


@dataclass(frozen=True)
class Plan:
    """How much is measured: sizes of reads and depths, seconds for each point, bytes of the scratch file, and so on."""

    disk_sizes: Sequence[int]
    disk_depths: Sequence[int]
    disk_seconds: float
    file_bytes: int
    memory_sizes: Sequence[int]
    memory_buffer: int
    seconds: float
    steps: int
    width: int


FULL = Plan(SIZES, (1, 2, 4), 0.5, 512 << 20, (1 << 20, 4 << 20, 16 << 20, 64 << 20), 256 << 20, 0.3, 30, 4096)
QUICK = Plan((256 << 10, 1 << 20, 4 << 20), (1, 2), 0.2, 64 << 20, (1 << 20, 16 << 20), 64 << 20, 0.1, 8, 2048)


def measure_hardware(
    folder: Path,
    *,
    name: str,
    expert_bytes: int | None = None,
    model: str | None = None,
    dtype: str = "float32",
    plan: Plan = FULL,
    on_progress: Callable[[float, float, str], None] | None = None,
) -> Hardware:
    """Measure the disk under ``folder``, the host's memory, the GPU if there is one, and the computing.

    Without a GPU the host is the device: one link, disk to host. With one there are two.

    Args:
        folder: on the disk that would hold the experts. name: of the profile. expert_bytes: a size of read that is
            measured in any case; by default that of ``model``'s experts. model: directory, hub id or ``bundled``, whose
            experts and layers are timed; None leaves its costs to be estimated. dtype: it is loaded in.
        plan: how much. on_progress: takes (done, total, what).

    Raises:
        SpecmoeError: the folder, its room or the model are not as needed.
    """
    tell = on_progress or (lambda _done, _total, _what: None)
    # Shares of the time, roughly; the disk takes most of it.
    disk_share, total = 70.0, 100.0
    loaded = None
    if model is not None:
        tell(0, total, f"loading {model}")
        loaded = load_for_measuring(model, dtype)
        if loaded.topology.experts_per_layer is not None or loaded.topology.bytes_per_expert_by_layer is not None:
            raise SpecmoeError(
                f"the layers of {model} have experts of different sizes or numbers, and one layer would be measured "
                "for all; measure the machine without --model, and its two rates give the times of each layer"
            )
        expert_bytes = expert_bytes or loaded.topology.bytes_per_expert
    sizes = [*plan.disk_sizes, *([expert_bytes] if expert_bytes is not None else [])]
    disk = measure_disk(
        folder,
        sizes,
        plan.disk_depths,
        seconds=plan.disk_seconds,
        file_bytes=plan.file_bytes,
        on_progress=lambda done, of, what: tell(disk_share * done / of, total, what),
    )
    tell(disk_share, total, "copies in memory")
    memory = measure_memory(plan.memory_sizes, seconds=plan.seconds, buffer_bytes=plan.memory_buffer)
    tell(80, total, "copies to a GPU")
    copies = measure_device(seconds=plan.seconds)
    device = "cuda" if copies is not None else "cpu"
    tell(85, total, "reading weights, multiplying matrices")
    rates = at_best_threads(
        lambda: measure_rates(device, seconds=plan.seconds, width=plan.width),
        lambda made: 1 / made.memory_bandwidth,
        device,
    )
    tell(90, total, "a model's layers and experts")
    times = None
    if loaded is not None:
        times = at_best_threads(
            lambda: measure_model(loaded, steps=plan.steps, seconds=plan.seconds),
            lambda made: made.calls["step"],
            device,
        )
    tell(total, total, "done")
    return _profile(name, folder, disk, memory, copies, rates, times)


def _profile(
    name: str,
    folder: Path,
    disk: DiskReads,
    memory: list[Point],
    copies: DeviceCopies | None,
    rates: Rates,
    times: ModelTimes | None,
) -> Hardware:
    day = datetime.now(UTC).date().isoformat()
    how = {
        "O_DIRECT": "past the page cache with O_DIRECT",
        "posix_fadvise": "the page cache emptied of each range before it is read (no O_DIRECT here)",
        "F_NOCACHE": "with F_NOCACHE",
        "none": "through the page cache, which cannot be passed here: too fast",
    }[disk.how]
    host = machine_name("cpu")
    links = [
        fit_link(
            "disk -> host",
            disk.points,
            f"measured {day}: random reads of a scratch file of {disk.file_bytes:,} bytes, {how}",
        )
    ]
    if copies is not None:
        links.append(
            fit_link("host -> device", copies.pinned, f"measured {day}: copies from page-locked memory to {copies.gpu}")
        )
    latency, bandwidth = fit_line(memory)
    measured: dict[str, Any] = {
        "date": day,
        "machine": host,
        "system": platform.platform(),
        "threads": rates.threads,
        "disk": {
            "how": disk.how,
            "points": [point.as_dict() for point in disk.points],
            **_disagreement(disk, links[0]),
        },
        "host_copy": {
            "bandwidth": bandwidth,
            "latency": latency,
            "points": [point.as_dict() for point in memory],
        },
        "device_copy": asdict(copies) if copies is not None else None,
        "rates": asdict(rates),
        "model": None if times is None else _raw(times),
    }
    return Hardware(
        name=name,
        description=f"{copies.gpu if copies is not None else host}; experts on a disk of this machine",
        source=f"measured {day} on {host}",
        links=tuple(links),
        compute=Compute(
            memory_bandwidth=rates.memory_bandwidth,
            flops=rates.flops,
            models=() if times is None else (times.cost,),
            source=f"measured {day}: matrix-vector and matrix products of torch, {rates.threads} threads",
        ),
        memory_bytes=_gpu_bytes() if copies is not None else _host_bytes(),
        host_bytes=_host_bytes() if copies is not None else None,
        measured=measured,
    )


def _disagreement(disk: DiskReads, link: Link) -> dict[str, float]:
    """How far the link is from what was measured: alone, and with as many reads at once as it has slots."""
    alone = [abs(link.seconds(point.size) / point.p50 - 1) for point in disk.points if point.depth == 1]
    depth = best_depth(disk.points)
    fastest = max(point.throughput for point in disk.points if point.depth == depth)
    return {
        "largest_error_alone": max(alone),
        "best_depth": depth,
        "best_throughput": fastest,
        "best_throughput_over_bandwidth": fastest / link.bandwidth,
    }


def _raw(times: ModelTimes) -> dict[str, Any]:
    return {
        "expert_seconds_by_tokens": {str(tokens): seconds for tokens, seconds in times.expert.items()},
        "experts_seconds_by_experts": {str(count): seconds for count, seconds in times.experts.items()},
        "calls": times.calls,
        "steps": times.n,
        "threads": times.threads,
        "note": times.note,
    }


def _host_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory
