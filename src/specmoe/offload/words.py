"""A simulation in words and in a table, the same for the terminal and the page."""

from __future__ import annotations

from specmoe.offload.comparing import FEWEST_UNITS, gain_of
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.results import Gain, Quantiles, RunResult, SimulationResults
from specmoe.report.text import NOT_MEASURED, microseconds

__all__ = ["found", "gain_sentence", "gain_text", "interval_note", "run_table", "run_title", "size_text"]

_COLUMNS = (
    "prefetches by",
    "what is admitted",
    "eviction",
    "tokens/s",
    "gain, %",
    "of the oracle's",
    "hits, %",
    "cold-miss recall, %",
    "demand",
    "prefetch",
    "wasted",
    "per byte saved",
    "stall a token, ms",
    "a token, ms: p50, p95",
)

_LATE = ", or they come after the layers that they are about (--predictor-seconds 0 shows which)"


def run_table(results: SimulationResults) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of all runs but the sweeps; the reference first."""
    prefill = any(run.first_token for run in results.main)
    note = interval_note(results.baseline_gain, results.demand.independent)
    columns = [f"{name} ({note})" if name == "gain, %" else name for name in _COLUMNS]
    if prefill:
        columns.append("first token, ms: p50, p95")
    return tuple(columns), [_row(run, prefill) for run in results.main]


def run_title(run: RunResult) -> str:
    """What foresees, for people."""
    titles = {"none": "nothing", "oracle": "oracle", "perfect": "perfect predictions"}
    title = titles.get(run.kind, run.predictor)
    if run.kind == "shuffled":
        return f"{title}, shuffled (control)"
    if run.kind == "frequency":
        return f"{title} (for the control)"
    return f"nothing ({title} evicts)" if run.kind == "predictor" and not run.admission else title


def gain_text(gain: Gain) -> str:
    """``+12.3 ± 0.8``, in %, for tables that say over what; without ± where there is no interval."""
    text = _signed(gain.value)
    if gain.low is None or gain.high is None or gain.low == gain.high:
        return text
    return f"{text} ± {50 * (gain.high - gain.low):.1f}"


def gain_sentence(gain: Gain, independent: str) -> str:
    """``+12.3 % (95 % interval +11.5 to +13.1, 9 documents)``; ``independent``: the units, in words."""
    if gain.low is None or gain.high is None:
        return f"{_signed(gain.value)} % (no interval: {independent})"
    return f"{_signed(gain.value)} % (95 % interval {_signed(gain.low)} to {_signed(gain.high)}, {independent})"


def interval_note(gain: Gain, independent: str) -> str:
    """What stands at the head of a column of gains: over what their intervals are, or why there are none."""
    return f"no interval: {independent}" if gain.low is None else f"95 % interval over {independent}"


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def size_text(size: float) -> str:
    """Bytes with a decimal prefix: ``3.2 GB``."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def capacity_text(capacity: int, expert_bytes: int | tuple[int, ...]) -> str:
    """Experts, or bytes where they differ in size: ``32 experts``, ``4.19 GB``."""
    return f"{capacity} experts" if isinstance(expert_bytes, int) else size_text(capacity)


def held_text(capacity: int, experts: int, expert_bytes: int | tuple[int, ...], all_bytes: int | None) -> str:
    """What a cache holds of what there is: ``32 of 128 experts``, ``4.19 GB of 17.6 GB in 6144 experts``."""
    if isinstance(expert_bytes, int):
        return f"{capacity} of {experts} experts"
    return f"{size_text(capacity)} of {size_text(all_bytes or capacity)} in {experts} experts"


def expert_text(expert_bytes: int | tuple[int, ...]) -> str:
    """Size of an expert, from smallest to largest where they differ."""
    if isinstance(expert_bytes, int):
        return size_text(expert_bytes)
    return f"{size_text(min(expert_bytes))} to {size_text(max(expert_bytes))}, by layer"


def found(results: SimulationResults) -> list[str]:
    """What came out, in sentences; the first says on what."""
    return [_setting(results), *_of_evidence(results), *_limits(results), *_of_best(results), *_of_rest(results)]


