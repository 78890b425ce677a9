"""Streams of expert accesses written out by hand, and the same streams as a file that libCacheSim reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.demand import Demand
from specmoe.topology import Topology
from specmoe.trace.record import Phase

# What libCacheSim calls oracleGeneral; a next access of -1 is none.
_REQUEST = np.dtype([("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")])


def demand_of(events: Sequence[Sequence[int]], layers: int, experts: int, prefill_steps: int = 0) -> Demand:
    """A stream from the keys (layer·E + expert) of each event; event v is layer v % L."""
    assert len(events) % layers == 0
    steps = len(events) // layers
    keys = [sorted(set(event)) for event in events]
    flat = np.array([key for event in keys for key in event], dtype=np.int32)
    phase = np.full(steps, Phase.DECODE, dtype=np.uint8)
    phase[:prefill_steps] = Phase.PREFILL
    return Demand(
        topology=Topology(model_id="by-hand", layers=layers, experts=experts, top_k=1, hidden_size=0),
        replay="trace",
        batch=1,
        keys_M=flat,
        tokens_M=np.ones(len(flat), dtype=np.int32),
        starts_V=np.cumsum([0, *map(len, keys)], dtype=np.int64),
        phase_J=phase,
        group_J=np.zeros(steps, dtype=np.int32),
        order_N=np.arange(steps),
        first_J=np.arange(steps + 1),
    )


def single_accesses(keys: NDArray[np.int32], universe: int) -> Demand:
    """Every access an event of its own, in a model of one layer."""
    count = len(keys)
    return Demand(
        topology=Topology(model_id="single", layers=1, experts=universe, top_k=1, hidden_size=0),
        replay="trace",
        batch=1,
        keys_M=np.ascontiguousarray(keys, dtype=np.int32),
        tokens_M=np.ones(count, dtype=np.int32),
        starts_V=np.arange(count + 1, dtype=np.int64),
        phase_J=np.full(count, Phase.DECODE, dtype=np.uint8),
        group_J=np.zeros(count, dtype=np.int32),
        order_N=np.arange(count),
        first_J=np.arange(count + 1),
    )


def write_requests(demand: Demand, path: Path) -> None:
    """A stream of single accesses as libCacheSim's binary format, each of one byte."""
    requests = np.zeros(demand.accesses, dtype=_REQUEST)
    requests["key"] = demand.keys_M + 1
    requests["size"] = 1
    requests["next"] = np.where(demand.next_use_M < demand.events, demand.next_use_M + 1, -1)
    requests.tofile(path)
