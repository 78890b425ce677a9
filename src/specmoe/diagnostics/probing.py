"""Do the hidden states belong to the routing they stand beside? Linear probes, at their own place and at others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specmoe.diagnostics.sample import draw_documents, read_pieces
from specmoe.sources.hidden_probe import MINIMUM_TEXTS, ProbeResult, best_of, probe_hidden, routed_of
from specmoe.trace import Trace

__all__ = ["Alignment", "HiddenSample", "RouterFit", "alignment", "probe", "router_fit", "sample_hidden"]

_MOST_DOCUMENTS = 64
_SAMPLE_TOKENS = 2048
# All layers of a shallow model; else some with both neighbours, against which they are compared.
_MOST_LAYERS, _NEIGHBOURHOODS = 9, 3
_REACH = 32
_FIT_TOKENS = 1024
_PENALTIES = (1e-3, 1e-1, 10.0)
_STANDARD_ERRORS = 4.0
_LEAST_GAIN = 0.03


@dataclass(frozen=True)
class HiddenSample:
    """Pieces of documents that keep hidden states.

    Attributes:
        layers: which layers' hidden states are held, a few of the trace's. experts, top_k: sizes E, K.
        ids: per document expert ids [T, L, K] of all layers. hidden: per document [T, len(layers), D] float32.
        logits: per document [T, len(layers), E], empty if they are not kept.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    ids: list[np.ndarray]
    hidden: list[np.ndarray]
    logits: list[np.ndarray]

    @property
    def tokens(self) -> int:
        """Tokens in all pieces."""
        return sum(len(ids) for ids in self.ids)


def sample_hidden(trace: Trace, seed: int = 0) -> HiddenSample | None:
    """Draw up to 64 documents, some 2000 tokens of them, and up to nine layers.

    Returns:
        None if no document keeps hidden states.

    Raises:
        SpecmoeError: a document is damaged.
    """
    kept = [i for i, document in enumerate(trace.documents) if document.hidden_start is not None and document.tokens]
    if not kept or trace.topology.hidden_size == 0:
        return None
    drawn = draw_documents(kept, _MOST_DOCUMENTS, seed)
    shape = trace.topology
    layers = _held_layers(shape.layers)
    sample = HiddenSample(tuple(layers), shape.experts, shape.top_k, [], [], [])
    longest = math.ceil(_SAMPLE_TOKENS / len(drawn))
    for _, record in read_pieces(trace, drawn, longest, ("hidden", "router_logits"), seed):
        assert record.hidden is not None
        sample.ids.append(record.expert_ids.numpy())
        sample.hidden.append(record.hidden[:, layers].float().numpy())
        if record.router_logits is not None:
            sample.logits.append(record.router_logits[:, layers].numpy())
    return sample


def _held_layers(layers: int) -> list[int]:
    if layers <= _MOST_LAYERS:
        return list(range(layers))
    middles = np.linspace(1, layers - 2, _NEIGHBOURHOODS).round().astype(int).tolist()
    return sorted({middle + step for middle in middles for step in (-1, 0, 1)})


