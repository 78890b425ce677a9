"""One simulated run: a demand, a machine, a cache, a prefetcher; and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from specmoe.errors import SpecmoeError
from specmoe.offload.admission.registry import ADMISSIONS, Admission
from specmoe.offload.capacity import ExpertBytes, all_units, bytes_L, split_by_layer, unit_bytes, units_L
from specmoe.offload.compiled import keeping
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.cost import StepCost, step_cost
from specmoe.offload.hardware.profile import Hardware
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.prefetchers.predictions import Predictions
from specmoe.offload.simulation.state import COUNTS, Log, counted, make_log, make_tier
from specmoe.offload.simulation.timeline import run_timeline
from specmoe.offload.simulation.world import ESTIMATES, Plan, Stream, Times, World
from specmoe.topology import Topology
from specmoe.trace.record import Phase

__all__ = [
    "ORACLE_PASSES",
    "Machine",
    "Outcome",
    "Run",
    "least_capacity",
    "least_seconds",
    "simulate",
    "simulate_oracle",
]

# How far oracles look ahead, in passes through the layers; besides, one that sees everything.
ORACLE_PASSES = (0.25, 0.5, 1, 4, 16)


@dataclass(frozen=True)
class Machine:
    """Where experts lie and how fast they travel.

    Attributes:
        hardware: its links and its device.
        expert_bytes: size of one expert as it is stored and moved; of each layer where they differ.
        capacity: units that the device holds, over all layers: experts, or bytes where their sizes differ (see
            ``offload.capacity``). per_layer: each layer has its own part of them.
        host_capacity: units that the host holds, where there are three tiers.
        policy, host_policy: what is evicted, on the device and on the host.
        cost: compute times; worked out from the hardware where None.
    """

    hardware: Hardware
    expert_bytes: ExpertBytes
    capacity: int
    per_layer: bool = False
    policy: str = "lru"
    host_capacity: int | None = None
    host_policy: str = "lru"
    cost: StepCost | None = None

    @property
    def tiers(self) -> int:
        """Two or three."""
        return len(self.hardware.links) + 1

    @property
    def held_bytes(self) -> int:
        """``capacity`` in bytes."""
        return self.capacity * unit_bytes(self.expert_bytes)


@dataclass(frozen=True)
class Run:
    """What is prefetched.

    Attributes:
        predictions: what is foreseen. admission: what of it is fetched; None for nothing.
        reach: for the oracle, events that it looks ahead; 0 where predictions are used.
        seconds: from a router's output to the prediction; it delays prefetches and not the model.
    """

    name: str = "none"
    predictions: Predictions = field(default_factory=Predictions.none)
    admission: Admission | None = None
    reach: int = 0
    seconds: float = 0.0

    @classmethod
    def oracle(cls, demand: Demand) -> Run:
        """Knows everything, fetches in the order of need as early as there is room. With Belady's eviction."""
        return cls(name="oracle", reach=demand.events)


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Counts are experts; times are seconds.

    Attributes:
        name: of the prefetcher. policy: of eviction. admission: of prefetches, empty for none.
        expert_bytes: size of an expert; of each layer where they differ. tokens, steps, events: of the demand.
        seconds: the whole run. compute: of it, computing. stall: of it, waiting for experts.
        link_seconds: that bytes passed on each link, from the lowest tier up.
        counts, host_counts: phase name → count name → experts; see ``simulation.state.COUNTS``.
        largest: most experts held at once. capacity: units that could be.
        counts_LC: int64, the device's counts by layer, of both phases.
        end_J, stall_J: when each step ended and how long it waited, float64.
        log: spans of the beginning, where they were asked for.
    """

    name: str
    policy: str
    admission: str
    expert_bytes: ExpertBytes
    tokens: int
    steps: int
    events: int
    seconds: float
    compute: float
    stall: float
    link_seconds: tuple[float, ...]
    counts: dict[str, dict[str, int]]
    host_counts: dict[str, dict[str, int]]
    largest: int
    capacity: int
    end_J: NDArray[np.float64] = field(repr=False)
    stall_J: NDArray[np.float64] = field(repr=False)
    counts_LC: NDArray[np.int64] = field(repr=False)
    log: Log | None = field(default=None, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the whole run's time."""
        return self.tokens / self.seconds if self.seconds > 0 else float("inf")

    def count(self, name: str) -> int:
        """A count on the device, of both phases."""
        return sum(phase[name] for phase in self.counts.values())

    @property
    def hit_rate(self) -> float:
        """Of the experts that were needed, the share that was there."""
        return self.count("hits") / max(1, self.count("accesses"))

    def bytes_of(self, name: str) -> int:
        """A count on the device, of both phases, in bytes."""
        size_L = np.broadcast_to(np.array(self.expert_bytes, dtype=np.int64), len(self.counts_LC))
        return int((self.counts_LC[:, COUNTS.index(name)] * size_L).sum())

    @property
    def demand_bytes(self) -> int:
        """Moved to the device because they were needed."""
        return self.bytes_of("misses")

    @property
    def prefetch_bytes(self) -> int:
        """Moved to the device because they were foreseen."""
        return self.bytes_of("prefetched")

    def group_seconds(self, demand: Demand) -> NDArray[np.float64]:
        """Time of each batch of sequences: [G]. With one sequence at a time, of each document."""
        lasting_J = np.diff(self.end_J, prepend=0.0)
        return np.bincount(demand.group_J, weights=lasting_J).astype(np.float64)

    def first_token_seconds(self, demand: Demand) -> NDArray[np.float64]:
        """Time to first token of each batch of sequences that has a prompt: [G']."""
        lasting_J = np.diff(self.end_J, prepend=0.0)
        reading_J = demand.phase_J == Phase.PREFILL
        seconds = np.bincount(demand.group_J, weights=lasting_J * reading_J)
        return seconds[np.bincount(demand.group_J, weights=reading_J) > 0].astype(np.float64)

    def output_token_seconds(self, demand: Demand) -> NDArray[np.float64]:
        """Time of each step that writes: [J']."""
        return np.diff(self.end_J, prepend=0.0)[demand.phase_J == Phase.DECODE]


