"""Copies: layers that route as other layers do, documents that route as others do, also at another place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specmoe.diagnostics.sample import RoutingSample
from specmoe.diagnostics.scan import ROUTING_RUN, TEXT_RUN, Scan
from specmoe.diagnostics.shingles import mix, pairs_of_copies, rolling
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

    Runs of the same tokens do not count: an equal passage may well be routed equally. Nor do runs with a token that is
    not known. How long a match must be follows from the entropy of one token's route: small models often route alike
    by chance.
    """
    columns = scan.routing.columns()
    known_N = columns[3] != 0
    hash_N, document_N, position_N, tokens_N = (column[known_N] for column in columns)
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
        judged: documents of validation, test and the held-out domain. mostly: those of them of whose tokens the train
            part has more than half. partly: others that share at least 50 tokens with it.
        share: mean share of their tokens that those of ``mostly`` have in common with the train part.
        routed: those of ``mostly`` that only their routing gives away. example: one of ``mostly``; None without one.
    """

    judged: int
    mostly: int
    partly: int
    share: float
    routed: int
    example: int | None


def leak(scan: Scan, sample: RoutingSample, train: tuple[int, ...], judged: tuple[int, ...]) -> Leak:
    """What documents that are judged share with documents that are trained on.

    Known tokens are compared by their ids: runs of 50 wherever they stand, and what documents begin with. Where a token
    is not known on one side or both, a run of eight that is routed alike in all layers stands in for the same text.
    """
    documents = scan.documents
    count = len(documents.tokens)
    trained_D, judged_D = np.zeros(count, bool), np.zeros(count, bool)
    trained_D[list(train)], judged_D[list(judged)] = True, True
    text_N, routed_N = _shared_text(scan, trained_D), _shared_routing(scan, sample, trained_D, judged_D)
    known_D = np.maximum(_share(scan, text_N, np.zeros_like(routed_N)), _shared_beginning(scan, trained_D))
    seen_D = (documents.tokens > 0) & (documents.unknown < documents.tokens)
    seen = _whole(scan)[trained_D & seen_D]
    known_D[seen_D & np.isin(_whole(scan), seen)] = 1.0
    share_D = np.maximum(known_D, _share(scan, text_N, routed_N))
    silent_D = ~seen_D & (documents.tokens >= _runs_beyond_chance(sample) + ROUTING_RUN - 1) & (documents.tokens > 0)
    share_D[silent_D & np.isin(documents.routing_hash, documents.routing_hash[trained_D & silent_D])] = 1.0
    mostly_D = judged_D & (share_D > _LEAST_SHARE)
    partly = int((judged_D & (share_D * documents.tokens >= TEXT_RUN) & ~mostly_D).sum())
    number = int(mostly_D.sum())
    return Leak(
        judged=int(judged_D.sum()),
        mostly=number,
        partly=partly,
        share=float(share_D[mostly_D].mean()) if number else 0.0,
        routed=int((mostly_D & (known_D <= _LEAST_SHARE)).sum()),
        example=int(mostly_D.argmax()) if number else None,
    )


def _whole(scan: Scan) -> np.ndarray:
    """A hash of each document [D]: its ids, and its routing too where some of them are unknown."""
    documents = scan.documents
    return np.where(documents.unknown == 0, documents.tokens_hash, documents.tokens_hash ^ mix(documents.routing_hash))


def _shared_text(scan: Scan, trained_D: np.ndarray) -> np.ndarray:
    """Which runs of known tokens the trained documents have, [N]."""
    hash_N, document_N, _, _ = scan.text.columns()
    return np.isin(hash_N, np.unique(hash_N[trained_D[document_N]]))


def _shared_beginning(scan: Scan, trained_D: np.ndarray) -> np.ndarray:
    """Share of every document's tokens with which a trained document begins too, [D]; 0 for fewer than eight."""
    hash_N, document_N, length_N = scan.prefixes.columns()
    found_N = np.isin(hash_N, np.unique(hash_N[trained_D[document_N]]))
    length_D = np.zeros(len(trained_D), np.int64)
    np.maximum.at(length_D, document_N[found_N], length_N[found_N])
    return length_D / np.maximum(scan.documents.tokens, 1)


