"""The whole of ``specmoe simulate``: many runs over one demand on one machine, resumable, and their comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import specmoe
from specmoe.errors import SpecmoeError
from specmoe.files import disk_errors
from specmoe.locks import writes
from specmoe.offload.admission.registry import ADMISSIONS, parse_admission
from specmoe.offload.bound import fewest_loads
from specmoe.offload.cache import miss_ratio_curves
from specmoe.offload.capacity import ExpertBytes, all_units, held_at_share, parse_capacity, unit_bytes
from specmoe.offload.comparing import compared, resampling_units
from specmoe.offload.demand import Demand, Replay
from specmoe.offload.hardware.cost import step_cost
from specmoe.offload.hardware.profile import Hardware
from specmoe.offload.jobs import simulation_jobs
from specmoe.offload.policies.registry import POLICIES, policy_named
from specmoe.offload.prefetchers.loading import Candidate, Opened, open_trace
from specmoe.offload.results import (
    Curve,
    CurvePoint,
    DemandFacts,
    MachineFacts,
    PredictorFacts,
    RunResult,
    SimulationResults,
    kept_runs,
)
from specmoe.offload.running import Simulator
from specmoe.offload.simulator import Machine, capacities, compute_seconds, least_seconds
from specmoe.suite.assemble import made_now, trace_facts
from specmoe.suite.data import trace_fingerprint
from specmoe.topology import Topology
from specmoe.trace import Trace
from specmoe.trace.record import Phase

__all__ = ["CURVE_SHARES", "Settings", "chosen_documents", "opened", "simulate_trace"]

CURVE_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
_BEST_ADMISSION = "expected-value"


@dataclass(frozen=True)
class Settings:
    """What ``specmoe simulate`` is asked for.

    Attributes:
        hardware: the profile, overrides applied. changed: which they were.
        expert_bytes: None for what the trace says. capacity, host_capacity: as people write them.
        policy: of eviction. policies: of the curves and of the runs without prefetching; none for all.
        predictors: names or patterns; none for the usual ones. admissions: as people write them; none for all forms.
        horizons: None for those of the run. prediction_seconds: None for what was measured.
        part: ``test`` or ``all`` documents; None for test where the trace can be split, else all.
        max_tokens: whole documents up to so many tokens; at least one document.
        replay, batch, prefill_chunk: see :meth:`Demand.of_trace`.
    """

    hardware: Hardware
    changed: tuple[str, ...] = ()
    expert_bytes: int | None = None
    capacity: str = "25%"
    per_layer: bool = False
    host_capacity: str | None = None
    policy: str = "lru"
    policies: tuple[str, ...] = ()
    predictors: tuple[str, ...] = ()
    admissions: tuple[str, ...] = ()
    horizons: tuple[int, ...] | None = None
    prediction_seconds: float | None = None
    part: str | None = None
    max_tokens: int | None = None
    replay: Replay | None = None
    batch: int = 1
    prefill_chunk: int = 512


@writes("simulate")
def simulate_trace(
    trace: Path,
    out: Path,
    settings: Settings,
    *,
    run: Path | None = None,
    device: str = "cpu",
    timeline: int = 0,
    on_stage: Callable[[str], None] = lambda _: None,
    on_run: Callable[[int, int, str], None] = lambda *_: None,
) -> SimulationResults:
    """Simulate everything that was asked for and write ``out/simulation.json``.

    Killed and started again it goes on: every run is kept in the file as it ends, with a fingerprint of what it depends
    on.

    Args:
        run: folder of a finished ``specmoe train`` on this trace; None for training-free predictors only.
        timeline: spans of ``out/timeline.json``, the beginning of the best predictor's run; 0 for no such file.
        on_run: told of runs that are done, of all of them, and the next one's key.

    Raises:
        SpecmoeError: something that was asked for cannot be, a damaged trace or run, a full disk.
    """
    started = time.monotonic()
    path = out / "simulation.json"
    kept, curves, curves_fingerprint = kept_runs(path)
    topology = Trace.open(trace).topology
    machine = machine_of(settings, topology)
    policies = settings.policies or tuple(POLICIES)
    for name in (settings.policy, *policies):
        policy_named(name)
    asked = [parse_admission(text, topology.top_k) for text in settings.admissions or ADMISSIONS]
    admissions = list(dict.fromkeys(asked))
    chosen = next((each for each in admissions if each.name == _BEST_ADMISSION), admissions[0])

    on_stage("reading the trace")
    found = opened(trace, settings, run, on_stage)
    documents = chosen_documents(found, settings.max_tokens)
    demand = Demand.of_trace(
        found.trace, documents, replay=settings.replay, batch=settings.batch, prefill_chunk=settings.prefill_chunk
    )
    candidates, horizons = found.candidates, found.horizons
    jobs = simulation_jobs(
        settings.policy,
        policies,
        candidates,
        admissions,
        chosen,
        found.control,
        all_admissions=bool(settings.admissions),
    )
    common = _common(found.trace, documents, demand, machine, settings, horizons)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    left_out = dict(found.left_out)
    if "predicted" in policies:
        left_out["miss-ratio curve of predicted"] = "it needs what is foreseen, which is made for one cache at a time"
    results = SimulationResults(
        complete=False,
        made=made_now(0.0),
        trace=trace_facts(found.trace),
        split_hash=found.split.hash if found.split is not None else "",
        unsplit=found.unsplit,
        demand=_demand_facts(found, documents, demand, settings),
        machine=_machine_facts(machine, demand, settings),
        horizons=horizons,
        predictors=tuple(_facts(each, ()) for each in candidates),
        best=candidates[0].name if candidates else "",
        admission=str(chosen),
        left_out=left_out,
    )
    simulator = Simulator(found.trace, documents, demand, machine, horizons, found.asked, device, on_stage)
    runs: list[RunResult] = []
    for place, job in enumerate(jobs):
        fingerprint = job.fingerprint(common)
        done = kept.get(fingerprint)
        on_run(place, len(jobs), job.key)
        if done is None:
            done = simulator.result(job, fingerprint)
            kept[fingerprint] = done
            # What an earlier start left stays in the file until this one has come to the end.
            results.model_copy(
                update={"runs": tuple(kept.values()), "curves": curves, "curves_fingerprint": curves_fingerprint}
            ).save(path)
        runs.append(done)
    on_run(len(jobs), len(jobs), "")

    wanted = _curves_fingerprint(common, policies)
    if curves_fingerprint != wanted:
        on_stage("miss-ratio curves")
        curves = curves_of(demand, policies, settings.per_layer, machine.expert_bytes)
        curves_fingerprint = wanted
    on_stage("comparing")
    if timeline:
        best = [job for job in jobs if job.group == "main" and job.kind == "predictor" and job.admission == chosen]
        simulator.write_timeline(best[0] if best else jobs[0], timeline, out / "timeline.json")
    results = results.model_copy(
        update={
            "complete": True,
            "made": made_now(time.monotonic() - started),
            "machine": results.machine.model_copy(update={"bound": bound(demand, machine)}),
            "predictors": tuple(_facts(each, runs) for each in candidates),
            "runs": compared(runs, settings.policy, results.demand.units),
            "curves": curves,
            "curves_fingerprint": curves_fingerprint,
        }
    )
    results.save(path)
    return results


def opened(
    trace: Path, settings: Settings, run: Path | None = None, on_stage: Callable[[str], None] = lambda _: None
) -> Opened:
    """The trace and the predictors that settings ask for.

    Raises:
        SpecmoeError: as :func:`specmoe.offload.prefetchers.loading.open_trace`.
    """
    return open_trace(
        trace,
        run,
        part=settings.part,
        horizons=settings.horizons,
        patterns=settings.predictors,
        seconds=settings.prediction_seconds,
        on_stage=on_stage,
    )


def machine_of(settings: Settings, topology: Topology) -> Machine:
    """The machine that settings describe.

    Raises:
        SpecmoeError: the size of an expert is not known, or a capacity cannot be read.
    """
    size = settings.expert_bytes or topology.expert_bytes
    if size is None:
        raise SpecmoeError(
            f"the trace does not say how large an expert of {topology.model_id} is; give --expert-bytes "
            "(3 × hidden size × inner size × bytes per weight, for the usual gated experts)"
        )
    tiers = len(settings.hardware.links) + 1
    if settings.host_capacity is not None and tiers == 2:
        raise SpecmoeError(f"--host-capacity: {settings.hardware.name} has no tier between store and device")
    return Machine(
        hardware=settings.hardware,
        expert_bytes=size,
        capacity=parse_capacity(settings.capacity, topology, size),
        per_layer=settings.per_layer,
        policy=settings.policy,
        host_capacity=None
        if settings.host_capacity is None
        else parse_capacity(settings.host_capacity, topology, size),
        cost=step_cost(settings.hardware, topology, size),
    )


def chosen_documents(found: Opened, max_tokens: int | None) -> tuple[int, ...]:
    """Numbers of the documents to replay, in the trace's order: the test part, which no predictor has seen, or all.

    All are those that the protocol's split can use or, without a split, those that hold a token.

    Args:
        max_tokens: take no document that would pass so many; the first is always taken.

    Raises:
        SpecmoeError: no document holds a token.
    """
    records = found.trace.documents
    if found.split is None:
        chosen = tuple(i for i, each in enumerate(records) if each.tokens)
    elif found.part == "all":
        hidden = "hidden" in found.trace.manifest.fields
        usable = (each.tokens >= 2 and not (hidden and each.hidden_start is None) for each in records)
        chosen = tuple(i for i, each in enumerate(usable) if each)
    else:
        chosen = found.split.parts["test"]
    taken, tokens = [], 0
    for index in chosen:
        tokens += records[index].tokens
        if taken and max_tokens is not None and tokens > max_tokens:
            break
        taken.append(index)
    if not taken:
        raise SpecmoeError(f"{found.trace.directory} has no token to replay; collect or import some text")
    return tuple(taken)


def curves_of(
    demand: Demand, policies: Sequence[str], per_layer: bool, expert_bytes: ExpertBytes | None = None
) -> tuple[Curve, ...]:
    """Miss-ratio curves over the shares of :data:`CURVE_SHARES` of all experts, and Belady's in any case."""
    everything = all_units(demand.topology, expert_bytes)
    # A cache that one token of one layer does not fit into would run in waves, which is another matter.
    held = [held_at_share(demand.topology, share, expert_bytes, per_layer=per_layer) for share in CURVE_SHARES]
    sizes = list({tuple(held_G.tolist()): held_G for held_G in held}.values())
    names = [name for name in dict.fromkeys([*policies, "belady"]) if POLICIES[name].needs != "predictor"]
    found = miss_ratio_curves(demand, names, sizes, per_layer=per_layer, expert_bytes=expert_bytes)
    return tuple(
        Curve(
            policy=name,
            title=POLICIES[name].title,
            points=tuple(
                CurvePoint(
                    capacity=point.capacity,
                    share=point.capacity / everything,
                    accesses=point.accesses,
                    misses=point.misses,
                )
                for point in points
            ),
        )
        for name, points in found.items()
    )


