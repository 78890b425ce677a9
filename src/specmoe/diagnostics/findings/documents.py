"""Findings about documents: how many, how long, whether they repeat, and whether a split keeps them apart."""

from __future__ import annotations

import numpy as np

from specmoe.diagnostics.evidence import Evidence, counted
from specmoe.diagnostics.result import Finding

__all__ = ["CHECKS"]

_FEWEST_TEST = 5
_SHORT_SHARE = 0.1
_DUPLICATE_SHARE = 0.1
_LEAK_ERROR = 0.1
_PADDING_RUN = 8
_PADDING_DOCUMENTS = 0.1
_PADDING_ERROR = 0.1


def cannot_split(evidence: Evidence) -> Finding | None:
    """The protocol's split is impossible."""
    if evidence.split is not None:
        return None
    message = f"{evidence.no_split}; caches and the oracle need no split (specmoe simulate, specmoe verdict)"
    return Finding(code="cannot-split", severity="error", message=message)


def few_documents(evidence: Evidence) -> Finding | None:
    """The test part has so few documents that an interval over documents means little."""
    if evidence.split is None or (number := len(evidence.split.parts["test"])) >= _FEWEST_TEST:
        return None
    message = (
        f"the test part has {counted(number, 'document')} only; intervals come from resampling documents, "
        f"so have at least {_FEWEST_TEST}, better 30: collect more text"
    )
    return Finding(code="few-documents", severity="warning", message=message)


def short_documents(evidence: Evidence) -> Finding | None:
    """Documents with fewer than two tokens have nothing to predict from."""
    tokens_D = evidence.scan.documents.tokens
    short = int((tokens_D < 2).sum())
    if short == 0:
        return None
    message = (
        f"{counted(short, 'document')} of {len(tokens_D):,} have fewer than 2 tokens and are in no part of the split; "
        "nothing is to be done if that is what the source holds"
    )
    severity = "warning" if short > _SHORT_SHARE * len(tokens_D) else "note"
    return Finding(code="short-documents", severity=severity, message=message)


def duplicate_documents(evidence: Evidence) -> Finding | None:
    """Documents that are there more than once; the split keeps equal texts on one side, but they count double."""
    documents = evidence.trace.documents
    repeated = len(documents) - len({document.text_sha256 for document in documents})
    if repeated == 0:
        return None
    message = (
        f"{repeated:,} of {len(documents):,} documents have the text of an earlier one "
        f"({repeated / len(documents):.1%}); a split keeps them on one side, but they count more than once: "
        "leave them out of the source"
    )
    severity = "warning" if repeated > _DUPLICATE_SHARE * len(documents) else "note"
    return Finding(code="duplicate-documents", severity=severity, message=message)


def split_leak(evidence: Evidence) -> Finding | None:
    """Documents that are judged whose text is in the train part too."""
    found = evidence.leak
    if found is None or (found.mostly == 0 and found.partly == 0):
        return None
    if found.mostly == 0:
        message = (
            f"{counted(found.partly, 'document')} of {found.judged:,} outside the train part share a passage of 50 "
            "tokens or more with it, at most half of each, as a common header or system prompt would be"
        )
        return Finding(code="split-leak", severity="note", message=message)
    share = found.mostly / found.judged
    assert found.example is not None
    example = f"such as {evidence.trace.documents[found.example].doc_id!r}"
    if found.routed:
        example += f"; {found.routed:,} by their routing, as their token ids are unknown"
    if found.partly:
        example += f"; {found.partly:,} more share a passage of at least 50 tokens, as a system prompt would be"
    message = (
        f"{found.mostly:,} of {found.judged:,} documents outside the train part ({share:.1%}) share more than half of "
        f"their tokens with it, {found.share:.0%} on average ({example}), so scores on them flatter whatever remembers "
        "text: give copies, samples of one prompt and the turns of one chat one group, or drop them"
    )
    return Finding(code="split-leak", severity="error" if share > _LEAK_ERROR else "warning", message=message)


def padding(evidence: Evidence) -> Finding | None:
    """Many documents begin or end with a long run of one and the same token id."""
    documents = evidence.scan.documents
    candidates: list[tuple[int, int, int, str]] = []
    for side, run_D, token_D in (
        ("end", documents.tail, documents.tail_token),
        ("begin", documents.head, documents.head_token),
    ):
        long_D = run_D >= _PADDING_RUN
        if not long_D.any():
            continue
        tokens, number = np.unique(token_D[long_D], return_counts=True)
        token = int(tokens[number.argmax()])
        padded_D = long_D & (token_D == token)
        candidates.append((int(run_D[padded_D].sum()), int(padded_D.sum()), token, side))
    lost, number, token, side = max(candidates, default=(0, 0, 0, ""))
    if number < max(2, _PADDING_DOCUMENTS * len(documents.tokens)):
        return None
    share = lost / evidence.scan.tokens
    message = (
        f"{number:,} of {len(documents.tokens):,} documents {side} with a run of at least {_PADDING_RUN} times token "
        f"{token}, {lost:,} tokens ({share:.1%}) in all, which looks like padding counted as text: strip it by the "
        "attention mask and capture or import again"
    )
    return Finding(code="padding", severity="error" if share > _PADDING_ERROR else "warning", message=message)


def unknown_tokens(evidence: Evidence) -> Finding | None:
    """Token ids are not known, so nothing can be learned from them."""
    unknown, tokens = int(evidence.scan.documents.unknown.sum()), evidence.scan.tokens
    if unknown == 0:
        return None
    whole = unknown == tokens
    share = f"{unknown:,} of {tokens:,} token ids ({unknown / tokens:.1%}) are unknown"
    what = "no token id is known" if whole else share
    message = f"{what}: predictors that read token ids have nothing to go by there; import them if the source has them"
    return Finding(code="unknown-tokens", severity="note", message=message)


CHECKS = (
    cannot_split,
    few_documents,
    short_documents,
    duplicate_documents,
    split_leak,
    padding,
    unknown_tokens,
)
