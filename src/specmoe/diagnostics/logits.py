"""Do the router's logits, the expert ids and the gate weights of a place belong together?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specmoe.diagnostics.sample import draw_documents, read_pieces
from specmoe.trace import RoutingRecord, Trace

__all__ = ["LogitFit", "logit_fit"]

_MOST_DOCUMENTS = 128
_MOST_TOKENS = 8192
_MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class LogitFit:
    """Per layer [L], over a sample of documents.

    Attributes:
        documents, tokens: size of the sample.
        within: share of the chosen experts whose logit is among the K largest. by_chance: the same with the logits of
            a token elsewhere in the document.
        ordered: share of the pairs of a place's experts of which that with the larger logit has the larger gate
            weight; ties do not count; NaN without gate weights or with one expert a token.
    """

    documents: int
    tokens: int
    within: np.ndarray
    by_chance: np.ndarray
    ordered: np.ndarray


def logit_fit(trace: Trace, seed: int = 0) -> LogitFit | None:
    """Compare them on at most 128 documents and 8192 tokens.

    Returns:
        None if the trace keeps no logits, or no document has two tokens.

    Raises:
        SpecmoeError: a document is damaged.
    """
    if "router_logits" not in trace.manifest.fields:
        return None
    shape = trace.topology
    drawn = draw_documents([i for i, d in enumerate(trace.documents) if d.tokens > 1], _MOST_DOCUMENTS, seed)
    if not drawn:
        return None
    longest = max(2, min(-(-_MOST_TOKENS // len(drawn)), _MOST_BYTES // (4 * shape.layers * shape.router_classes)))
    sums = torch.zeros(5, shape.layers, dtype=torch.float64)
    tokens = 0
    for _, record in read_pieces(trace, drawn, longest, ("router_logits", "gate_weights"), seed):
        sums += _compare(record)
        tokens += len(record)
    served, within, by_chance, pairs, ordered = sums
    within_L, chance_L = (total / served.clamp_min(1) for total in (within, by_chance))
    return LogitFit(len(drawn), tokens, within_L.numpy(), chance_L.numpy(), (ordered / pairs).numpy())


def _compare(record: RoutingRecord) -> Tensor:
    """Sums per layer: slots with an expert, those within the top K, those by chance, pairs, ordered pairs."""
    assert record.router_logits is not None
    ids_TLK = record.expert_ids.long()
    # Routers have logits for zero experts too.
    served_TLK = (ids_TLK >= 0) & (ids_TLK < record.router_logits.shape[-1])
    ids_TLK = ids_TLK.masked_fill(~served_TLK, 0)
    logits_TLE = record.router_logits
    at_TLK = logits_TLE.gather(-1, ids_TLK)
    # Values are compared, not ids, so that ties do not count.
    within_TLK = at_TLK >= _least_of_best(logits_TLE, ids_TLK.shape[-1])
    elsewhere_TLE = logits_TLE.roll(len(record) // 2, 0)
    by_chance_TLK = elsewhere_TLE.gather(-1, ids_TLK) >= _least_of_best(elsewhere_TLE, ids_TLK.shape[-1])
    pairs_L, ordered_L = _ordered_pairs(at_TLK, record.gate_weights, served_TLK)
    slots = [served_TLK, within_TLK & served_TLK, by_chance_TLK & served_TLK]
    return torch.stack([*(slot.sum((0, 2)).double() for slot in slots), pairs_L, ordered_L])


def _least_of_best(logits_TLE: Tensor, top_k: int) -> Tensor:
    return logits_TLE.topk(top_k, -1).values[..., -1:]


def _ordered_pairs(at_TLK: Tensor, gates_TLK: Tensor | None, served_TLK: Tensor) -> tuple[Tensor, Tensor]:
    pairs_L = torch.zeros(at_TLK.shape[1], dtype=torch.float64)
    ordered_L = torch.zeros_like(pairs_L)
    if gates_TLK is None:
        return pairs_L, ordered_L
    for slot in range(1, at_TLK.shape[-1]):
        logit = (at_TLK[..., :slot] - at_TLK[..., slot, None]).sign()
        gate = (gates_TLK[..., :slot] - gates_TLK[..., slot, None]).sign()
        untied = (logit * gate != 0) & served_TLK[..., :slot] & served_TLK[..., slot, None]
        pairs_L += untied.sum((0, 2))
        ordered_L += ((logit == gate) & untied).sum((0, 2))
    return pairs_L, ordered_L
