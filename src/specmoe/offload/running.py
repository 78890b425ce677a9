"""Carrying out the runs of a simulation: predictions are worked out when a run first needs them, then kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from specmoe.offload.comparing import result_of
from specmoe.offload.demand import Demand
from specmoe.offload.jobs import SimulationJob
from specmoe.offload.perfetto import write_timeline
from specmoe.offload.prefetchers.loading import Candidate, recall_at_need
from specmoe.offload.prefetchers.predictions import Predictions, predicted, shuffled, with_recall
from specmoe.offload.results import RunResult
from specmoe.offload.simulator import Machine, Outcome, Run, simulate, simulate_oracle
from specmoe.trace import Trace

__all__ = ["Simulator", "scaled"]


class Simulator:
    """One demand, one machine, and the predictors to choose from.

    Args:
        documents: those that ``demand`` was made from. horizons: to prefetch for.
        device: that predictors score on. on_stage: told what takes time.
    """

    def __init__(
        self,
        trace: Trace,
        documents: Sequence[int],
        demand: Demand,
        machine: Machine,
        horizons: tuple[int, ...],
        candidates: Sequence[Candidate],
        device: str = "cpu",
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.trace, self.documents, self.demand, self.machine = trace, documents, demand, machine
        self.horizons, self.device, self.on_stage = horizons, device, on_stage
        self._candidates = {each.name: each for each in candidates}
        # Predictions of a large trace fill gigabytes: those of one predictor at a time.
        self._scored: tuple[str, Predictions] | None = None
        self._recall: dict[int, float] = {}

    def result(self, job: SimulationJob, fingerprint: str) -> RunResult:
        """Run a job, in the form in which it is kept."""
        predictions, recall = self._foreseen(job)
        outcome, link = self._simulate(job, predictions), self._machine(job).hardware.links[-1]
        return result_of(job, fingerprint, outcome, self.demand, link, predictions.horizons, recall)

    def write_timeline(self, job: SimulationJob, spans: int, path: Path) -> None:
        """Run a job and write the beginning of its timeline for a trace viewer."""
        outcome = self._simulate(job, self._foreseen(job)[0], spans)
        assert outcome.log is not None
        write_timeline(outcome.log, self._machine(job).hardware, self.demand.topology, path, title=job.key)

    def _simulate(self, job: SimulationJob, predictions: Predictions, spans: int = 0) -> Outcome:
        if job.kind == "oracle":
            return simulate_oracle(self.demand, self._machine(job), spans=spans)
        run = Run(job.key, predictions, job.admission, seconds=job.seconds)
        return simulate(self.demand, self._machine(job), run, spans=spans)

    def _machine(self, job: SimulationJob) -> Machine:
        machine = replace(self.machine, policy=job.policy)
        return scaled(machine, job.x) if job.group == "bandwidth" and job.x is not None else machine

    def _foreseen(self, job: SimulationJob) -> tuple[Predictions, dict[int, float]]:
        """What a job's runs go by, and its recall by horizon."""
        if job.kind in {"none", "oracle"}:
            return Predictions.none(), {}
        if job.kind in {"perfect", "recall"}:
            made = with_recall(self.demand, self.horizons, job.x or 1.0)
            return made, recall_at_need(made, self.demand)
        scored = self.predictions_of(job.predictor)
        recall = self._recall
        if job.kind == "shuffled":
            other = shuffled(scored, self.demand.topology.layers)
            return other, recall_at_need(other, self.demand)
        return scored, recall

    def predictions_of(self, name: str) -> Predictions:
        """What a candidate foresees at every event."""
        if self._scored is None or self._scored[0] != name:
            scored = self._score(self._candidates[name])
            self._scored, self._recall = (name, scored), recall_at_need(scored, self.demand)
        return self._scored[1]

    def _score(self, candidate: Candidate) -> Predictions:
        self.on_stage(f"asking {candidate.name} about {self.demand.tokens:,} tokens")
        predictor, calibration = candidate.load()
        found = predicted(
            candidate.name,
            predictor.to(self.device),
            calibration,
            self.demand,
            self.trace,
            self.documents,
            device=self.device,
        )
        rows = [found.horizons.index(horizon) for horizon in self.horizons]
        if rows == list(range(len(found.horizons))):
            return found
        return replace(
            found,
            horizons=self.horizons,
            experts_VHB=np.ascontiguousarray(found.experts_VHB[:, rows]),
            chance_VHB=np.ascontiguousarray(found.chance_VHB[:, rows]),
        )


def scaled(machine: Machine, factor: float) -> Machine:
    """The same machine, all links ``factor`` times as fast; fixed costs stay."""
    links = [link.model_copy(update={"bandwidth": link.bandwidth * factor}) for link in machine.hardware.links]
    return replace(machine, hardware=machine.hardware.model_copy(update={"links": tuple(links)}))
