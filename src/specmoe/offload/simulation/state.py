"""What a simulation keeps while it runs: flat records, so that compiled code can change them in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.capacity import ExpertBytes, bytes_L, units_L
from specmoe.offload.compiled import Records
from specmoe.offload.hardware.profile import Link
from specmoe.offload.policies.state import PolicyState, make_state
from specmoe.topology import Topology

__all__ = ["COUNTS", "Log", "Tier", "counted", "make_log", "make_tier"]

# Columns of the table of counts; all of them count experts by layer, so times the size of a layer's they are bytes.
COUNTS = (
    "accesses",  # experts that events needed
    "hits",  # of them, those that were there
    "misses",  # of them, those that were fetched because they were needed
    "late",  # of them, those whose prefetch was still under way
    "prefetched",  # prefetches that were started
    "used",  # prefetched experts that were there when they were first needed
    "wasted",  # prefetched experts that were evicted, or left at the end, without having been needed
    "cancelled",  # prefetches that waited until it was too late, and moved no byte
    "refused",  # prefetches that found no place in the queue
    "evictions",
)
ACCESSES, HITS, MISSES, LATE, PREFETCHED, USED, WASTED, CANCELLED, REFUSED, EVICTIONS = range(len(COUNTS))
# Kinds of spans in the log of a timeline.
LAYER, EXPERTS, STALL, DEMAND, PREFETCH = range(5)
NEVER = np.iinfo(np.int64).max

TIER = np.dtype(
    [
        ("latency", "f8"),
        ("bus", "f8"),
        ("busy", "f8"),
        ("policy", "i8"),
        ("waiting", "i8"),
        ("flights", "i8"),
        ("held", "i8"),
        ("largest", "i8"),
        ("soonest", "i8"),
    ],
    align=True,
)
COPY = np.dtype(
    [
        ("arrival", "f8"),
        ("chance", "f8"),
        ("due", "i8"),
        ("evicted", "i8"),
        ("seconds", "f8"),
        ("first_token", "f8"),
        ("token", "f8"),
        ("waits", "i4"),
        ("unused", "?"),
    ],
    align=True,
)
WAIT = np.dtype([("due", "i8"), ("chance", "f8"), ("ready", "f8"), ("seconds", "f8"), ("key", "i4")], align=True)


class Tier(NamedTuple):
    """A cache and the link that fills it.

    A transfer takes one of the link's slots; its fixed cost overlaps with that of others, its bytes do not.

    Attributes:
        own: one record. latency: fixed cost of a transfer, s. bus: when the last bytes have passed. busy: seconds in
            which bytes passed. policy: number of the eviction policy. waiting: length of the queue. flights: prefetches
            under way. held: experts held or on their way, largest: most of them at once. soonest: the first event that
            needs what was evicted since an oracle last looked.
        cache: the policy's state.
        copies: records [N]. chance, due: as foreseen last, and for which event. arrival: when a prefetch under way
            arrives, inf for none. evicted: the event at which a prefetch pushed the expert out, negative for none.
            seconds: in which it passes the bus. first_token, token: in which it computes one token, and each further
            one; on the device only. unused: brought by a prefetch and not needed since. waits: where it stands in the
            queue, negative for nowhere.
        waiting: records, the queue. due: event it is for. chance: of being needed. ready: when it may start. seconds:
            in which it passes the bus. key.
        slots: float64 [parallelism], when each slot is free. flying: int32, the experts under way.
        counts: int64 [2, L, len(COUNTS)], prefill and decode.
    """

    own: Records
    cache: PolicyState
    copies: Records
    waiting: Records
    slots: Any
    flying: NDArray[np.int32]
    counts: NDArray[np.int64]


class Log(NamedTuple):
    """Spans of the first part of a timeline.

    what: int32 [spans, 4]: kind; 0 for the device or 1, 2 for the link into host and device; layer or expert; event.
    when: float64 [spans, 2], begin and end in seconds. size: int64 [1], spans kept.
    """

    what: NDArray[np.int32]
    when: NDArray[np.float64]
    size: NDArray[np.int64]


def make_tier(
    policy: int, topology: Topology, capacity_G: NDArray[np.int64], link: Link, expert_bytes: ExpertBytes
) -> Tier:
    """An empty cache behind an idle link.

    Args:
        policy: number of the eviction policy. capacity_G: int64, units that each cache holds: one cache for all
            layers, or one a layer. expert_bytes: of an expert; by layer where they differ, and units are bytes.
    """
    keys = topology.layers * topology.experts
    layer_N = np.repeat(np.arange(topology.layers, dtype=np.int32), topology.experts)
    group_N = layer_N if len(capacity_G) == topology.layers else np.zeros_like(layer_N)
    own = np.zeros(1, dtype=TIER)
    own["latency"], own["policy"] = link.latency, policy
    own["soonest"] = NEVER
    copies = np.zeros(keys, dtype=COPY)
    copies["arrival"], copies["evicted"], copies["waits"] = np.inf, -1, -1
    copies["seconds"] = (bytes_L(topology, expert_bytes) / link.bandwidth)[layer_N]
    return Tier(
        own=own,
        cache=make_state(group_N, layer_N, capacity_G, topology.layers, units_L(topology, expert_bytes)),
        copies=copies,
        waiting=np.zeros(link.queue_depth, dtype=WAIT),
        slots=np.zeros(link.parallelism),
        flying=np.zeros(keys, dtype=np.int32),
        counts=np.zeros((2, topology.layers, len(COUNTS)), dtype=np.int64),
    )


def make_log(spans: int) -> Log:
    """Room for so many spans; what does not fit is not kept."""
    return Log(np.zeros((spans, 4), dtype=np.int32), np.zeros((spans, 2)), np.zeros(1, dtype=np.int64))


def counted(tier: Tier, phase: int) -> dict[str, int]:
    """The counts of one phase, by name."""
    return dict(zip(COUNTS, tier.counts[phase].sum(0).tolist(), strict=True))
