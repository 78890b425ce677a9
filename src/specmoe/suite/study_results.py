"""The results files of studies: how recall grows with the training documents, and what a domain kept out costs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.results import ByHorizon, Made, Protocol, TraceFacts, check_metric_version, validated
from specmoe.schema import FileModel

__all__ = [
    "CurvePoint",
    "CurveResult",
    "DomainResult",
    "DomainStudy",
    "LearningCurve",
    "Studied",
    "Study",
    "load_study",
]


class Studied(FileModel):
    """A predictor of a study.

    Attributes:
        category, sees: from its recipe. learned: has trained parameters.
        reason: why it has no result; empty if it has.
    """

    name: str
    category: str
    sees: str
    learned: bool
    reason: str = ""


class CurveResult(FileModel):
    """One predictor at one share of the training documents.

    Attributes:
        seeds: how many finished. recall: recall@K on the test part, by horizon.
        gain: that minus recall@K at the share before, paired by document; empty at the first.
    """

    name: str
    seeds: int
    recall: ByHorizon
    gain: ByHorizon = Field(default_factory=dict)


class CurvePoint(FileModel):
    """Everything at one share (0 to 1) of the training documents; the smaller shares lie within the larger ones."""

    share: float
    documents: int
    tokens: int
    split_hash: str
    results: tuple[CurveResult, ...]


class LearningCurve(FileModel):
    """recall@K on the same test documents, by how many documents were trained on.

    Attributes:
        test_documents, validation_documents: how many, the same at every share.
        points: from the smallest share to the largest.
    """

    format: Literal["specmoe-learning-curve"] = "specmoe-learning-curve"
    version: Literal[1] = 1
    made: Made
    trace: TraceFacts
    protocol: Protocol
    test_documents: int
    validation_documents: int
    predictors: tuple[Studied, ...]
    points: tuple[CurvePoint, ...]


class DomainResult(FileModel):
    """One predictor and one domain (or all together), recall@K by horizon.

    Attributes:
        seen: trained with the normal split. unseen: trained without the domain. Both on the normal split's test
            documents of the domain. drop: seen minus unseen, paired by document.
        own_drop: the same against a training on as few documents of all domains, which leaves what is the domain's.
        whole: trained without the domain, on all documents of it.
    """

    name: str
    seen: ByHorizon
    unseen: ByHorizon
    drop: ByHorizon
    own_drop: ByHorizon
    whole: ByHorizon = Field(default_factory=dict)


class HeldOut(FileModel):
    """A domain that was kept out.

    Attributes:
        documents: of it, in all parts. test_documents: of it in the normal split's test part.
        train_documents: what was left to train on. matched_documents: training documents of the run behind
            ``own_drop``.
    """

    domain: str
    documents: int
    test_documents: int
    train_documents: int
    matched_documents: int
    split_hash: str
    results: tuple[DomainResult, ...]


class DomainStudy(FileModel):
    """Each domain in turn kept out of training and validation, and judged on.

    Attributes:
        split_hash: of the normal split, which keeps no domain out. train_documents: of it.
        domains: those that were kept out. left_out: domain → why it was not.
        together: all these domains' test documents in one, by predictor.
    """

    format: Literal["specmoe-domain-study"] = "specmoe-domain-study"
    version: Literal[1] = 1
    made: Made
    trace: TraceFacts
    protocol: Protocol
    split_hash: str
    train_documents: int
    predictors: tuple[Studied, ...]
    domains: tuple[HeldOut, ...]
    left_out: dict[str, str]
    together: tuple[DomainResult, ...]


Study: TypeAlias = LearningCurve | DomainStudy
_KINDS: dict[str, type[Study]] = {"specmoe-learning-curve": LearningCurve, "specmoe-domain-study": DomainStudy}


def load_study(path: Path) -> Study:
    """Read a study's results file.

    Raises:
        SpecmoeError: missing, damaged, of another kind, or made under other definitions of the metrics.
    """
    content = read_json(path)
    kind = _KINDS.get(content.get("format", "")) if isinstance(content, dict) else None
    if kind is None:
        raise SpecmoeError(f"{path} is not a results file of a study")
    check_metric_version(content, path, "make it again")
    return validated(kind, content, path)


def save_study(study: Study, path: Path) -> None:
    """Write a study atomically."""
    write_json(path, study.model_dump(mode="json"))