def probe(sample: HiddenSample, seed: int = 0) -> ProbeResult | None:
    """The linear probe of each held layer's hidden states at its own routing; None with fewer than ten documents."""

    def read(text: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        return sample.hidden[text][:, layer], sample.ids[text][:, sample.layers[layer]]

    lengths = [len(ids) for ids in sample.ids]
    return probe_hidden(lengths, len(sample.layers), sample.experts, sample.top_k, read, seed=seed)


@dataclass(frozen=True)
class Alignment:
    """Which hidden states explain a layer's routing, as recall@K of a linear probe on unseen documents.

    Attributes:
        layer: whose routing. own: from the hidden states that stand beside it.
        best, best_layer, token_shift: from the others that explain it best: those of that layer, of the token so much
            later (0: the same token).
        misplaced: whether that is clearly better than the own ones.
        foreseen: whether the hidden states of the place before (the layer before; for the first layer the last one of
            the token before) clearly explain more than layer frequency does.
    """

    layer: int
    own: float
    best: float
    best_layer: int
    token_shift: int
    misplaced: bool
    foreseen: bool


def alignment(sample: HiddenSample) -> list[Alignment]:
    """Compare, for each held layer's routing, the hidden states beside it with others.

    A ridge regression is fitted on half of the documents from the hidden states of each held layer of the same token,
    and of the own layer of the token before and after. A router is linear in its input, so no others should do better
    than the own ones: others must win by three points of recall@K on the other half, and by four standard errors over
    documents. The same routing is explained each time, so what makes one layer easier than another does not count.

    Returns:
        One for each held layer; none with fewer than ten documents of three tokens.
    """
    usable = [n for n, ids in enumerate(sample.ids) if len(ids) >= 3]
    if len(usable) < MINIMUM_TEXTS:
        return []
    last = sample.ids[0].shape[1] - 1
    recall: dict[tuple[int, int, int], np.ndarray] = {}
    for number, source in enumerate(sample.layers):
        ridge = _Ridge(sample, number, usable[::2], usable[1::2])
        for target in sample.layers:
            # The place ahead of the last layer is the first layer of the next token.
            shifts = (-1, 0, 1) if source == target else (0, -1) if (source, target) == (last, 0) else (0,)
            recall.update({(target, source, shift): ridge.recall(target, -shift) for shift in shifts})
        recall[source, -1, 0] = ridge.frequency(source)
    return [_aligned(layer, recall, last) for layer in sample.layers]


def _aligned(layer: int, recall: dict[tuple[int, int, int], np.ndarray], last: int) -> Alignment:
    own_D = recall[layer, layer, 0]
    others = {key: value for key, value in recall.items() if key[0] == layer and key[1] >= 0 and key[1:] != (layer, 0)}
    best = max(others, key=lambda key: float(others[key].mean()))
    before = recall.get((layer, layer - 1, 0) if layer else (0, last, -1))
    return Alignment(
        layer=layer,
        own=float(own_D.mean()),
        best=float(others[best].mean()),
        best_layer=best[1],
        token_shift=best[2],
        misplaced=_clearly(others[best] - own_D, _LEAST_GAIN),
        foreseen=before is not None and _clearly(before - recall[layer, -1, 0], 0.0),
    )


def _clearly(gain_D: np.ndarray, least: float) -> bool:
    """Whether a mean over documents is above ``least`` and above four standard errors."""
    mean, error = float(gain_D.mean()), float(gain_D.std(ddof=1)) / math.sqrt(len(gain_D))
    return mean > max(least, _STANDARD_ERRORS * error)


class _Ridge:
    """One layer's hidden states, decomposed once, for any number of targets. First and last tokens are only targets."""

    def __init__(self, sample: HiddenSample, number: int, fit: list[int], scored: list[int]) -> None:
        self._sample, self._fit, self._scored = sample, fit, scored
        inner = [sample.hidden[text][1:-1, number].astype(np.float64) for text in fit]
        fit_ND = np.concatenate(inner)[:_FIT_TOKENS]
        mean_D, scale_D = fit_ND.mean(0), fit_ND.std(0)
        scale_D[scale_D == 0] = 1
        self._left_NR, self._singular_R, right_RD = np.linalg.svd((fit_ND - mean_D) / scale_D, full_matrices=False)
        self._scored_MR = [((sample.hidden[text][1:-1, number] - mean_D) / scale_D) @ right_RD.T for text in scored]

    def recall(self, layer: int, shift: int) -> np.ndarray:
        """Recall@K of a layer's routing, ``shift`` tokens later, by document, at the best of three penalties."""
        count = len(self._left_NR)
        target_NE = np.concatenate([self._routed(text, layer, shift) for text in self._fit])[:count]
        prior_E = target_NE.mean(0)
        projected_RE = self._left_NR.T @ (target_NE - prior_E)
        wanted = [self._routed(text, layer, shift) for text in self._scored]
        best_D = np.full(len(wanted), -np.inf)
        for penalty in _PENALTIES:
            weight_RE = (self._singular_R / (self._singular_R**2 + penalty * count))[:, None] * projected_RE
            scores = [best_of(prior_E + inputs @ weight_RE, self._sample.top_k) for inputs in self._scored_MR]
            recall_D = np.array([_recall(*pair) for pair in zip(wanted, scores, strict=True)])
            if recall_D.mean() > best_D.mean():
                best_D = recall_D
        return best_D

    def frequency(self, layer: int) -> np.ndarray:
        """Recall@K of always naming the layer's most used experts, per scored document."""
        prior_E = np.concatenate([self._routed(text, layer, 0) for text in self._fit]).mean(0)
        usual_E = best_of(prior_E[None], self._sample.top_k)
        return np.array([_recall(self._routed(text, layer, 0), usual_E) for text in self._scored])

    def _routed(self, text: int, layer: int, shift: int) -> np.ndarray:
        ids_TK = self._sample.ids[text][:, layer]
        return routed_of(ids_TK[1 + shift : len(ids_TK) - 1 + shift], self._sample.experts)


def _recall(routed_TE: np.ndarray, chosen_TE: np.ndarray) -> float:
    return float((routed_TE * chosen_TE).sum() / max(1.0, routed_TE.sum()))


@dataclass(frozen=True)
class RouterFit:
    """How well hidden × router gives the kept logits.

    Attributes:
        layers: whose hidden states. own: correlation at the own layer. best, best_layer: the highest at any layer.
    """

    layers: tuple[int, ...]
    own: tuple[float, ...]
    best: tuple[float, ...]
    best_layer: tuple[int, ...]


def router_fit(sample: HiddenSample, routers: tuple[Tensor, Tensor] | None) -> RouterFit | None:
    """Correlate hidden × router + bias with the kept logits, each token's mean over experts removed.

    The mean says nothing of the route, and a scale on all logits does not count either.

    Args:
        sample: with hidden states and logits. routers: weights [L, E, D] and biases [L, E].

    Returns:
        None if the trace lacks logits or routers.
    """
    if routers is None or not sample.logits:
        return None
    weight_LED, bias_LE = routers
    own, best, best_layer = [], [], []
    hidden, kept = np.concatenate(sample.hidden), np.concatenate(sample.logits)
    for number, layer in enumerate(sample.layers):
        input_TD = torch.from_numpy(hidden[:, number])
        logits_TE = torch.from_numpy(kept[:, number])
        near = range(max(0, layer - _REACH), min(len(weight_LED), layer + _REACH + 1))
        fits = {other: _correlation(input_TD @ weight_LED[other].T + bias_LE[other], logits_TE) for other in near}
        own.append(fits[layer])
        best_layer.append(max(fits, key=lambda other: fits[other]))
        best.append(fits[best_layer[-1]])
    return RouterFit(sample.layers, tuple(own), tuple(best), tuple(best_layer))


def _correlation(left_TE: Tensor, right_TE: Tensor) -> float:
    left, right = (value.double() - value.double().mean(-1, keepdim=True) for value in (left_TE, right_TE))
    scale = float(left.norm() * right.norm())
    return float((left * right).sum()) / scale if scale > 0 and math.isfinite(scale) else 0.0
