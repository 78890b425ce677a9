"""Runs of a small real trace whose counts and seconds are kept in ``golden/simulation.json``.

The file also holds the routing: 96 tokens of each of six texts through the bundled model (8 layers, 16 experts,
top-2), a hexadecimal digit for each expert. Refresh counts and seconds with: ``python tests/golden_runs.py``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from simulation_worlds import hardware, link
from specmoe.offload.admission.registry import parse_admission
from specmoe.offload.demand import Demand
from specmoe.offload.hardware.cost import StepCost
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.prefetchers.predictions import perfect, shuffled, with_recall
from specmoe.offload.simulator import Machine, Outcome, Run, simulate
from specmoe.topology import Topology

PATH = Path(__file__).parent / "golden" / "simulation.json"
TOPOLOGY = Topology(model_id="olmoe-stdlib", layers=8, experts=16, top_k=2, hidden_size=128)
COST = StepCost(
    layer_seconds=1e-3, token_layer_seconds=1e-5, expert_seconds=2e-4, token_seconds=1e-5, other_seconds=5e-4
)


def golden_demand(batch: int = 1) -> Demand:
    """The six texts, of which the first 32 tokens are read and the others written."""
    routing = json.loads(PATH.read_text())["routing"]
    ids = [np.array([int(digit, 16) for digit in text], dtype=np.int16).reshape(96, 8, 2) for text in routing]
    phase = (np.arange(96) >= 32).astype(np.uint8)
    return Demand.of_records(TOPOLOGY, ids, [phase] * len(ids), batch=batch)


def golden_machine(seconds: float = 1.5e-3, capacity: int = 32, **changes: Any) -> Machine:
    """An expert of a million bytes takes ``seconds`` on the bus."""
    return Machine(hardware(link(seconds, 1e-4, parallelism=2)), 1_000_000, capacity, cost=COST, **changes)


def golden_outcomes() -> dict[str, Outcome]:
    """The runs, by name."""
    demand, batched = golden_demand(), golden_demand(batch=3)
    found = {
        f"none, {policy}": simulate(demand, golden_machine(policy=policy))
        for policy in POLICIES
        if policy != "belady-bypass"
    }
    found["none, lru, batch 3"] = simulate(batched, golden_machine())
    found["none, lru, per layer"] = simulate(demand, golden_machine(per_layer=True))
    seen, null = with_recall(demand, (1, 2), 0.6), shuffled(with_recall(demand, (1, 2), 0.6), 8)
    for rule in ("top:2", "confidence:0.5", "expected-value"):
        admission = parse_admission(rule, 2)
        found[f"recall 60%, {rule}"] = simulate(demand, golden_machine(), Run("seen", seen, admission))
        found[f"shuffled, {rule}"] = simulate(demand, golden_machine(), Run("null", null, admission))
    found["perfect, top:2"] = simulate(
        demand, golden_machine(), Run("perfect", perfect(demand, (1, 2, 3)), parse_admission("top:2", 2))
    )
    found["oracle"] = simulate(demand, golden_machine(policy="belady"), Run.oracle(demand))
    disk = link(6e-3, 2e-4, parallelism=4).model_copy(update={"name": "disk"})
    three = Machine(hardware(disk, link(1.5e-3)), 1_000_000, 32, host_capacity=64, cost=COST)
    found["none, three tiers"] = simulate(demand, three)
    return found


def as_kept(outcome: Outcome) -> dict[str, Any]:
    """What of a run the file holds."""
    return {
        "seconds": outcome.seconds,
        "stall": outcome.stall,
        "counts": outcome.counts,
        **({"host_counts": outcome.host_counts} if outcome.host_counts else {}),
    }


if __name__ == "__main__":
    content = json.loads(PATH.read_text())
    content["runs"] = {name: as_kept(outcome) for name, outcome in golden_outcomes().items()}
    PATH.write_text(json.dumps(content, indent=1) + "\n")