def stream_of(demand: Demand) -> Stream:
    """The demand as compiled code takes it."""
    return Stream(
        demand.topology.layers,
        demand.topology.experts,
        demand.keys_M,
        demand.tokens_M,
        demand.starts_V,
        demand.next_use_M,
        demand.phase_J,
        np.diff(demand.first_J),
    )


def capacities(machine: Machine, demand: Demand) -> NDArray[np.int64]:
    """Units that each of the device's caches holds: one number, or one a layer.

    Raises:
        SpecmoeError: less than a token needs, or a policy that cannot be.
    """
    topology, size, least = demand.topology, machine.expert_bytes, least_capacity(machine, demand.topology)
    held_G = np.array([min(machine.capacity, all_units(topology, size))], dtype=np.int64)
    needed_G = np.array([least], dtype=np.int64)
    if machine.per_layer:
        held_G = split_by_layer(topology, machine.capacity, size)
        needed_G = topology.top_k * units_L(topology, size)
    if (held_G < needed_G).any():
        unit = "experts" if isinstance(size, int) else "bytes"
        raise SpecmoeError(
            f"a cache of {machine.capacity} {unit}{' split by layers' if machine.per_layer else ''} is too small: a "
            f"token needs {topology.top_k} experts of a layer at once; give at least {least} {unit}"
        )
    return held_G


