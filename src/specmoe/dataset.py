"""From a trace to batches: splits by document, windows of tokens, and what each event must foresee.

Shapes: B windows, T tokens, L layers (S where a layer is the source of a prediction), H horizons,
E experts, K experts a token is routed to, D hidden size.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.memory import check_fits
from specmoe.topology import Topology
from specmoe.trace import DocumentRecord, Trace

__all__ = [
    "PARTS",
    "Split",
    "Targets",
    "Window",
    "Windows",
    "sharpen",
    "split_documents",
    "targets_of",
    "tokens_at_once",
]

PARTS = ("train", "validation", "test", "held_out_domain")
_FRACTIONS = {"train": 0.525, "validation": 0.175, "test": 0.3}


@dataclass(frozen=True)
class Split:
    """Which documents (by index in the trace) belong to which part.

    Attributes:
        parts: part name → document indices. domain: name of the held-out domain, None if there is none.
        seed: of the draw. hash: of the parts' document ids and texts; results compare only under one hash.
    """

    parts: dict[str, tuple[int, ...]]
    domain: str | None
    seed: int
    hash: str


def split_documents(documents: Sequence[DocumentRecord], seed: int = 0, *, hold_out: bool = True) -> Split:
    """Draw the protocol's parts: 52.5 % train, 17.5 % validation, 30 % test, by document.

    Documents of one group, and those with the same text, stay on one side; a copy of a text in a second group is in no
    part. In a trace that keeps hidden states for a sample of its documents, only that sample is split, so that
    every predictor is judged on the same events. Where there are at least four domains, one that holds at most a fifth
    of the documents is kept out of all three as a part of its own, unless ``hold_out`` is False.

    Raises:
        SpecmoeError: fewer than three distinct documents.
    """
    sampled = any(document.hidden_start is not None for document in documents)
    usable = [
        index
        for index, document in enumerate(documents)
        if document.tokens >= 2 and (document.hidden_start is not None or not sampled)
    ]
    domain = _held_out_domain([documents[index] for index in usable], seed) if hold_out else None
    held_out = [index for index in usable if documents[index].domain == domain]
    # What shares a text or a group with the held-out domain is in no part at all.
    kept_out = {documents[index].text_sha256 for index in held_out} | {documents[index].group for index in held_out}
    kept_out.discard("")
    rest = [index for index in usable if not kept_out & {documents[index].text_sha256, documents[index].group}]
    groups = _kept_together(documents, [index for index in rest if documents[index].domain != domain])
    if len(groups) < 3:
        raise SpecmoeError(
            f"the trace has {len(groups)} distinct document(s); a split by document needs at least 3: collect more text"
        )
    order = sorted(groups)
    random.Random(f"split {seed}").shuffle(order)
    bounds = [0, *(max(1, round(len(order) * share)) for share in (0.525, 0.7)), len(order)]
    bounds[1] = min(bounds[1], len(order) - 2)
    bounds[2] = min(max(bounds[2], bounds[1] + 1), len(order) - 1)
    parts = {
        name: tuple(sorted(index for key in order[bounds[i] : bounds[i + 1]] for index in groups[key]))
        for i, name in enumerate(_FRACTIONS)
    }
    parts["held_out_domain"] = tuple(held_out)
    return Split(parts, domain, seed, split_hash(documents, parts))


def split_hash(documents: Sequence[DocumentRecord], parts: Mapping[str, Sequence[int]]) -> str:
    """Hash of which documents (by id and text) belong to which part."""
    digest = hashlib.sha256()
    for name in PARTS:
        # By name, so that the order of documents in the trace does not matter.
        for index in sorted(parts[name], key=lambda index: documents[index].doc_id):
            digest.update(f"{name}\0{documents[index].doc_id}\0{documents[index].text_sha256}\0".encode())
    return digest.hexdigest()[:16]


def _kept_together(documents: Sequence[DocumentRecord], usable: Sequence[int]) -> dict[str, list[int]]:
    """Documents by what they must stay together with: their group, else the copies of their text."""
    together: dict[str, list[int]] = {}
    place: dict[str, str] = {}
    for index in usable:
        text = documents[index].text_sha256
        key = f"group {documents[index].group}" if documents[index].group else text
        # Binding groups that share a text would chain them into one: a copy in a second group is left out instead.
        if place.setdefault(text, key) == key:
            together.setdefault(key, []).append(index)
    return together


def _held_out_domain(documents: Sequence[DocumentRecord], seed: int) -> str | None:
    counts: dict[str, int] = {}
    for document in documents:
        counts[document.domain] = counts.get(document.domain, 0) + 1
    candidates = sorted(name for name, count in counts.items() if 3 <= count <= len(documents) / 5)
    if len(counts) < 4 or not candidates:
        return None
    return random.Random(f"domain {seed}").choice(candidates)


@dataclass(frozen=True)
class Window:
    """A batch of windows: everything that was observed. What an event may use of it is the event's past.

    Attributes:
        token_ids_BT: int64. valid_BT: bool, False for padding. scored_BT: bool, False for tokens that are
            there as context only.
        expert_ids_BTLK: int64, -1 for a slot without expert. routed_BTLE: float32, 1 where an expert is
            among the K.
        router_BTLE: float32, the router's output as a distribution: softmax of its logits where they were
            kept, else the gate weights or the ids, normalised.
        hidden_BTLD: float32 router inputs, None where the trace keeps none.
        soft: whether ``router_BTLE`` comes from logits (and can serve as a soft target).
        document_B: index of each window's document in the trace.
        phase_BT: int64, prefill or decode (:class:`specmoe.trace.Phase`).
    """

    token_ids_BT: Tensor
    valid_BT: Tensor
    scored_BT: Tensor
    expert_ids_BTLK: Tensor
    routed_BTLE: Tensor
    router_BTLE: Tensor
    hidden_BTLD: Tensor | None
    soft: bool
    document_B: Tensor
    phase_BT: Tensor | None = None

    def to(self, device: torch.device | str) -> Window:
        """The same window on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class Targets(NamedTuple):
    """What is to be foreseen at each event and horizon.

    Attributes:
        expert_ids_BTSHK: the experts at the place the horizon points to, -1 for a slot without one.
        routed_BTSHE: 1 where an expert is among the K there.
        router_BTSHE: that router's output distribution.
        known_BTSH: False where the place lies beyond the window, is padding, the event is not scored, or
            no expert served the token there.
    """

    expert_ids_BTSHK: Tensor
    routed_BTSHE: Tensor
    router_BTSHE: Tensor
    known_BTSH: Tensor


