"""What a model asks a store of experts for, in execution order: the stream that caches and simulations replay.

Letters: J steps of the engine, L MoE layers, V = J·L events, M expert accesses, N tokens, E experts in a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from specmoe.errors import SpecmoeError
from specmoe.offload.compiled import keeping
from specmoe.topology import Topology
from specmoe.trace import Trace
from specmoe.trace.record import Phase

__all__ = ["Demand", "Replay"]

Replay = Literal["trace", "decode"]


@dataclass(frozen=True)
class Demand:
    """A stream of events. Event v is layer v % L of step v // L; all experts of an event are needed at once.

    An expert that several tokens of a step are routed to is one access.

    Attributes:
        topology: of the model. replay: how the documents were read, see :meth:`of_trace`. batch: sequences at once.
        keys_M: int32, layer·E + expert, ascending within an event. tokens_M: int32, tokens of the step that are
            routed to it. starts_V: int64 [V + 1], where each event's accesses begin.
        phase_J: uint8, values of :class:`Phase`. group_J: int32, number of the batch of sequences a step belongs to.
        order_N: int64, the tokens in the order in which they are run, as numbers in the documents put end to end.
        first_J: int64 [J + 1], where each step's tokens begin in ``order_N``.
    """

    topology: Topology
    replay: Replay
    batch: int
    keys_M: NDArray[np.int32]
    tokens_M: NDArray[np.int32]
    starts_V: NDArray[np.int64]
    phase_J: NDArray[np.uint8]
    group_J: NDArray[np.int32]
    order_N: NDArray[np.int64]
    first_J: NDArray[np.int64]

    @property
    def steps(self) -> int:
        """J."""
        return len(self.phase_J)

    @property
    def events(self) -> int:
        """V."""
        return len(self.starts_V) - 1

    @property
    def accesses(self) -> int:
        """M."""
        return len(self.keys_M)

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.order_N)

    @cached_property
    def next_use_M(self) -> NDArray[np.int64]:
        """For each access the event that next needs the same expert; V for never. What an oracle knows."""
        return _next_uses(self.keys_M, self.starts_V, self.topology.layers * self.topology.experts)

    @cached_property
    def first_use(self) -> NDArray[np.int64]:
        """For each expert (layer·E + expert) the number of the event that first needs it; V for never."""
        first = np.full(self.topology.layers * self.topology.experts, self.events, dtype=np.int64)
        event_M = np.repeat(np.arange(self.events), np.diff(self.starts_V))
        np.minimum.at(first, self.keys_M, event_M)
        return first

    @classmethod
    def of_trace(
        cls,
        trace: Trace,
        documents: Sequence[int],
        *,
        replay: Replay | None = None,
        batch: int = 1,
        prefill_chunk: int = 512,
    ) -> Demand:
        """Replay documents of a trace as an engine would run them.

        Args:
            trace: it. documents: their numbers in the trace.
            replay: ``trace`` runs a document's prefill tokens together and its decode tokens one by one, as they were
                recorded; ``decode`` runs every token by itself, as if the text were being written. By default the first
                where the trace has decode tokens, else the second.
            batch: sequences side by side. They start together, read their prompts together, and the next batch starts
                when the last of them has ended.
            prefill_chunk: prompt tokens of a sequence that are run in one step, at most.

        Raises:
            SpecmoeError: nothing to replay, no token that is routed, an argument that cannot be, or a looped
                transformer, whose layers run several times with the same experts.
        """
        if "layer_order" in trace.manifest.source.settings:
            raise SpecmoeError(
                f"{trace.topology.model_id} runs some layers several times with the same experts; caches count each "
                "run's experts as others, so such a trace cannot be simulated yet; it can be trained on and judged"
            )
        records = [trace.read(index, ()) for index in documents]
        demand = cls.of_records(
            trace.topology,
            [record.expert_ids.numpy() for record in records],
            [record.phase.numpy() for record in records],
            replay=replay,
            batch=batch,
            prefill_chunk=prefill_chunk,
        )
        if not demand.accesses:
            raise SpecmoeError(
                f"no token of these documents is routed to an expert ({trace.directory}), so there is nothing to load; "
                "see specmoe validate, and collect or import it again"
            )
        return demand

    @classmethod
    def of_records(
        cls,
        topology: Topology,
        expert_ids: Sequence[NDArray[Any]],
        phases: Sequence[NDArray[np.uint8]],
        *,
        replay: Replay | None = None,
        batch: int = 1,
        prefill_chunk: int = 512,
    ) -> Demand:
        """The same from arrays: ``expert_ids`` [T, L, K] and ``phases`` [T] of each document."""
        if not 1 <= batch <= 4096 or prefill_chunk < 1:
            raise SpecmoeError(f"batch {batch} or prefill chunk {prefill_chunk} is not a size; use 1 or more")
        lengths = np.array([len(ids) for ids in expert_ids], dtype=np.int64)
        if lengths.sum() == 0:
            raise SpecmoeError("there is nothing to replay: the documents hold no token")
        phase_N = np.concatenate(list(phases))
        if replay is None:
            replay = "trace" if (phase_N == Phase.DECODE).any() else "decode"
        if replay == "decode":
            phase_N = np.full(len(phase_N), Phase.DECODE, dtype=np.uint8)
        step_N, group_N = _steps(lengths, phase_N, batch, prefill_chunk)
        order_N = np.argsort(step_N, kind="stable")
        # Steps without a token (a batch whose sequences end early leaves none) do not exist.
        step_sorted, first = np.unique(step_N[order_N], return_index=True)
        first_J = np.append(first, len(order_N)).astype(np.int64)
        del step_sorted
        leading = order_N[first]
        ids_NLK = np.concatenate([np.asarray(ids, dtype=np.int16) for ids in expert_ids])[order_N]
        starts_V, keys_M, tokens_M = _merge(ids_NLK, first_J, topology.experts)
        return cls(
            topology,
            replay,
            batch,
            keys_M,
            tokens_M,
            starts_V,
            phase_N[leading],
            group_N[leading].astype(np.int32),
            order_N,
            first_J,
        )


def _steps(
    lengths: NDArray[np.int64], phase_N: NDArray[np.uint8], batch: int, chunk: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The step in which each token is run, and the batch of sequences it belongs to: [N] each."""
    step_N = np.empty(len(phase_N), dtype=np.int64)
    group_N = np.empty(len(phase_N), dtype=np.int64)
    ends = lengths.cumsum()
    base = 0
    for group, first in enumerate(range(0, len(lengths), batch)):
        documents = range(first, min(first + batch, len(lengths)))
        # Decode tokens that stand before the last prefill token are part of what is read (a chat's earlier turns).
        prompts = []
        for document in documents:
            read = np.flatnonzero(phase_N[ends[document] - lengths[document] : ends[document]] == Phase.PREFILL)
            prompts.append(int(read[-1]) + 1 if len(read) else 0)
        reading = max(-(-prompt // chunk) for prompt in prompts)
        last = base
        for document, prompt in zip(documents, prompts, strict=True):
            place = np.arange(lengths[document])
            # All sequences begin to write together, when the longest prompt has been read.
            step = np.where(place < prompt, place // chunk, reading + place - prompt)
            own = slice(ends[document] - lengths[document], ends[document])
            step_N[own], group_N[own] = base + step, group
            phase_N[own] = np.where(place < prompt, Phase.PREFILL, Phase.DECODE)
            last = max(last, base + int(step.max(initial=-1)) + 1)
        base = last
    return step_N, group_N


@keeping()
def _merge(
    ids_NLK: NDArray[np.int16], first_J: NDArray[np.int64], experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Accesses of each event: where they begin, which experts, ascending, and how many tokens each serves."""
    steps, layers, top_k = len(first_J) - 1, ids_NLK.shape[1], ids_NLK.shape[2]
    starts = np.zeros(steps * layers + 1, dtype=np.int64)
    keys = np.empty(ids_NLK.size, dtype=np.int32)
    tokens = np.empty(ids_NLK.size, dtype=np.int32)
    count = np.zeros(experts, dtype=np.int32)
    chosen = np.empty(experts, dtype=np.int32)
    total = 0
    for step in range(steps):
        for layer in range(layers):
            found = 0
            for token in range(first_J[step], first_J[step + 1]):
                for slot in range(top_k):
                    expert = ids_NLK[token, layer, slot]
                    if expert < 0 or expert >= experts:
                        continue
                    if count[expert] == 0:
                        chosen[found] = expert
                        found += 1
                    count[expert] += 1
            chosen[:found].sort()
            for place in range(found):
                expert = chosen[place]
                keys[total] = layer * experts + expert
                tokens[total] = count[expert]
                count[expert] = 0
                total += 1
            starts[step * layers + layer + 1] = total
    return starts, keys[:total].copy(), tokens[:total].copy()


@keeping()
def _next_uses(keys_M: NDArray[np.int32], starts_V: NDArray[np.int64], keys: int) -> NDArray[np.int64]:
    events = len(starts_V) - 1
    upcoming = np.full(keys, events, dtype=np.int64)
    result = np.empty(len(keys_M), dtype=np.int64)
    for event in range(events - 1, -1, -1):
        for access in range(starts_V[event], starts_V[event + 1]):
            result[access] = upcoming[keys_M[access]]
            upcoming[keys_M[access]] = event
    return result
