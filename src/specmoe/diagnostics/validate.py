"""``specmoe validate``: measure a trace, then say what is wrong with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specmoe.diagnostics.evidence import Evidence, gather
from specmoe.diagnostics.findings import findings_of
from specmoe.diagnostics.result import (
    DocumentFacts,
    HiddenFacts,
    InformationFacts,
    LayerFacts,
    PartFacts,
    Validation,
)
from specmoe.diagnostics.scan import Scan
from specmoe.diagnostics.statistics import chance_overlap, entropy_bits, gini, mutual_information_bits
from specmoe.trace import DocumentRecord, Trace

__all__ = ["validate_trace"]


def validate_trace(path: Path, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> Validation:
    """Answer whether a trace is worth training on.

    Reads the whole trace once, in memory bounded by one document, and samples of it again. The same trace
    gives the same answer.

    Args:
        path: directory of the trace. on_progress: called with tokens read and tokens in all.

    Raises:
        SpecmoeError: the directory is no whole trace, or is damaged.
    """
    with Trace.open(path) as trace:
        evidence = gather(trace, on_progress)
        split = evidence.split.parts if evidence.split is not None else {}
        documents = trace.documents
        return Validation(
            trace=path.resolve().name,
            topology=trace.topology,
            kind=trace.manifest.source.kind,
            fields=trace.manifest.fields,
            documents=_document_facts(documents, evidence.scan),
            split={
                part: PartFacts(documents=len(indices), tokens=sum(documents[index].tokens for index in indices))
                for part, indices in split.items()
            },
            layers=tuple(_layer_facts(evidence.scan, layer) for layer in range(trace.topology.layers)),
            information=_information_facts(evidence),
            hidden=_hidden_facts(evidence),
            findings=findings_of(evidence),
        )


def _document_facts(documents: list[DocumentRecord], scan: Scan) -> DocumentFacts:
    tokens_D = scan.documents.tokens
    known_D = scan.documents.unknown < tokens_D
    decode = int(scan.documents.decode.sum())
    return DocumentFacts(
        documents=len(documents),
        tokens=scan.tokens,
        prefill=scan.tokens - decode,
        decode=decode,
        shortest=int(tokens_D.min()) if len(tokens_D) else 0,
        median=float(np.median(tokens_D)) if len(tokens_D) else 0.0,
        longest=int(tokens_D.max(initial=0)),
        same_text=len(documents) - len({document.text_sha256 for document in documents}),
        same_tokens=int(known_D.sum()) - len(np.unique(scan.documents.tokens_hash[known_D])),
        domains=dict(Counter(document.domain for document in documents).most_common()),
    )


def _layer_facts(scan: Scan, layer: int) -> LayerFacts:
    load_E, top_k = scan.load_LE[layer, : scan.topology.experts_L[layer]], scan.topology.top_k
    total, experts = int(load_E.sum()), len(load_E)
    joint = scan.joint_LGG
    return LayerFacts(
        entropy=entropy_bits(load_E) / math.log2(experts) if experts > 1 else 1.0,
        gini=gini(load_E),
        dead=int((load_E == 0).sum()),
        max_over_mean=float(load_E.max() * experts / total) if total else 0.0,
        overlap=float(scan.matches_L[layer] / (scan.pairs * top_k)) if scan.pairs else None,
        overlap_chance=chance_overlap(load_E, scan.tokens, top_k),
        next_bits=mutual_information_bits(joint[layer]) if layer < len(joint) else None,
        top1_bits=entropy_bits(scan.top_LE[layer]),
    )


def _information_facts(evidence: Evidence) -> InformationFacts | None:
    found = evidence.information
    if found is None:
        return None
    return InformationFacts(
        tokens=len(evidence.sample),
        documents=evidence.sample.documents,
        layers=found.layers,
        bits=found.bits,
        deviations=found.deviations,
    )


def _hidden_facts(evidence: Evidence) -> HiddenFacts | None:
    if evidence.probe is None or evidence.hidden is None:
        return None
    return HiddenFacts(
        documents=len(evidence.hidden.ids),
        tokens=evidence.hidden.tokens,
        layers=evidence.hidden.layers,
        recall=evidence.probe.recall,
        frequency=evidence.probe.frequency,
        correlation=evidence.routers.own if evidence.routers is not None else None,
    )
