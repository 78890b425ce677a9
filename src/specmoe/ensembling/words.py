"""What blending gained and cost, in sentences and in tables for a terminal."""

from __future__ import annotations

from specmoe.ensembling.outcome import Check, Contender, EnsembleResult, MemberFacts
from specmoe.report.select import excludes_zero, has_width
from specmoe.report.text import NOT_MEASURED, count, margin, microseconds, percent
from specmoe.results import Interval

__all__ = ["contender_table", "ensemble_lines", "found", "member_table"]

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def found(result: EnsembleResult) -> tuple[str, ...]:
    """The sentences, the most telling first: what each contender gains over the best single member, and at what cost.

    Gains are means over horizons.
    """
    best = result.contender("best")
    assert best is not None
    sentences = [_verdict(each, best, result) for each in result.contenders if each.key in ("blend", "greedy")]
    sentences += _students(result, best)
    sentences += [_checked(check, len(result.checks) > 1) for check in result.checks]
    budget = result.trace.layer_us_p50
    if budget:
        sentences.append(f"For scale: one layer of this model computes for {microseconds(budget)}.")
    seeds = len(result.protocol.seeds)
    sentences.append(
        f"All on the same {result.test_documents} test documents and {seeds} seed{'' if seeds == 1 else 's'}; 95 % "
        "intervals. Members and weights were chosen on the validation part, on which the members' training had also "
        "been stopped and their calibration fitted."
    )
    return tuple(sentences)


def contender_table(result: EnsembleResult) -> Table:
    """A row per contender: recall at each horizon, the mean difference to the best single member, time and size."""
    horizons = result.protocol.horizons
    best = result.contender("best")
    columns = (
        "",
        *(f"h={h}" for h in horizons),
        "over the best, points",
        "step p50",
        "p99",
        "added p50",
        "trained parameters",
        "MB",
    )
    rows = []
    for each in result.contenders:
        added = NOT_MEASURED if each.key == "best" or best is None else _added(each, best)
        rows.append(
            (
                f"best single: {each.title}" if each.key == "best" else each.title,
                *(percent(each.recall.get(h)) for h in horizons),
                margin(each.gain) if each.gain is None else _fine(each.gain),
                microseconds(each.latency.p50_us),
                microseconds(each.latency.p99_us),
                added,
                count(each.parameters),
                f"{each.megabytes:.1f}",
            )
        )
    return columns, rows


def member_table(result: EnsembleResult) -> Table:
    """A row per member: its recall on the validation part, its share of the blend at each horizon, and of the picks."""
    horizons = result.protocol.horizons
    columns = ("member", "validation recall@K", *(f"weight h={h}" for h in horizons), "greedy share")
    rows = [
        (m.name, f"{100 * m.validation:.1f}", *(_share(m, h) for h in horizons), f"{100 * m.picks:.0f} %")
        for m in result.members
    ]
    return columns, rows


def ensemble_lines(result: EnsembleResult) -> list[str]:
    """Everything for a terminal."""
    lines = ["members, and their shares in %", *_aligned(member_table(result)), ""]
    lines += ["recall@K on the test part, %", *_aligned(contender_table(result)), "", *found(result)]
    return lines + [f"not a member: {name}: {reason}" for name, reason in result.left_out.items()]


def _verdict(each: Contender, best: Contender, result: EnsembleResult) -> str:
    who = f"The {each.title} of {_listed(each.members)}"
    gain = each.gain
    if gain is None:
        return f"{who} was not compared."
    if each.members == best.members:
        return f"The {each.title} came to {best.title} alone: no other member gained anything on the validation part."
    cost = f"one step takes {microseconds(each.latency.p50_us)}, {_added(each, best)}"
    over = f"{best.title} alone" if best.seeds == 1 else f"{best.title} of the same seed alone"
    if not has_width(gain):
        return f"{who}: {_fine(gain)} points over {over}; no interval can be drawn; {cost}."
    if not excludes_zero(gain):
        return (
            f"{who} is not shown to foresee more than {over} ({_fine(gain)} points, the interval includes 0), and "
            f"{cost}: not worth it."
        )
    if gain.value < 0:
        return f"{who} foresees less than {over} ({_fine(gain)} points), and {cost}: not worth it."
    extra = each.latency.p50_us - best.latency.p50_us
    price = f": {microseconds(extra / (100 * gain.value))} for each point" if extra > 0 else ""
    return f"{who} foresees {_fine(gain)} points more than {over}, and {cost}{price}."


def _students(result: EnsembleResult, best: Contender) -> list[str]:
    taught, gain = result.contender("taught"), result.taught_mean
    if taught is None or gain is None or taught.gain is None:
        return []
    if not excludes_zero(gain):
        does = f"Teaching {result.student} by the blend is not shown to help"
    else:
        does = f"Teaching {result.student} by the blend {'helps' if gain.value > 0 else 'harms'}"
    sentences = [f"{does}: {_fine(gain)} points over the same training without teacher."]
    blend = result.contender("blend")
    if blend is not None and result.student != best.title:
        kept = _fine(taught.gain)
        sentences.append(
            f"The taught student takes {microseconds(taught.latency.p50_us)} a step where the blend takes "
            f"{microseconds(blend.latency.p50_us)}, and stands at {kept} points against {best.title} alone."
        )
    return sentences


def _checked(check: Check, several: bool) -> str:
    of_seed = f" (seed {check.seed})" if several else ""
    if check.documents == 0 or check.single is None or check.blend is None or check.greedy is None:
        return f"There is only one validation document, so the weights could not be checked on others{of_seed}."
    gains = [100 * (value - check.single) for value in (check.blend, check.greedy)]
    sampled = "all" if check.share >= 1 else f"{100 * check.share:.0f} % of the"
    loss = ""
    if check.single_loss is not None and check.blend_loss is not None:
        loss = f" (log loss {check.blend_loss:.3f} for {check.single_loss:.3f} nats an event)"
    return (
        f"Checked on validation documents that the weights had not seen{of_seed}: {_signed(gains[0])} points for the "
        f"blend{loss}, {_signed(gains[1])} for the greedy selection, over {check.documents} documents; then learned "
        f"anew on both halves, {sampled} events ({check.events:,})."
    )


def _added(each: Contender, best: Contender) -> str:
    extra = each.latency.p50_us - best.latency.p50_us
    return f"{microseconds(abs(extra))} {'more' if extra >= 0 else 'less'}"


def _share(member: MemberFacts, horizon: int) -> str:
    return f"{100 * member.weights.get(horizon, 0.0):.0f} %"


def _fine(gain: Interval) -> str:
    """``+0.15 [+0.02, +0.29]``: two decimals, as what a blend gains is often small."""
    if not has_width(gain):
        return _signed(100 * gain.value)
    return f"{_signed(100 * gain.value)} [{_signed(100 * gain.low)}, {_signed(100 * gain.high)}]"


def _signed(points: float) -> str:
    text = f"{points:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _aligned(table: Table) -> list[str]:
    lines = [table[0], *table[1]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