def bound(demand: Demand, machine: Machine) -> float:
    """Seconds that nothing can go below: see :func:`specmoe.offload.simulator.least_seconds`."""
    held_G = capacities(machine, demand)
    loaded_V = fewest_loads(demand, held_G, per_layer=machine.per_layer, expert_bytes=machine.expert_bytes)
    return least_seconds(demand, machine, loaded_V)


def _common(
    trace: Trace,
    documents: tuple[int, ...],
    demand: Demand,
    machine: Machine,
    settings: Settings,
    horizons: tuple[int, ...],
) -> str:
    """Hash of what all runs depend on."""
    hardware = machine.hardware.model_dump_json(include={"links", "compute"})
    held = (machine.expert_bytes, machine.capacity, machine.per_layer, machine.host_capacity, machine.host_policy)
    replayed = (trace_fingerprint(trace), documents, demand.replay, demand.batch, settings.prefill_chunk)
    versions = (specmoe.__version__, torch.__version__, np.__version__)
    parts = (hardware, held, machine.cost, replayed, horizons, versions)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _curves_fingerprint(common: str, policies: Sequence[str]) -> str:
    return hashlib.sha256(repr((common, tuple(policies), CURVE_SHARES)).encode()).hexdigest()[:16]


def _demand_facts(found: Opened, documents: Sequence[int], demand: Demand, settings: Settings) -> DemandFacts:
    records = [found.trace.documents[index] for index in documents]
    parts = found.split.parts if found.split is not None and found.candidates else {}
    return DemandFacts(
        part=found.part,
        documents=tuple(record.doc_id for record in records),
        replay=demand.replay,
        batch=demand.batch,
        prefill_chunk=settings.prefill_chunk,
        tokens=demand.tokens,
        steps=demand.steps,
        events=demand.events,
        accesses=demand.accesses,
        prefill_steps=int((demand.phase_J == Phase.PREFILL).sum()),
        groups=int(demand.group_J.max()) + 1,
        units=resampling_units(records, demand.batch),
        learned=len(set(documents) & {*parts.get("train", ()), *parts.get("validation", ())}),
    )


def _machine_facts(machine: Machine, demand: Demand, settings: Settings) -> MachineFacts:
    assert machine.cost is not None
    return MachineFacts(
        hardware=machine.hardware,
        changed=settings.changed,
        expert_bytes=machine.expert_bytes,
        capacity=machine.capacity,
        experts=demand.topology.all_experts,
        all_bytes=all_units(demand.topology, machine.expert_bytes) * unit_bytes(machine.expert_bytes),
        asked=settings.capacity,
        per_layer=machine.per_layer,
        host_capacity=machine.host_capacity,
        policy=machine.policy,
        compute=compute_seconds(demand, machine.cost),
        **dataclasses.asdict(machine.cost),
    )


def _facts(candidate: Candidate, runs: Sequence[RunResult]) -> PredictorFacts:
    own = [run.recall for run in runs if run.kind == "predictor" and run.predictor == candidate.name]
    return PredictorFacts(
        name=candidate.name,
        learned=candidate.learned,
        seed=candidate.seed,
        validation=round(candidate.validation, 6),
        seconds=candidate.seconds,
        timed=candidate.timed,
        recall=own[0] if own else {},
    )
