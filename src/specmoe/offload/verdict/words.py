"""The verdict as one page of text: Markdown, the same for the terminal and the file."""

from __future__ import annotations

from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.verdict.decide import Answer, Verdict
from specmoe.offload.verdict.evidence import Evidence
from specmoe.offload.words import capacity_text, held_text, size_text
from specmoe.results import Interval

__all__ = ["verdict_page"]

_ANSWERS = {Answer.DO: "do", Answer.DO_NOT: "don't", Answer.OPEN: "not settled"}


def verdict_page(evidence: Evidence, verdict: Verdict) -> str:
    """Answer, the numbers it rests on, the reasoning, and the sensitivity table."""
    e, title = evidence, POLICIES[evidence.policy].title
    held = held_text(e.held, e.experts, e.expert_bytes, e.all_bytes)
    size = f" ({size_text(e.held * e.expert_bytes)})" if isinstance(e.expert_bytes, int) else ""
    speed = f"{e.tokens_per_second:,.0f}" if e.tokens_per_second >= 100 else f"{e.tokens_per_second:.3g}"
    lines = [
        f"# Prefetch experts? {_ANSWERS[verdict.answer].capitalize()}.",
        "",
        f"{verdict.reason[0].upper()}{verdict.reason[1:]}.",
        f"Change first: {verdict.first.what}, {_percent(verdict.first.gain)}."
        if verdict.first is not None
        else "No change that was tried brings more than is asked for.",
        "",
        f"On {e.model}, {e.tokens:,} tokens of {e.documents} documents, {e.hardware}"
        f"{' (' + '; '.join(e.changed) + ')' if e.changed else ''}, {held} held{size}, "
        f"{title}: {speed} tokens/s without prefetching.",
        "",
        "| what | gain in tokens/s |",
        "|---|--:|",
        f"| prefetching at best (oracle, with the best eviction) | {_percent(e.oracle)} |",
    ]
    if e.gain is not None:
        lines.append(f"| {e.predictor}, prefetching by {e.admission} | {_percent(e.gain)} |")
    if e.shuffled is not None:
        lines.append(f"| the same predictions put to other tokens (control) | {_percent(e.shuffled)} |")
    lines += [f"| {change.what} | {_percent(change.gain)} |" for change in e.changes]
    lines += ["", *_reasoning(e), "", *_table(e), "", *_limits(e)]
    return "\n".join(lines) + "\n"


def _reasoning(e: Evidence) -> list[str]:
    busy = "it cannot keep up, whatever is foreseen" if e.load > 1 else "it has time left while the device computes"
    lines = [
        "## Why",
        "",
        f"- Waiting for experts takes {e.stall_share:.1%} of the time; the cache misses {e.miss_ratio:.1%}.",
        f"- Load of the link: ρ = F / C = {e.loading:.3g} s / {e.computing:.3g} s = {e.load:.2f}; {busy}.",
        f"- Hiding these loads behind computing: at most T / max(C, F) = {e.limit:.2f} times as fast.",
    ]
    if e.bound is not None:
        lines.append(f"- No prefetching and no eviction can gain more than {e.bound:.1%} on this cache and link.")
    if e.enough is not None:
        lines.append(
            f"- Working set: {e.enough:.0%} of the experts are enough to miss at most 10 %; "
            f"{e.held / e.everything:.0%} are held."
        )
    else:
        lines.append("- Working set: no cache that was tried misses less than 10 %.")
    if e.break_even is None:
        lines.append("- Break-even: fetching every guess loses at any recall.")
    elif e.break_even == 0:
        lines.append("- Break-even: fetching every guess gains at any recall that was tried.")
    else:
        lines.append(f"- Break-even: fetching every guess pays from a recall of about {e.break_even:.0%} on.")
    if e.precision is not None:
        lines.append(f"- Of what {e.predictor} fetched, {e.precision:.0%} was used.")
    return lines


def _table(e: Evidence) -> list[str]:
    """Oracle and predictor over bandwidth and capacity, in % over none of the same place."""
    sizes = sorted({cell.capacity for cell in e.cells})
    lines = [
        "## If the machine were another",
        "",
        f"Gain of the oracle{' / ' + e.predictor if e.predictor else ''} over no prefetching on the same machine, %.",
        "",
        "| bandwidth | "
        + " | ".join(f"{capacity_text(size, e.expert_bytes)} ({size / e.everything:.0%})" for size in sizes)
        + " |",
        "|---" + "|--:" * len(sizes) + "|",
    ]
    for factor in sorted({cell.factor for cell in e.cells}):
        row = []
        for size in sizes:
            cell = next(cell for cell in e.cells if (cell.factor, cell.capacity) == (factor, size))
            text = f"{100 * (cell.none / cell.oracle - 1):+.0f}"
            if cell.predictor is not None:
                text += f" / {100 * (cell.none / cell.predictor - 1):+.0f}"
            row.append(text.replace("-", "−"))
        lines.append(f"| × {factor:g} | " + " | ".join(row) + " |")
    return lines


def _limits(e: Evidence) -> list[str]:
    return [
        "Intervals are 95 %, over documents; rows without ± are single comparisons of the whole text. Fewer bits "
        "change the model's quality, which is not judged here, and are taken to compute as fast as before. "
        "What the simulation leaves out is in docs/simulator.md.",
    ]


def _percent(gain: Interval) -> str:
    half = 50 * (gain.high - gain.low)
    text = f"{100 * gain.value:+.1f}" + (f" ± {half:.1f}" if half > 0 else "")
    return text.replace("-", "−") + " %"
