"""The page of a simulation: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path

from specmoe.files import write_text
from specmoe.offload.charts import bandwidth_chart, curves_chart, draw, recall_chart
from specmoe.offload.policies.registry import POLICIES
from specmoe.offload.results import PredictorFacts, SimulationResults
from specmoe.offload.words import capacity_text, expert_text, found, held_text, run_table, size_text
from specmoe.report.charts import Spec
from specmoe.report.page import Facts, Figure, as_script, environment, made_facts, page_parts, trace_facts
from specmoe.report.text import microseconds

__all__ = ["render_simulation", "write_figures", "write_simulation_page"]

_FIGURES = {
    "misses": (
        "Misses over capacity",
        "Miss ratio of each eviction policy over the capacity of the cache",
        "On demand only. Dashed: Belady, which knows the future; no policy that fetches on demand misses less.",
    ),
    "bandwidth": (
        "Tokens a second over bandwidth",
        "Tokens a second over the bandwidth of the link",
        "Where the lines meet prefetching brings nothing: on a fast link nothing is left to hide, and on a slow one "
        "bytes are what counts.",
    ),
    "recall": (
        "Gain over recall",
        "Gain over no prefetching, over the recall of the predictions",
        "The line: made-up predictions that find each expert with a stated chance and else name another at random.",
    ),
}
_BESIDE = (
    " Beside it the predictors, at their own recall. What moves them off the line: mistakes that persist from one "
    "horizon to the next, how well they know what they do not know, and how long they take."
)
# Heading of a column: what it says; the same names as in the table.
_MEANINGS = (
    ("gain", "tokens/s over those without prefetching under the first row's eviction, minus 1; after ± the half-width "
     "of a paired 95 % interval over what is independent: documents of one group, or in one batch, count once"),
    ("of the oracle's", "seconds saved, by the seconds that the oracle saves"),
    ("hits", "experts that were there when their layer's router had run, by experts that were needed"),
    ("cold-miss recall", "of the experts that would not have been there without a prefetch, the share that a prefetch "
     "had there in time"),
    ("demand, prefetch, wasted", "bytes into the device: fetched when needed, started ahead, and of these never used"),
    ("per byte saved", "prefetched bytes for each demand byte less than without prefetching under the same eviction"),
    ("stall a token", "time that computing waited for experts"),
)  # fmt: skip


def write_simulation_page(results: SimulationResults, path: Path) -> None:
    """Write the page of ``results`` to ``path``, atomically.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    write_text(path, render_simulation(results))


def render_simulation(results: SimulationResults) -> str:
    """The page as HTML, complete in itself."""
    charts = {f"chart-{id}": {**spec, "description": _FIGURES[id][1]} for id, spec in _specs(results).items()}
    figures = [
        Figure(f"chart-{id}", label, title, note + (_BESIDE if id == "recall" and results.predictors else ""))
        for id, (title, label, note) in _FIGURES.items()
    ]
    columns, rows = run_table(results)
    sentences = found(results)
    return (
        environment()
        .get_template("simulation.html.jinja")
        .render(
            model=results.trace.topology.model_id,
            lead=sentences[0],
            more=sentences[1:],
            figures=[figure for figure in figures if figure.id in charts],
            columns=columns,
            rows=rows,
            meanings=_MEANINGS,
            predictor_columns=("predictor", "validation recall@K, %", "recall here, %", "a prediction takes", "time"),
            predictors=[_predictor_row(each) for each in results.predictors],
            left_out=results.left_out,
            sources=_sources(results),
            facts=_facts(results),
            journey_json=as_script(None),
            **page_parts(charts),
        )
    )


def write_figures(results: SimulationResults, out: Path, kind: str) -> list[Path]:
    """Write the plots as pictures into a folder: their files. ``kind``: ``svg`` or ``png``.

    Raises:
        SpecmoeError: a file cannot be written.
    """
    paths = []
    for name, spec in _specs(results).items():
        paths.append(out / f"{name}.{kind}")
        draw(spec, paths[-1])
    return paths


