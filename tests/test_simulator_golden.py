"""A small real trace: counts and seconds that must not move, and what knowing the future buys."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from golden_runs import PATH, as_kept, golden_demand, golden_machine, golden_outcomes
from specmoe.offload.admission.registry import parse_admission
from specmoe.offload.cache import replay_cache
from specmoe.offload.demand import Demand
from specmoe.offload.prefetchers.predictions import perfect, shuffled, with_recall
from specmoe.offload.simulator import Machine, Run, least_seconds, simulate


def bound(demand: Demand, of: Machine) -> float:
    best = replay_cache(demand, "belady-bypass", of.capacity, keep_misses=True)
    event_M = np.repeat(np.arange(demand.events), np.diff(demand.starts_V))
    missed_V = np.bincount(event_M, weights=best.missed_M, minlength=demand.events).astype(np.int64)
    return least_seconds(demand, of, missed_V)


def test_counts_and_seconds_stay() -> None:
    """After a change that is meant: ``python tests/golden_runs.py``."""
    kept = json.loads(PATH.read_text())["runs"]
    outcomes = golden_outcomes()
    assert list(outcomes) == list(kept)
    for name, outcome in outcomes.items():
        now = as_kept(outcome)
        for part in ("seconds", "stall"):
            assert now.pop(part) == pytest.approx(kept[name].pop(part), rel=1e-9), name
        assert now == kept[name], name


@pytest.mark.parametrize("seconds", [2e-4, 1.5e-3, 5e-3])
@pytest.mark.parametrize("capacity", [16, 32, 96])
@pytest.mark.parametrize("batch", [1, 4])
def test_nobody_beats_the_oracle(seconds: float, capacity: int, batch: int) -> None:
    """The oracle is greedy and not proven to be optimal; the bound is. Here it was beaten once, by 0.02 %."""
    demand = golden_demand(batch)
    of = golden_machine(seconds, capacity, policy="belady")
    oracle, none = simulate(demand, of, Run.oracle(demand)).seconds, simulate(demand, of).seconds
    assert bound(demand, of) <= oracle <= none
    seen = with_recall(demand, (1, 2, 3), 0.6)
    for found in (seen, with_recall(demand, (1,), 0.9), shuffled(seen, 8), perfect(demand, (1, 2, 3, 4))):
        for policy in ("lru", "s3-fifo", "least-stale", "predicted"):
            for rule in ("top:2", "confidence:0.5", "expected-value"):
                online = golden_machine(seconds, capacity, policy=policy)
                outcome = simulate(demand, online, Run(found.name, found, parse_admission(rule, 2)))
                assert outcome.seconds >= oracle * (1 - 1e-3), (found.name, policy, rule)


def test_perfect_predictions_approach_the_oracle_as_they_reach_further() -> None:
    demand = golden_demand()
    of = golden_machine(1.5e-3, 64, policy="belady")
    oracle, none = simulate(demand, of, Run.oracle(demand)).seconds, simulate(demand, of).seconds
    reached = []
    for furthest in (1, 2, 4, 8):
        found = perfect(demand, tuple(range(1, furthest + 1)))
        reached.append(simulate(demand, of, Run("perfect", found, parse_admission("top:2", 2))).seconds)
    # Reaching further is not always better: the queue keeps what is due first, but places are taken in its order.
    assert all(later <= sooner * 1.005 for sooner, later in itertools.pairwise(reached))
    assert (none - reached[-1]) >= 0.85 * (none - oracle)


def test_the_null_control_gains_nothing() -> None:
    """Shuffled predictions of a good predictor are worse than none wherever the link matters."""
    demand = golden_demand()
    null = shuffled(with_recall(demand, (1, 2), 0.9), 8)
    for seconds in (5e-4, 1.5e-3, 5e-3):
        of = golden_machine(seconds)
        assert (
            simulate(demand, of, Run("null", null, parse_admission("top:2", 2))).seconds > simulate(demand, of).seconds
        )
