"""A validation as one page of text: numbers first, then findings."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from specmoe.diagnostics.evidence import counted
from specmoe.diagnostics.result import Finding, LayerFacts, Validation

__all__ = ["page"]

_WIDTH = 110
_MOST_LAYERS = 32
_MOST_DOMAINS = 8


def page(result: Validation) -> str:
    """The whole page, without a newline at its end."""
    parts = (_head(result), _layers(result.layers), _dependence(result), _findings(result))
    return "\n".join("\n".join(part) for part in parts)


def _wrapped(label: str, text: str) -> list[str]:
    """A label in a column of its own, the text beside it."""
    return textwrap.wrap(f"{label:<12}{text}", _WIDTH, subsequent_indent=" " * 12, break_long_words=False)


def _head(result: Validation) -> Iterator[str]:
    shape, facts = result.topology, result.documents
    yield (
        f"{result.trace}: {shape.model_id} ({result.kind}), {shape.layers} MoE layers × {shape.experts_text} experts, "
        f"top-{shape.top_k}"
    )
    yield from _wrapped("fields", ", ".join(result.fields))
    yield from _wrapped("tokens", f"{facts.tokens:,} ({facts.prefill:,} prefill, {facts.decode:,} decode)")
    yield from _wrapped(
        "documents",
        f"{facts.documents:,} of {facts.shortest:,} to {facts.longest:,} tokens, median {facts.median:,.0f}; "
        f"duplicates: {facts.same_text:,} by text, {facts.same_tokens:,} by token ids",
    )
    shown = [f"{name or '(none)'} {count:,}" for name, count in list(facts.domains.items())[:_MOST_DOMAINS]]
    more = len(facts.domains) - len(shown)
    yield from _wrapped("domains", f"{', '.join(shown)}{f' and {more:,} more' if more > 0 else ''}")
    parts = [
        f"{name.replace('_', ' ')} {counted(part.documents, 'document')}, {counted(part.tokens, 'token')}"
        for name, part in result.split.items()
        if part.documents
    ]
    yield from _wrapped("split", "; ".join(parts) or "impossible")
    yield ""


def _layers(layers: Sequence[LayerFacts]) -> Iterator[str]:
    yield "            ------ load of the experts -----   -- previous token --   -- top-1, bits --"
    yield "layer       entropy   Gini   dead  max/mean     overlap   by chance   entropy  of next"
    step = -(-len(layers) // _MOST_LAYERS)
    for number in range(0, len(layers), step):
        yield _row(str(number), layers[number])
    if step > 1:
        yield f"({len(layers)} layers, one in {step} is shown; --json has all)"
    if len(layers) > 1:
        yield _row("mean", _mean(layers))
    yield ""


def _row(name: str, layer: LayerFacts) -> str:
    overlap = "–" if layer.overlap is None else f"{layer.overlap:.1%}"
    following = "–" if layer.next_bits is None else f"{layer.next_bits:.3f}"
    return (
        f"{name:<12}{layer.entropy:>7.3f}{layer.gini:>7.3f}{layer.dead:>7,}{layer.max_over_mean:>10.2f}"
        f"{overlap:>12}{layer.overlap_chance:>12.1%}{layer.top1_bits:>10.3f}{following:>9}"
    )


def _mean(layers: Sequence[LayerFacts]) -> LayerFacts:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    means = {name: mean([getattr(layer, name) for layer in layers]) for name in LayerFacts.model_fields}
    # Whole experts are dead, here as in a layer's own row.
    return LayerFacts.model_validate({**means, "dead": sum(layer.dead for layer in layers) // len(layers)})


def _dependence(result: Validation) -> Iterator[str]:
    found, hidden = result.information, result.hidden
    if found is None:
        yield from _wrapped("dependence", "not tested: that takes 1,000 tokens")
    else:
        told = ", ".join(f"{name} {bits:.3f} ({found.deviations[name]:+.0f} σ)" for name, bits in found.bits.items())
        sample = f"{found.tokens:,} tokens of {found.documents:,} documents"
        yield from _wrapped("dependence", f"bits on the top-1 expert beyond shuffled data: {told}; {sample}")
    if hidden is not None:
        text = (
            f"a linear probe finds {hidden.recall:.1%} of the experts of the same place, layer frequency "
            f"{hidden.frequency:.1%}; {hidden.tokens:,} tokens of {hidden.documents:,} documents"
        )
        if hidden.correlation is not None:
            text += f"; hidden × router against the kept logits: correlation at least {min(hidden.correlation):.4f}"
        yield from _wrapped("hidden", text)
    yield ""


def _findings(result: Validation) -> Iterator[str]:
    if not result.findings:
        yield "findings    none"
        return
    counts = Counter(finding.severity for finding in result.findings)
    yield f"findings    {', '.join(counted(number, severity) for severity, number in counts.items())}"
    for finding in result.findings:
        yield from _finding(finding)


def _finding(finding: Finding) -> list[str]:
    severity = finding.severity.upper() if finding.severity == "error" else finding.severity
    head = f"  {severity:<8}{finding.code}: "
    return textwrap.wrap(head + finding.message, _WIDTH, subsequent_indent=" " * 10, break_long_words=False)
