"""What the verdict needs beyond a simulation: other links, other capacities, smaller experts, other precisions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.offload.admission.registry import Admission
from specmoe.offload.capacity import all_units, unit_bytes
from specmoe.offload.demand import Demand
from specmoe.offload.prefetchers.predictions import Predictions, with_recall
from specmoe.offload.running import scaled
from specmoe.offload.simulator import Machine, Outcome, Run, least_capacity, simulate, simulate_oracle
from specmoe.offload.words import capacity_text
from specmoe.results import validated
from specmoe.schema import FileModel

__all__ = ["Cell", "Fewer", "Precision", "Sensitivity", "measure_sensitivity"]

_FORMAT = "specmoe-sensitivity"
_VERSION = 2
FACTORS = (0.5, 1.0, 2.0, 4.0)
CAPACITIES = (0.5, 1.0, 1.5, 2.0)
# A cache that holds nearly everything says nothing.
_MOST = 0.95
BITS = (8.0, 4.0)
# What published experts are stored in, unless told otherwise.
_STORED_BITS = 16.0
RECALLS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Cell(FileModel):
    """One place of the table. Seconds of the whole demand.

    factor: on the links' bandwidth. capacity: experts held, or bytes where they differ in size. none, oracle: without
    prefetching, and with the oracle. predictor: with the best predictor; None where there is none.
    group_seconds: of ``none``, by batch of sequences.
    """

    factor: float
    capacity: int
    none: float
    oracle: float
    predictor: float | None
    group_seconds: tuple[float, ...] = ()


class Fewer(FileModel):
    """Without prefetching, experts stored in ``bits`` a weight; ``capacity``: of the same bytes, in the same unit."""

    bits: float
    capacity: int
    seconds: float
    group_seconds: tuple[float, ...]


class Precision(FileModel):
    """Prefetching K made-up guesses an event of which the share ``recall`` is right; its gain over none."""

    recall: float
    gain: float


class Sensitivity(FileModel):
    """All of them. fingerprint: of what they depend on."""

    format: str = _FORMAT
    version: int = _VERSION
    fingerprint: str
    cells: tuple[Cell, ...]
    fewer: tuple[Fewer, ...]
    precisions: tuple[Precision, ...]


def measure_sensitivity(
    demand: Demand,
    machine: Machine,
    policy: str,
    horizons: tuple[int, ...],
    foreseen: Callable[[], Predictions] | None,
    admission: Admission,
    seconds: float,
    path: Path,
    depends_on: str,
    *,
    on_run: Callable[[int, int, str], None] = lambda *_: None,
) -> Sensitivity:
    """Run the grid and the rest, or read them where they were run before under the same conditions.

    Args:
        policy: of eviction. foreseen: gives the best predictor's predictions; None for no predictor.
        admission: of its prefetches. seconds: that a prediction takes.
        path: the file that they are kept in. depends_on: everything that is not said by the other arguments.
    """
    parts = (_VERSION, depends_on, machine, policy, horizons, str(admission), seconds, FACTORS, CAPACITIES, BITS)
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    kept = _kept(path, fingerprint)
    if kept is not None:
        return kept
    machine = replace(machine, policy=policy)
    sizes = _capacities(machine, demand)
    total = len(FACTORS) * len(sizes) + len(BITS) + len(RECALLS)
    done = 0
    predictions = foreseen() if foreseen is not None else None
    cells = []
    for factor in FACTORS:
        for capacity in sizes:
            on_run(done, total, f"{factor:g} × the bandwidth, {capacity_text(capacity, machine.expert_bytes)}")
            here = scaled(replace(machine, capacity=capacity), factor)
            run = None if predictions is None else Run("predictor", predictions, admission, seconds=seconds)
            none = simulate(demand, here)
            cells.append(
                Cell(
                    factor=factor,
                    capacity=capacity,
                    none=none.seconds,
                    oracle=simulate_oracle(demand, here).seconds,
                    predictor=None if run is None else simulate(demand, here, run).seconds,
                    group_seconds=_by_group(none, demand),
                )
            )
            done += 1
    fewer = []
    for bits in BITS:
        on_run(done, total, f"{bits:g} bits a weight")
        stored = machine.expert_bytes
        size = _fewer(stored, bits) if isinstance(stored, int) else tuple(_fewer(each, bits) for each in stored)
        capacity = min(all_units(demand.topology, size), machine.held_bytes // unit_bytes(size))
        outcome = simulate(demand, replace(machine, expert_bytes=size, capacity=capacity))
        fewer.append(
            Fewer(bits=bits, capacity=capacity, seconds=outcome.seconds, group_seconds=_by_group(outcome, demand))
        )
        done += 1
    none = simulate(demand, machine).seconds
    precisions = []
    for recall in RECALLS:
        on_run(done, total, f"made-up predictions, {recall:.0%} right")
        run = Run("recall", with_recall(demand, horizons, recall), Admission("top", float(demand.topology.experts)))
        precisions.append(Precision(recall=recall, gain=none / simulate(demand, machine, run).seconds - 1))
        done += 1
    on_run(total, total, "")
    found = Sensitivity(fingerprint=fingerprint, cells=tuple(cells), fewer=tuple(fewer), precisions=tuple(precisions))
    write_json(path, found.model_dump(mode="json"))
    return found


def _fewer(size: int, bits: float) -> int:
    return max(1, round(size * bits / _STORED_BITS))


def _by_group(outcome: Outcome, demand: Demand) -> tuple[float, ...]:
    return tuple(outcome.group_seconds(demand).round(10).tolist())


def _capacities(machine: Machine, demand: Demand) -> Sequence[int]:
    topology = demand.topology
    everything = all_units(topology, machine.expert_bytes)
    least = least_capacity(machine, topology)
    most = max(machine.capacity, int(_MOST * everything))
    return sorted({min(most, max(least, round(machine.capacity * factor))) for factor in CAPACITIES})


def _kept(path: Path, fingerprint: str) -> Sensitivity | None:
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise SpecmoeError(f"{path} is not a sensitivity file; give another folder with --out")
    if content.get("version") != _VERSION or content.get("fingerprint") != fingerprint:
        return None
    return validated(Sensitivity, content, path)
