"""The file of a simulation: what was simulated on what, and what every run came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.offload.hardware.profile import Hardware
from specmoe.results import Made, TraceFacts, validated
from specmoe.schema import FileModel

__all__ = [
    "Comparison",
    "Curve",
    "CurvePoint",
    "DemandFacts",
    "Gain",
    "MachineFacts",
    "PredictorFacts",
    "Quantiles",
    "RunResult",
    "SimulationResults",
    "kept_runs",
]

_FORMAT = "specmoe-simulation"
_VERSION = 2


class DemandFacts(FileModel):
    """What was replayed.

    Attributes:
        part: ``test`` or ``all``. documents: their ids, in order. replay, batch, prefill_chunk: how they were run.
        tokens, steps, events, accesses: how much that is; an expert that tokens of a step share is one access.
        prefill_steps: of the steps, those that read a prompt. groups: batches of sequences.
        units: of each batch of sequences, the number of the unit that it is resampled with: documents of one group, and
            copies of one text, are no second evidence.
        learned: documents that predictors of this simulation were prepared or trained on, calibrated or chosen by.
    """

    part: str
    documents: tuple[str, ...]
    replay: str
    batch: int
    prefill_chunk: int
    tokens: int
    steps: int
    events: int
    accesses: int
    prefill_steps: int
    groups: int
    units: tuple[int, ...]
    learned: int = 0

    @property
    def independent(self) -> str:
        """How many units there are, in words: ``one document``, ``4 groups of documents``."""
        number = len(set(self.units))
        noun, plural = "group of documents", "groups of documents"
        if number == len(self.documents):
            noun, plural = "document", "documents"
        elif self.batch > 1 and number == self.groups:
            noun, plural = "batch of documents", "batches of documents"
        return f"one {noun}" if number == 1 else f"{number:,} {plural}"


class MachineFacts(FileModel):
    """On what.

    Attributes:
        hardware: the profile, with the bandwidth and latency that were used. changed: what of it was overridden.
        expert_bytes: size of an expert; of each layer where they differ. capacity: experts that the device holds, of
            ``experts``, or bytes where sizes differ; asked: as given. all_bytes: of all experts together.
        per_layer: each layer has its own part. host_capacity: of the tier between, None with two tiers.
        policy: of eviction where a run names no other.
        layer_seconds, token_layer_seconds, expert_seconds, token_seconds, other_seconds, and those by layer: see
            ``StepCost``.
        compute: seconds of computing alone, C. bound: seconds that no prefetcher and no eviction can go below.
    """

    hardware: Hardware
    changed: tuple[str, ...] = ()
    expert_bytes: int | tuple[int, ...]
    capacity: int
    experts: int
    all_bytes: int | None = None
    asked: str
    per_layer: bool
    host_capacity: int | None
    policy: str
    layer_seconds: float
    token_layer_seconds: float
    expert_seconds: float
    token_seconds: float
    other_seconds: float
    expert_seconds_by_layer: tuple[float, ...] | None = None
    token_seconds_by_layer: tuple[float, ...] | None = None
    compute: float
    bound: float | None = None

    @property
    def held_bytes(self) -> int:
        """``capacity`` in bytes."""
        return self.capacity * self.expert_bytes if isinstance(self.expert_bytes, int) else self.capacity

    @property
    def share(self) -> float:
        """Of all experts, or of their bytes where sizes differ, what the device holds."""
        return self.capacity / (self.experts if isinstance(self.expert_bytes, int) else self.all_bytes or self.capacity)


class PredictorFacts(FileModel):
    """A predictor whose prefetches were simulated.

    Attributes:
        validation: recall@K on the validation part, by which they are ordered. seed: of its training.
        seconds: from a router's output to the prediction; timed: ``measured`` when it was trained, ``given``, or
            ``unknown`` and counted as nothing.
        recall: by horizon, on what was replayed: of the experts that an event needs, the share among as many that were
            put first.
    """

    name: str
    learned: bool
    seed: int
    validation: float
    seconds: float
    timed: Literal["measured", "given", "unknown"]
    recall: dict[int, float] = Field(default_factory=dict)


class Quantiles(FileModel):
    """Median and 95th percentile, in seconds."""

    p50: float
    p95: float


class Gain(FileModel):
    """Tokens a second over those of a reference, minus 1.

    Attributes:
        low, high: 95 % interval, paired, over ``units`` independent parts of what was replayed; None where they are too
            few for an interval to hold what it says.
    """

    value: float
    low: float | None = None
    high: float | None = None
    units: int

    @property
    def settled(self) -> int:
        """1 or -1 where the interval lies above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


