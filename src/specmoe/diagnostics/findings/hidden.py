"""Findings about hidden states: do they explain the routing that they stand beside?"""

from __future__ import annotations

import numpy as np

from specmoe.diagnostics.evidence import Evidence, counted, listed
from specmoe.diagnostics.probing import Alignment
from specmoe.diagnostics.result import Finding
from specmoe.sources.hidden_probe import MINIMUM_TEXTS

__all__ = ["CHECKS"]

_ROUTER_GOOD, _ROUTER_NONE = 0.99, 0.5


def noise_hidden(evidence: Evidence) -> Finding | None:
    """A linear probe from hidden states finds no more experts than layer frequency does, anywhere near."""
    found = evidence.probe
    if found is None or not found.at_chance or _misplaced(evidence):
        return None
    assert evidence.hidden is not None
    sample = f"{counted(evidence.hidden.tokens, 'token')} of {counted(len(evidence.hidden.ids), 'document')}"
    message = (
        f"hidden states do not explain the routing: on unseen documents a linear probe from them finds "
        f"{found.recall:.1%} of the experts, layer frequency {found.frequency:.1%} ({sample}); they are noise or their "
        "axes were mixed up: capture again or leave them out"
    )
    return Finding(code="noise-hidden", severity="error", message=message)


def misplaced_hidden(evidence: Evidence) -> Finding | None:
    """The routing of some layer follows from the hidden states of another layer or token better than from its own."""
    misplaced = _misplaced(evidence)
    if not misplaced:
        return None
    shown = "; ".join(
        f"the routing of layer {one.layer} follows from those of {_place(one)} (a linear probe finds {one.best:.1%} of "
        f"the experts) better than from its own ({one.own:.1%})"
        for one in misplaced[:3]
    )
    message = (
        f"hidden states are {_pattern(misplaced)}, in {len(misplaced)} of {len(evidence.alignment)} layers looked at: "
        f"{shown}; line them up and capture or import again"
    )
    return Finding(code="misplaced-hidden", severity="error", message=message)


def _misplaced(evidence: Evidence) -> list[Alignment]:
    return [place for place in evidence.alignment if place.misplaced]


def _place(one: Alignment) -> str:
    token = {-1: " of the token before", 0: "", 1: " of the token after"}[one.token_shift]
    return f"layer {one.best_layer}{token}"


def _pattern(misplaced: list[Alignment]) -> str:
    """What hidden states really stand for, if that is the same everywhere: hidden s explains the routing of s + n."""
    shifts = {(one.layer - one.best_layer, -one.token_shift) for one in misplaced}
    if len(shifts) > 1:
        return "aligned with other layers or tokens (permuted)"
    layers, tokens = shifts.pop()
    parts = [f"layer s{layers:+d}"] * (layers != 0) + [f"token t{tokens:+d}"] * (tokens != 0)
    return f"aligned with {' and '.join(parts)}"


def foreign_routers(evidence: Evidence) -> Finding | None:
    """Hidden × router does not give the kept logits."""
    fit = evidence.routers
    if fit is None:
        return None
    poor = [n for n, own in enumerate(fit.own) if own < _ROUTER_GOOD]
    if not poor:
        return None
    moved = [n for n in poor if fit.best[n] >= _ROUTER_GOOD]
    worst = poor[int(np.argmin([fit.own[n] for n in poor]))]
    text = (
        f"hidden state × router does not give the kept logits in {len(poor)} of {len(fit.layers)} layers looked at "
        f"({listed([fit.layers[n] for n in poor])}): their correlation is {fit.own[worst]:.3f} in layer "
        f"{fit.layers[worst]}"
    )
    if moved:
        one = moved[0]
        text += f", but hidden × router {fit.best_layer[one]} gives those of layer {fit.layers[one]}"
    wrong = bool(moved) or fit.own[worst] < _ROUTER_NONE
    advice = (
        "; hidden states, routers and logits do not belong together: capture again"
        if wrong
        else "; a router that transforms its input does that, else capture again"
    )
    return Finding(code="foreign-routers", severity="error" if wrong else "warning", message=text + advice)


def unprobed_hidden(evidence: Evidence) -> Finding | None:
    """Too few documents to tell whether the hidden states explain anything."""
    if evidence.hidden is None or evidence.probe is not None:
        return None
    message = (
        f"hidden states were not probed: that takes {MINIMUM_TEXTS} documents that keep them, here are "
        f"{len(evidence.hidden.ids)}"
    )
    return Finding(code="unprobed-hidden", severity="note", message=message)


CHECKS = (noise_hidden, misplaced_hidden, foreign_routers, unprobed_hidden)
