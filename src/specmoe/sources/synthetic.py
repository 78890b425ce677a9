"""Markov routing whose best possible recall is known exactly: the yardstick for every predictor.

Each of the K slots of a token is a Markov chain of its own over G = E // K experts, and the slots' experts
are disjoint. From one MoE layer to the next (past the last one: to the first layer of the next token) a slot
moves by a fixed random permutation with probability ``determinism``, and to a uniformly random expert of
its group otherwise. Nothing in the trace (token ids, hidden states, logits) says more than the states up to
that place, so the best predictor names each slot's most likely state after h steps, and its recall follows
from the transition matrices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, TraceWriter

__all__ = ["SyntheticProcess", "optimal_recall", "synthetic_process", "synthetic_trace"]

_VOCABULARY = 4096


@dataclass(frozen=True)
class SyntheticProcess:
    """The law that the routing follows.

    Attributes:
        topology: sizes L, E, K, D. determinism: probability of the permutation's step.
        step_LKG: int64, where the permutation takes each state of a slot from a layer to the next one.
        expert_LKG: int64, the expert that a state stands for. embedding_LKGD: float32, what a state adds
            to the hidden state. bias_LE: float32 in [0, 1), a small preference that orders the logits.
    """

    topology: Topology
    determinism: float
    step_LKG: np.ndarray
    expert_LKG: np.ndarray
    embedding_LKGD: np.ndarray
    bias_LE: np.ndarray

    def transition_LKGG(self) -> np.ndarray:
        """Probability [from, to] of one step out of each layer, for every slot."""
        group = self.step_LKG.shape[-1]
        certain = np.eye(group)[self.step_LKG]
        return self.determinism * certain + (1 - self.determinism) / group

    def ahead_LKGG(self, horizon: int) -> np.ndarray:
        """Probability [from, to] of ``horizon`` steps, by source layer.

        Raises:
            SpecmoeError: the horizon is below 1.
        """
        if horizon < 1:
            raise SpecmoeError(f"horizons must be 1 or more, got {horizon}")
        step = self.transition_LKGG()
        ahead = step
        for h in range(1, horizon):
            ahead = ahead @ np.roll(step, -h, axis=0)
        return ahead

    def optimal_recall(self, horizon: int) -> float:
        """Recall@K of the best predictor, mean over source layers.

        Every transition is doubly stochastic, so each state is equally likely at every place. The best K
        experts are those with the highest probability given the current states: one of every slot.
        """
        return float(self.ahead_LKGG(horizon).max(-1).mean())

    def sample(self, documents: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the states [documents, T, L, K] int64 of independent documents."""
        layers, slots, group = self.step_LKG.shape
        states = np.empty((documents, tokens * layers, slots), np.int64)
        state = rng.integers(group, size=(documents, slots))
        slot = np.arange(slots)
        for place in range(tokens * layers):
            states[:, place] = state
            follows = rng.random((documents, slots)) < self.determinism
            anywhere = rng.integers(group, size=(documents, slots))
            state = np.where(follows, self.step_LKG[place % layers, slot, state], anywhere)
        return states.reshape(documents, tokens, layers, slots)

    def record(self, states_TLK: np.ndarray) -> RoutingRecord:
        """What a model would have recorded in these states; a function of the states alone."""
        tokens, layers, slots = states_TLK.shape
        layer, slot = np.arange(layers)[:, None], np.arange(slots)
        chosen = self.expert_LKG[layer, slot, states_TLK]
        logits = np.broadcast_to(0.5 * self.bias_LE, (tokens, *self.bias_LE.shape)).astype(np.float32)
        preference = 4 + 0.1 * np.take_along_axis(np.broadcast_to(self.bias_LE, logits.shape), chosen, -1)
        np.put_along_axis(logits, chosen, preference.astype(np.float32), -1)
        router_logits = torch.from_numpy(logits)
        expert_ids = router_logits.topk(slots, -1).indices
        hidden = self.embedding_LKGD[layer, slot, states_TLK].sum(-2) / np.sqrt(slots)
        # The token id tells of the first layer's states only, which are known wherever the id is.
        weights = np.array([pow(self.step_LKG.shape[-1], number, _VOCABULARY) for number in range(slots)])
        token_ids = (states_TLK[:, 0] * weights).sum(-1) % _VOCABULARY
        return RoutingRecord(
            token_ids=torch.from_numpy(token_ids.astype(np.int32)),
            phase=torch.zeros(tokens, dtype=torch.uint8),
            expert_ids=expert_ids.to(torch.int16),
            gate_weights=router_logits.softmax(-1).gather(-1, expert_ids),
            router_logits=router_logits,
            hidden=torch.from_numpy(hidden.astype(np.float16)),
        )