def _setting(results: SimulationResults) -> str:
    machine, demand, base = results.machine, results.demand, results.baseline
    link, number = machine.hardware.links[-1], len(demand.documents)
    held = held_text(machine.capacity, machine.experts, machine.expert_bytes, machine.all_bytes)
    size = f" ({size_text(machine.held_bytes)})" if isinstance(machine.expert_bytes, int) else ""
    return (
        f"{results.trace.topology.model_id}, {demand.tokens:,} tokens of {number} "
        f"{'test ' if demand.part == 'test' else ''}document{'' if number == 1 else 's'} on {machine.hardware.name} "
        f"({link.bandwidth / 1e9:.3g} GB/s, {link.latency * 1e6:.3g} µs a transfer), a cache of {held}"
        f"{size}: without prefetching "
        f"{POLICIES[base.policy].title} finds {100 * base.hit_rate:.1f} % of the experts, waits "
        f"{1e3 * base.stall_per_token:.3g} ms a token and comes to {base.tokens_per_second:,.4g} tokens/s."
    )


def _of_evidence(results: SimulationResults) -> list[str]:
    """What the numbers cannot carry: too little text, or text that the predictors know."""
    demand, said = results.demand, []
    if results.baseline_gain.low is None:
        said.append(
            f"No gain has an interval: {demand.independent} {'is' if results.baseline_gain.units == 1 else 'are'} too "
            f"little to tell chance from gain, which takes {FEWEST_UNITS} that are independent."
        )
    if results.unsplit:
        said.append(f"No predictor was simulated: {results.unsplit}.")
    elif not results.best:
        said.append("No predictor was simulated.")
    if demand.learned:
        said.append(
            f"{demand.learned} of the {len(demand.documents)} documents are ones that the predictors learned from or "
            "were chosen by, so what they gain here is more than on new text."
        )
    return said


def _limits(results: SimulationResults) -> list[str]:
    machine, base = results.machine, results.baseline
    said = []
    oracle = next((run for run in results.main if run.kind == "oracle"), None)
    if oracle is not None and oracle.against is not None:
        said.append(
            "The oracle, which knows all that comes and evicts by Belady's rule, "
            f"{_moves(oracle.against.gain, results)}."
        )
    if machine.bound:
        # Rounding must not put a bound below what a run came to.
        most = max(0.0, base.seconds / machine.bound - 1)
        hidden = max(0.0, base.seconds / max(base.compute, base.loading) - 1)
        said.append(
            f"Nothing can gain more than {100 * most:.1f} % here: computing takes its time, and the fewest bytes have "
            f"to pass the link. With the loads of {POLICIES[base.policy].title}, hiding as much as possible of them "
            f"behind computing could gain {100 * hidden:.1f} %. The link is busy {100 * base.busy:.0f} % of the time."
        )
    return said


def _of_best(results: SimulationResults) -> list[str]:
    """The best predictor under the study's policy and the admission of the sweeps, and its control."""
    own = {
        run.kind: run
        for run in results.main
        if run.admission == results.admission and run.policy == results.machine.policy and run.against is not None
        if run.predictor == results.best or run.kind == "frequency"
    }
    run = own.get("predictor")
    if run is None or run.against is None:
        return []
    facts = {each.name: each for each in results.predictors}[results.best]
    others = [each.validation for each in results.predictors if each.name != results.best]
    chosen = ", the best on the validation part," if others and facts.validation > max(others) else ""
    share = run.against.share_of_oracle
    of_oracle = f", {100 * share:.0f} % of the time that the oracle saves" if share is not None and share > 0 else ""
    takes = "" if facts.timed == "unknown" else f"; a prediction takes {microseconds(1e6 * run.prediction_seconds)}"
    gain = gain_sentence(run.against.gain, results.demand.independent)
    said = [f"{results.best}{chosen} with admission by {run.admission}: {gain}{of_oracle}{takes}."]
    if "shuffled" in own:
        said.append(_of_control(own["shuffled"], own.get("frequency"), results))
    return said


