"""What all runs of a suite share: one trace, one split, its windows in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from specmoe.dataset import PARTS, Split, Window, Windows
from specmoe.errors import SpecmoeError
from specmoe.memory import check_fits
from specmoe.predictors.base import Knowledge, Predictor, held_bytes
from specmoe.predictors.recipes import Recipes, kind_of
from specmoe.residency import Residency, cache_size, replay
from specmoe.suite.cut import Cut, cut_documents
from specmoe.topology import Topology
from specmoe.trace import Trace

__all__ = ["SuiteData", "trace_fingerprint"]

# The parts of which every number is kept; of the others recall@K is enough.
REPORTED = ("test", "held_out_domain")
TRAINING_LENGTH = 16
EVALUATION_LENGTH = 512
EVALUATION_CONTEXT = 64
# The training part is large and its recall only shows the gap to the others: a sample is enough.
_TRAINING_SAMPLE_TOKENS = 6000
_JOURNEY_TOKENS = 40
_PREPARATION_WINDOWS = 64
# Of a predictor's numbers, beside themselves: counts in float64 and a batch's, or gradients and the optimizer's two.
_COPIES = 4
_PROTOCOL = Cut()


@dataclass(frozen=True)
class SuiteData:
    """A trace cut by the protocol.

    Attributes:
        trace: it. split: by document. train: short windows to learn from. validation: whole documents.
        horizons: that are predicted.
        recipes: what some predictors' recipes are changed to; the same for all runs of a suite.
        cut: how the parts were drawn.
        cache_experts: experts a layer in the cache that cold-miss recall supposes.
    """

    trace: Trace
    split: Split
    train: Windows
    validation: Windows
    horizons: tuple[int, ...]
    recipes: Recipes = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)
    cache_experts: int = 0
    _training: dict[int, Windows] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        path: Path,
        horizons: tuple[int, ...],
        cut: Cut = _PROTOCOL,
        recipes: Recipes | None = None,
        cache_experts: int | None = None,
    ) -> SuiteData:
        """Open a trace, cut it, and read what training needs.

        Raises:
            SpecmoeError: too few documents, a damaged trace, documents too short for the horizons, or a cache that
                does not suit the model.
        """
        trace = Trace.open(path)
        cached = cache_size(trace.topology, cache_experts)
        split = cut_documents(trace.documents, cut)
        longest = max(document.tokens for document in trace.documents)
        if max(horizons) >= trace.topology.layers * longest:
            raise SpecmoeError(
                f"horizon {max(horizons)} reaches past the longest document "
                f"({longest} tokens × {trace.topology.layers} layers); use smaller --horizons"
            )
        # At the least what all experts of one document are given at every horizon, in float32.
        given = trace.topology.layers * len(horizons) * trace.topology.experts * 4
        check_fits(
            min(longest, EVALUATION_LENGTH) * given,
            f"predictions for a document of {longest:,} tokens, {trace.topology.layers} layers × "
            f"{trace.topology.experts} experts × {len(horizons)} horizons,",
            "use fewer --horizons, or collect with smaller --tokens-per-document",
        )
        train = Windows(trace, split.parts["train"], length=TRAINING_LENGTH)
        return cls(trace, split, train, _whole(trace, split.parts["validation"]), horizons, recipes or {}, cut, cached)

    @property
    def topology(self) -> Topology:
        """The model's shape."""
        return self.trace.topology

    def kind(self, name: str) -> type[Predictor]:
        """The predictor of a name, under the recipe it has in this suite."""
        return kind_of(name, self.recipes)

    def training(self, kind: type[Predictor]) -> Windows:
        """The training part in windows of the length that a predictor's recipe asks for."""
        # A longer window holds no more than a whole document does, and would only be padded.
        longest = max(self.trace.documents[index].tokens for index in self.split.parts["train"])
        length = min(kind.recipe.window, max(longest, self.train.length))
        if length == self.train.length:
            return self.train
        if length not in self._training:
            self._training[length] = Windows(self.trace, self.split.parts["train"], length=length)
        return self._training[length]

    @cached_property
    def knowledge(self) -> Knowledge:
        """What predictors may prepare from: the training windows and the model's routers."""

        def windows() -> Iterable[Window]:
            return self.train.batches(_PREPARATION_WINDOWS)

        routers = self.trace.routers()
        return Knowledge(windows, *(routers or (None, None)), self.trace.unembedding())

    @cached_property
    def evaluated(self) -> dict[str, Windows]:
        """Whole documents of each part that is reported: part name → windows."""
        parts = {"validation": self.validation, "test": _whole(self.trace, self.split.parts["test"])}
        sample, tokens = [], 0
        for index in self.split.parts["train"]:
            if tokens < _TRAINING_SAMPLE_TOKENS:
                sample.append(index)
                tokens += self.trace.documents[index].tokens
        parts["train"] = _whole(self.trace, sample)
        if self.split.parts["held_out_domain"]:
            parts["held_out_domain"] = _whole(self.trace, self.split.parts["held_out_domain"])
        return {name: parts[name] for name in PARTS if name in parts}

    @cached_property
    def residency(self) -> dict[str, Residency]:
        """What the stated cache lacks at each event of the reported parts: part name → replay."""
        return {
            name: replay(windows, self.horizons, self.cache_experts)
            for name, windows in self.evaluated.items()
            if name in REPORTED
        }

    @cached_property
    def available(self) -> frozenset[str]:
        """Everything a predictor can ask for that this trace has."""
        routers = {"routers"} if self.knowledge.router_weight_LED is not None else set()
        return frozenset(self.trace.manifest.fields) | routers

    def lacks(self, predictor: type[Predictor]) -> str:
        """Why a predictor cannot run on this trace; empty if it can."""
        missing = sorted(predictor.recipe.needs - self.available)
        if missing:
            return f"the trace has no {' and no '.join(missing)}"
        try:
            check_fits(
                _COPIES * held_bytes(predictor, self.topology, self.horizons),
                f"preparing it for {self.topology.layers} layers × {self.topology.experts} experts",
                "take a machine with more, or fewer --horizons",
            )
        except SpecmoeError as error:
            return str(error)
        return ""

    @cached_property
    def journey(self) -> tuple[int, Window]:
        """A stretch of a test document to show: its index in the trace, and a window of one."""
        test = self.split.parts["test"]
        index = max(test, key=lambda i: (min(self.trace.documents[i].tokens, 2 * _JOURNEY_TOKENS), -i))
        windows = Windows(self.trace, [index], length=2 * _JOURNEY_TOKENS)
        window = windows.batch(slice(0, 1))
        return index, window

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the result of a run depends on besides its predictor and seed."""
        measured = (self.horizons, TRAINING_LENGTH, self.cache_experts)
        parts = (trace_fingerprint(self.trace), self.split.hash, measured, torch.__version__)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _whole(trace: Trace, documents: Iterable[int]) -> Windows:
    """Documents in one piece, or in long pieces that see the tokens before them."""
    chosen = list(documents)
    longest = max((trace.documents[index].tokens for index in chosen), default=0)
    context = EVALUATION_CONTEXT if longest > EVALUATION_LENGTH else 0
    return Windows(trace, chosen, length=min(EVALUATION_LENGTH, max(2, longest)), context=context)


def trace_fingerprint(trace: Trace) -> str:
    """Hash of a trace's content: its topology, its documents' names, groups and checksums, and its routers.

    How documents are put into shards is left out: a capture that is slower, or killed and continued, cuts them
    elsewhere.
    """
    documents = [
        (each.doc_id, each.domain, each.group, each.text_sha256, each.tokens, sorted(each.crc32.items()))
        for each in trace.documents
    ]
    content = (trace.topology.model_dump_json(), documents, trace.manifest.routers_sha256)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def with_shuffled_hidden(windows: Windows, seed: int = 0) -> Windows:
    """The same windows whose router inputs belong to other tokens: nothing can be learned from them."""
    assert windows.hidden is not None
    shuffled = object.__new__(Windows)
    vars(shuffled).update(vars(windows))
    hidden: Tensor = windows.hidden.flatten(0, 1).clone()
    valid = windows.valid.flatten().nonzero()[:, 0]
    order = torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed))
    hidden[valid] = hidden[valid[order]]
    shuffled.hidden = hidden.view(windows.hidden.shape)
    return shuffled


def with_shuffled_routing(windows: Windows, seed: int = 0, tokens: int = 1 << 62) -> Windows:
    """The same windows whose routing, layer by layer, belongs to other tokens: ids and earlier layers say nothing.

    tokens: evenly spaced windows of about so many tokens are kept.
    """
    count = max(1, min(len(windows), tokens * len(windows) // max(1, windows.tokens)))
    rows = torch.linspace(0, len(windows) - 1, count).long()
    shuffled = object.__new__(Windows)
    kept = {n: v[rows] if isinstance(v, Tensor) else v for n, v in vars(windows).items()}
    valid = kept["valid"].flatten().nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(valid), generator=generator) for _ in range(windows.topology.layers)]
    for name in ("expert_ids", "routed", "router", "gates"):
        if kept[name] is not None:
            flat = kept[name].flatten(0, 1)
            for layer, order in enumerate(orders):
                flat[valid, layer] = flat[valid[order], layer]
            kept[name] = flat.view(kept[name].shape)
    vars(shuffled).update(kept)
    return shuffled
