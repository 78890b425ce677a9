"""A trace as a stream of blocks of some thousand tokens, whatever the length of its documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from specmoe.trace import RoutingRecord, Trace

__all__ = ["Block", "blocks"]

# Of expert ids in one block: what is derived from them takes some twenty times that.
_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class Block:
    """Tokens of one or several documents, in order. Tokens come last, so that one operation runs along them.

    Arrays are numpy's, whose elementwise operations take one core: blocks are small, and on a busy machine two
    threads spend most of their time waiting for each other.

    Attributes:
        document_T, position_T: where each token stands, int64. token_ids_T: int64.
        expert_ids_KLT: int16. gate_weights_KLT: float32, None if not kept.
        follows_T: whether the token before is that of the same document. A document longer than a block is cut,
            and the first token of a piece follows none.
    """

    document_T: np.ndarray
    position_T: np.ndarray
    token_ids_T: np.ndarray
    expert_ids_KLT: np.ndarray
    gate_weights_KLT: np.ndarray | None
    follows_T: np.ndarray

    def __len__(self) -> int:
        return len(self.document_T)


def blocks(trace: Trace, on_document: Callable[[int, RoutingRecord], None]) -> Iterator[Block]:
    """Read a trace once, in order.

    Args:
        trace: what is read. on_document: called with each document's number and record, before its block.

    Raises:
        SpecmoeError: a document is damaged.
    """
    shape = trace.topology
    most = max(256, _BLOCK_BYTES // (2 * shape.layers * shape.top_k))
    waiting: list[tuple[int, int, RoutingRecord]] = []
    held = 0
    for index in range(len(trace)):
        record = trace.read(index, fields=("gate_weights",))
        on_document(index, record)
        for start in range(0, len(record), most):
            piece = _rows(record, start, start + most)
            if held + len(piece) > most:
                yield _join(waiting)
                waiting, held = [], 0
            waiting.append((index, start, piece))
            held += len(piece)
    if waiting:
        yield _join(waiting)


def _rows(record: RoutingRecord, start: int, stop: int) -> RoutingRecord:
    return RoutingRecord(**{name: tensor[start:stop] for name, tensor in record.tensors()})


def _join(pieces: list[tuple[int, int, RoutingRecord]]) -> Block:
    records = [record for _, _, record in pieces]
    lengths = [len(record) for record in records]
    follows_T = np.ones(sum(lengths), bool)
    follows_T[np.cumsum([0, *lengths[:-1]])] = False
    gates = [record.gate_weights.numpy() for record in records if record.gate_weights is not None]
    return Block(
        document_T=np.repeat([index for index, _, _ in pieces], lengths),
        position_T=np.concatenate([np.arange(start, start + len(record)) for _, start, record in pieces]),
        token_ids_T=np.concatenate([record.token_ids.numpy() for record in records]).astype(np.int64),
        expert_ids_KLT=_tokens_last([record.expert_ids.numpy() for record in records]),
        gate_weights_KLT=_tokens_last(gates) if gates else None,
        follows_T=follows_T,
    )


def _tokens_last(parts: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate(parts).transpose(2, 1, 0))
