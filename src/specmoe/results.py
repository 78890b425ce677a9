"""The results file: everything that was measured, describing itself, from which everything shown is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

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
    "TestDocuments",
    "TraceFacts",
    "validated",
]

# Raised whenever a metric's definition changes; results of different versions do not compare.
METRIC_VERSION = 2


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Interval(_Model):
    """An estimate with its 95 % bootstrap interval (equal to the estimate where it cannot be drawn)."""

    value: float
    low: float
    high: float


Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], content: Any, path: Path) -> Model:
    """What a file held, as a model of a kind.

    Raises:
        SpecmoeError: it does not fit; the message names the first place that does not.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SpecmoeError(f"{path} is damaged at {place}: {first['msg']}") from error


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
    """Time of one ``step`` at batch 1 on one thread, in µs.

    Attributes:
        compiled: whether it is the predictor's compiled form that was timed, else eager PyTorch.
    """

    p50_us: float
    p99_us: float
    events: int
    compiled: bool = False


class PredictorResult(_Model):
    """Everything measured of one predictor.

    Attributes:
        category, sees, needs, source: from its recipe. learned: has trained parameters.
        status: ``ok``; ``skipped`` (the trace lacks what it needs); ``failed`` (no seed finished).
        recipe: what of its recipe was changed for this run, by field; empty where nothing was.
        scores: metric → horizon → interval, on the test part, mean over seeds. Metrics: ``recall@K``,
            ``recall@1.5K``, ``recall@2K``, ``recall@3K``, ``recall@4K`` (share of the experts needed that
            are among the first b foreseen) and for the same budgets ``coverage@b`` (all K among them),
            ``precision@b`` (share of the foreseen that are needed), ``gate_mass@b`` (recall weighted by gate);
            ``cold_recall@K`` and ``cold_recall@2K`` (recall over the needed experts that the stated cache lacks),
            ``top1`` … ``top10`` (the heaviest expert among the first n), ``kl`` (nats), ``ece``, ``brier``.
        per_layer: recall@K by source layer (rows) and horizon (columns, in the protocol's order).
        per_domain: domain → main metric → horizon → interval, test part; empty where there is only one.
        per_phase: the same for ``prefill`` and ``decode``.
        held_out_domain: recall@K by horizon on the domain kept out of training.
        calibration: horizon → bins. lift: recall@K minus the strongest training-free baseline's, paired.
        over_ridge: recall@K minus ridge's, paired over documents; empty where ridge was not run.
        document_sums: metric → [seeds][documents][horizons], the metric summed over the events of each test
            document, one row a finished seed. With :class:`TestDocuments` it is all that a paired bootstrap needs
            (:meth:`specmoe.evaluation.Ratios.of_result`). Metrics: ``recall@K``, ``recall@2K``, ``coverage@K``,
            ``gate_mass@K``, ``cold_recall@K``.
        latency: of ``step``; None if not measured.
    """

    name: str
    category: str
    sees: str
    needs: tuple[str, ...]
    source: str
    learned: bool
    parameters: int
    recipe: dict[str, Any] = Field(default_factory=dict)
    status: Literal["ok", "skipped", "failed"] = "ok"
    reason: str = ""
    seeds: tuple[SeedResult, ...] = ()
    scores: dict[str, ByHorizon] = Field(default_factory=dict)
    per_layer: tuple[tuple[float | None, ...], ...] = ()
    per_domain: dict[str, dict[str, ByHorizon]] = Field(default_factory=dict)
    per_phase: dict[str, dict[str, ByHorizon]] = Field(default_factory=dict)
    held_out_domain: ByHorizon = Field(default_factory=dict)
    calibration: dict[int, tuple[CalibrationBin, ...]] = Field(default_factory=dict)
    lift: ByHorizon = Field(default_factory=dict)
    over_ridge: ByHorizon = Field(default_factory=dict)
    document_sums: dict[str, tuple[tuple[tuple[float, ...], ...], ...]] = Field(default_factory=dict)
    latency: Latency | None = None


class Control(_Model):
    """A check whose outcome is known beforehand.

    Attributes:
        name: what was done. expected: the outcome in words. value, unit: what came out. holds: as expected.
        note: what else came out, in words.
    """

    name: str
    expected: str
    value: float
    unit: str = "%"
    holds: bool
    note: str = ""


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


class TestDocuments(_Model):
    """The documents of the test part, in the order in which every ``document_sums`` has them.

    Attributes:
        ids: their ids in the trace.
        events: [documents][horizons] how many events there are: what a mean over events divides by.
        cold: [documents][horizons] how many needed experts the stated cache lacks: what cold-miss recall divides by.
    """

    __test__ = False  # Not a test, whatever its name begins with.

    ids: tuple[str, ...] = ()
    events: tuple[tuple[int, ...], ...] = ()
    cold: tuple[tuple[int, ...], ...] = ()


class Protocol(_Model):
    """How it was judged.

    Attributes:
        budgets: label → experts fetched.
        cache_experts: experts that the cache of cold-miss recall holds in every layer: least recently used leaves
            first, on demand only, through the part's documents in the trace's order, empty at the start. None where
            no cache was replayed.
    """

    metric_version: int = METRIC_VERSION
    horizons: tuple[int, ...]
    budgets: dict[str, int]
    seeds: tuple[int, ...]
    bootstrap_draws: int
    cache_experts: int | None = None


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
        test_documents: what the sums per document belong to.
        cold_share: share of the needed experts that the stated cache lacks when the event is made, by horizon.
        control_trace: facts of the untrained control model's trace, None if there is none.
        untrained: predictor → recall@K by horizon on that trace (training-free predictors only).
    """

    format: Literal["specmoe-results"] = "specmoe-results"
    version: Literal[2] = 2
    made: Made
    trace: TraceFacts
    split: SplitFacts
    protocol: Protocol
    test_documents: TestDocuments = Field(default_factory=TestDocuments)
    cold_share: ByHorizon = Field(default_factory=dict)
    predictors: tuple[PredictorResult, ...]
    controls: tuple[Control, ...] = ()
    control_trace: TraceFacts | None = None
    untrained: dict[str, ByHorizon] = Field(default_factory=dict)
    journey: Journey | None = None

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results file.

        Raises:
            SpecmoeError: missing, damaged, not a results file, or made under other definitions of the metrics.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != "specmoe-results":
            raise SpecmoeError(f"{path} is not a specmoe results file")
        protocol = content.get("protocol")
        version = protocol.get("metric_version") if isinstance(protocol, dict) else None
        if isinstance(version, int) and version != METRIC_VERSION:
            raise SpecmoeError(
                f"{path} was made under metric version {version}, this specmoe has version {METRIC_VERSION}: "
                "run `specmoe train` again, with --replace if into the same folder"
            )
        return validated(cls, content, path)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.model_dump(mode="json"), indent=None)
