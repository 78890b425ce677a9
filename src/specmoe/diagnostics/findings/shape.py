"""Findings about K and E: what the slots hold, and whether that is what the model does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from specmoe.diagnostics.evidence import Evidence, counted, listed
from specmoe.diagnostics.result import Finding
from specmoe.sources.fused_slots import fused_slots

__all__ = ["CHECKS"]

# What configurations in transformers, and recorders after them, call K and E.
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k", "topk")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "experts_per_layer")
# An importer says with this setting that E is one more than the largest id.
_EXPERTS_FROM = "experts_from"


def top_k_mismatch(evidence: Evidence) -> Finding | None:
    """K or E is another than the model's configuration says."""
    topology, settings = evidence.trace.topology, evidence.trace.manifest.source.settings
    wrong = []
    for name, held, keys in (("top-k", topology.top_k, _TOP_K_KEYS), ("experts", topology.experts, _EXPERT_KEYS)):
        for key, value in _settings_named(settings, keys):
            if value != held:
                wrong.append(f"{name} is {held}, but the setting {key} says {value}")
    if not wrong:
        return None
    message = f"{'; '.join(wrong)}: the trace does not hold what the model routed, capture or import again"
    return Finding(code="top-k-mismatch", severity="error", message=message)


def _settings_named(settings: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Whole numbers under one of these names, at the top or within a nested configuration."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _settings_named(value, keys)
        elif key in keys and isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def repeated_experts(evidence: Evidence) -> Finding | None:
    """A place names an expert twice, which no router does."""
    repeats_L = evidence.scan.repeats_L
    if not repeats_L.any():
        return None
    places = evidence.scan.tokens * len(repeats_L)
    message = (
        f"{int(repeats_L.sum()):,} of {places:,} places ({repeats_L.sum() / places:.2%}) name an expert twice, first "
        f"in layer {int((repeats_L > 0).argmax())}; routers choose K different experts, so the ids or their shape are "
        "wrong: import again"
    )
    return Finding(code="repeated-experts", severity="error", message=message)


def empty_slots(evidence: Evidence) -> Finding | None:
    """Every place of some layer serves the same number of experts, and that is less than K."""
    served_LK1, top_k = evidence.scan.served_LK1, evidence.trace.topology.top_k
    constant_L = (served_LK1 > 0).sum(1) == 1
    served_L = served_LK1.argmax(1)
    few = np.flatnonzero(constant_L & (served_L < top_k))
    if not len(few):
        return None
    numbers = sorted(set(served_L[few].tolist()))
    message = (
        f"the trace says top-{top_k}, but {counted(len(few), 'layer')} ({listed(few.tolist())}) always serve "
        f"{listed(numbers)} experts and leave the other slots empty; recall@K is then counted at the wrong K: "
        "import again with the model's own top-k"
    )
    return Finding(code="empty-slots", severity="warning", message=message)


def dropped_slots(evidence: Evidence) -> Finding | None:
    """Some slots have no expert, now and then: tokens dropped over capacity."""
    served_LK1, empty_LK = evidence.scan.served_LK1, evidence.scan.empty_LK
    varying_L = (served_LK1 > 0).sum(1) > 1
    dropped = int(empty_LK[varying_L].sum())
    if dropped == 0:
        return None
    slots = evidence.scan.tokens * int(varying_L.sum()) * evidence.trace.topology.top_k
    message = (
        f"{dropped / slots:.2%} of the slots of {counted(int(varying_L.sum()), 'layer')} have no expert, as when "
        "tokens are dropped over an expert's capacity; such places are scored on the experts that they have"
    )
    return Finding(code="dropped-slots", severity="note", message=message)


def beyond_experts(evidence: Evidence) -> Finding | None:
    """Ids of E and above are kept: zero or skip experts, or a wrong E.

    It is an error where the topology says how many zero experts there are, and an id is none of them either.
    """
    beyond = int(evidence.scan.beyond_LK.sum())
    if beyond == 0:
        return None
    shape = evidence.trace.topology
    slots = evidence.scan.tokens * shape.layers * shape.top_k
    if shape.zero_experts and evidence.scan.largest_id >= shape.router_classes:
        message = (
            f"the largest expert id is {evidence.scan.largest_id}, but with {shape.experts} experts and "
            f"{shape.zero_experts} zero experts the last one is {shape.router_classes - 1}: capture or import again"
        )
        return Finding(code="beyond-experts", severity="error", message=message)
    message = (
        f"{beyond / slots:.2%} of the slots hold an id of {shape.experts} or above; those count as zero or skip "
        "experts, which need no prefetch: if the model has none, the number of experts is wrong, import with --experts"
    )
    return Finding(code="beyond-experts", severity="note", message=message)


def shared_slot(evidence: Evidence) -> Finding | None:
    """A slot holds what no other slot does: a shared expert that an engine fused into the top-k."""
    found = fused_slots(evidence.scan.seen_LKE, evidence.scan.served_LK)
    if found is None:
        return None
    looks = f"{found.words}, as where an engine fuses a shared expert into the top-k"
    if not found.certain:
        message = (
            f"{looks}; {counted(evidence.scan.tokens, 'token')} of so few layers and experts do not make it certain: "
            "if the model has a shared expert, record without fusing it"
        )
        return Finding(code="shared-slot", severity="warning", message=message)
    message = (
        f"{looks}; it is no choice of the router, so every figure counts what needs no foresight: import the source "
        "again, which leaves it out, or record without fusing it"
    )
    return Finding(code="shared-slot", severity="error", message=message)


def inferred_experts(evidence: Evidence) -> Finding | None:
    """The number of experts was taken from the ids."""
    settings, shape = evidence.trace.manifest.source.settings, evidence.trace.topology
    if settings.get(_EXPERTS_FROM) != "ids":
        return None
    message = (
        f"the number of experts, {shape.experts}, is one more than the largest id; experts that were never used may be "
        "missing from it: import with --experts if you know the model's"
    )
    return Finding(code="inferred-experts", severity="note", message=message)


CHECKS = (top_k_mismatch, repeated_experts, empty_slots, dropped_slots, beyond_experts, shared_slot, inferred_experts)
