"""Findings about the routing itself: collapsed, copied, or without anything that could be foreseen."""

from __future__ import annotations

import numpy as np

from specmoe.diagnostics.evidence import Evidence, counted, listed
from specmoe.diagnostics.result import Finding
from specmoe.sources.fused_slots import fused_slots
from specmoe.sources.unrouted import LEAST_RUN

__all__ = ["CHECKS"]

# A busy model's expert would be used this often on average before its absence says anything.
_USES_FOR_DEAD = 50
_COLLAPSED_SHARE = 0.95
_ALWAYS_SHARE = 0.99
_ALWAYS_TOKENS = 64
# Where all layers together say less of a token, neighbours are routed alike by chance.
_ROUTE_BITS = 8.0
_ALIKE_ERROR = 0.1
# In standard deviations of shuffled data.
_INFORMATIVE = 4.0


def dead_experts(evidence: Evidence) -> Finding | None:
    """Experts that were never used, in a trace long enough to expect all."""
    load_LE = evidence.scan.load_LE
    topology = evidence.trace.topology
    experts_L = np.array(topology.experts_L)
    if load_LE.sum() < _USES_FOR_DEAD * experts_L.sum():
        return None
    # What a layer does not have is not dead.
    dead_L = ((load_LE == 0) & (np.arange(topology.experts) < experts_L[:, None])).sum(1)
    if not dead_L.any():
        return None
    worst = int(dead_L.argmax())
    message = (
        f"{int(dead_L.sum()):,} of {topology.all_experts:,} experts were never used, most in layer {worst} "
        f"({dead_L[worst]} of {experts_L[worst]}); they make prediction look easier: check that the model is "
        "whole and the text varied"
    )
    severity = "warning" if dead_L.sum() > topology.all_experts / 2 else "note"
    return Finding(code="dead-experts", severity=severity, message=message)


def collapsed_layers(evidence: Evidence) -> Finding | None:
    """Layers whose K busiest experts take nearly everything, so that there is nothing to foresee."""
    load_LE, top_k = evidence.scan.load_LE, evidence.trace.topology.top_k
    if load_LE.shape[1] <= top_k:
        message = f"every place uses all {top_k} experts of its layer: there is nothing to foresee"
        return Finding(code="collapsed-layers", severity="error", message=message)
    busiest_L = np.sort(load_LE, 1)[:, -top_k:].sum(1) / np.maximum(load_LE.sum(1), 1)
    collapsed = np.flatnonzero(busiest_L >= _COLLAPSED_SHARE)
    if not len(collapsed):
        return None
    every = len(collapsed) == len(load_LE)
    message = (
        f"in {counted(len(collapsed), 'layer')} of {len(load_LE)} ({listed(collapsed.tolist())}) the {top_k} busiest "
        f"of {evidence.trace.topology.experts_text} experts take at least {_COLLAPSED_SHARE:.0%} of the load; naming "
        "them is right nearly always, so leave such layers out of what you report"
    )
    return Finding(code="collapsed-layers", severity="error" if every else "warning", message=message)


def identical_layers(evidence: Evidence) -> Finding | None:
    """Two layers route every token alike."""
    copies = [copy for copy in evidence.layer_copies if copy.shift == 0]
    if not copies:
        return None
    first = copies[0]
    message = (
        f"{counted(len({copy.copy for copy in copies}), 'layer')} route as an earlier one does: layer {first.copy} as "
        f"layer {first.layer} in {first.share:.0%} of runs of tokens; no model does that, so the layers were mixed up "
        "when the trace was made"
    )
    return Finding(code="identical-layers", severity="error", message=message)


def shifted_layers(evidence: Evidence) -> Finding | None:
    """A layer routes as another one does some tokens earlier or later."""
    copies = [copy for copy in evidence.layer_copies if copy.shift != 0]
    if not copies:
        return None
    first = copies[0]
    message = (
        f"layer {first.copy} routes as layer {first.layer} does {counted(abs(first.shift), 'token')} "
        f"{'later' if first.shift > 0 else 'earlier'}, in {first.share:.0%} of runs of tokens "
        f"({counted(len(copies), 'such pair')}); no model does that, so the trace is made up or cut wrongly"
    )
    return Finding(code="shifted-layers", severity="error", message=message)


def copied_routing(evidence: Evidence) -> Finding | None:
    """Documents whose routing is another document's although their tokens differ."""
    copies = evidence.document_copies
    if copies.example is None:
        return None
    first, second, shift = copies.example
    names = [evidence.trace.documents[index].doc_id for index in (first, second)]
    message = (
        f"{len(copies.documents):,} of {len(evidence.trace):,} documents are routed as another one is under other "
        f"tokens, {copies.shifted:,} of them shifted ({names[1]!r} as {names[0]!r}, {abs(shift):,} tokens apart); "
        "routing follows from tokens, so the data are made up or tokens and routing were paired wrongly"
    )
    return Finding(code="copied-routing", severity="error", message=message)


