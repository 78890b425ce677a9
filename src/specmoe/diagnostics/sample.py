"""A seeded sample of documents, for what would cost too much over the whole trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from specmoe.diagnostics.statistics import Excess, excess_information
from specmoe.trace import RoutingRecord, Trace

__all__ = ["RoutingSample", "draw_documents", "information", "read_pieces", "sample_routing"]

_MOST_TOKENS = 1 << 16
_MOST_BYTES = 64 << 20
_MOST_DOCUMENTS = 1024
_MOST_LAYERS = 8
# With fewer, even strong dependence may hide among the shuffles.
MINIMUM_TOKENS = 1000


def draw_documents(indices: Sequence[int], most: int, seed: int = 0) -> list[int]:
    """At most ``most`` of ``indices``, drawn at random, in rising order."""
    drawn = np.random.default_rng(seed).permutation(np.asarray(indices, np.int64))[:most]
    return sorted(drawn.tolist())


def read_pieces(
    trace: Trace, indices: Sequence[int], tokens: int, fields: tuple[str, ...], seed: int = 0
) -> Iterator[tuple[int, RoutingRecord]]:
    """A run of at most ``tokens`` tokens of each document, at a random place, with its number.

    Raises:
        SpecmoeError: a document is damaged.
    """
    rng = np.random.default_rng(seed)
    for index in indices:
        record = trace.read(index, fields=fields)
        start = int(rng.integers(max(1, len(record) - tokens + 1)))
        yield index, RoutingRecord(**{name: value[start : start + tokens].clone() for name, value in record.tensors()})


@dataclass(frozen=True)
class RoutingSample:
    """Routing of some documents, one after the other.

    Attributes:
        document_T: int64, which document a token belongs to. token_ids_T: int32.
        expert_ids_TLK: int16. top_TL: int16, the expert with the largest gate weight, or of the first slot.
    """

    document_T: np.ndarray
    token_ids_T: np.ndarray
    expert_ids_TLK: np.ndarray
    top_TL: np.ndarray

    def __len__(self) -> int:
        return len(self.document_T)

    @property
    def documents(self) -> int:
        """How many documents it has tokens of."""
        return len(np.unique(self.document_T))


def sample_routing(trace: Trace, seed: int = 0) -> RoutingSample:
    """Draw documents, at most 1024 and some 65,000 tokens (fewer where K and L are large).

    Raises:
        SpecmoeError: a document is damaged.
    """
    shape = trace.topology
    most = min(_MOST_TOKENS, max(1024, _MOST_BYTES // (2 * shape.layers * shape.top_k)))
    drawn = draw_documents([i for i, d in enumerate(trace.documents) if d.tokens > 0], _MOST_DOCUMENTS, seed)
    share = max(2, most // max(1, len(drawn)))
    # What short documents leave is for long ones: a level at which all together come close to the whole.
    lengths = np.array([trace.documents[index].tokens for index in drawn])
    while len(drawn) and np.minimum(lengths, 2 * share).sum() <= most and share < lengths.max():
        share *= 2
    documents, tokens, ids, tops = [], [], [], []
    for index, record in read_pieces(trace, drawn, share, ("gate_weights",), seed):
        documents.append(np.full(len(record), index))
        tokens.append(record.token_ids.numpy())
        ids.append(record.expert_ids.numpy())
        tops.append(_top(record))
    if not ids:
        empty = np.zeros((0, shape.layers, shape.top_k), np.int16)
        return RoutingSample(np.zeros(0, np.int64), np.zeros(0, np.int32), empty, empty[..., 0])
    return RoutingSample(*(np.concatenate(parts) for parts in (documents, tokens, ids, tops)))


def _top(record: RoutingRecord) -> np.ndarray:
    ids = record.expert_ids
    if record.gate_weights is None:
        return ids[..., 0].numpy()
    return ids.gather(-1, record.gate_weights.argmax(-1, keepdim=True))[..., 0].numpy()


@dataclass(frozen=True)
class Information:
    """What tells of the top-1 expert, by source: excess bits and deviations over the shuffles, layers summed.

    Attributes:
        layers: which were looked at. bits: mean over them. deviations: of their sum, in those of a shuffle.
    """

    layers: tuple[int, ...]
    bits: dict[str, float]
    deviations: dict[str, float]


def information(sample: RoutingSample, seed: int = 0) -> Information | None:
    """What the previous token (same layer), the previous layer (same token) and the token id tell of a route.

    Returns:
        None with fewer than 1000 tokens.
    """
    if len(sample) < MINIMUM_TOKENS:
        return None
    rng = np.random.default_rng(seed)
    layers = sample.top_TL.shape[1]
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, _MOST_LAYERS)).round().astype(int)).tolist()
    follows = np.flatnonzero(sample.document_T[1:] == sample.document_T[:-1]) + 1
    known = _repeated(sample.token_ids_T)
    sources: dict[str, list[Excess]] = {}
    for layer in chosen:
        top_T = sample.top_TL[:, layer]
        if len(follows):
            found = excess_information(top_T[follows - 1], top_T[follows], rng)
            sources.setdefault("previous token", []).append(found)
        if layer > 0:
            found = excess_information(sample.top_TL[:, layer - 1], top_T, rng)
            sources.setdefault("previous layer", []).append(found)
        if len(known) >= MINIMUM_TOKENS // 2:
            found = excess_information(sample.token_ids_T[known], top_T[known], rng)
            sources.setdefault("token id", []).append(found)
    bits = {name: float(np.mean([one.bits for one in found])) for name, found in sources.items()}
    return Information(tuple(chosen), bits, {name: _deviations(found) for name, found in sources.items()})


def _repeated(token_ids_T: np.ndarray) -> np.ndarray:
    """Tokens with a known id that the sample has more than once: the others tell nothing that could be tested."""
    _, inverse, count = np.unique(token_ids_T, return_inverse=True, return_counts=True)
    return np.flatnonzero((count[inverse] > 1) & (token_ids_T >= 0))


def _deviations(found: list[Excess]) -> float:
    bits, variance = sum(one.bits for one in found), sum(one.variance for one in found)
    # Shuffles of a constant do not vary.
    return float(bits / variance**0.5) if variance > 0 else 0.0
