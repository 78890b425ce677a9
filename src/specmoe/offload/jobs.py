"""Which runs a simulation consists of: each policy alone, oracle, predictors and their controls, and two sweeps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from specmoe.offload.admission.registry import Admission
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.prefetchers.loading import Candidate

__all__ = ["BANDWIDTHS", "RECALLS", "SimulationJob", "simulable", "simulation_jobs"]

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
RECALLS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Raised whenever the same run would come out otherwise.
_VERSION = 2

Group = Literal["main", "bandwidth", "recall"]
Kind = Literal["none", "oracle", "perfect", "predictor", "shuffled", "frequency", "recall"]


@dataclass(frozen=True)
class SimulationJob:
    """One run.

    Attributes:
        kind: what foresees; see :class:`specmoe.offload.results.RunResult`. policy: of eviction.
        predictor: its name, empty for none. admission: what of it is fetched; None for nothing.
        group, x: of a sweep, and where in it.
        identity: of the predictor. seconds: that its prediction takes.
    """

    kind: Kind
    policy: str
    predictor: str = ""
    admission: Admission | None = None
    group: Group = "main"
    x: float | None = None
    identity: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """A name of its own."""
        parts = [self.predictor or self.kind, self.policy]
        if self.kind == "shuffled":
            parts.insert(1, "shuffled")
        if self.kind == "frequency":
            parts.insert(1, "control")
        if self.admission is not None:
            parts.append(str(self.admission))
        if self.x is not None:
            parts.append(f"{self.group} {self.x:g}")
        return "/".join(parts)

    def fingerprint(self, common: str) -> str:
        """Hash of everything that it depends on; ``common``: of all runs."""
        parts = (_VERSION, common, self.key, self.identity, self.seconds)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def simulable(policies: Sequence[str]) -> list[str]:
    """Of some policies, those that a cache behind a link can have without a predictor."""
    return [name for name in policies if name != "belady-bypass" and POLICIES[name].needs != "predictor"]


def simulation_jobs(
    policy: str,
    policies: Sequence[str],
    candidates: Sequence[Candidate],
    admissions: Sequence[Admission],
    chosen: Admission,
    control: Candidate | None = None,
    *,
    all_admissions: bool,
) -> list[SimulationJob]:
    """All runs, those of one predictor together, as its predictions are large.

    Args:
        policy: of eviction, in all runs but those that are about another one. policies: to run without prefetching.
        candidates: best first. admissions: for the best. chosen: the one for everything else.
        control: what the best predictor's shuffled predictions must not be above, run as they are.
        all_admissions: whether the others are run with all of them too.
    """
    jobs = [SimulationJob("none", name) for name in dict.fromkeys([policy, *simulable(policies), "belady"])]
    jobs.append(SimulationJob("oracle", "belady"))
    jobs += [SimulationJob("perfect", policy, admission=each) for each in admissions]
    for factor in BANDWIDTHS:
        jobs.append(SimulationJob("none", policy, group="bandwidth", x=factor))
        jobs.append(SimulationJob("oracle", "belady", group="bandwidth", x=factor))
    jobs += [SimulationJob("recall", policy, admission=chosen, group="recall", x=recall) for recall in RECALLS]
    for place, candidate in enumerate(candidates):
        best, alone = (
            place == 0,
            SimulationJob(
                "predictor", policy, candidate.name, chosen, identity=candidate.identity, seconds=candidate.seconds
            ),
        )
        jobs += [replace(alone, admission=each) for each in (admissions if best or all_admissions else [chosen])]
        if not best:
            continue
        jobs.append(replace(alone, kind="shuffled"))
        if policy != "predicted":
            jobs += [replace(alone, policy="predicted", admission=each) for each in (None, chosen)]
        jobs += [replace(alone, group="bandwidth", x=factor) for factor in BANDWIDTHS]
        if control is not None:
            # As late as the best one's, so that nothing but what is foreseen makes the difference.
            jobs.append(replace(alone, kind="frequency", predictor=control.name, identity=control.identity))
    return jobs