def _shared_routing(scan: Scan, sample: RoutingSample, trained_D: np.ndarray, judged_D: np.ndarray) -> np.ndarray:
    """Which runs of judged documents are routed as runs of trained ones, a token of either being unknown, [N].

    A run is looked for at its own place first, then anywhere. It counts if so many runs match in a row, in one trained
    document at one distance, that chance is out of the question.
    """
    hash_N, document_N, position_N, tokens_N = scan.routing.columns()
    shared_N = np.zeros(len(hash_N), bool)
    if not (tokens_N == 0).any():
        return shared_N
    # What a document repeats within itself says nothing of another one.
    single_N = np.zeros(len(hash_N), bool)
    single_N[pairs_of_copies(hash_N, document_N, position_N)[3]] = True
    source_N = np.full(len(hash_N), -1)
    for key_N in (mix(hash_N + mix(position_N)), hash_N):
        for unknown in (True, False):
            # A run that is known can only match one that is not: else its ids tell.
            wanted = np.flatnonzero(single_N & judged_D[document_N] & ((tokens_N == 0) == unknown) & (source_N < 0))
            offered = np.flatnonzero(single_N & trained_D[document_N] & (unknown | (tokens_N == 0)))
            source_N[wanted] = _first_equal(key_N[wanted], key_N[offered], offered)
    found = np.flatnonzero(source_N >= 0)
    rows = np.stack([document_N[found], document_N[source_N[found]], position_N[found] - position_N[source_N[found]]])
    _, place, runs = np.unique(rows, axis=1, return_inverse=True, return_counts=True)
    least_runs = max(1.0, _runs_beyond_chance(sample) / scan.routing.step)
    shared_N[found] = runs[place.reshape(-1)] >= least_runs
    return shared_N


def _first_equal(wanted_N: np.ndarray, offered_M: np.ndarray, name_M: np.ndarray) -> np.ndarray:
    """Name of the first of ``offered`` that equals each of ``wanted``; -1 where there is none, [N]."""
    if not len(offered_M):
        return np.full(len(wanted_N), -1)
    order = np.argsort(offered_M, kind="stable")
    place = np.minimum(np.searchsorted(offered_M[order], wanted_N), len(order) - 1)
    return np.where(offered_M[order][place] == wanted_N, name_M[order][place], -1)


def _share(scan: Scan, text_N: np.ndarray, routed_M: np.ndarray) -> np.ndarray:
    """Share of every document's tokens that lie in one of the chosen runs of text or of routing, [D]."""
    tokens_D = np.maximum(scan.documents.tokens, 1)
    kinds = ((scan.text, text_N, TEXT_RUN), (scan.routing, routed_M, ROUTING_RUN))
    if scan.text.step > 1:
        # Runs were sampled, so their share stands in for that of the tokens.
        share_D = np.zeros(len(tokens_D))
        for shingles, chosen_N, size in kinds:
            document_N = shingles.columns()[1]
            kept_D = np.bincount(document_N, minlength=len(tokens_D))
            hit_D = np.bincount(document_N[chosen_N], minlength=len(tokens_D))
            within_D = 1 - scan.documents.unknown / tokens_D if size == TEXT_RUN else 1.0
            share_D += hit_D / np.maximum(kept_D, 1) * within_D
        return np.minimum(share_D, 1.0)
    document_R = np.concatenate([shingles.columns()[1][chosen_N] for shingles, chosen_N, _ in kinds])
    begin_R = np.concatenate([shingles.columns()[2][chosen_N] for shingles, chosen_N, _ in kinds])
    size_R = np.concatenate([np.full(int(chosen_N.sum()), size) for _, chosen_N, size in kinds])
    order = np.lexsort((begin_R, document_R))
    # Documents are far apart, so that one running maximum serves all.
    begin_R = (begin_R + document_R.astype(np.int64) * (1 << 32))[order]
    end_R = np.maximum.accumulate(begin_R + size_R[order])
    fresh_R = end_R - np.maximum(begin_R, np.concatenate([[0], end_R[:-1]])) if len(end_R) else end_R
    return np.bincount(document_R[order], fresh_R, minlength=len(tokens_D)) / tokens_D