class Comparison(FileModel):
    """A run beside two others on the same machine.

    Attributes:
        gain: over no prefetching under the study's policy.
        share_of_oracle: seconds saved by those that the oracle saves; None where it saves nothing.
        bytes_saved: demand bytes less than without prefetching under the run's own policy.
        bytes_per_byte_saved: prefetched bytes by ``bytes_saved``; None where none were saved.
    """

    gain: Gain
    share_of_oracle: float | None = None
    bytes_saved: int
    bytes_per_byte_saved: float | None = None


class RunResult(FileModel):
    """One simulated run. Bytes are those that went over the link into the device; times are seconds.

    Attributes:
        fingerprint: of everything that it depends on.
        group: ``main``, or a sweep: ``bandwidth`` (``x``: factor on it) or ``recall`` (``x``: of made-up predictions).
        kind: ``none``, ``oracle``, ``perfect``, ``predictor``, ``recall``, or of the control ``shuffled`` and
            ``frequency``, which it must not be above.
        predictor: its name, empty for none. admission: what of it is fetched, empty for nothing. policy: of eviction.
        horizons: of prefetching. prediction_seconds: that a prediction takes.
        recall: by horizon, of what was foreseen; see :class:`PredictorFacts`.
        seconds, compute, stall: the whole run, and of it computing and waiting for experts.
        link_seconds: in which bytes passed each link, from the lowest tier up. loading: F, the least time in which
            the link into the device could pass this run's transfers one after another, fixed costs included.
        counts, host_counts: phase → name → experts, as in ``simulation.state.COUNTS``.
        largest: most experts held at once.
        hit_rate: of the experts that were needed, the share that was there when the layer's router had run.
        cold_recall: of the accesses at which the cache would have lacked the expert had no prefetch brought it (found
            there thanks to a prefetch and used for the first time since; prefetch under way; missed), the share of the
            first kind. None where nothing is prefetched.
        demand_bytes: fetched when they were needed. prefetch_bytes: by prefetches that were started. used_bytes: there
            in time and used. late_bytes: used, but waited for. wasted_bytes: never used. cancelled_bytes: of prefetches
            that waited until it was too late, and moved nothing.
        first_token: of each batch of sequences with a prompt, output_token: of each step that writes; None without.
        group_seconds: of each batch of sequences.
        against: the comparison, when all runs of the group are done.
    """

    key: str
    fingerprint: str
    group: Literal["main", "bandwidth", "recall"] = "main"
    x: float | None = None
    kind: Literal["none", "oracle", "perfect", "predictor", "shuffled", "frequency", "recall"]
    predictor: str = ""
    admission: str = ""
    policy: str
    horizons: tuple[int, ...] = ()
    prediction_seconds: float = 0.0
    recall: dict[int, float] = Field(default_factory=dict)
    tokens: int
    seconds: float
    compute: float
    stall: float
    link_seconds: tuple[float, ...]
    loading: float
    counts: dict[str, dict[str, int]]
    host_counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    largest: int
    hit_rate: float
    cold_recall: float | None = None
    demand_bytes: int
    prefetch_bytes: int
    used_bytes: int
    late_bytes: int
    wasted_bytes: int
    cancelled_bytes: int
    first_token: Quantiles | None = None
    output_token: Quantiles | None = None
    group_seconds: tuple[float, ...]
    against: Comparison | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the whole run's time."""
        return self.tokens / self.seconds

    @property
    def stall_per_token(self) -> float:
        """Seconds."""
        return self.stall / self.tokens

    @property
    def busy(self) -> float:
        """Share of the time in which bytes passed the link into the device."""
        return self.link_seconds[-1] / self.seconds

    @property
    def overlap_limit(self) -> float:
        """(C + F) / max(C, F): the most that hiding loads behind computing can speed up, with the bytes of this run."""
        return (self.compute + self.loading) / max(self.compute, self.loading)