def synthetic_process(topology: Topology, determinism: float, seed: int) -> SyntheticProcess:
    """Draw a process: its permutations, which experts belong to which slot, and its embeddings.

    Raises:
        SpecmoeError: ``determinism`` is outside [0, 1], or the experts do not divide into top-k groups.
    """
    if not 0 <= determinism <= 1:
        raise SpecmoeError(f"determinism must lie between 0 and 1, got {determinism}")
    layers, experts, slots = topology.layers, topology.experts, topology.top_k
    if experts % slots:
        raise SpecmoeError(f"{experts} experts do not divide into {slots} equal groups; choose a multiple of top-k")
    group = experts // slots
    rng = np.random.default_rng([seed, 0])
    step = rng.permuted(np.broadcast_to(np.arange(group), (layers, slots, group)), axis=-1)
    expert = rng.permuted(np.broadcast_to(np.arange(experts), (layers, experts)), axis=-1)
    embedding = rng.standard_normal((layers, slots, group, topology.hidden_size)).astype(np.float32)
    bias = rng.random((layers, experts)).astype(np.float32)
    return SyntheticProcess(topology, determinism, step, expert.reshape(layers, slots, group), embedding, bias)


def optimal_recall(topology: Topology, determinism: float, seed: int, horizon: int) -> float:
    """Recall@K that no predictor can exceed on :func:`synthetic_trace` of the same arguments.

    Raises:
        SpecmoeError: as :func:`synthetic_process`, or the horizon is below 1.
    """
    return synthetic_process(topology, determinism, seed).optimal_recall(horizon)


def synthetic_trace(
    out: Path, *, topology: Topology, documents: int, tokens: int, determinism: float, seed: int, domains: int = 4
) -> None:
    """Write a trace of synthetic routing. The same arguments give the same bytes.

    Args:
        out: directory of the trace. topology: sizes; experts must be a multiple of top-k.
        documents: how many. tokens: in each. determinism: 0 (routing at random) to 1 (certain).
        domains: labels that the documents carry in turn; the routing does not depend on them.

    Raises:
        SpecmoeError: an argument is out of range, or ``out`` cannot be written or holds another trace.
    """
    process = synthetic_process(topology, determinism, seed)
    if min(documents, tokens, domains) < 1:
        raise SpecmoeError("a synthetic trace needs at least one document, one token and one domain")
    settings = {"documents": documents, "tokens": tokens, "determinism": determinism, "seed": seed, "domains": domains}
    fields = ("token_ids", "phase", "expert_ids", "gate_weights", "router_logits", "hidden")
    manifest = Manifest(topology=topology, source=Source(kind="synthetic", settings=settings), fields=fields)
    states = process.sample(documents, tokens, np.random.default_rng([seed, 1]))
    with TraceWriter(out, manifest) as writer:
        for number in range(documents):
            doc_id = f"synthetic-{number:05d}"
            if doc_id not in writer.written:
                digest = hashlib.sha256(states[number].tobytes()).hexdigest()
                writer.add(doc_id, f"domain-{number % domains}", digest, process.record(states[number]))