def iid_routing(evidence: Evidence) -> Finding | None:
    """Nothing that is known before tells of a route more than its frequency does."""
    found = evidence.information
    if found is None or not found.bits or max(found.deviations.values()) >= _INFORMATIVE:
        return None
    if any(place.foreseen for place in evidence.alignment):
        return None
    tried = ", ".join(f"{name} {found.bits[name]:.4f} bits ({found.deviations[name]:+.1f} σ)" for name in found.bits)
    message = (
        f"routing looks independent and identically distributed: on {len(evidence.sample):,} tokens nothing tells of "
        f"the top-1 expert beyond shuffled data: {tried}; no predictor can beat layer frequency, so this is noise or "
        "made up: look for the fault where it was recorded"
    )
    return Finding(code="iid-routing", severity="error", message=message)


def always_used(evidence: Evidence) -> Finding | None:
    """An expert that (nearly) every token of a layer uses, beside a choice among others: a shared one, by its use."""
    scan, top_k = evidence.scan, evidence.trace.topology.top_k
    load_LE = scan.load_LE
    served_L = scan.served_LK.max(1)
    if top_k < 2 or load_LE.shape[1] <= top_k or scan.tokens < _ALWAYS_TOKENS:
        return None
    fused = fused_slots(scan.seen_LKE, scan.served_LK)
    always_LE = load_LE >= _ALWAYS_SHARE * np.maximum(served_L, 1)[:, None]
    if fused is not None:
        always_LE[:, [expert for expert in fused.experts if expert < load_LE.shape[1]]] = False
    # Where all K are the same for nearly every token the layer has collapsed, which another finding says.
    always_LE[np.sort(load_LE, 1)[:, -top_k:].sum(1) >= _COLLAPSED_SHARE * load_LE.sum(1)] = False
    layers = np.flatnonzero(always_LE.any(1))
    if not len(layers):
        return None
    everywhere = np.flatnonzero(always_LE.all(0))
    if len(everywhere) and len(load_LE) > 1:
        who = f"expert{'s' * (len(everywhere) > 1)} {listed(everywhere.tolist())} in every layer"
    else:
        first = int(layers[0])
        who = f"one expert or more in {counted(len(layers), 'layer')} of {len(load_LE)}"
        who += f" (expert {int(always_LE[first].argmax())} in layer {first})"
    message = (
        f"at least {_ALWAYS_SHARE:.0%} of tokens use {who}, as a shared expert that was counted among the routed ones; "
        "naming it is right always: record the router's own choices only, or leave such layers out of what you report"
    )
    certain = len(everywhere) > 0 and len(load_LE) > 1
    return Finding(code="always-used", severity="error" if certain else "warning", message=message)


def constant_routing(evidence: Evidence) -> Finding | None:
    """Tokens in a row that are routed alike in every layer: a profiling pass, padding, a buffer not written again."""
    alike, tokens, layers = evidence.scan.alike, evidence.scan.tokens, len(evidence.scan.top_LE)
    if not alike.tokens and not alike.repeats:
        return None
    share_LE = evidence.scan.top_LE / np.maximum(evidence.scan.top_LE.sum(1, keepdims=True), 1)
    if -(share_LE * np.log2(np.where(share_LE > 0, share_LE, 1))).sum() < _ROUTE_BITS:
        return None
    where = f"in runs of {LEAST_RUN} or more that are routed alike in all {layers:,} layers"
    if not alike.tokens:
        share = alike.repeats / tokens
        message = (
            f"{alike.repeats:,} tokens ({share:.1%}) stand {where}, each run of one token id, as repeated white space "
            "may be in a small model and padding is: check that they are text"
        )
        return Finding(code="constant-routing", severity="warning" if share > _ALIKE_ERROR else "note", message=message)
    share, (length, document) = alike.tokens / tokens, alike.longest
    message = (
        f"{alike.tokens:,} tokens ({share:.1%}) stand {where} although their token ids differ or are unknown, the "
        f"longest run {length:,} tokens in {evidence.trace.documents[document].doc_id!r}; that is no text but an "
        "engine's profiling pass, padding or a buffer that was not written again: leave those rows out at the source"
    )
    return Finding(code="constant-routing", severity="error" if share > _ALIKE_ERROR else "warning", message=message)


CHECKS = (
    dead_experts,
    collapsed_layers,
    always_used,
    constant_routing,
    identical_layers,
    shifted_layers,
    copied_routing,
    iid_routing,
)
