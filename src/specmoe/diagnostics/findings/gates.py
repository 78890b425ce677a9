"""Findings about gate weights and logits: are they what they are called, and do they belong to the ids?

Families differ: softmax over all experts (the K weights sum to less than 1), softmax over the K (to 1), sigmoid scores
(any sum up to K), and each of these times a fixed factor. So no sum as such is wrong.
"""

from __future__ import annotations

import numpy as np

from specmoe.diagnostics.evidence import Evidence, counted, listed
from specmoe.diagnostics.result import Finding

__all__ = ["CHECKS"]

_TOLERANCE = 1e-2  # half precision, many experts
_CONSTANT = 1e-2
_EVEN_SHARE = 0.99
_UNORDERED_ERROR, _UNORDERED_WARNING = 0.75, 0.99
_LEAST_EXCESS = 0.1
_NO_CHOICE = 0.95
_TOP_K_SHARE = 0.999


def negative_gates(evidence: Evidence) -> Finding | None:
    """Weights below 0."""
    gates = evidence.scan.gates
    if gates is None or gates.negative == 0:
        return None
    slots = gates.places * evidence.trace.topology.top_k
    message = (
        f"{gates.negative / slots:.2%} of the gate weights are negative (down to {gates.low:.3g}), so they are no "
        "weights of experts but raw logits, say: import them as such or leave them out"
    )
    return Finding(code="negative-gates", severity="error", message=message)


def scaled_gates(evidence: Evidence) -> Finding | None:
    """The weights of every place sum to one constant that is not 1."""
    gates = evidence.scan.gates
    if gates is None or gates.negative or gates.spread > _CONSTANT or abs(gates.mean - 1) <= _TOLERANCE:
        return None
    if gates.mean <= _TOLERANCE:
        message = "the gate weights are all zero: gate-mass recall means nothing; import them or leave them out"
        return Finding(code="scaled-gates", severity="warning", message=message)
    message = (
        f"the gate weights of every place sum to {gates.mean:.3g}, as with a routed scaling factor; nothing is wrong, "
        "shares of gate mass are taken relative to the sum"
    )
    return Finding(code="scaled-gates", severity="note", message=message)


def odd_gates(evidence: Evidence) -> Finding | None:
    """Weights above 1 whose sums vary: no probabilities, nor such times a factor that leaves their sum fixed."""
    gates = evidence.scan.gates
    if gates is None or gates.negative or gates.high <= 1 + _TOLERANCE or gates.spread <= _CONSTANT:
        return None
    message = (
        f"gate weights reach {gates.high:.3g} and their sums vary by {gates.spread:.0%} (up to {gates.largest:.3g}); "
        "scores times a fixed factor look like that and are fine, unnormalised numbers such as logits are not: "
        "check what the source recorded"
    )
    return Finding(code="odd-gates", severity="warning", message=message)


def constant_gates(evidence: Evidence) -> Finding | None:
    """The K weights of a place are all the same."""
    gates = evidence.scan.gates
    if gates is None or gates.several == 0 or gates.even < _EVEN_SHARE * gates.several or gates.high == 0:
        return None
    message = (
        f"at {gates.even / gates.several:.1%} of places all gate weights are equal, so they say nothing and gate-mass "
        "recall is plain recall: if the model weighs its experts, record the weights, else leave them out"
    )
    return Finding(code="constant-gates", severity="warning", message=message)


def unserved_gates(evidence: Evidence) -> Finding | None:
    """Slots without an expert carry a weight."""
    gates = evidence.scan.gates
    if gates is None or gates.unserved == 0:
        return None
    message = (
        f"{counted(gates.unserved, 'slot')} without an expert (-1) carry a gate weight; weights and ids were paired "
        "wrongly, or the weight should be 0: import again"
    )
    return Finding(code="unserved-gates", severity="warning", message=message)


def unordered_gates(evidence: Evidence) -> Finding | None:
    """The larger logit of two chosen experts does not have the larger weight."""
    found = evidence.logits
    if found is None or np.isnan(found.ordered).all():
        return None
    worst = int(np.nanargmin(found.ordered))
    share = float(found.ordered[worst])
    if share >= _UNORDERED_WARNING:
        return None
    message = (
        f"in layer {worst} the expert with the larger router logit has the larger gate weight in {share:.1%} of pairs "
        f"only ({counted(found.tokens, 'token')} of {counted(found.documents, 'document')}; half is chance), so "
        "weights do not match the ids: check the order of both in the source"
    )
    severity = "error" if share < _UNORDERED_ERROR else "warning"
    return Finding(code="unordered-gates", severity=severity, message=message)


def foreign_logits(evidence: Evidence) -> Finding | None:
    """The logits explain the ids no better than another token's logits do."""
    found = evidence.logits
    if found is None:
        return None
    excess_L = (found.within - found.by_chance) / np.maximum(1 - found.by_chance, 1e-9)
    foreign = np.flatnonzero((excess_L < _LEAST_EXCESS) & (found.by_chance < _NO_CHOICE) & (found.within > 0))
    if not len(foreign):
        return None
    worst = int(foreign[0])
    message = (
        f"in {counted(len(foreign), 'layer')} ({listed(foreign.tolist())}) the logits do not explain the ids: in "
        f"layer {worst} {found.within[worst]:.1%} of the chosen experts are among the {evidence.trace.topology.top_k} "
        f"largest logits, {found.by_chance[worst]:.1%} among another token's: logits and ids were paired wrongly"
    )
    return Finding(code="foreign-logits", severity="error", message=message)


def route_not_top_k(evidence: Evidence) -> Finding | None:
    """The route is not simply the top-k of the logits."""
    found = evidence.logits
    if found is None or foreign_logits(evidence) is not None:
        return None
    differing = np.flatnonzero((found.within < _TOP_K_SHARE) & (found.within > 0))
    if not len(differing):
        return None
    message = (
        f"{found.within[differing].mean():.1%} of the chosen experts are among the K largest logits in "
        f"{counted(len(differing), 'layer')} ({listed(differing.tolist())}); families that route with a bias, by "
        "groups or within a capacity do that: never take the top-k of the logits for the route"
    )
    return Finding(code="route-not-top-k", severity="note", message=message)


CHECKS = (
    negative_gates,
    scaled_gates,
    odd_gates,
    constant_gates,
    unserved_gates,
    unordered_gates,
    foreign_logits,
    route_not_top_k,
)
