"""The results file: everything that was measured, describing itself, from which everything shown is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.schema import FileModel
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
    "check_metric_version",
    "validated",
]

# Raised whenever a metric's definition changes; results of different versions do not compare.
METRIC_VERSION = 2


_Count = Annotated[int, Field(ge=0)]
_Horizon = Annotated[int, Field(ge=1, le=1024)]


class Interval(FileModel):
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
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise SpecmoeError(f"{path} is damaged at {place}: {first['msg'].removeprefix('Value error, ')}") from error


def check_metric_version(content: dict[str, Any], path: Path, again: str) -> None:
    """Refuse what was made under other definitions of the metrics, or does not say under which.

    Args:
        content: of a results file, not yet checked. again: what makes it anew.

    Raises:
        SpecmoeError: it is of another version; nothing is said of a file without a protocol.
    """
    protocol = content.get("protocol")
    if not isinstance(protocol, dict):
        return
    if "metric_version" not in protocol:
        raise SpecmoeError(f"{path} does not say under which metric version it was made: {again}")
    version = protocol["metric_version"]
    if version != METRIC_VERSION:
        raise SpecmoeError(
            f"{path} was made under metric version {version!r}, this specmoe has version {METRIC_VERSION}: {again}"
        )


# Horizon → interval; JSON keys are strings, so "1" stands for horizon 1.
ByHorizon = dict[int, Interval]


class Epoch(FileModel):
    """One point of a learning curve. Losses in nats an event, recall@K over all horizons (0 to 1)."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_recall: float
    learning_rate: float


class SeedResult(FileModel):
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


class CalibrationBin(FileModel):
    """Experts whose predicted probability of being among the K lies in one bin."""

    predicted: float
    observed: float
    count: _Count


class Latency(FileModel):
    """Time of one ``step`` at batch 1 on one thread, in µs.

    Attributes:
        compiled: whether it is the predictor's compiled form that was timed, else eager PyTorch.
    """

    p50_us: float
    p99_us: float
    events: _Count
    compiled: bool = False


class PredictorResult(FileModel):
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
    parameters: _Count
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


class Control(FileModel):
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


class Journey(FileModel):
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


class TraceFacts(FileModel):
    """The trace that was used."""

    name: str
    fingerprint: str
    topology: Topology
    tokens: _Count
    documents: _Count
    domains: _Count
    fields: tuple[str, ...]
    source: dict[str, Any]
    layer_us_p50: float | None = None


class SplitFacts(FileModel):
    """The split: its hash and seed, and documents and tokens of each part."""

    hash: str
    seed: int
    documents: dict[str, _Count]
    tokens: dict[str, _Count]
    held_out_domain: str | None = None


class TestDocuments(FileModel):
    """The documents of the test part, in the order in which every ``document_sums`` has them.

    Attributes:
        ids: their ids in the trace.
        events: [documents][horizons] how many events there are: what a mean over events divides by.
        cold: [documents][horizons] how many needed experts the stated cache lacks: what cold-miss recall divides by.
    """

    __test__ = False  # Not a test, whatever its name begins with.

    ids: tuple[str, ...] = ()
    events: tuple[tuple[_Count, ...], ...] = ()
    cold: tuple[tuple[_Count, ...], ...] = ()


class Protocol(FileModel):
    """How it was judged.

    Attributes:
        budgets: label → experts fetched.
        cache_experts: experts that the cache of cold-miss recall holds in every layer: least recently used leaves
            first, on demand only, through the part's documents in the trace's order, empty at the start. None where
            no cache was replayed.
    """

    metric_version: int = METRIC_VERSION
    horizons: tuple[_Horizon, ...] = Field(min_length=1)
    budgets: dict[str, _Count]
    seeds: tuple[int, ...]
    bootstrap_draws: _Count
    cache_experts: int | None = None


class Made(FileModel):
    """By what the file was made."""

    date: str
    commit: str
    command: str
    versions: dict[str, str]
    hardware: dict[str, str]
    seconds: float


class Results(FileModel):
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
        check_metric_version(content, path, "run `specmoe train` again, with --replace if into the same folder")
        return validated(cls, content, path)

    @model_validator(mode="after")
    def _tables_are_whole(self) -> Results:
        horizons, documents = len(self.protocol.horizons), len(self.test_documents.ids)
        tables: dict[str, tuple[tuple[Any, ...], ...]] = {
            "test_documents.events": self.test_documents.events,
            "test_documents.cold": self.test_documents.cold,
        }
        for each in self.predictors:
            tables[f"per_layer of {each.name}"] = each.per_layer
            for metric, seeds in each.document_sums.items():
                tables |= {f"document_sums {metric} of {each.name}": sums for sums in seeds}
                if any(len(sums) != documents for sums in seeds):
                    raise ValueError(f"document_sums {metric} of {each.name} are not of {documents} documents")
        for name, table in tables.items():
            if any(len(row) != horizons for row in table):
                raise ValueError(f"{name} has a row that is not of {horizons} horizons")
        for name in ("events", "cold"):
            if len(getattr(self.test_documents, name)) not in {0, documents}:
                raise ValueError(f"test_documents.{name} is not of {documents} documents")
        return self

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.model_dump(mode="json"), indent=None)