def least_capacity(machine: Machine, topology: Topology) -> int:
    """Units that suffice for one token of every layer, in a machine's kind of cache."""
    needed_L = topology.top_k * units_L(topology, machine.expert_bytes)
    if not machine.per_layer:
        return int(needed_L.max())
    everything = all_units(topology, machine.expert_bytes)
    whole_L = units_L(topology, machine.expert_bytes) * topology.experts_L
    return max(-(-int(needed) * everything // int(whole)) for needed, whole in zip(needed_L, whole_L, strict=True))


def simulate(demand: Demand, machine: Machine, run: Run | None = None, *, spans: int = 0) -> Outcome:
    """Run a demand through a machine.

    Args:
        run: what is prefetched; None for nothing.
        spans: how many spans of the timeline's beginning to keep.

    Raises:
        SpecmoeError: a cache that is too small, a policy that cannot be used so, or predictions of another demand.
    """
    run = run or Run()
    topology, links = demand.topology, machine.hardware.links
    _check(demand, machine, run)
    cost = machine.cost or step_cost(machine.hardware, topology, machine.expert_bytes)
    device = make_tier(
        POLICIES[machine.policy].number, topology, capacities(machine, demand), links[-1], machine.expert_bytes
    )
    device.copies["first_token"] = np.repeat(cost.expert_L(topology.layers), topology.experts)
    device.copies["token"] = np.repeat(cost.token_L(topology.layers), topology.experts)
    device.cache.keys["next_use"][: len(demand.first_use)] = demand.first_use
    host = device
    if machine.tiers == 3:
        everything = all_units(topology, machine.expert_bytes)
        host_capacity = np.array([min(machine.host_capacity or everything, everything)], dtype=np.int64)
        host = make_tier(POLICIES[machine.host_policy].number, topology, host_capacity, links[0], machine.expert_bytes)
    plan = Plan(
        horizons_H=np.array(run.predictions.horizons, dtype=np.int64),
        experts_VHB=run.predictions.experts_VHB,
        chance_VHB=run.predictions.chance_VHB,
        reach=run.reach,
        rule=run.admission.number if run.admission else ADMISSIONS["confidence"].number,
        parameter=run.admission.parameter if run.admission else 2.0,
        informed=POLICIES[machine.policy].needs == "predictor",
        clairvoyant=POLICIES[machine.policy].needs == "future",
    )
    times = Times(
        cost.layer_seconds,
        cost.token_layer_seconds,
        cost.other_seconds,
        run.seconds,
    )
    log = make_log(spans)
    end_J, stall_J = np.zeros(demand.steps), np.zeros(demand.steps)
    world = World(stream_of(demand), device, host, machine.tiers, times, plan, np.zeros(1, dtype=ESTIMATES), log)
    seconds = run_timeline(
        world,
        end_J,
        stall_J,
        np.zeros(topology.layers * topology.experts),
        np.zeros(2, dtype=np.int64),
        np.zeros(topology.experts, dtype=np.bool_),
        np.zeros(topology.experts),
    )
    tiers = [device] if machine.tiers == 2 else [host, device]
    return Outcome(
        name=run.name,
        policy=machine.policy,
        admission=str(run.admission) if run.admission else "",
        expert_bytes=machine.expert_bytes,
        tokens=demand.tokens,
        steps=demand.steps,
        events=demand.events,
        seconds=seconds,
        compute=compute_seconds(demand, cost),
        stall=float(stall_J.sum()),
        link_seconds=tuple(float(tier.own["busy"][0]) for tier in tiers),
        counts={phase.name.lower(): counted(device, phase) for phase in Phase},
        host_counts={phase.name.lower(): counted(host, phase) for phase in Phase} if machine.tiers == 3 else {},
        largest=int(device.own["largest"][0]),
        capacity=int(device.cache.caches["capacity"].sum()),
        end_J=end_J,
        stall_J=stall_J,
        counts_LC=device.counts.sum(0),
        log=log if spans else None,
    )


def simulate_oracle(demand: Demand, machine: Machine, *, spans: int = 0) -> Outcome:
    """The best that knowing everything brought: Belady's eviction and the fastest of several look-aheads.

    One that looks too far ahead fills a small host cache with what is due late. Greedy and therefore not proven to be
    the optimum, which :func:`least_seconds` bounds; where experts differ in size, neither is Belady's eviction.

    Raises:
        SpecmoeError: as :func:`simulate`.
    """
    reaches = {min(max(1, round(demand.topology.layers * passes)), demand.events) for passes in ORACLE_PASSES}
    machine, oracle = replace(machine, policy="belady"), Run.oracle(demand)
    outcomes = [
        simulate(demand, machine, replace(oracle, reach=reach), spans=spans)
        for reach in sorted(reaches | {demand.events})
    ]
    return min(outcomes, key=lambda outcome: outcome.seconds)


def _check(demand: Demand, machine: Machine, run: Run) -> None:
    predictions = run.predictions
    if run.admission is not None and len(predictions.experts_VHB) not in {0, demand.events}:
        raise SpecmoeError(
            f"predictions for {len(predictions.experts_VHB)} events do not go with a demand of {demand.events}"
        )
    for policy, where in ((machine.policy, "device"), (machine.host_policy, "host")):
        if policy not in POLICIES or policy == "belady-bypass":
            raise SpecmoeError(f"policy {policy!r} cannot be simulated with a link; see `specmoe simulate --help`")
        if where == "host" and POLICIES[policy].needs:
            raise SpecmoeError(f"policy {policy!r} needs to know more than the host's cache does; use lru there")
    if machine.tiers == 3 and machine.host_capacity is not None:
        largest = int(units_L(demand.topology, machine.expert_bytes).max())
        least = (demand.topology.top_k + machine.hardware.links[0].parallelism) * largest
        if machine.host_capacity < least:
            unit = "experts" if isinstance(machine.expert_bytes, int) else "bytes"
            raise SpecmoeError(f"a host cache of {machine.host_capacity} {unit} is too small; give at least {least}")


def compute_seconds(demand: Demand, cost: StepCost) -> float:
    """Computing alone, C: what the run would take if every expert were always there."""
    tokens_J = np.diff(demand.first_J)
    layers = demand.topology.layers
    outside = demand.steps * cost.other_seconds + layers * (
        demand.steps * cost.layer_seconds + float((tokens_J - 1).sum()) * cost.token_layer_seconds
    )
    if cost.expert_seconds_by_layer is None and cost.token_seconds_by_layer is None:
        extra = float(demand.tokens_M.sum()) - demand.accesses
        return outside + demand.accesses * cost.expert_seconds + extra * cost.token_seconds
    accesses_L, further_L = (counts_V.reshape(-1, layers).sum(0) for counts_V in _work(demand))
    return outside + float(accesses_L @ cost.expert_L(layers) + further_L @ cost.token_L(layers))


def _work(demand: Demand) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Experts of each event, and tokens that they serve beyond one each: [V]."""
    sizes_V = np.diff(demand.starts_V)
    event_M = np.repeat(np.arange(demand.events), sizes_V)
    further_V = np.bincount(event_M, weights=demand.tokens_M, minlength=demand.events) - sizes_V
    return sizes_V, further_V.astype(np.float64)


def least_seconds(demand: Demand, machine: Machine, loaded_V: NDArray[np.int64]) -> float:
    """A time that no prefetcher and no eviction can go below on this machine.

    Before an event is done, at least what no cache can do without up to there must have passed the last link; and
    computing goes one thing after the other.

    Args:
        loaded_V: int64, units that each event has to load: see :func:`specmoe.offload.bound.fewest_loads`.
    """
    cost = machine.cost or step_cost(machine.hardware, demand.topology, machine.expert_bytes)
    link, layers = machine.hardware.links[-1], demand.topology.layers
    tokens_V = np.repeat(np.diff(demand.first_J), layers)
    layer_V = cost.layer_seconds + (tokens_V - 1) * cost.token_layer_seconds
    layer_V[::layers] += cost.other_seconds
    sizes_V, further_V = _work(demand)
    experts_V = sizes_V * np.tile(cost.expert_L(layers), demand.steps)
    experts_V += further_V * np.tile(cost.token_L(layers), demand.steps)
    unit = unit_bytes(machine.expert_bytes)
    # So many bytes are at least so many transfers as if all were of the largest expert.
    transfers = unit / int(bytes_L(demand.topology, machine.expert_bytes).max())
    slot = (transfers * link.latency + unit / link.bandwidth) / link.parallelism
    return _least(layer_V, experts_V, loaded_V, unit / link.bandwidth, link.latency, slot)


@keeping()
def _least(
    layer_V: NDArray[np.float64],
    experts_V: NDArray[np.float64],
    loaded_V: NDArray[np.int64],
    bus: float,
    latency: float,
    slot: float,
) -> float:
    now, loaded = 0.0, 0
    for event in range(len(layer_V)):
        now += layer_V[event]
        loaded += loaded_V[event]
        if loaded_V[event]:
            now = max(now, latency + loaded * bus, loaded * slot)
        now += experts_V[event]
    return now
