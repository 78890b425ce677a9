"""The simulator against a slow one written from its rules, and against cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation_reference import Reference
from simulation_worlds import demand_of, demands, fits, hardware, link, links, machine, machines, runs, topology_of
from specmoe.errors import SpecmoeError
from specmoe.offload.admission.registry import Admission
from specmoe.offload.capacity import bytes_L, units_L
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.profile import Link
from specmoe.offload.prefetchers.predictions import Predictions
from specmoe.offload.simulation.state import COUNTS
from specmoe.offload.simulator import Machine, Run, capacities, simulate


def referee(demand: Demand, of: Machine, run: Run) -> Reference:
    assert of.cost is not None
    return Reference(
        demand,
        capacities(of, demand).tolist(),
        of.hardware.links[0],
        of.expert_bytes,
        of.cost,
        run.predictions,
        run.admission.name if run.admission else "",
        run.admission.parameter if run.admission else 0.0,
        run.seconds,
    )


def compare(demand: Demand, of: Machine, run: Run) -> None:
    outcome, reference = simulate(demand, of, run), referee(demand, of, run)
    seconds = reference.run()
    assert outcome.counts == reference.counts
    assert outcome.largest == reference.largest
    assert outcome.seconds == pytest.approx(seconds, rel=1e-9)
    assert outcome.stall == pytest.approx(reference.stall, rel=1e-9, abs=1e-9)
    assert outcome.demand_bytes + outcome.prefetch_bytes == reference.moved
    passed = reference.moved / of.hardware.links[0].bandwidth
    assert outcome.link_seconds[0] == pytest.approx(passed, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_reference_without_prefetching(data: st.DataObject) -> None:
    demand = data.draw(demands())
    compare(demand, data.draw(machines(demand)), Run())


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_equals_the_reference_with_prefetching(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand))
    if fits(demand, of):
        compare(demand, of, data.draw(runs(demand, ("top", "confidence"))))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_reference_where_events_run_in_waves(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand))
    if not fits(demand, of):
        compare(demand, of, data.draw(runs(demand, ("top", "confidence"))))


def foreseen(events: int, wanted: dict[int, list[int]], horizon: int) -> Run:
    """``wanted``: event → experts that are foreseen there for ``horizon`` events later, with certainty."""
    experts = np.full((events, 1, 3), -1, dtype=np.int16)
    for event, listed in wanted.items():
        experts[event, 0, : len(listed)] = listed
    chance = np.where(experts >= 0, np.float32(1), np.float32(0))
    return Run("by hand", Predictions("by hand", (horizon,), experts, chance), Admission("top", 3.0))


def test_demand_by_hand() -> None:
    """Two slots: fixed costs overlap, bytes do not."""
    demand = demand_of([[[0, 1]], [[1, 2]]], topology_of(1, 4, 2))
    outcome = simulate(demand, machine(3, link(2.0, 0.5, parallelism=2)))
    # First token: 0.5 + 2 + 2 of transfers, second one: 0.5 + 2.
    assert outcome.stall_J == pytest.approx([4.5, 2.5])
    assert outcome.seconds == pytest.approx(2 * (0.23 + 1.0 + 2 * 0.37) + 7.0)
    single = simulate(demand, machine(3, link(2.0, 0.5)))
    assert single.stall_J == pytest.approx([5.0, 2.5])


def test_a_prefetch_by_hand() -> None:
    """Foreseen at the first router, begun when the demand has passed, joined while it is under way."""
    demand = demand_of([[[0]], [[1]]], topology_of(1, 4, 1))
    outcome = simulate(demand, machine(4, link(2.0)), foreseen(2, {0: [1]}, 1))
    # Routers at 1.23 and 4.83 s; the link is busy from 1.23 to 3.23 with the demand, then with the prefetch to 5.23.
    assert outcome.stall_J == pytest.approx([2.0, 0.4])
    assert outcome.counts["decode"] == {
        **dict.fromkeys(outcome.counts["decode"], 0),
        "accesses": 2,
        "misses": 1,
        "late": 1,
        "prefetched": 1,
    }


def test_a_prefetch_never_begins_before_there_was_room_for_it() -> None:
    """Both places are in use until the second router has run; what waits since the first can begin only then."""
    demand = demand_of([[[0, 1]], [[0, -1]], [[2, -1]]], topology_of(1, 4, 2))
    outcome = simulate(demand, machine(2, link(1.9)), foreseen(3, {0: [2]}, 2))
    second = 1.23 + 2 * 1.9 + 2 * 0.37 + 1.23
    third = second + 0.37 + 1.23
    assert outcome.count("late") == 1
    assert outcome.stall_J == pytest.approx([3.8, 0.0, second + 1.9 - third])


def test_what_waits_too_long_is_cancelled_and_moves_no_byte() -> None:
    demand = demand_of([[[0]], [[1]], [[2]]], topology_of(1, 4, 1))
    run = foreseen(3, {0: [3, 2, 1]}, 1)
    outcome = simulate(demand, machine(4, link(3.0)), run)
    assert outcome.count("prefetched") == 1
    assert outcome.count("cancelled") == 2
    assert outcome.link_seconds == pytest.approx((4 * 3.0,))
    assert simulate(demand, machine(4, link(3.0, depth=1)), run).count("refused") == 2


# Three tiers


def disk_and_bus(disk: float, bus: float, parallelism: int = 1) -> tuple[Link, Link]:
    slow = link(disk, parallelism=parallelism).model_copy(update={"name": "disk"})
    return slow, link(bus)


def test_three_tiers_by_hand() -> None:
    """The disk is read once, the bus as often as the device has let go of it."""
    demand = demand_of([[[0]], [[1]], [[0]], [[0]]], topology_of(1, 4, 1))
    disk, bus = disk_and_bus(10.0, 1.0)
    outcome = simulate(demand, machine(1, disk, bus, host_capacity=4))
    assert outcome.stall_J == pytest.approx([11.0, 11.0, 1.0, 0.0])
    assert outcome.link_seconds == pytest.approx((20.0, 3.0))
    assert outcome.host_counts["decode"]["misses"] == 2
    assert outcome.host_counts["decode"]["hits"] == 1


def test_a_prefetch_passes_host_and_bus_by_hand() -> None:
    demand = demand_of([[[0]], [[1]]], topology_of(1, 4, 1))
    disk, bus = disk_and_bus(2.0, 0.5)
    outcome = simulate(demand, machine(2, disk, bus, host_capacity=4), foreseen(2, {0: [1]}, 1))
    # Router 1.23; demand: disk to 3.23, bus to 3.73. Prefetch: disk to 5.23, bus to 5.73. Second router: 5.33.
    assert outcome.host_counts["decode"]["prefetched"] == outcome.host_counts["decode"]["used"] == 1
    assert outcome.count("prefetched") == outcome.count("late") == outcome.count("misses") == 1
    assert outcome.stall_J == pytest.approx([2.5, 0.4])


def test_an_expert_that_the_host_has_does_not_wait_for_the_disk() -> None:
    """First come, first served on the bus: what lies in the host comes first there, whatever its number."""
    demand = demand_of([[[1, -1]], [[2, 0]], [[1, 3]]], topology_of(1, 4, 2))
    disk, bus = disk_and_bus(10.0, 1.0)
    outcome = simulate(demand, machine(2, disk, bus, host_capacity=4))
    assert outcome.count("misses") == 5
    # 1 passes the bus while 3 is read: 10 + 1, not 10 + 1 + 1.
    assert outcome.stall_J[2] == pytest.approx(11.0)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_host_that_holds_all_reads_the_disk_once(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand))
    slow = data.draw(links()).model_copy(update={"name": "disk"})
    everything = int(units_L(demand.topology, of.expert_bytes).max()) * max(
        demand.topology.layers * demand.topology.experts, 8
    )
    of = replace(of, hardware=hardware(slow, of.hardware.links[0]), host_capacity=everything)
    outcome = simulate(demand, of)
    host = {name: sum(phase[name] for phase in outcome.host_counts.values()) for name in COUNTS}
    assert host["misses"] == len(np.unique(demand.keys_M))
    assert host["evictions"] == 0
    size_L = bytes_L(demand.topology, of.expert_bytes)
    read = size_L[np.unique(demand.keys_M) // demand.topology.experts].sum()
    assert outcome.link_seconds[0] == pytest.approx(read / slow.bandwidth)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_disk_that_takes_no_time_equals_two_tiers(data: st.DataObject) -> None:
    demand = data.draw(demands())
    of = data.draw(machines(demand))
    run = data.draw(st.one_of(st.just(Run()), runs(demand, ("top", "confidence"))))
    free = Link(name="free", bandwidth=1e24, latency=0.0, parallelism=4, queue_depth=1 << 10)
    bus = of.hardware.links[0].model_copy(update={"queue_depth": 1 << 10})
    two = replace(of, hardware=hardware(bus))
    host = 64 * int(units_L(demand.topology, of.expert_bytes).max())
    three = replace(of, hardware=hardware(free, bus), host_capacity=host)
    below, above = simulate(demand, two, run), simulate(demand, three, run)
    if run.admission is None:
        assert above.counts == below.counts
        assert above.seconds == pytest.approx(below.seconds, rel=1e-12)
    # A prefetch that comes to the host within a moment still has to be asked for twice.
    names = ("accesses", "evictions") if run.admission is None else ("accesses",)
    assert all(above.count(name) == below.count(name) for name in names)


def test_a_host_that_is_too_small() -> None:
    topology = topology_of(1, 8, 2)
    demand = demand_of([[[0, 1]], [[2, 3]], [[0, 5]]], topology)
    disk, bus = disk_and_bus(1.0, 1.0, parallelism=2)
    with pytest.raises(SpecmoeError, match="at least 4"):
        simulate(demand, machine(4, disk, bus, host_capacity=3))
    outcome = simulate(demand, machine(4, disk, bus, host_capacity=4))
    assert outcome.count("misses") == 5  # 0 is still there


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"capacity": 1}, "at least 2"),
        ({"capacity": 3, "per_layer": True}, "at least 4"),
        ({"policy": "belady-bypass"}, "cannot be simulated"),
        ({"policy": "nothing"}, "cannot be simulated"),
        ({"host_policy": "belady"}, "use lru"),
    ],
)
def test_what_cannot_be_simulated(changes: dict[str, object], says: str) -> None:
    demand = demand_of([[[0, 1], [2, 3]]], topology_of(2, 4, 2))
    with pytest.raises(SpecmoeError, match=says):
        simulate(demand, replace(machine(4, link(1.0)), **changes))  # type: ignore[arg-type]


def test_predictions_of_another_demand() -> None:
    demand = demand_of([[[0]], [[1]]], topology_of(1, 4, 1))
    with pytest.raises(SpecmoeError, match="5 events"):
        simulate(demand, machine(4, link(1.0)), foreseen(5, {}, 1))


def test_times_of_documents_and_tokens() -> None:
    ids = [np.zeros((3, 1, 1), dtype=np.int16), np.ones((2, 1, 1), dtype=np.int16)]
    phases = [np.array([0, 0, 1], dtype=np.uint8), np.array([1, 1], dtype=np.uint8)]
    demand = Demand.of_records(topology_of(1, 2, 1), ids, phases)
    outcome = simulate(demand, machine(2, link(2.0)))
    prompt, token = 0.23 + 1.13 + 0.44 + 2.0, 0.23 + 1.0 + 0.37
    assert outcome.group_seconds(demand) == pytest.approx([prompt + token, 2 * token + 2.0])
    assert outcome.first_token_seconds(demand) == pytest.approx([prompt])
    assert outcome.output_token_seconds(demand) == pytest.approx([token, token + 2.0, token])
    assert outcome.hit_rate == pytest.approx(2 / 4)
    assert outcome.demand_bytes == 2_000_000
    assert outcome.tokens_per_second == pytest.approx(5 / outcome.seconds)
