"""Everything that the findings are drawn from, gathered once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specmoe.dataset import Split, split_documents
from specmoe.diagnostics.copies import DocumentCopies, LayerCopy, Leak, document_copies, layer_copies, leak
from specmoe.diagnostics.logits import LogitFit, logit_fit
from specmoe.diagnostics.probing import (
    Alignment,
    HiddenSample,
    RouterFit,
    alignment,
    probe,
    router_fit,
    sample_hidden,
)
from specmoe.diagnostics.sample import Information, RoutingSample, information, sample_routing
from specmoe.diagnostics.scan import Scan, scan_trace
from specmoe.errors import SpecmoeError
from specmoe.sources.hidden_probe import ProbeResult
from specmoe.trace import Trace

__all__ = ["Evidence", "counted", "gather", "listed"]


@dataclass(frozen=True)
class Evidence:
    """Measurements of one trace; None where the trace lacks what they take.

    Attributes:
        trace: what was measured. scan: the pass over all tokens.
        split: the protocol's split; None where it is impossible, and ``no_split`` says why.
        sample: of routing, with ``information``, ``layer_copies`` drawn from it.
        document_copies, leak: from shingles of the whole trace.
        logits: whether logits, ids and gate weights fit.
        hidden: sample of hidden states, with ``probe``, ``alignment``, ``routers`` drawn from it.
    """

    trace: Trace
    scan: Scan
    split: Split | None
    no_split: str
    sample: RoutingSample
    information: Information | None
    layer_copies: list[LayerCopy]
    document_copies: DocumentCopies
    leak: Leak | None
    logits: LogitFit | None
    hidden: HiddenSample | None
    probe: ProbeResult | None
    alignment: list[Alignment]
    routers: RouterFit | None


def gather(trace: Trace, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> Evidence:
    """Measure a trace: one pass over all of it, then samples of documents (seed 0).

    Raises:
        SpecmoeError: a document or the routers' file is damaged.
    """
    scan = scan_trace(trace, on_progress)
    split, no_split = None, ""
    try:
        split = split_documents(trace.documents)
    except SpecmoeError as error:
        no_split = str(error)
    sample = sample_routing(trace)
    hidden = sample_hidden(trace)
    found = leak(scan, sample, split.parts["train"], _judged(split)) if split is not None else None
    return Evidence(
        trace=trace,
        scan=scan,
        split=split,
        no_split=no_split,
        sample=sample,
        information=information(sample),
        layer_copies=layer_copies(sample, trace.topology.experts),
        document_copies=document_copies(scan, sample),
        leak=found,
        logits=logit_fit(trace),
        hidden=hidden,
        probe=probe(hidden) if hidden is not None else None,
        alignment=alignment(hidden) if hidden is not None else [],
        routers=router_fit(hidden, trace.routers()) if hidden is not None else None,
    )


def _judged(split: Split) -> tuple[int, ...]:
    return tuple(index for part, indices in split.parts.items() if part != "train" for index in indices)


def listed(numbers: Sequence[int], most: int = 6) -> str:
    """Numbers as text, the first few of many."""
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most:,} more"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 document``, ``2 documents``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