class CurvePoint(FileModel):
    """Misses of a policy that fetches on demand only, at a capacity: experts in all layers together."""

    capacity: int
    share: float
    accesses: int
    misses: int

    @property
    def miss_ratio(self) -> float:
        """Misses by accesses; 0 where nothing was asked for."""
        return self.misses / max(1, self.accesses)


class Curve(FileModel):
    """The miss-ratio curve of a policy."""

    policy: str
    title: str
    points: tuple[CurvePoint, ...]


class SimulationResults(FileModel):
    """The content of ``simulation.json``.

    Attributes:
        complete: False while runs are missing; the same command goes on.
        split_hash: of the split by document; empty where none was made, and ``unsplit`` says why.
        best: name of the predictor that is best on the validation part, empty if none was simulated. admission: the one
            that its sweeps and controls were run with.
        left_out: what was not run, and why.
    """

    format: Literal["specmoe-simulation"] = _FORMAT
    version: Literal[2] = _VERSION
    complete: bool
    made: Made
    trace: TraceFacts
    split_hash: str
    unsplit: str = ""
    demand: DemandFacts
    machine: MachineFacts
    horizons: tuple[int, ...]
    predictors: tuple[PredictorFacts, ...] = ()
    best: str = ""
    admission: str = ""
    runs: tuple[RunResult, ...] = ()
    curves: tuple[Curve, ...] = ()
    curves_fingerprint: str = ""
    left_out: dict[str, str] = Field(default_factory=dict)

    def run(self, key: str) -> RunResult:
        """A run by its key.

        Raises:
            KeyError: it is not there.
        """
        for run in self.runs:
            if run.key == key:
                return run
        raise KeyError(key)

    @property
    def baseline(self) -> RunResult:
        """Without prefetching, under the study's policy."""
        return self.run(f"none/{self.machine.policy}")

    @property
    def baseline_gain(self) -> Gain:
        """Of the baseline over itself: 0, with an interval where the text allows one."""
        against = self.baseline.against
        return against.gain if against is not None else Gain(value=0.0, units=len(set(self.demand.units)))

    @property
    def main(self) -> tuple[RunResult, ...]:
        """Without the sweeps."""
        return tuple(run for run in self.runs if run.group == "main")

    @classmethod
    def load(cls, path: Path) -> SimulationResults:
        """Read a file.

        Raises:
            SpecmoeError: missing, damaged, or not the file of a simulation of this version.
        """
        content = _content(path)
        if content.get("version") != _VERSION:
            raise SpecmoeError(
                f"{path} has version {content.get('version')!r}, this specmoe has {_VERSION}: "
                "run `specmoe simulate` again"
            )
        return validated(cls, content, path)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.model_dump(mode="json"), indent=None)


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise SpecmoeError(f"{path} is not the file of a simulation; give another folder with --out")
    return content


def kept_runs(path: Path) -> tuple[dict[str, RunResult], tuple[Curve, ...], str]:
    """What an earlier start left: runs by fingerprint, curves and their fingerprint; nothing from another version.

    Raises:
        SpecmoeError: there is a file, and it is something else.
    """
    if not path.exists() or _content(path).get("version") != _VERSION:
        return {}, (), ""
    kept = SimulationResults.load(path)
    return {run.fingerprint: run for run in kept.runs}, kept.curves, kept.curves_fingerprint
