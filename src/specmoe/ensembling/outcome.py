"""What blending gained and what it costs, as it is kept in ``ensemble.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.results import ByHorizon, Interval, Latency, Made, Protocol, TraceFacts, check_metric_version, validated
from specmoe.schema import FileModel

__all__ = ["Check", "Contender", "EnsembleResult", "MemberFacts", "load_ensemble", "save_ensemble"]

Key = Literal["best", "blend", "greedy", "student", "taught"]


class MemberFacts(FileModel):
    """A member of the ensemble.

    Attributes:
        validation: recall@K on the validation part, mean over horizons and seeds, by which it was chosen.
        weights: horizon → its share of the blend's weights, mean over seeds. picks: its share of the greedy picks.
    """

    name: str
    learned: bool
    validation: float
    weights: dict[int, float]
    picks: float


class Check(FileModel):
    """Weights fitted on one half of the validation documents, judged on the other half.

    Attributes:
        documents: in the half that was held back, 0 if there was only one in all and nothing could be checked.
        events: in the sample, both halves; share: of all events of the validation part.
        single, blend, greedy: recall@K on the held-back half, mean over horizons; ``single`` is the strongest member
            of the half that was fitted on.
        single_loss, blend_loss: log loss of the inclusion probabilities there, nats an event, mean over horizons.
        picks: the greedy selection made anew on all documents, in order.
    """

    seed: int
    documents: int
    events: int
    share: float
    single: float | None = None
    blend: float | None = None
    greedy: float | None = None
    single_loss: float | None = None
    blend_loss: float | None = None
    picks: tuple[str, ...] = ()


class Contender(FileModel):
    """One of those that are compared, on the test part.

    Attributes:
        key: ``best`` single member by the validation part, ``blend``, ``greedy``, ``student`` without teacher,
            ``taught`` by the blend.
        members: whom a step asks. seeds: how many runs.
        recall: recall@K. difference: that minus the best single member's, paired; empty for itself.
        gain: the difference, mean over horizons. latency: of one step.
        parameters: trained ones, of all members. megabytes: of all that has to be kept, tables too, as float32.
        files: where each seed's weights lie, from the folder of the ensemble or absolute.
    """

    key: Key
    title: str
    members: tuple[str, ...]
    seeds: int
    recall: ByHorizon
    difference: ByHorizon = Field(default_factory=dict)
    gain: Interval | None = None
    latency: Latency
    parameters: int
    megabytes: float
    files: tuple[str, ...] = ()


class EnsembleResult(FileModel):
    """The content of ``ensemble.json``.

    Attributes:
        run: folder of the run whose predictors were blended. best: its strongest member by the validation part.
        student: which predictor was taught.
        left_out: predictor → why it could not be a member.
        checks: one a seed.
        taught_gain: recall@K of the student with minus without teacher, paired. taught_mean: mean over horizons.
    """

    format: Literal["specmoe-ensemble"] = "specmoe-ensemble"
    version: Literal[1] = 1
    made: Made
    trace: TraceFacts
    split_hash: str
    test_documents: int
    validation_documents: int
    protocol: Protocol
    run: str
    best: str
    student: str
    members: tuple[MemberFacts, ...]
    left_out: dict[str, str] = Field(default_factory=dict)
    checks: tuple[Check, ...]
    contenders: tuple[Contender, ...]
    taught_gain: ByHorizon = Field(default_factory=dict)
    taught_mean: Interval | None = None

    def contender(self, key: Key) -> Contender | None:
        """The contender of a key."""
        return next((each for each in self.contenders if each.key == key), None)


def load_ensemble(path: Path) -> EnsembleResult:
    """Read ``ensemble.json``.

    Raises:
        SpecmoeError: missing, damaged, of another kind, or made under other definitions of the metrics.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != "specmoe-ensemble":
        raise SpecmoeError(f"{path} is not a results file of an ensemble")
    check_metric_version(content, path, "make it again")
    return validated(EnsembleResult, content, path)


def save_ensemble(result: EnsembleResult, path: Path) -> None:
    """Write it atomically."""
    write_json(path, result.model_dump(mode="json"))