def targets_of(window: Window, horizons: Sequence[int]) -> Targets:
    """Look up the place each (token, source layer, horizon) points to, in execution order."""
    experts = window.routed_BTLE.shape[-1]
    ids_BTLK = window.expert_ids_BTLK
    ids_BTLK = torch.where((ids_BTLK < experts) & window.valid_BT[..., None, None], ids_BTLK, -1)
    # Shifted by one, so that the zeros beyond the window become "no expert".
    expert_ids = ahead(ids_BTLK + 1, horizons) - 1
    known = (expert_ids >= 0).any(-1) & window.scored_BT[:, :, None, None]
    return Targets(expert_ids, ahead(window.routed_BTLE, horizons), ahead(window.router_BTLE, horizons), known)


def known_ahead(window: Window, horizons: Sequence[int]) -> Tensor:
    """Where there is something to foresee: ``known_BTSH`` of :class:`Targets`, without the rest."""
    served_BTL = (window.routed_BTLE.sum(-1) > 0) & window.valid_BT[..., None]
    return ahead(served_BTL[..., None], horizons)[..., 0] & window.scored_BT[:, :, None, None]


def ahead(values_BTLX: Tensor, horizons: Sequence[int]) -> Tensor:
    """``values`` at the places that the horizons point to, [B, T, L, H, X], zero beyond the window.

    A negative horizon looks back.
    """
    batch, tokens, layers, width = values_BTLX.shape
    flat = values_BTLX.reshape(batch, tokens * layers, width)
    after, before = max(0, *horizons), max(0, *(-h for h in horizons))
    padded = F.pad(flat, (0, 0, before, after))
    length = tokens * layers
    shifted = [padded[:, before + h : before + h + length] for h in horizons]
    return torch.stack(shifted, 2).view(batch, tokens, layers, len(horizons), width)


def sharpen(distribution: Tensor, temperature: float) -> Tensor:
    """A distribution [..., E] at another temperature: below 1 sharper, above 1 flatter."""
    return (distribution.clamp_min(1e-9).log() / temperature).softmax(-1)


