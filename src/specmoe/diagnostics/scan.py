"""One pass over the whole trace: every count that can be kept in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specmoe.diagnostics.blocks import Block, blocks
from specmoe.diagnostics.gate_sums import GateSums
from specmoe.diagnostics.runs import AlikeRuns
from specmoe.diagnostics.shingles import Prefixes, Shingles, mix, rolling, sampling_step
from specmoe.trace import Phase, RoutingRecord, Trace

__all__ = ["ROUTING_RUN", "TEXT_RUN", "DocumentScan", "Scan", "scan_trace"]

# Tokens in a shingle. Text: long enough that common phrases do not count. Routing: every layer of each token counts.
TEXT_RUN, ROUTING_RUN = 50, 8
_MOST_JOINT_CELLS = 1 << 24


@dataclass(frozen=True)
class DocumentScan:
    """One number per document [N].

    Attributes:
        tokens, decode, unknown: tokens in all, of phase decode, and without a known token id.
        tokens_hash, routing_hash: of all token ids, of all expert ids; uint64.
        head, tail: length of the run of one known token id at the beginning and at the end. head_token, tail_token: it.
    """

    tokens: np.ndarray
    decode: np.ndarray
    unknown: np.ndarray
    tokens_hash: np.ndarray
    routing_hash: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    head_token: np.ndarray
    tail_token: np.ndarray

    @classmethod
    def empty(cls, documents: int) -> DocumentScan:
        """Zeros for so many documents."""
        dtypes = {name: np.uint64 if name.endswith("_hash") else np.int64 for name in cls.__annotations__}
        return cls(**{name: np.zeros(documents, dtype) for name, dtype in dtypes.items()})

    def take(self, index: int, record: RoutingRecord) -> None:
        """Note one document."""
        ids = record.token_ids.numpy()
        self.tokens[index] = len(ids)
        if len(ids) == 0:
            return
        self.decode[index] = int((record.phase == Phase.DECODE).sum())
        self.unknown[index] = int((ids < 0).sum())
        self.tokens_hash[index] = _digest(ids)
        self.routing_hash[index] = _digest(record.expert_ids.numpy())
        self.head[index], self.head_token[index] = _run(ids)
        self.tail[index], self.tail_token[index] = _run(ids[::-1])


def _digest(values: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(values).data).digest()[:8], "little")


def _run(ids: np.ndarray) -> tuple[int, int]:
    """Length of the run of one known id that ``ids`` begins with, and the id."""
    if ids[0] < 0:
        return 0, -1
    # Runs are short as a rule, so a short look decides nearly always.
    for length in (16, len(ids)):
        other = ids[:length] != ids[0]
        if other.any():
            return int(other.argmax()), int(ids[0])
    return len(ids), int(ids[0])


class Scan:
    """Sums over all tokens of a trace.

    Attributes:
        documents: per document. tokens: in all. pairs: tokens that follow another one. largest_id: of any expert.
        load_LE: int64, how often each expert was used. beyond_LK: tokens for which a slot has an id of E or above.
        seen_LKE: bool [L, K, E + 1], whether a slot ever held an expert; all ids beyond them are one.
        empty_LK: slots without an expert (-1). served_LK1: places by the number of their slots with an expert.
        repeats_L: places that name an expert twice.
        matches_L: slots whose expert the previous token used too.
        top_LE: int64, how often each expert was the top-1.
        joint_LGG: int64 [L - 1, G, G], top-1 experts of a layer and the next one; beyond some 500 experts
            neighbouring ids share a group, which can only lower the information.
        gates: sums of the gate weights, None if they are not kept. alike: runs of tokens that are routed alike.
        text, routing: shingles over :data:`TEXT_RUN` and :data:`ROUTING_RUN` tokens; the routing's second hash is
            that of the same tokens' ids, 0 where one of them is unknown.
        prefixes: of every document, hashes of the known token ids that it begins with, at some lengths.
    """

    def __init__(self, trace: Trace) -> None:
        shape = trace.topology
        layers, experts, top_k = shape.layers, shape.experts, shape.top_k
        self.topology = shape
        self.documents = DocumentScan.empty(len(trace))
        self.tokens = self.pairs = 0
        self.largest_id = -1
        self.load_LE = np.zeros((layers, experts), np.int64)
        self.seen_LKE = np.zeros((layers, top_k, experts + 1), bool)
        self.alike = AlikeRuns()
        self.beyond_LK = np.zeros((layers, top_k), np.int64)
        self.empty_LK = np.zeros((layers, top_k), np.int64)
        self.served_LK1 = np.zeros((layers, top_k + 1), np.int64)
        self.repeats_L = np.zeros(layers, np.int64)
        self.matches_L = np.zeros(layers, np.int64)
        self.top_LE = np.zeros((layers, experts), np.int64)
        self.gates = GateSums(layers) if "gate_weights" in trace.manifest.fields else None
        groups = min(experts, int((_MOST_JOINT_CELLS / max(1, layers - 1)) ** 0.5) - 1)
        # One more group collects what is no expert of this layer.
        self._joint = np.zeros((max(0, layers - 1), groups + 1, groups + 1), np.int64)
        # Each layer's experts are numbered on, with one number more for what is no expert of it.
        self._first_cell = (np.arange(layers) * (experts + 1))[:, None]
        step = sampling_step(trace.tokens)
        self.text, self.routing = Shingles(step), Shingles(step)
        self.prefixes = Prefixes(len(trace))
        draw = np.random.default_rng(0)
        self._label = draw.integers(1 << 63, size=layers * (experts + 1), dtype=np.int64).view(np.uint64)

    @property
    def joint_LGG(self) -> np.ndarray:
        """See the class."""
        return self._joint[:, :-1, :-1]

    def take(self, block: Block) -> None:
        """Add a block's tokens to all sums."""
        self.tokens += len(block)
        self.pairs += int(block.follows_T.sum())
        ids, experts = block.expert_ids_KLT, self.topology.experts
        if not self._count_slots(ids):
            # A name of its own for what is no expert of this layer.
            ids = np.where((ids < 0) | (ids >= experts), np.int16(experts), ids)
        cell = ids + self._first_cell
        for slot, cell_LT in enumerate(cell):
            count_LE = self._by_expert(cell_LT)
            self.load_LE += count_LE
            self.seen_LKE[:, slot, :-1] |= count_LE > 0
        self.alike.take(block)
        self._count_repeats(ids)
        self._count_matches(ids, block.follows_T)
        top_LT = _top_slot(ids, block.gate_weights_KLT)
        self.top_LE += self._by_expert(top_LT + self._first_cell)
        self._count_joint(top_LT)
        if self.gates is not None and block.gate_weights_KLT is not None:
            self.gates.take(block.gate_weights_KLT, block.expert_ids_KLT)
        self._keep_shingles(block, cell)

    def _count_slots(self, ids_KLT: np.ndarray) -> bool:
        """Count slots by what they hold; whether every one holds an expert."""
        largest = int(ids_KLT.max())
        self.largest_id = max(self.largest_id, largest)
        if ids_KLT.min() >= 0 and largest < self.topology.experts:
            self.served_LK1[:, -1] += ids_KLT.shape[-1]
            return True
        self.beyond_LK += (ids_KLT >= self.topology.experts).sum(-1).T
        self.seen_LKE[..., -1] = self.beyond_LK > 0
        empty_KLT = ids_KLT < 0
        self.empty_LK += empty_KLT.sum(-1).T
        served_LT = len(ids_KLT) - empty_KLT.sum(0)
        for count in range(len(ids_KLT) + 1):
            self.served_LK1[:, count] += (served_LT == count).sum(-1)
        return False

    @property
    def served_LK(self) -> np.ndarray:
        """int64, tokens of each layer that a slot serves with an expert."""
        return self.tokens - self.empty_LK

    def _by_expert(self, cell: np.ndarray) -> np.ndarray:
        layers, experts = self.topology.layers, self.topology.experts
        count = np.bincount(cell.reshape(-1), minlength=layers * (experts + 1))
        return count.reshape(layers, experts + 1)[:, :-1]

    def _count_repeats(self, ids_KLT: np.ndarray) -> None:
        repeated_LT = np.zeros(ids_KLT.shape[1:], bool)
        equal_LT = np.empty_like(repeated_LT)
        for slot in range(1, len(ids_KLT)):
            for other in range(slot):
                np.equal(ids_KLT[slot], ids_KLT[other], out=equal_LT)
                repeated_LT |= equal_LT
        if repeated_LT.any():
            # Two slots without an expert are no repetition.
            cell_LTK = np.sort(ids_KLT.transpose(1, 2, 0), -1)
            twice_LTK = (cell_LTK[..., 1:] == cell_LTK[..., :-1]) & (cell_LTK[..., 1:] < self.topology.experts)
            self.repeats_L += twice_LTK.any(-1).sum(-1)

    def _count_matches(self, ids_KLT: np.ndarray, follows_T: np.ndarray) -> None:
        now_KLT, before_KLT = ids_KLT[..., 1:], ids_KLT[..., :-1].copy()
        # What is no expert matches nothing, nor does another document's last token.
        before_KLT[before_KLT >= self.topology.experts] = -1
        before_KLT[..., ~follows_T[1:]] = -1
        equal_LT = np.empty(now_KLT.shape[1:], bool)
        # At most K matches of each of K slots; K² fits 16 bits for every K below 256.
        matches_LT = np.empty(now_KLT.shape[1:], np.uint16 if len(ids_KLT) < 256 else np.uint32)
        matches_LT[:] = 0
        for before_LT in before_KLT:
            for now_LT in now_KLT:
                np.equal(now_LT, before_LT, out=equal_LT)
                np.add(matches_LT, equal_LT, out=matches_LT)
        self.matches_L += matches_LT.sum(-1, dtype=np.int64)

    def _count_joint(self, top_LT: np.ndarray) -> None:
        pairs, groups = self._joint.shape[0], self._joint.shape[1] - 1
        if pairs == 0:
            return
        experts = self.topology.experts
        top_LT = top_LT.astype(np.int64)
        if groups < experts:
            top_LT = np.where(top_LT < experts, top_LT * groups // experts, groups)
        cell = (np.arange(pairs)[:, None] * (groups + 1) + top_LT[:-1]) * (groups + 1) + top_LT[1:]
        flat = self._joint.reshape(-1)
        if flat.size <= 4 * cell.size:
            flat += np.bincount(cell.reshape(-1), minlength=flat.size)
        else:
            np.add.at(flat, cell.reshape(-1), 1)

    def _keep_shingles(self, block: Block, cell_KLT: np.ndarray) -> None:
        routing_T = np.zeros(len(block), np.uint64)
        for slot in cell_KLT:
            routing_T += self._label[slot].sum(0)
        token_T = mix(block.token_ids_T)
        known_T = block.token_ids_T >= 0
        for shingles, size, item_T in ((self.text, TEXT_RUN, token_T), (self.routing, ROUTING_RUN, mix(routing_T))):
            hash_N = rolling(item_T, size)
            # A run lies within one document, and text within what is known of it.
            whole_N = block.document_T[: len(hash_N)] == block.document_T[size - 1 :]
            if shingles is self.text:
                whole_N &= _sums(~known_T, size) == 0
            first = np.flatnonzero(whole_N)
            other_N = rolling(token_T, size)[first]
            if shingles is self.routing:
                other_N[_sums(~known_T, size)[first] > 0] = 0
            shingles.add(hash_N[first], block.document_T[first], block.position_T[first], other_N)


def _sums(flag_T: np.ndarray, size: int) -> np.ndarray:
    """How many of every run of ``size`` are set, [T - size + 1]; empty if there are fewer."""
    total_T = np.concatenate([[0], np.cumsum(flag_T)])
    return total_T[size:] - total_T[:-size]


def _top_slot(ids_KLT: np.ndarray, gates_KLT: np.ndarray | None) -> np.ndarray:
    """Ids [L, T] of the slot with the largest gate weight, of the first slot where no weights are kept."""
    top_LT = ids_KLT[0]
    if gates_KLT is None:
        return top_LT
    best_LT = gates_KLT[0]
    for ids_LT, gate_LT in zip(ids_KLT[1:], gates_KLT[1:], strict=True):
        larger_LT = gate_LT > best_LT
        top_LT, best_LT = np.where(larger_LT, ids_LT, top_LT), np.where(larger_LT, gate_LT, best_LT)
    return top_LT


def scan_trace(trace: Trace, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> Scan:
    """Read the whole trace once.

    Args:
        trace: what is read. on_progress: called with tokens read and tokens in all.

    Raises:
        SpecmoeError: a document is damaged.
    """
    scan = Scan(trace)

    def document(index: int, record: RoutingRecord) -> None:
        scan.documents.take(index, record)
        scan.prefixes.add(index, record.token_ids.numpy())

    for block in blocks(trace, document):
        scan.take(block)
        on_progress(scan.tokens, trace.tokens)
    scan.alike.close()
    return scan
