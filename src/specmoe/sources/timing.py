"""What one layer costs the model itself: the time that a prediction has to beat."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specmoe.sources.families import Family, router_sites
from specmoe.sources.recording import cache_name

__all__ = ["decode_tokens", "machine_name", "measure_layer_us", "synchronise"]


def measure_layer_us(model: Any, family: Family, stack: str | None = None, *, steps: int = 50) -> float:
    """Median time in µs of one MoE transformer layer for a single token at batch 1, on one CPU thread.

    A decoder stack decodes with a cache behind 16 tokens. An encoder has no decoding: it reads one token, and so does
    a model that keeps no cache.
    """
    stack = stack or next(iter(family.stacks))
    seconds: list[float] = []
    started = 0.0

    def before(_module: nn.Module, _arguments: Any) -> None:
        nonlocal started
        synchronise(model.device)
        started = time.perf_counter()

    def after(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        synchronise(model.device)
        seconds.append(time.perf_counter() - started)

    handles = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for site in router_sites(model, family, stack):
            handles.append(site.whole.register_forward_pre_hook(before))
            handles.append(site.whole.register_forward_hook(after))
        with torch.inference_mode():
            decode_tokens(model, family, stack, steps, seconds.clear)
    finally:
        torch.set_num_threads(threads)
        for handle in handles:
            handle.remove()
    return sorted(seconds)[len(seconds) // 2] * 1e6


def decode_tokens(model: Any, family: Family, stack: str, steps: int, warmed_up: Callable[[], None]) -> None:
    """Run ``steps`` steps of one token behind 16 tokens, after a few to warm up; ``warmed_up`` is called in between.

    What is to be timed is timed by hooks of the caller, who also chooses the threads and turns gradients off.
    """
    prompt = torch.zeros(1, 16, dtype=torch.long, device=model.device)
    token = prompt[:, :1]
    if stack == "encoder":
        for step in range(steps + 2):
            model.get_encoder()(input_ids=token)
            if step == 1:
                warmed_up()
        return
    ids_name = "decoder_input_ids" if family.is_encoder_decoder else "input_ids"
    named: dict[str, Any] = {}
    if family.is_encoder_decoder:
        named = {"encoder_outputs": model.get_encoder()(input_ids=prompt)}
    cache = getattr(model(**named, **{ids_name: prompt}, use_cache=True), cache_name(), None)
    if cache is not None:
        named = {**named, cache_name(): cache, "use_cache": True}
    for step in range(steps + 2):
        model(**named, **{ids_name: token})
        if step == 1:
            warmed_up()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine_name(device: str) -> str:
    """Name of the processor and its cores, or of the accelerator."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
