"""A simulation in words and in a table, the same for the terminal and the page."""

from __future__ import annotations

from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.results import Quantiles, RunResult, SimulationResults
from specmoe.report.select import excludes_zero
from specmoe.report.text import NOT_MEASURED
from specmoe.results import Interval

__all__ = ["found", "gain_text", "run_table", "run_title", "size_text"]

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


def run_table(results: SimulationResults) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of all runs but the sweeps; the reference first."""
    prefill = any(run.first_token for run in results.main)
    columns = (*_COLUMNS, "first token, ms: p50, p95") if prefill else _COLUMNS
    return columns, [_row(run, prefill) for run in results.main]


def run_title(run: RunResult) -> str:
    """What foresees, for people."""
    titles = {"none": "nothing", "oracle": "oracle", "perfect": "perfect predictions"}
    title = titles.get(run.kind, run.predictor)
    if run.kind == "shuffled":
        return f"{title}, shuffled (control)"
    return f"nothing ({title} evicts)" if run.kind == "predictor" and not run.admission else title


def gain_text(gain: Interval) -> str:
    """``+12.3 ± 0.8``, in %."""
    half = 50 * (gain.high - gain.low)
    text = f"{100 * gain.value:+.1f}".replace("-", "−")
    return f"{text} ± {half:.1f}" if half > 0 else text


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
    machine, demand, base = results.machine, results.demand, results.baseline
    link = machine.hardware.links[-1]
    held = held_text(machine.capacity, machine.experts, machine.expert_bytes, machine.all_bytes)
    size = f" ({size_text(machine.held_bytes)})" if isinstance(machine.expert_bytes, int) else ""
    said = [
        f"{results.trace.topology.model_id}, {demand.tokens:,} tokens of {len(demand.documents)} "
        f"{'test ' if demand.part == 'test' else ''}documents on {machine.hardware.name} "
        f"({link.bandwidth / 1e9:.3g} GB/s, {link.latency * 1e6:.3g} µs a transfer), a cache of {held}"
        f"{size}: without prefetching "
        f"{POLICIES[base.policy].title} finds {100 * base.hit_rate:.1f} % of the experts, waits "
        f"{1e3 * base.stall_per_token:.3g} ms a token and writes {base.tokens_per_second:,.4g} tokens/s."
    ]
    oracle = next((run for run in results.main if run.kind == "oracle"), None)
    if oracle is not None and oracle.against is not None:
        said.append(f"The oracle, which knows all that comes and evicts by Belady's rule, gains {_gain(oracle)}.")
    if machine.bound:
        said.append(
            f"Nothing can gain more than {100 * (base.seconds / machine.bound - 1):.1f} % here, as the fewest bytes "
            f"have to pass the link. With the loads of {POLICIES[base.policy].title}, hiding them all behind computing "
            f"could gain {100 * (base.overlap_limit - 1):.1f} %. The link is busy {100 * base.busy:.0f} % of the time."
        )
    said += _of_best(results)
    said += _of_policies(results)
    late = [r.predictor for r in results.main if r.kind == "predictor" and r.admission and not r.prefetch_bytes]
    if late:
        said.append(
            f"Nothing was worth prefetching by {', '.join(dict.fromkeys(late))}: its predictions are too weak, or they "
            "come after the layers that they are about (--predictor-seconds 0 shows which)."
        )
    unknown = [each.name for each in results.predictors if each.timed == "unknown"]
    if unknown:
        said.append(f"How long a prediction takes was not measured and counts as nothing for: {', '.join(unknown)}.")
    return said


def _of_best(results: SimulationResults) -> list[str]:
    if not results.best:
        return ["No predictor was simulated."]
    own = [r for r in results.main if r.kind in {"predictor", "shuffled"} and r.predictor == results.best]
    said = []
    for run in own:
        against = run.against
        if run.admission != results.admission or run.policy != results.machine.policy or against is None:
            continue
        if run.kind == "shuffled":
            verdict = "gains, which it should not" if _settled(run) > 0 else "does not gain, as it should be"
            said.append(f"The same predictor with its predictions shuffled {verdict}: {_gain(run)}.")
            continue
        share = against.share_of_oracle
        of_oracle = "" if share is None else f", {100 * share:.0f} % of the time that the oracle saves"
        said.append(
            f"{results.best}, the best on the validation part, with admission by {run.admission}: "
            f"{_gain(run)}{of_oracle}; a prediction takes {1e6 * run.prediction_seconds:.3g} µs."
        )
    return said


def _of_policies(results: SimulationResults) -> list[str]:
    alone = [run for run in results.main if run.kind == "none" and run.against and POLICIES[run.policy].needs == ""]
    others = [run for run in alone if run.policy != results.machine.policy]
    if not others:
        return []
    best = max(others, key=lambda run: run.tokens_per_second)
    return [
        f"Of the other eviction policies without prefetching, {POLICIES[best.policy].title} does best: {_gain(best)} "
        "(chosen on these very documents)."
    ]


def _settled(run: RunResult) -> int:
    """1 or -1 where the gain's interval excludes 0, else 0."""
    if run.against is None or not excludes_zero(run.against.gain):
        return 0
    return 1 if run.against.gain.value > 0 else -1


def _gain(run: RunResult) -> str:
    assert run.against is not None
    gain = run.against.gain
    return f"{100 * gain.value:+.1f} % ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})".replace("-", "−")


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
