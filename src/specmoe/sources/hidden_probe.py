"""Do the hidden states of a trace explain its routing at all? A linear probe against layer frequency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["MINIMUM_TEXTS", "ProbeResult", "best_of", "probe_hidden", "routed_of"]

# Fewer texts give no usable standard error over texts.
MINIMUM_TEXTS = 10
_FIT_TOKENS = 1024
_SCORED_TOKENS = 4096
_MOST_LAYERS = 8
_STANDARD_ERRORS = 3.0


Read = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ProbeResult:
    """Recall@K on unseen texts, mean over texts.

    Attributes:
        recall: of the ridge probe. frequency: of always naming the layer's most used experts.
        standard_error: of their difference, over texts.
    """

    recall: float
    frequency: float
    standard_error: float

    @property
    def at_chance(self) -> bool:
        """Whether the probe is not clearly better than frequency (by three standard errors).

        Routing that frequency foresees by itself leaves nothing to explain and says nothing.
        """
        return self.frequency < 0.99 and self.recall - self.frequency <= _STANDARD_ERRORS * self.standard_error


def probe_hidden(
    lengths: Sequence[int], layers: int, experts: int, top_k: int, read: Read, *, seed: int = 0
) -> ProbeResult | None:
    """Fit a ridge regression from hidden states to the experts on half of the texts, score it on the others.

    The penalty is chosen per layer by the leave-one-out error on the fitting half (Allen, 1974), over a
    range that ends where only the mean is left, so that noise falls back to frequency and a weak signal is not
    hidden by overfitting. At most eight layers and a few thousand tokens are looked at.

    Args:
        lengths: tokens of each text. layers, experts, top_k: sizes L, E, K.
        read: (text, layer) → its router inputs [T, D] and expert ids [T, K]; ids outside 0 … E - 1 are no target.
        seed: of the halves and of the tokens looked at.

    Returns:
        None with fewer than :data:`MINIMUM_TEXTS` texts.
    """
    if len(lengths) < MINIMUM_TEXTS:
        return None
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    half = len(lengths) // 2
    fit = _sample(order[:half], lengths, _FIT_TOKENS, rng)
    scored = _sample(order[half:], lengths, _SCORED_TOKENS, rng)
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, _MOST_LAYERS)).round().astype(int))
    probe = np.zeros((len(chosen), len(scored)))
    frequency = np.zeros_like(probe)
    for row, layer in enumerate(chosen.tolist()):
        parts = [_rows(read, text, layer, positions, experts) for text, positions in fit]
        hidden_ND, routed_NE = (np.concatenate(part) for part in zip(*parts, strict=True))
        prior_E = routed_NE.mean(0)
        weight_DE, mean_D, scale_D = _ridge(hidden_ND, routed_NE - prior_E)
        usual_E = best_of(prior_E[None], top_k)
        for column, (text, positions) in enumerate(scored):
            hidden_TD, routed_TE = _rows(read, text, layer, positions, experts)
            scores_TE = prior_E + (hidden_TD - mean_D) / scale_D @ weight_DE
            wanted = max(routed_TE.sum(), 1.0)
            probe[row, column] = (routed_TE * best_of(scores_TE, top_k)).sum() / wanted
            frequency[row, column] = (routed_TE * usual_E).sum() / wanted
    lift = (probe - frequency).mean(0)
    error = float(lift.std(ddof=1)) / math.sqrt(len(lift))
    return ProbeResult(float(probe.mean()), float(frequency.mean()), error)


def _sample(
    texts: np.ndarray, lengths: Sequence[int], tokens: int, rng: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """The same number of random positions of every text, ``tokens`` in all at most."""
    texts = texts[:tokens]
    share = max(1, tokens // len(texts))
    return [(text, np.sort(rng.permutation(lengths[text])[:share])) for text in texts.tolist()]


def _rows(read: Read, text: int, layer: int, positions: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    hidden_TD, ids_TK = (values[positions] for values in read(text, layer))
    return hidden_TD.astype(np.float64), routed_of(ids_TK, experts)


def routed_of(ids_TK: np.ndarray, experts: int) -> np.ndarray:
    """Expert ids as [T, E] float64, 1 where an expert is among the K; ids outside 0 … E - 1 are left out."""
    # Column E collects what is no expert of this layer: empty slots and zero or skip experts.
    slots = np.where((ids_TK < 0) | (ids_TK >= experts), experts, ids_TK).astype(np.int64)
    routed = np.zeros((len(slots), experts + 1))
    np.put_along_axis(routed, slots, 1.0, axis=1)
    return routed[:, :experts]


def best_of(scores_TE: np.ndarray, top_k: int) -> np.ndarray:
    """The K best-scored experts as [T, E] float64 of 0 and 1."""
    best = np.zeros_like(scores_TE)
    np.put_along_axis(best, np.argsort(-scores_TE, axis=1, kind="stable")[:, :top_k], 1.0, axis=1)
    return best


def _ridge(hidden_ND: np.ndarray, target_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [D, E] for standardised inputs, and the mean and scale [D] to standardise with."""
    mean_D, scale_D = hidden_ND.mean(0), hidden_ND.std(0)
    scale_D[scale_D == 0] = 1
    count = len(hidden_ND)
    left, singular, right = np.linalg.svd((hidden_ND - mean_D) / scale_D, full_matrices=False)
    projected = left.T @ target_NE
    best_error, best_penalty = math.inf, 1.0
    for penalty in count * 10.0 ** np.arange(-4, 5):
        shrink = singular**2 / (singular**2 + penalty)
        leverage = (left**2) @ shrink + 1 / count
        residual = (target_NE - left @ (shrink[:, None] * projected)) / np.maximum(1 - leverage, 1e-6)[:, None]
        error = float((residual**2).mean())
        if error < best_error:
            best_error, best_penalty = error, float(penalty)
    return right.T @ ((singular / (singular**2 + best_penalty))[:, None] * projected), mean_D, scale_D