def _of_control(shuffled: RunResult, frequency: RunResult | None, results: SimulationResults) -> str:
    """What shuffled predictions still hold is how often each expert is wanted, and that may well bring something."""
    assert shuffled.against is not None
    gain, independent = shuffled.against.gain, results.demand.independent
    said = f"The same predictor with its predictions shuffled, the control, comes to {gain_sentence(gain, independent)}"
    if frequency is None or frequency.against is None:
        return f"{said}."
    over = gain_of(frequency, shuffled, results.demand.units)
    beside = f"{frequency.predictor} with the same admission to {gain_sentence(frequency.against.gain, independent)}"
    if gain.low is None:
        verdict = "whether it is above both that and no prefetching is not settled"
    elif gain.settled > 0 and over.settled > 0:
        verdict = (
            f"the control is above it by {gain_sentence(over, independent)}, more than the frequencies of the training "
            "part explain; unless this text's own do, something is told that cannot be known"
        )
    elif gain.settled > 0:
        verdict = "the control is not shown to be above it, as it should be"
    else:
        verdict = "the control is not shown to be above no prefetching, as it should be"
    return f"{said}; {beside}: {verdict}."


def _of_rest(results: SimulationResults) -> list[str]:
    said = []
    alone = [run for run in results.main if run.kind == "none" and run.against and POLICIES[run.policy].needs == ""]
    others = [run for run in alone if run.policy != results.machine.policy]
    if others:
        best = max(others, key=lambda run: run.tokens_per_second)
        assert best.against is not None
        gain = gain_sentence(best.against.gain, results.demand.independent)
        who = f"Of the other eviction policies without prefetching, {POLICIES[best.policy].title} does best"
        if len(others) == 1:
            who = f"The other eviction policy without prefetching, {POLICIES[best.policy].title}"
        elif min(run.tokens_per_second for run in others) == best.tokens_per_second:
            who = "The other eviction policies without prefetching all come to the same"
        chosen = " (chosen on these very documents)" if "does best" in who else ""
        said.append(f"{who}: {gain}{chosen}.")
    said += _of_idle(results)
    unknown = [each.name for each in results.predictors if each.timed == "unknown"]
    if unknown:
        said.append(f"How long a prediction takes was not measured and counts as nothing for: {', '.join(unknown)}.")
    return said


def _of_idle(results: SimulationResults) -> list[str]:
    """Predictors of which nothing was prefetched, by any admission or by some."""
    said, never, timed = [], [], {each.name: each.seconds for each in results.predictors}
    for each in results.predictors:
        own = [run for run in results.main if run.kind == "predictor" and run.admission and run.predictor == each.name]
        idle = dict.fromkeys(run.admission for run in own if not run.prefetch_bytes)
        busy = dict.fromkeys(run.admission for run in own if run.prefetch_bytes)
        if own and not busy:
            never.append(each.name)
        elif only := [admission for admission in idle if admission not in busy]:
            said.append(f"By {', '.join(only)} nothing that {each.name} foresees was prefetched.")
    if never:
        said.insert(
            0,
            f"Nothing was worth prefetching by {', '.join(never)}, whatever the admission: too little is missing, the "
            f"predictions are too weak{_LATE if any(timed[name] for name in never) else ''}.",
        )
    return said


def _moves(gain: Gain, results: SimulationResults) -> str:
    """``gains +3.0 % (…)``, or what else came of it."""
    text = gain_sentence(gain, results.demand.independent)
    if _signed(gain.value) == "0.0":
        return f"changes nothing: {text}"
    return f"{'gains' if gain.value > 0 else 'loses'} {text}"


def _row(run: RunResult, prefill: bool) -> tuple[str, ...]:
    against = run.against
    share = against.share_of_oracle if against else None
    price = against.bytes_per_byte_saved if against else None
    cells = (
        run_title(run),
        run.admission or NOT_MEASURED,
        POLICIES[run.policy].title,
        f"{run.tokens_per_second:,.4g}",
        gain_text(against.gain) if against else NOT_MEASURED,
        NOT_MEASURED if share is None or run.kind == "none" else f"{100 * share:.0f} %".replace("-", "−"),
        f"{100 * run.hit_rate:.1f}",
        NOT_MEASURED if run.cold_recall is None else f"{100 * run.cold_recall:.1f}",
        size_text(run.demand_bytes),
        size_text(run.prefetch_bytes),
        size_text(run.wasted_bytes),
        NOT_MEASURED if price is None else f"{price:.2f}",
        f"{1e3 * run.stall_per_token:.3g}",
        _span(run.output_token),
    )
    return (*cells, _span(run.first_token)) if prefill else cells


def _span(quantiles: Quantiles | None) -> str:
    if quantiles is None:
        return NOT_MEASURED
    return f"{1e3 * quantiles.p50:.3g}, {1e3 * quantiles.p95:.3g}"
