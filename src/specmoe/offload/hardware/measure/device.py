"""Copying from the host's memory to a GPU's, from page-locked and from ordinary memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specmoe.offload.hardware.measure.points import Point, point_of

__all__ = ["DeviceCopies", "copy_points", "measure_device"]


@dataclass(frozen=True)
class DeviceCopies:
    """Copies from page-locked (pinned) and from ordinary (pageable) host memory to the GPU of that name."""

    gpu: str
    pinned: list[Point]
    pageable: list[Point]


def measure_device(
    sizes: Sequence[int] = (256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20), *, seconds: float = 0.3
) -> DeviceCopies | None:
    """Time copies to the first GPU; None where torch sees none.

    Args:
        sizes: bytes of a copy. seconds: time for each size and depth.
    """
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    streams = [torch.cuda.Stream(device) for _ in range(4)]

    def copy(target: Tensor, source: Tensor, lane: int) -> None:
        with torch.cuda.stream(streams[lane]):
            target.copy_(source, non_blocking=True)

    def wait() -> None:
        torch.cuda.synchronize(device)

    def points(pin: bool, depths: Sequence[int]) -> list[Point]:
        made = []
        for size in sizes:
            sources = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for _ in range(max(depths))]
            targets = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(max(depths))]
            made += [copy_points(sources[:d], targets[:d], copy, wait, seconds=seconds) for d in depths]
        return made

    # A copy from ordinary memory goes through a page-locked buffer of the driver's, one after the other.
    return DeviceCopies(torch.cuda.get_device_name(device), points(True, (1, 2, 4)), points(False, (1,)))


def copy_points(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    copy: Callable[[Tensor, Tensor, int], None],
    wait: Callable[[], None],
    *,
    seconds: float,
) -> Point:
    """Time rounds of one copy for each source, all started before any is waited for.

    Args:
        sources, targets: as many of each as copies shall be under way at once, all of one size.
        copy: starts a copy of (target, source) in a lane. wait: until all are done. seconds: time for all rounds.
    """
    for lane, (target, source) in enumerate(zip(targets, sources, strict=True)):
        source.fill_(lane + 1)
        copy(target, source, lane)
    wait()
    rounds: list[float] = []
    begun = time.perf_counter()
    while len(rounds) < 5 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        for lane, (target, source) in enumerate(zip(targets, sources, strict=True)):
            copy(target, source, lane)
        wait()
        rounds.append(time.perf_counter() - started)
    depth, size = len(sources), sources[0].numel() * sources[0].element_size()
    return point_of(size, depth, [each for each in rounds for _ in range(depth)], sum(rounds))
