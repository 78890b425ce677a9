"""Copies: layers that route as other layers do, documents that route as others do, also at another place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specmoe.diagnostics.sample import RoutingSample
from specmoe.diagnostics.scan import ROUTING_RUN, Scan
from specmoe.diagnostics.shingles import Shingles, mix, pairs_of_copies, rolling
from specmoe.diagnostics.statistics import entropy_bits

__all__ = ["DocumentCopies", "LayerCopy", "Leak", "document_copies", "layer_copies", "leak"]

_LEAST_SHARE = 0.5
_MOST_LAYER_TOKENS = 1 << 21
_LEAST_RUNS = 32
_LEAST_DOCUMENT_RUNS = 4
# A match by chance must be less likely than 2 to the minus this.
_CHANCE_BITS = 64


@dataclass(frozen=True)
class LayerCopy:
    """Layer ``copy`` routes a token as ``layer`` does the token ``shift`` later, in this share of its runs."""

    layer: int
    copy: int
    shift: int
    share: float


def layer_copies(sample: RoutingSample, experts: int) -> list[LayerCopy]:
    """Layers of which at least half of the runs of eight tokens also stand in another layer, at a constant shift.

    Runs that one layer has twice are left out, so that two layers that use one expert for everything do not count.
    """
    tokens, layers, _ = sample.expert_ids_TLK.shape
    tokens = min(tokens, max(512, _MOST_LAYER_TOKENS // layers))
    label = np.random.default_rng(0).integers(1 << 63, size=experts + 1, dtype=np.int64).view(np.uint64)
    document_T = sample.document_T[:tokens]
    whole = np.flatnonzero(document_T[: max(0, tokens - ROUTING_RUN + 1)] == document_T[ROUTING_RUN - 1 :])
    # Documents are far apart, so that no shift within one leads into another.
    place = whole + document_T[whole] * (1 << 24)
    hashes = []
    for layer in range(layers):
        ids_TK = sample.expert_ids_TLK[:tokens, layer]
        slot_TK = np.where((ids_TK < 0) | (ids_TK >= experts), experts, ids_TK)
        hashes.append(rolling(mix(label[slot_TK].sum(1)), ROUTING_RUN)[whole])
    owner_N = np.repeat(np.arange(layers), len(whole))
    place_N = np.tile(place, layers)
    first_P, second_P, count_L, _ = pairs_of_copies(np.concatenate(hashes), owner_N, place_N)
    shift_P = place_N[first_P] - place_N[second_P]
    found, number = np.unique(np.stack([owner_N[first_P], owner_N[second_P], shift_P]), axis=1, return_counts=True)
    copies = []
    for (layer, copy, shift), runs in zip(found.T.tolist(), number.tolist(), strict=True):
        least = min(int(count_L[layer]), int(count_L[copy]))
        if runs >= _LEAST_RUNS and runs >= _LEAST_SHARE * least:
            copies.append(LayerCopy(layer, copy, shift, runs / least))
    return copies


@dataclass(frozen=True)
class DocumentCopies:
    """Documents whose routing is another document's, at the same place or shifted, under other tokens.

    Attributes:
        documents: which. shifted: those of them that are copies at another place. example: two of them and the shift.
    """

    documents: tuple[int, ...]
    shifted: int
    example: tuple[int, int, int] | None


def document_copies(scan: Scan, sample: RoutingSample) -> DocumentCopies:
    """Documents of which half of the runs of eight tokens are routed, in all layers, as runs of other tokens elsewhere.

    Runs of the same tokens do not count: an equal passage may well be routed equally. How long a match must be
    follows from the entropy of one token's route: small models often route alike by chance.
    """
    hash_N, document_N, position_N, tokens_N = scan.routing.columns()
    least_runs = max(_LEAST_DOCUMENT_RUNS, _runs_beyond_chance(sample) / scan.routing.step)
    first_P, second_P, count_D, _ = pairs_of_copies(hash_N, document_N, position_N)
    other = tokens_N[first_P] != tokens_N[second_P]
    first_P, second_P = first_P[other], second_P[other]
    shift_P = position_N[first_P] - position_N[second_P]
    rows = np.stack([document_N[first_P].astype(np.int64), document_N[second_P], shift_P])
    found, number = np.unique(rows, axis=1, return_counts=True)
    copied: dict[int, int] = {}
    example = None
    for (first, second, shift), runs in zip(found.T.tolist(), number.tolist(), strict=True):
        least = min(int(count_D[first]), int(count_D[second]))
        if runs >= least_runs and runs >= _LEAST_SHARE * least:
            example = example or (first, second, shift)
            copied[first] = copied.get(first, 0) or shift
            copied[second] = copied.get(second, 0) or shift
    return DocumentCopies(tuple(sorted(copied)), sum(1 for shift in copied.values() if shift), example)


def _runs_beyond_chance(sample: RoutingSample) -> float:
    """Runs that must match in a row before chance is out of the question."""
    if len(sample) == 0:
        return 0.0
    bits = entropy_bits(np.unique(sample.top_TL, axis=0, return_counts=True)[1])
    return _CHANCE_BITS / max(bits, 1e-6) - ROUTING_RUN + 1


@dataclass(frozen=True)
class Leak:
    """Text on one side of a split that the other side has too.

    Attributes:
        judged: documents of validation, test and the held-out domain. mostly: those of them of whose runs of 50 tokens
            at least half also stand in the train part, or that are the same tokens as a document there.
        partly: those that share at least one run, but less than half. example: one of ``mostly``; None without one.
    """

    judged: int
    mostly: int
    partly: int
    example: int | None


def leak(scan: Scan, train: tuple[int, ...], judged: tuple[int, ...]) -> Leak:
    """What documents that are judged share with documents that are trained on."""
    count = len(scan.documents.tokens)
    trained_D, judged_D = np.zeros(count, bool), np.zeros(count, bool)
    trained_D[list(train)], judged_D[list(judged)] = True, True
    # Where no token is known, equal routing stands in for equal text.
    unknown = int(scan.documents.unknown.sum()) == scan.tokens
    share_D = _shared_with(scan.routing if unknown else scan.text, trained_D, count)
    known_D = (scan.documents.tokens > 0) & (scan.documents.unknown < scan.documents.tokens)
    seen = np.unique(scan.documents.tokens_hash[trained_D & known_D])
    share_D[known_D & np.isin(scan.documents.tokens_hash, seen)] = 1.0
    mostly_D = judged_D & (share_D >= _LEAST_SHARE)
    partly = int((judged_D & (share_D > 0) & ~mostly_D).sum())
    example = int(mostly_D.argmax()) if mostly_D.any() else None
    return Leak(int(judged_D.sum()), int(mostly_D.sum()), partly, example)


def _shared_with(text: Shingles, trained_D: np.ndarray, count: int) -> np.ndarray:
    """Share of every document's runs that the trained documents have, [N]."""
    hash_N, document_N, _, _ = text.columns()
    found_N = np.isin(hash_N, np.unique(hash_N[trained_D[document_N]]))
    runs_D = np.bincount(document_N, minlength=count)
    return np.bincount(document_N, found_N, minlength=count) / np.maximum(runs_D, 1)
