"""The answer of ``specmoe validate``: what a trace holds, in numbers, and what is wrong with it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from specmoe.topology import Topology

__all__ = [
    "DocumentFacts",
    "Finding",
    "HiddenFacts",
    "InformationFacts",
    "LayerFacts",
    "PartFacts",
    "Severity",
    "Validation",
]

Severity = Literal["error", "warning", "note"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Finding(_Strict):
    """One thing that a reader of the trace should know before training on it.

    Attributes:
        code: stable name; ``docs/validate.md`` explains each. severity: ``error`` spoils what is learned or
            measured, ``warning`` may, ``note`` is a property to know of.
        message: one sentence with the numbers, and what to do.
    """

    code: str
    severity: Severity
    message: str


class DocumentFacts(_Strict):
    """The documents.

    Attributes:
        documents, tokens, prefill, decode: counts. shortest, median, longest: tokens of a document.
        same_text: documents whose text hash an earlier one has. same_tokens: whose token ids an earlier one has
            (documents without any known token id do not count).
        domains: documents by domain, most first.
    """

    documents: int
    tokens: int
    prefill: int
    decode: int
    shortest: int
    median: float
    longest: int
    same_text: int
    same_tokens: int
    domains: dict[str, int]


class PartFacts(_Strict):
    """One part of the protocol's split (seed 0)."""

    documents: int
    tokens: int


class LayerFacts(_Strict):
    """One MoE layer.

    Attributes:
        entropy: of the experts' load, over log E: 1 where all carry the same, 0 where one carries all.
        gini: of the load; 0 even, towards 1 uneven. dead: experts that were never used.
        max_over_mean: load of the busiest expert over the mean load.
        overlap: mean share of the K experts that the previous token used too. overlap_chance: what independent
            draws with the same load would give.
        next_bits: mutual information in bits between the top-1 experts of this layer and of the next one for
            the same token, bias-corrected; None for the last layer.
        top1_bits: entropy of the top-1 expert, the most that anything can tell of it.
    """

    entropy: float
    gini: float
    dead: int
    max_over_mean: float
    overlap: float | None
    overlap_chance: float
    next_bits: float | None
    top1_bits: float


class InformationFacts(_Strict):
    """What the top-1 expert depends on: bits beyond shuffled data, and how many deviations that is beyond it.

    Attributes:
        tokens, documents: size of the sample. layers: which were looked at.
        bits: source (``previous token``, ``previous layer``, ``token id``) → mean mutual information over the
            layers, less that of the same data shuffled. A source that the trace cannot show is absent.
        deviations: the same in standard deviations of the shuffles.
    """

    tokens: int
    documents: int
    layers: tuple[int, ...]
    bits: dict[str, float]
    deviations: dict[str, float]


class HiddenFacts(_Strict):
    """What the hidden states explain.

    Attributes:
        documents, tokens: size of the sample. layers: which were looked at.
        recall: recall@K of a linear probe on unseen documents, from the hidden state to the same layer's route.
        frequency: recall@K of always naming the layer's most used experts.
        correlation: per looked-at layer, between hidden × router and the kept logits; None without both.
    """

    documents: int
    tokens: int
    layers: tuple[int, ...]
    recall: float
    frequency: float
    correlation: tuple[float, ...] | None


class Validation(_Strict):
    """Everything that ``specmoe validate`` prints.

    Attributes:
        trace: name of its folder. kind: of its source. fields: what is kept.
        documents, split, layers, information, hidden: the numbers. ``split`` is empty where there is none,
            ``information`` and ``hidden`` are None where there is too little data or no such field.
        findings: worst first.
    """

    trace: str
    topology: Topology
    kind: str
    fields: tuple[str, ...]
    documents: DocumentFacts
    split: dict[str, PartFacts]
    layers: tuple[LayerFacts, ...]
    information: InformationFacts | None
    hidden: HiddenFacts | None
    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether there is a finding of severity ``error``."""
        return any(finding.severity == "error" for finding in self.findings)
