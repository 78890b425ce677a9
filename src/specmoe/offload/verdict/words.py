"""The verdict as one page of text: Markdown, the same for the terminal and the file."""

from __future__ import annotations

from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.results import Gain
from specmoe.offload.verdict.decide import Answer, Verdict
from specmoe.offload.verdict.evidence import Evidence
from specmoe.offload.words import capacity_text, gain_text, held_text, interval_note, size_text

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
        _first(evidence, verdict),
        "",
        f"On {e.model}, {e.tokens:,} tokens of {e.documents} document{'' if e.documents == 1 else 's'}, {e.hardware}"
        f"{' (' + '; '.join(e.changed) + ')' if e.changed else ''}, {held} held{size}, "
        f"{title}: {speed} tokens/s without prefetching.",
        "",
        f"| what | gain in tokens/s ({interval_note(e.oracle, e.independent)}) |",
        "|---|--:|",
        f"| an oracle, which knows all that comes and evicts by Belady's rule | {_percent(e.oracle)} |",
    ]
    if e.gain is not None:
        lines.append(f"| {e.predictor}, prefetching by {e.admission} | {_percent(e.gain)} |")
    lines += [f"| {e.predictor}, prefetching by {each.what} instead | {_percent(each.gain)} |" for each in e.admissions]
    if e.shuffled is not None:
        lines.append(f"| the same predictions put to other tokens (control) | {_percent(e.shuffled)} |")
    if e.frequency is not None:
        lines.append(f"| layer frequency, which the control should not be above | {_percent(e.frequency)} |")
    lines += [f"| {change.what} | {_percent(change.gain)} |" for change in e.changes]
    lines += ["", *_reasoning(e), "", *_table(e), "", *_limits(e)]
    return "\n".join(lines) + "\n"


def _first(e: Evidence, verdict: Verdict) -> str:
    """What to change first, if anything is shown to help."""
    if verdict.first is not None:
        return f"Change first: {verdict.first.what}, {_percent(verdict.first.gain)}."
    gains = [change.gain for change in e.changes if change.buildable]
    if any(gain.value > verdict.worth if gain.high is None else gain.high > verdict.worth for gain in gains):
        return "Whether a change that was tried brings more than is asked for is not settled."
    return "No change that was tried brings more than is asked for."


def _reasoning(e: Evidence) -> list[str]:
    busy = (
        "with these loads it cannot keep up, however early they are foreseen"
        if e.load > 1
        else "it has time left while the device computes"
    )
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
    elif e.curve:
        lines.append("- Working set: every cache that was tried misses more than 10 %.")
    else:
        lines.append("- Working set: not known, as no other cache was tried with this eviction.")
    if e.break_even is None:
        lines.append("- Break-even: fetching every guess does not pay even where all of them are right.")
    elif e.break_even == 0:
        lines.append("- Break-even: fetching every guess pays at any recall that was tried.")
    else:
        lines.append(f"- Break-even: fetching every guess pays from a recall of about {e.break_even:.0%} on.")
    if e.precision is not None:
        lines.append(f"- Of what {e.predictor} fetched, {e.precision:.0%} was used.")
    if e.over is not None and e.shuffled is not None:
        lines.append(f"- Control: the same predictions put to other tokens are {_control(e.shuffled, e.over)}.")
    return lines


def _control(shuffled: Gain, over: Gain) -> str:
    if shuffled.low is None:
        return "not settled to be above layer frequency, nor not to be"
    if shuffled.settled > 0 and over.settled > 0:
        return (
            "above layer frequency, which they should not be unless the frequencies of this text differ from those of "
            "the training part"
        )
    return f"not shown to be above {'layer frequency' if shuffled.settled > 0 else 'no prefetching'}, as it should be"


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
    over = (
        f"There are no intervals, as there is no more than {e.independent}."
        if e.oracle.low is None
        else f"Intervals are 95 %, over {e.independent}."
    )
    known = (
        [f"{e.learned} of the {e.documents} documents are ones that {e.predictor} learned from or was chosen by."]
        if e.learned
        else []
    )
    return [
        " ".join(
            [
                over,
                *known,
                "The table of other machines holds single comparisons of the whole text. Fewer bytes an expert mean "
                "fewer bits, which change the model's quality; that is not judged here, and they are taken to compute "
                "as fast as before. What the simulation leaves out is in docs/simulator.md.",
            ]
        )
    ]


def _percent(gain: Gain) -> str:
    return f"{gain_text(gain)} %" + (", no interval" if gain.low is None else "")