# Larger tensors would come from the operating system anew each time: on 26 layers x 64 experts, evaluation took 1.5
# to 1.7 times as long with 7 million logits at once.
_CPU_LOGITS = 1 << 20
_GPU_LOGITS = 1 << 24


def tokens_at_once(topology: Topology, horizons: int, device: str = "cpu") -> int:
    """How many tokens to score in one batch, so that their logits stay in fast memory; at least one."""
    logits_per_token = topology.layers * horizons * topology.experts
    return max(1, (_GPU_LOGITS if device.startswith("cuda") else _CPU_LOGITS) // logits_per_token)


class Windows:
    """Windows of some documents, held in memory as whole tensors, so that a batch is one gather.

    Args:
        trace: where to read. documents: indices of the documents.
        length: scored tokens in a window. context: tokens before them that are shown but not scored, so
            that a long document can be cut without hiding its past.
    """

    def __init__(self, trace: Trace, documents: Sequence[int], *, length: int, context: int = 0) -> None:
        self.topology: Topology = trace.topology
        self.length, self.context = length, context
        fields = trace.manifest.fields
        self.soft = "router_logits" in fields
        if "hidden" in fields:
            documents = [index for index in documents if trace.documents[index].hidden_start is not None]
        if not documents:
            raise SpecmoeError("a part of the split has no document (with hidden states); collect more text")
        pieces = [(index, start) for index in documents for start in range(0, trace.documents[index].tokens, length)]
        count, span = len(pieces), length + context
        layers, experts, top_k = self.topology.layers, self.topology.experts, self.topology.top_k
        of_layer = 2 * top_k + (8 * experts if self.soft else 4 * top_k if "gate_weights" in fields else 0)
        of_layer += 4 * self.topology.hidden_size if "hidden" in fields else 0
        check_fits(
            count * span * (layers * of_layer + 18),
            f"{count:,} windows of {span:,} tokens, {layers} layers × {experts} experts,",
            "lower the recipe's window, or collect fewer or shorter documents",
        )
        self.token_ids = torch.zeros(count, span, dtype=torch.long)
        self.phase = torch.zeros(count, span, dtype=torch.long)
        self.valid = torch.zeros(count, span, dtype=torch.bool)
        self.scored = torch.zeros(count, span, dtype=torch.bool)
        self.expert_ids = torch.full((count, span, layers, top_k), -1, dtype=torch.int16)
        # Distributions over all experts are many times the size of the ids. Where the ids say it all, as in large
        # traces without logits, they are spread out batch by batch.
        self.routed = torch.zeros(count, span, layers, experts) if self.soft else None
        self.router = torch.zeros(count, span, layers, experts) if self.soft else None
        self.gates = torch.zeros(count, span, layers, top_k) if "gate_weights" in fields and not self.soft else None
        self.hidden: Tensor | None = None
        if "hidden" in fields:
            # float32 although the trace may hold less: converting in every batch would cost more than a gather.
            self.hidden = torch.zeros(count, span, layers, self.topology.hidden_size)
        self.documents = torch.tensor([index for index, _ in pieces])
        row = 0
        for index in documents:
            record = trace.read(index)
            router = routed = None
            if record.router_logits is not None:
                # Zero experts take their share, but there is nothing to foresee in them.
                router = record.router_logits.softmax(-1)[..., :experts]
                routed = routed_of(record.expert_ids, experts)
            for start in range(0, len(record), length):
                first, last = max(0, start - context), min(len(record), start + length)
                # Context sits at the front of every window; a document's first window has less of it.
                self.token_ids[row, : last - first] = record.token_ids[first:last]
                self.phase[row, : last - first] = record.phase[first:last]
                self.valid[row, : last - first] = True
                self.scored[row, start - first : last - first] = True
                self.expert_ids[row, : last - first] = record.expert_ids[first:last]
                for kept, of_record in (
                    (self.routed, routed),
                    (self.router, router),
                    (self.gates, record.gate_weights),
                ):
                    if kept is not None and of_record is not None:
                        kept[row, : last - first] = of_record[first:last]
                if self.hidden is not None and record.hidden is not None:
                    self.hidden[row, : last - first] = record.hidden[first:last]
                row += 1

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())

    def router_temperature(self, sharpness: float) -> float:
        """The temperature that brings the routers' distributions to a stated sharpness, on average.

        Routers differ widely: some put nearly everything on their K experts, others little more than an even
        share, which as a target would teach next to nothing.

        Args:
            sharpness: 0 where the K largest entries hold no more than an even share (K / E), 1 where they
                hold everything.
        """
        even = self.topology.top_k / self.topology.experts
        mass = even + sharpness * (1 - even)
        tokens = self.valid.flatten().nonzero()[:, 0]
        chosen = tokens[torch.linspace(0, len(tokens) - 1, min(len(tokens), 2048)).long()]
        if self.router is not None:
            sample = self.router.flatten(0, 1)[chosen]
        else:
            ids = self.expert_ids.flatten(0, 1)[chosen].long()
            gates = None if self.gates is None else self.gates.flatten(0, 1)[chosen]
            sample = _spread(ids, gates, self.topology.experts)
        low, high = math.log(1e-3), math.log(1e3)
        for _ in range(30):
            middle = (low + high) / 2
            top = sharpen(sample, math.exp(middle)).topk(self.topology.top_k, -1).values.sum(-1).mean()
            low, high = (middle, high) if float(top) > mass else (low, middle)
        return math.exp((low + high) / 2)

    def batch(self, rows: Tensor | slice) -> Window:
        """The windows ``rows`` as a batch."""

        def pick(tensor: Tensor) -> Tensor:
            # index_select copies whole rows, several times faster than general indexing.
            return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)

        experts, expert_ids = self.topology.experts, pick(self.expert_ids).long()
        if self.routed is not None and self.router is not None:
            routed, router = pick(self.routed), pick(self.router)
        else:
            routed = routed_of(expert_ids, experts)
            router = _spread(expert_ids, None if self.gates is None else pick(self.gates), experts)
        return Window(
            token_ids_BT=pick(self.token_ids),
            valid_BT=pick(self.valid),
            scored_BT=pick(self.scored),
            expert_ids_BTLK=expert_ids,
            routed_BTLE=routed,
            router_BTLE=router,
            hidden_BTLD=None if self.hidden is None else pick(self.hidden),
            soft=self.soft,
            document_B=pick(self.documents),
            phase_BT=pick(self.phase),
        )

    def by_length(self, tokens: int) -> Iterator[tuple[Tensor, Window]]:
        """All windows once, those of similar length together and cut to the longest of them.

        Traces of short prompts would otherwise be mostly padding.

        Args:
            tokens: in a batch, padding included (one window at least).

        Yields:
            Row numbers of the windows [B], and the windows.
        """
        position = torch.arange(1, self.valid.shape[1] + 1)
        lengths = (self.valid * position).amax(1).clamp_min(1)
        order = lengths.argsort(descending=True, stable=True)
        first = 0
        while first < len(order):
            longest = int(lengths[order[first]])
            rows = order[first : first + max(1, tokens // longest)]
            yield rows, _cut(self.batch(rows), longest)
            first += len(rows)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Window]:
        """All windows once, ``size`` at a time; in random order if a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            yield self.batch(rows if generator is not None else slice(int(rows[0]), int(rows[-1]) + 1))


def _cut(window: Window, tokens: int) -> Window:
    """The first tokens of every window of a batch."""
    cut = {n: value[:, :tokens] for n, value in vars(window).items() if isinstance(value, Tensor) and value.ndim > 1}
    return replace(window, **cut)


def routed_of(expert_ids: Tensor, experts: int) -> Tensor:
    """Expert ids [..., K] as float32 [..., E], 1 where an expert is among the K."""
    ids = expert_ids.long()
    # Slot E collects what is no expert of this layer: empty slots and zero or skip experts.
    slots = torch.where((ids < 0) | (ids >= experts), experts, ids)
    return torch.zeros(*ids.shape[:-1], experts + 1).scatter_(-1, slots, 1.0)[..., :experts]


def _spread(expert_ids: Tensor, gates: Tensor | None, experts: int) -> Tensor:
    """Gate weights [..., K], or equal ones, at their experts: a distribution [..., E], zero where no expert is."""
    slots = torch.where((expert_ids < 0) | (expert_ids >= experts), experts, expert_ids)
    weights = gates.clamp_min(0) if gates is not None else torch.ones(slots.shape)
    spread = torch.zeros(*slots.shape[:-1], experts + 1).scatter_add_(-1, slots, weights)[..., :experts]
    return spread / spread.sum(-1, keepdim=True).clamp_min(1e-9)
