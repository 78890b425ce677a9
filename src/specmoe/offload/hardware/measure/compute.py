"""How fast a device computes: its two rates, and what the parts of one model cost on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from specmoe.offload.hardware.profile import ModelCost
from specmoe.sources.families import Family, RouterSite, router_sites
from specmoe.sources.loading import LoadedModel, load_model
from specmoe.sources.recording import run_model
from specmoe.sources.timing import decode_tokens, synchronise

__all__ = ["ModelTimes", "Rates", "at_best_threads", "load_for_measuring", "measure_model", "measure_rates"]

T = TypeVar("T")

_TOKENS = (1, 2, 4, 16)
_EXPERTS = (1, 2, 4, 8, 16)
_UNDIVIDED = (
    "this family's experts cannot be called one at a time: their common call was divided by top-k, "
    "and further tokens through an expert count as free"
)


@dataclass(frozen=True)
class Rates:
    """Bytes of weights that a matrix-vector product reads per second, and operations per second of a matrix product."""

    memory_bandwidth: float
    flops: float
    threads: int


@dataclass(frozen=True)
class ModelTimes:
    """A model's costs, and the times they come from.

    Attributes:
        cost: for a profile. expert: median seconds of one expert for so many tokens. experts: of so many experts for
            one token. Both are empty where a family's experts cannot be called one at a time.
        calls: other medians in seconds, by what was timed. n: steps that were decoded. threads: of torch.
        note: what else to know.
    """

    cost: ModelCost
    expert: dict[int, float]
    experts: dict[int, float]
    calls: dict[str, float]
    n: int
    threads: int
    note: str = ""


def measure_rates(device: str = "cpu", *, seconds: float = 1.0, width: int = 4096) -> Rates:
    """Read weights and multiply matrices for ``seconds`` each, in float32 on a CPU and bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.inference_mode():
        weights = torch.randn(width, width, device=device).to(dtype)
        vector = torch.randn(width, device=device).to(dtype)
        square = torch.randn(width // 4, width // 4, device=device).to(dtype)
        wait = _waiter(torch.device(device))
        reading = _median(lambda: weights @ vector, wait, seconds)[0]
        multiplying = _median(lambda: square @ square, wait, seconds)[0]
    return Rates(
        memory_bandwidth=weights.numel() * weights.element_size() / reading,
        flops=2 * square.shape[0] ** 3 / multiplying,
        threads=torch.get_num_threads(),
    )


def at_best_threads(measure: Callable[[], T], seconds_of: Callable[[T], float], device: str) -> T:
    """Measure on a CPU with one thread and with as many as torch would take, and keep the faster; on a GPU once.

    Small layers are slower on many threads, and so is everything on a machine that others use too.
    """
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        return measure()
    made = []
    try:
        for each in (1, threads):
            torch.set_num_threads(each)
            made.append(measure())
    finally:
        torch.set_num_threads(threads)
    return min(made, key=seconds_of)


def load_for_measuring(model: str, dtype: str = "float32") -> LoadedModel:
    """A model by directory, hub id or ``bundled``, on the GPU if there is one.

    Raises:
        SpecmoeError: as :func:`specmoe.sources.loading.load_model`.
    """
    from specmoe.sources.bundled import bundled_model

    place: str | Path = bundled_model() if model == "bundled" else model
    return load_model(place, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class _Watch:
    """Times of the calls of some modules, by name."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))


def measure_model(loaded: LoadedModel, *, steps: int = 30, seconds: float = 0.3) -> ModelTimes:
    """Time one token's step, its layers and its experts; warm, medians.

    A step of one token is decoded behind 16 others. An expert is the slope over calls of 1, 2, 4, 8 and 16 experts of
    one token: what a call costs besides goes to the layer, so that layer and experts together are what was timed. Each
    further token in an expert is the slope over 1, 2, 4 and 16 tokens; each further token in the
    layer is the difference between reading 16 tokens and one, without the experts.

    Args:
        loaded: on its device. steps: decoded. seconds: for each kind of call of an expert.
    """
    model, family, shape = loaded.model, loaded.family, loaded.topology
    sites = router_sites(model, family, loaded.stack)
    middle = sites[len(sites) // 2]
    wait = _waiter(model.device)
    with torch.inference_mode():
        with _watched(
            {"step": [model], "layer": [s.whole for s in sites], "experts": [s.experts for s in sites]}, wait
        ) as w:
            decode_tokens(model, family, loaded.stack, steps, w.seconds.clear)
        alone = _alone(model, family, sites, wait, 1)
        many = _alone(model, family, sites, wait, max(_TOKENS))
        called = _expert_calls(model, family, middle, shape.experts, wait, seconds)
    layer, experts = w.median("layer"), w.median("experts")
    step = w.median("step") if "step" in w.seconds else layer * shape.layers
    calls = {"step": step, "layer": layer, "experts": experts, "layer without experts, 1 token": alone}
    calls[f"layer without experts, {max(_TOKENS)} tokens"] = many
    by_tokens, by_experts = called if called is not None else ({}, {})
    expert, token, note = experts / shape.top_k, 0.0, _UNDIVIDED
    if called is not None:
        slope, note, most = _slope(by_experts), "", max(by_experts)
        # Within noise an expert can seem to cost nothing beside the call; then it is a share of the largest call.
        expert = min(slope if slope > 0 else by_experts[most] / most, layer / shape.top_k)
        token = max(0.0, _slope(by_tokens))
    cost = ModelCost(
        model_id=shape.model_id,
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        expert_bytes=_held_bytes(middle, shape.experts) or shape.bytes_per_expert or 1,
        layer_seconds=max(0.0, layer - shape.top_k * expert),
        token_layer_seconds=max(0.0, (many - alone) / (max(_TOKENS) - 1)),
        expert_seconds=expert,
        token_seconds=token,
        other_seconds=max(0.0, step - shape.layers * layer),
    )
    return ModelTimes(cost, by_tokens, by_experts, calls, steps, torch.get_num_threads(), note)


def _alone(
    model: Any, family: Family, sites: list[RouterSite], wait: Callable[[], None], tokens: int, rounds: int = 6
) -> float:
    """Median seconds of a layer less its experts' call, reading ``tokens`` tokens without a cache."""
    # An encoder-decoder's decoder reads the second half.
    ids = [0] * (2 * tokens if family.is_encoder_decoder else tokens)
    with _watched({"layer": [s.whole for s in sites], "experts": [s.experts for s in sites]}, wait) as watch:
        run_model(model, family, [ids])
        watch.seconds.clear()
        for _ in range(rounds):
            run_model(model, family, [ids])
    return max(0.0, watch.median("layer") - watch.median("experts"))


def _expert_calls(
    model: Any, family: Family, site: RouterSite, experts: int, wait: Callable[[], None], seconds: float
) -> tuple[dict[int, float], dict[int, float]] | None:
    """Medians of one expert for several tokens, and of several for one; None where experts are called otherwise.

    The call that the model itself makes is taken, with other ids.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = site.experts.register_forward_pre_hook(
        lambda _m, given, named: seen.append((given, named)), with_kwargs=True
    )
    try:
        run_model(model, family, [[0, 0]])
    finally:
        handle.remove()
    given, named = seen[0]
    if len(given) != 3 or named or not all(isinstance(each, Tensor) for each in given):
        return None
    hidden, ids, weights = given
    if (
        hidden.ndim != 2
        or ids.ndim != 2
        or ids.is_floating_point()
        or ids.dtype == torch.bool
        or weights.shape != ids.shape
    ):
        return None

    def call(tokens: int, experts: int) -> Callable[[], Any]:
        chosen = torch.arange(experts, device=ids.device, dtype=ids.dtype).repeat(tokens, 1)
        share = torch.full((tokens, experts), 1 / experts, device=ids.device, dtype=weights.dtype)
        rows = hidden[:1].repeat(tokens, 1)
        return lambda: site.experts(rows, chosen, share)

    try:
        by_tokens = {tokens: _median(call(tokens, 1), wait, seconds)[0] for tokens in _TOKENS}
        by_experts = {count: _median(call(1, count), wait, seconds)[0] for count in _EXPERTS if count <= experts}
        return by_tokens, by_experts
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None


def _slope(times: dict[int, float]) -> float:
    """Seconds for each more; the least squares of a straight line, 0 from a single point."""
    return float(np.polyfit(list(times), list(times.values()), 1)[0]) if len(times) > 1 else 0.0


def _held_bytes(site: RouterSite, experts: int) -> int | None:
    held = sum(p.numel() * p.element_size() for p in site.experts.parameters() if p.ndim >= 2)
    return held // experts or None


@contextmanager
def _watched(modules: dict[str, list[nn.Module]], wait: Callable[[], None]) -> Iterator[_Watch]:
    """Time every call of some modules; the device is waited for on both sides."""
    watch = _Watch()
    handles = []
    for name, group in modules.items():
        for module in group:
            started: list[float] = []

            def before(_module: nn.Module, _given: Any, started: list[float] = started) -> None:
                wait()
                started.append(time.perf_counter())

            def after(
                _module: nn.Module, _given: Any, _output: Any, name: str = name, started: list[float] = started
            ) -> None:
                wait()
                watch.seconds.setdefault(name, []).append(time.perf_counter() - started.pop())

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _waiter(device: torch.device) -> Callable[[], None]:
    return lambda: synchronise(device)


def _median(call: Callable[[], Any], wait: Callable[[], None], seconds: float) -> tuple[float, int]:
    """Median seconds of a call, and of how many, after some to warm up."""
    for _ in range(3):
        call()
    wait()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return float(np.median(times)), len(times)
