"""The numbers that a verdict rests on, taken out of a simulation and its sensitivity."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from specmoe.offload.comparing import gain_between, gain_of
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.results import Gain, RunResult, SimulationResults
from specmoe.offload.verdict.sensitivity import Cell, Precision, Sensitivity
from specmoe.offload.words import capacity_text

__all__ = ["Change", "Evidence", "evidence_of"]

# A cache is large enough, as far as eviction goes, where it misses no more than this share.
_FEW_MISSES = 0.1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Change(_Model):
    """Something that could be done instead of prefetching, or with it, and its gain in tokens a second.

    buildable: False for what nobody can do, as it needs to know the future.
    """

    what: str
    gain: Gain
    buildable: bool = True


class Evidence(_Model):
    """All of it. Gains are relative to tokens a second without prefetching; times are seconds.

    Attributes:
        model, hardware, policy, held, experts, expert_bytes, all_bytes: what was simulated, see ``MachineFacts`` (held:
            its capacity). tokens, documents: on how much text.
        independent: what intervals are over, in words. part, batch: of the documents, and how many side by side.
        learned: documents that the predictor was prepared or trained on, calibrated or chosen by.
        unsplit: why no predictor could be prepared; empty where one could.
        changed: what of the hardware's profile was overridden.
        tokens_per_second: without prefetching. stall_share: of its time, waiting. seconds: T, that time.
        computing: of it, C. loading: F, that its loads need at least with the link always busy.
        miss_ratio: of the cache alone. enough: smallest share of the experts at which it would miss at most a tenth,
            None if none was tried
            that does. curve: whether any was tried.
        oracle: gain of knowing everything. limit: T / max(C, F), what hiding loads behind computing can bring.
        bound: gain that nothing can pass on this link and cache, eviction included; None where not worked out.
        predictor: its name, empty if none was simulated. gain: with it. precision: of its prefetches, the share that
            was used, late or not. shuffled: gain of the same predictions put to other tokens, the control; over: that
            over layer frequency with the same admission, whose own gain is ``frequency``.
        admission: by which it fetches.
        break_even: recall below which fetching every guess loses; None if it does not gain with perfect recall, 0 if it
            gains at every one that was tried.
        admissions: the same predictor, prefetching by another rule. changes: other things to do.
        cells: the sensitivity table.
    """

    model: str
    hardware: str
    changed: tuple[str, ...] = ()
    policy: str
    held: int
    experts: int
    expert_bytes: int | tuple[int, ...]
    all_bytes: int | None = None
    tokens: int
    documents: int
    independent: str
    part: str
    batch: int = 1
    learned: int = 0
    unsplit: str = ""
    tokens_per_second: float
    stall_share: float
    seconds: float
    computing: float
    loading: float
    miss_ratio: float
    enough: float | None
    curve: bool = True
    oracle: Gain
    bound: float | None
    predictor: str = ""
    admission: str = ""
    gain: Gain | None = None
    precision: float | None = None
    shuffled: Gain | None = None
    frequency: Gain | None = None
    over: Gain | None = None
    break_even: float | None = None
    admissions: tuple[Change, ...] = ()
    changes: tuple[Change, ...] = ()
    cells: tuple[Cell, ...] = ()

    @property
    def everything(self) -> int:
        """What ``held`` and the capacities of ``cells`` are parts of: experts, or bytes where their sizes differ."""
        return self.experts if isinstance(self.expert_bytes, int) else self.all_bytes or self.held

    @property
    def load(self) -> float:
        """ρ, seconds that the link works for each second of computing; above 1 it cannot keep up, whatever is known."""
        return self.loading / self.computing

    @property
    def limit(self) -> float:
        """T / max(C, F): (C + F) / max(C, F) where nothing overlaps without prefetching."""
        return self.seconds / max(self.computing, self.loading)


def evidence_of(results: SimulationResults, sensitivity: Sensitivity) -> Evidence:
    """Collect the numbers."""
    baseline, machine = results.baseline, results.machine
    oracle = next(run for run in results.main if run.kind == "oracle")
    best = _best(results)
    control = next((run for run in results.main if run.kind == "shuffled"), None)
    frequency = next((run for run in results.main if run.kind == "frequency"), None)
    units = results.demand.units
    fetched = best.prefetch_bytes if best is not None else 0
    return Evidence(
        model=results.trace.topology.model_id,
        hardware=machine.hardware.name,
        changed=machine.changed,
        policy=machine.policy,
        held=machine.capacity,
        experts=machine.experts,
        expert_bytes=machine.expert_bytes,
        all_bytes=machine.all_bytes,
        tokens=results.demand.tokens,
        documents=len(results.demand.documents),
        independent=results.demand.independent,
        part=results.demand.part,
        batch=results.demand.batch,
        learned=results.demand.learned,
        unsplit=results.unsplit,
        tokens_per_second=baseline.tokens_per_second,
        stall_share=baseline.stall / baseline.seconds,
        computing=baseline.compute,
        seconds=baseline.seconds,
        loading=machine.hardware.links[-1].least_seconds(baseline.demand_bytes, _demanded(baseline)),
        miss_ratio=1 - baseline.hit_rate,
        enough=_enough(results),
        curve=any(curve.policy == machine.policy for curve in results.curves),
        oracle=_gain(oracle),
        bound=baseline.seconds / machine.bound - 1 if machine.bound else None,
        predictor=best.predictor if best is not None else "",
        admission=best.admission if best is not None else "",
        gain=_gain(best) if best is not None else None,
        precision=(best.used_bytes + best.late_bytes) / fetched if best is not None and fetched else None,
        shuffled=_gain(control) if control is not None else None,
        frequency=_gain(frequency) if frequency is not None else None,
        over=gain_of(frequency, control, units) if frequency is not None and control is not None else None,
        admissions=_admissions(results),
        break_even=_break_even(sensitivity.precisions),
        changes=(
            *_policies(results),
            *_smaller(baseline, sensitivity, units),
            *_larger(baseline, sensitivity, machine.capacity, machine.expert_bytes, units),
        ),
        cells=sensitivity.cells,
    )


def _demanded(run: RunResult) -> int:
    return sum(phase["misses"] for phase in run.counts.values())


def _gain(run: RunResult) -> Gain:
    assert run.against is not None
    return run.against.gain


def _best(results: SimulationResults) -> RunResult | None:
    """The best predictor's run under the study's own policy and the admission chosen before any was run."""
    for run in results.main:
        own = run.kind == "predictor" and run.predictor == results.best and run.policy == results.machine.policy
        if own and run.admission == results.admission:
            return run
    return None


def _policies(results: SimulationResults) -> list[Change]:
    """Every other policy that could be built, and Belady for comparison."""
    found = []
    for run in results.main:
        if run.kind == "none" and run.policy != results.machine.policy:
            title, needs = POLICIES[run.policy].title, POLICIES[run.policy].needs
            future = " (knows the future: the fewest misses on demand)" if needs else ""
            found.append(Change(what=f"eviction by {title}{future}", gain=_gain(run), buildable=not needs))
    return found


def _admissions(results: SimulationResults) -> tuple[Change, ...]:
    """The best predictor with the other forms of admission."""
    return tuple(
        Change(what=run.admission, gain=_gain(run))
        for run in results.main
        if run.kind == "predictor" and run.predictor == results.best and run.policy == results.machine.policy
        if run.admission not in {"", results.admission}
    )


def _smaller(baseline: RunResult, sensitivity: Sensitivity, units: Sequence[int]) -> list[Change]:
    """Experts of fewer bytes. What they are stored in now is not known, so only the share is said."""
    shares = {8.0: "half as many bytes", 4.0: "a quarter of the bytes"}
    return [
        Change(
            what=f"experts of {shares.get(each.bits, f'{each.bits:g}/16 of the bytes')}",
            gain=gain_between(baseline.group_seconds, each.group_seconds, units),
        )
        for each in sensitivity.fewer
    ]


def _larger(
    baseline: RunResult,
    sensitivity: Sensitivity,
    capacity: int,
    expert_bytes: int | tuple[int, ...],
    units: Sequence[int],
) -> list[Change]:
    """Twice the link, or the largest cache of the table."""
    found = []
    larger = [cell for cell in sensitivity.cells if cell.factor == 1 and cell.capacity > capacity]
    faster = [cell for cell in sensitivity.cells if cell.factor == 2 and cell.capacity == capacity]
    for cells, what in ((faster, "a link of twice the bandwidth"), (larger[-1:], "")):
        for cell in cells:
            here = str(capacity) if isinstance(expert_bytes, int) else capacity_text(capacity, expert_bytes)
            text = what or f"a cache of {capacity_text(cell.capacity, expert_bytes)} instead of {here}"
            found.append(Change(what=text, gain=gain_between(baseline.group_seconds, cell.group_seconds, units)))
    return found


def _enough(results: SimulationResults) -> float | None:
    for curve in results.curves:
        if curve.policy == results.machine.policy:
            return next((point.share for point in curve.points if point.miss_ratio <= _FEW_MISSES), None)
    return None


def _break_even(precisions: tuple[Precision, ...]) -> float | None:
    """Where the gain passes zero for the last time, straight between the recalls that were run."""
    if precisions[-1].gain <= 0:
        return None
    for low, high in zip(reversed(precisions[:-1]), reversed(precisions[1:]), strict=True):
        if low.gain <= 0 < high.gain:
            return low.recall + (high.recall - low.recall) * -low.gain / (high.gain - low.gain)
    return 0.0