def _specs(results: SimulationResults) -> dict[str, Spec]:
    made = {
        "misses": curves_chart(results),
        "bandwidth": bandwidth_chart(results),
        "recall": recall_chart(results),
    }
    return {name: spec for name, spec in made.items() if spec is not None}


def _predictor_row(predictor: PredictorFacts) -> tuple[str, ...]:
    recall = ", ".join(f"h={h} {100 * value:.1f}" for h, value in predictor.recall.items())
    timed = {"measured": "p50 when it was trained", "given": "as given", "unknown": "not measured, counted as nothing"}
    return (
        predictor.name,
        f"{100 * predictor.validation:.1f}",
        recall,
        microseconds(1e6 * predictor.seconds),
        timed[predictor.timed],
    )


def _sources(results: SimulationResults) -> list[tuple[str, str]]:
    """Each figure of the hardware with where it is from."""
    hardware = results.machine.hardware
    links = [
        (
            f"{link.name}: {link.bandwidth / 1e9:.3g} GB/s, {link.latency * 1e6:.3g} µs a transfer, {link.parallelism} "
            f"at once, queue of {link.queue_depth}",
            link.source,
        )
        for link in hardware.links
    ]
    compute = hardware.compute
    rates = f"computing: {compute.memory_bandwidth / 1e9:,.4g} GB/s of weights, {compute.flops / 1e12:,.3g} TFLOP/s"
    changed = [("changed for this simulation", text) for text in results.machine.changed]
    return [(hardware.name, hardware.source), *links, (rates, compute.source), *changed]


def _facts(results: SimulationResults) -> list[Facts]:
    machine, demand, base = results.machine, results.demand, results.baseline
    held = held_text(machine.capacity, machine.experts, machine.expert_bytes, machine.all_bytes)
    size = f", {size_text(machine.held_bytes)}" if isinstance(machine.expert_bytes, int) else ""
    cut = f"split {results.split_hash}" if results.split_hash else "not split"
    host = (
        [("host cache", capacity_text(machine.host_capacity, machine.expert_bytes))]
        if machine.host_capacity is not None
        else []
    )
    bound = [("no run can be shorter than", _seconds(machine.bound))] if machine.bound is not None else []
    return [
        trace_facts(results.trace),
        (
            "Replayed",
            [
                ("documents", f"{len(demand.documents)} ({demand.part}), {cut}"),
                ("for intervals", demand.independent),
                ("tokens", f"{demand.tokens:,} in {demand.steps:,} steps, {demand.prefill_steps:,} of them prefill"),
                ("events", f"{demand.events:,} with {demand.accesses:,} accesses"),
                ("replay", f"{demand.replay}, batch {demand.batch}, prompts in chunks of {demand.prefill_chunk}"),
                ("horizons", ", ".join(map(str, results.horizons))),
            ],
        ),
        (
            "Machine",
            [
                ("hardware", f"{machine.hardware.name}: {machine.hardware.description}"),
                ("an expert", expert_text(machine.expert_bytes)),
                (
                    "cache",
                    f"{held}{size} (asked: {machine.asked}), "
                    + ("a part for each layer" if machine.per_layer else "shared by all layers"),
                ),
                *host,
                ("eviction", POLICIES[machine.policy].title),
                (
                    "computing",
                    f"layer {microseconds(1e6 * machine.layer_seconds)}, "
                    f"expert {microseconds(1e6 * machine.expert_seconds)}, "
                    f"rest of a step {microseconds(1e6 * machine.other_seconds)}",
                ),
                ("computing alone, C", _seconds(machine.compute)),
                (f"loads of {POLICIES[base.policy].title}, F", _seconds(base.loading)),
                ("(C + F) / max(C, F)", f"{base.overlap_limit:.3f}"),
                ("link busy", f"{100 * base.busy:.0f} % without prefetching"),
                *bound,
            ],
        ),
        made_facts(results.made),
    ]


def _seconds(value: float) -> str:
    return f"{value:.4g} s"
