"""The results file: everything that was measured, describing itself, from which everything shown is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.topology import Topology

__all__ = [
    "CalibrationBin",
    "Control",
    "Epoch",
    "Interval",
    "Journey",
    "Latency",
    "Made",
    "PredictorResult",
    "Protocol",
    "Results",
    "SeedResult",
    "SplitFacts",
    "TraceFacts",
]

# Raised whenever a metric's definition changes; results of different versions do not compare.
METRIC_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Interval(_Model):
    """An estimate with its 95 % bootstrap interval (equal to the estimate where it cannot be drawn)."""

    value: float
    low: float
    high: float


# Horizon → interval; JSON keys are strings, so "1" stands for horizon 1.
ByHorizon = dict[int, Interval]


class Epoch(_Model):
    """One point of a learning curve. Losses in nats an event, recall@K over all horizons (0 to 1)."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_recall: float
    learning_rate: float


class SeedResult(_Model):
    """One training run.

    Attributes:
        status: ``ok``, or ``failed`` with the cause in ``reason``.
        best_epoch: whose weights were kept. stopped: why training ended.
        train_seconds: wall clock on one core, preparation included.
        recall: part (train, validation, test, held_out_domain) → horizon → recall@K.
    """

    seed: int
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""
    best_epoch: int = 0
    stopped: str = ""
    train_seconds: float = 0.0
    curve: tuple[Epoch, ...] = ()
    recall: dict[str, dict[int, float]] = Field(default_factory=dict)


class CalibrationBin(_Model):
    """Experts whose predicted probability of being among the K lies in one bin."""

    predicted: float
    observed: float
    count: int


class Latency(_Model):
    """Time of one ``step`` at batch 1, eager PyTorch, one thread, in µs."""

    p50_us: float
    p99_us: float
    events: int


class PredictorResult(_Model):
    """Everything measured of one predictor.

    Attributes:
        category, sees, needs, source: from its recipe. learned: has trained parameters.
        status: ``ok``; ``skipped`` (the trace lacks what it needs); ``failed`` (no seed finished).
        scores: metric → horizon → interval, on the test part, mean over seeds. Metrics: ``recall@K``,
            ``recall@1.5K``, ``recall@2K``, ``recall@3K``, ``recall@4K`` (share of the experts needed that
            are among the first b foreseen), ``coverage@K`` and ``coverage@2K`` (all K among them),
            ``gate_mass@K`` (weighted by gate), ``top1`` … ``top10`` (the heaviest expert among the first n),
            ``kl`` (nats), ``ece``, ``brier``.
        per_layer: recall@K by source layer (rows) and horizon (columns, in the protocol's order).
        per_domain: domain → recall@K by horizon, test part. per_phase: prefill and decode likewise.
        held_out_domain: recall@K by horizon on the domain kept out of training.
        calibration: horizon → bins. lift: recall@K minus the strongest training-free baseline's, paired.
        over_ridge: recall@K minus ridge's, paired over documents; empty where ridge was not run.
        document_recall: [documents][horizons] recall@K of each test document (mean over seeds).
        latency: of ``step``; None if not measured.
    """

    name: str
    category: str
    sees: str
    needs: tuple[str, ...]
    source: str
    learned: bool
    parameters: int
    status: Literal["ok", "skipped", "failed"] = "ok"
    reason: str = ""
    seeds: tuple[SeedResult, ...] = ()
    scores: dict[str, ByHorizon] = Field(default_factory=dict)
    per_layer: tuple[tuple[float | None, ...], ...] = ()
    per_domain: dict[str, ByHorizon] = Field(default_factory=dict)
    per_phase: dict[str, ByHorizon] = Field(default_factory=dict)
    held_out_domain: ByHorizon = Field(default_factory=dict)
    calibration: dict[int, tuple[CalibrationBin, ...]] = Field(default_factory=dict)
    lift: ByHorizon = Field(default_factory=dict)
    over_ridge: ByHorizon = Field(default_factory=dict)
    document_recall: tuple[tuple[float | None, ...], ...] = ()
    latency: Latency | None = None


class Control(_Model):
    """A check whose outcome is known beforehand.

    Attributes:
        name: what was done. expected: the outcome in words. value, unit: what came out. holds: as expected.
    """

    name: str
    expected: str
    value: float
    unit: str = "%"
    holds: bool


class Journey(_Model):
    """The experts that one stretch of a test document visits, and which were foreseen.

    Attributes:
        document: its id. tokens: texts of the tokens shown (empty strings where no tokenizer is at hand).
        actual: [tokens][layers][K] expert ids. predictions: predictor → horizon → [tokens][layers] →
            the K experts foreseen *for that place* (null where the place lies before the first event that
            could have foreseen it).
    """

    document: str
    tokens: tuple[str, ...]
    actual: tuple[tuple[tuple[int, ...], ...], ...]
    predictions: dict[str, dict[int, tuple[tuple[tuple[int, ...] | None, ...], ...]]]


class TraceFacts(_Model):
    """The trace that was used."""

    name: str
    fingerprint: str
    topology: Topology
    tokens: int
    documents: int
    domains: int
    fields: tuple[str, ...]
    source: dict[str, Any]
    layer_us_p50: float | None = None


class SplitFacts(_Model):
    """The split: its hash and seed, and documents and tokens of each part."""

    hash: str
    seed: int
    documents: dict[str, int]
    tokens: dict[str, int]
    held_out_domain: str | None = None


class Protocol(_Model):
    """How it was judged. budgets: label → experts fetched."""

    metric_version: int = METRIC_VERSION
    horizons: tuple[int, ...]
    budgets: dict[str, int]
    seeds: tuple[int, ...]
    bootstrap_draws: int


class Made(_Model):
    """By what the file was made."""

    date: str
    commit: str
    command: str
    versions: dict[str, str]
    hardware: dict[str, str]
    seconds: float


class Results(_Model):
    """The content of a results file.

    Attributes:
        control_trace: facts of the untrained control model's trace, None if there is none.
        untrained: predictor → recall@K by horizon on that trace (training-free predictors only).
    """

    format: Literal["specmoe-results"] = "specmoe-results"
    version: Literal[1] = 1
    made: Made
    trace: TraceFacts
    split: SplitFacts
    protocol: Protocol
    predictors: tuple[PredictorResult, ...]
    controls: tuple[Control, ...] = ()
    control_trace: TraceFacts | None = None
    untrained: dict[str, ByHorizon] = Field(default_factory=dict)
    journey: Journey | None = None

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results file.

        Raises:
            SpecmoeError: missing, damaged, or not a results file of this version.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != "specmoe-results":
            raise SpecmoeError(f"{path} is not a specmoe results file")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise SpecmoeError(f"{path} is damaged at {place}: {first['msg']}") from error

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.model_dump(mode="json"), indent=None)
