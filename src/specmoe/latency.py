"""How long one prediction takes, asked for as an engine would: one event at a time."""

from __future__ import annotations

import time

import torch

from specmoe.dataset import Window
from specmoe.predictors.base import Observation, Predictor
from specmoe.results import Latency

__all__ = ["measure_latency", "observations_of"]


def observations_of(window: Window) -> list[Observation]:
    """The events of the first sequence of a window, in execution order."""
    _, tokens, layers, _ = window.router_BTLE.shape
    return [
        Observation(
            token_id=int(window.token_ids_BT[0, t]),
            layer=layer,
            expert_ids=window.expert_ids_BTLK[0, t, layer],
            router=window.router_BTLE[0, t, layer],
            hidden=None if window.hidden_BTLD is None else window.hidden_BTLD[0, t, layer],
        )
        for t in range(tokens)
        if window.valid_BT[0, t]
        for layer in range(layers)
    ]


@torch.no_grad()
def measure_latency(predictor: Predictor, window: Window, warmup: int = 24) -> Latency:
    """Time ``step`` over the events of a window's first sequence: one thread, batch 1, in its fastest form.

    That is the predictor's compiled form where it has one, else eager PyTorch. The first ``warmup`` events are not
    counted, compiling among them.
    """
    predictor.eval()
    compiled = predictor.compiled()
    stepper = compiled or predictor
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        state, times = stepper.start(), []
        for observation in observations_of(window):
            begin = time.perf_counter_ns()
            stepper.step(state, observation)
            times.append(time.perf_counter_ns() - begin)
    finally:
        torch.set_num_threads(threads)
    micros = torch.tensor(times[min(warmup, len(times) // 2) :], dtype=torch.float64) / 1000
    p50, p99 = torch.quantile(micros, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return Latency(p50_us=round(p50, 2), p99_us=round(p99, 2), events=len(micros), compiled=compiled is not None)
