"""Shingles: hashes of short runs of tokens or of routing, by which copies are found without comparing pairs.

A copied passage shares all its runs with its source, whatever place it stands at (Broder, "On the resemblance and
containment of documents", 1997). Of a large trace only hashes divisible by some number are kept, which samples
the same runs in every document (ibid., "MOD" sampling).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Prefixes", "Shingles", "mix", "pairs_of_copies", "rolling", "sampling_step"]

_MOST_KEPT = 1 << 20
_MOST_FINE = 1 << 15  # documents
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers can be divided out again
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def mix(value_N: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers to uint64 (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    x = value_N.astype(np.uint64) + _BASE
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rolling(item_T: np.ndarray, size: int) -> np.ndarray:
    """Hash of every run of ``size`` items, [T - size + 1] uint64; empty if there are fewer items.

    The polynomial hash of Karp and Rabin (1987) modulo 2^64, as differences of one running sum, then mixed.

    Args:
        item_T: hashes of the items, uint64.
    """
    count = len(item_T)
    if count < size:
        return np.empty(0, np.uint64)
    power_T, inverse_T = _powers(_BASE, count), _powers(_INVERSE, count - size + 1)
    total_T = np.concatenate([np.zeros(1, np.uint64), np.cumsum(item_T * power_T, dtype=np.uint64)])
    return mix((total_T[size:] - total_T[:-size]) * inverse_T)


def _powers(base: np.uint64, count: int) -> np.ndarray:
    power_T = np.full(count, base)
    power_T[0] = 1
    return np.cumprod(power_T, dtype=np.uint64)


def sampling_step(tokens: int) -> int:
    """Of a trace of so many tokens, one shingle in this many is kept: a power of two."""
    step = 1
    while tokens // step > _MOST_KEPT:
        step *= 2
    return step


@dataclass
class Shingles:
    """Hashes of runs with the place where each begins.

    Attributes:
        step: only hashes divisible by it are kept.
    """

    step: int = 1

    def __post_init__(self) -> None:
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, hash_N: np.ndarray, document_N: np.ndarray, position_N: np.ndarray, other_N: np.ndarray) -> None:
        """Keep some runs. ``other_N`` is a second hash of the same run that goes along."""
        kept = (hash_N & np.uint64(self.step - 1)) == 0
        columns = (hash_N, document_N.astype(np.int32), position_N.astype(np.int64), other_N)
        self._parts.append(tuple(column[kept] for column in columns))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Hashes, documents, positions and second hashes of all runs kept."""
        if not self._parts:
            empty = np.empty(0, np.uint64)
            return empty, empty.astype(np.int32), empty.astype(np.int64), empty
        hash_N, document_N, position_N, other_N = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        self._parts = [(hash_N, document_N, position_N, other_N)]
        return hash_N, document_N, position_N, other_N


class Prefixes:
    """Hashes of what documents begin with, at lengths from 8 tokens on that rise by a twelfth, or else by a quarter.

    They rise by a quarter beyond 128 tokens and, to save memory, in a trace of many documents.
    """

    def __init__(self, documents: int) -> None:
        fine = 8 * 1.08 ** np.arange(37 if documents <= _MOST_FINE else 1)
        coarse = fine[-1] * 1.25 ** np.arange(1, 80)
        self._length_N = np.unique(np.concatenate([fine, coarse]).astype(np.int64))
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, document: int, token_ids_T: np.ndarray) -> None:
        """Keep the beginnings of a document, as far as its ids are known (not below 0)."""
        unknown = np.flatnonzero(token_ids_T < 0)
        known_T = token_ids_T[: unknown[0]] if len(unknown) else token_ids_T
        length_N = self._length_N[: np.searchsorted(self._length_N, len(known_T), "right")]
        if len(length_N):
            total_T = np.cumsum(mix(known_T) * _powers(_BASE, len(known_T)), dtype=np.uint64)
            hash_N = mix(total_T[length_N - 1] + length_N.astype(np.uint64))
            self._parts.append((hash_N, np.full(len(length_N), document, np.int32), length_N))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hashes, documents and lengths of all beginnings."""
        if not self._parts:
            return np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int64)
        hash_N, document_N, length_N = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        self._parts = [(hash_N, document_N, length_N)]
        return hash_N, document_N, length_N


def pairs_of_copies(
    hash_N: np.ndarray, owner_N: np.ndarray, position_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs that occur in two owners, each owner's occurrence paired with that of the next owner which has it.

    Runs that an owner has more than once (silence, padding, a collapsed layer) say nothing of copying and are
    left out, so that what is common by chance does not count.

    Returns:
        Indices of the first and second run of each pair [P], how many runs each owner has (by owner number), and
        the indices of the runs that count.
    """
    order = np.lexsort((owner_N, hash_N))
    same_hash = hash_N[order][1:] == hash_N[order][:-1]
    again = same_hash & (owner_N[order][1:] == owner_N[order][:-1])
    repeated = np.zeros(len(order), bool)
    repeated[1:] |= again
    repeated[:-1] |= again
    order = order[~repeated]
    counts = np.bincount(owner_N[order]) if len(order) else np.zeros(0, np.int64)
    follows = hash_N[order][1:] == hash_N[order][:-1]
    return order[:-1][follows], order[1:][follows], counts, order
