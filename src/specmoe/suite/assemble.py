"""From finished jobs to one results file."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specmoe
from specmoe.evaluation import (
    BOOTSTRAP_DRAWS,
    Ratios,
    Tally,
    by_horizon,
    cold_share,
    documents_of,
    expected_calibration_error,
    paired_difference,
    recall_by_layer,
    reliability,
    sums_by_document,
)
from specmoe.latency import measure_latency
from specmoe.metrics import budgets_of
from specmoe.predictors.base import Predictor, parameter_count
from specmoe.results import (
    ByHorizon,
    Control,
    Journey,
    Made,
    PredictorResult,
    Protocol,
    Results,
    SeedResult,
    SplitFacts,
    TestDocuments,
    TraceFacts,
)
from specmoe.suite.controls import controls_of
from specmoe.suite.data import SuiteData, trace_fingerprint
from specmoe.suite.jobs import Job, load_foreseen, load_predictor, load_tally
from specmoe.trace import Trace
from specmoe.trace.record import Phase

__all__ = ["assemble", "commit", "made_now"]

# Kept by domain, by phase and by document; of the others the whole test part has to do.
MAIN_METRICS = ("recall@K", "recall@2K", "coverage@K", "gate_mass@K", "cold_recall@K")
_RIDGE = "Ridge"
_JOURNEY_TOKENS = 40


def assemble(
    data: SuiteData,
    out: Path,
    jobs: dict[Job, SeedResult],
    names: Sequence[str],
    *,
    made: Made,
    seeds: Sequence[int],
    control: tuple[TraceFacts, dict[str, ByHorizon]] | None = None,
    tokens_of: Any = None,
) -> Results:
    """Put everything that was measured into one results object.

    Args:
        jobs: finished jobs and their results. names: the predictors asked for, also those that were skipped.
        control: an untrained model's trace and what the training-free predictors reach on it.
        tokens_of: token ids → texts, for the journey; None if no tokenizer is at hand.
    """
    by_predictor = {name: [job for job in jobs if job.predictor == name] for name in names}
    predictors = [one_predictor(name, by_predictor[name], jobs, data, out) for name in names]
    topology = data.topology
    done = next((job for job, result in jobs.items() if result.status == "ok"), None)
    tally = load_tally(done, out, "test") if done else None
    return Results(
        made=made,
        trace=trace_facts(data.trace),
        split=SplitFacts(
            hash=data.split.hash,
            seed=data.split.seed,
            documents={part: len(indices) for part, indices in data.split.parts.items()},
            tokens={
                part: sum(data.trace.documents[index].tokens for index in indices)
                for part, indices in data.split.parts.items()
            },
            held_out_domain=data.split.domain,
        ),
        protocol=Protocol(
            horizons=data.horizons,
            budgets=budgets_of(topology.top_k, topology.experts),
            seeds=tuple(seeds),
            bootstrap_draws=BOOTSTRAP_DRAWS,
            cache_experts=data.cache_experts,
        ),
        test_documents=documents_of(tally, [document.doc_id for document in data.trace.documents])
        if tally
        else TestDocuments(),
        cold_share=cold_share(tally, data.horizons) if tally else {},
        predictors=tuple(with_lift(predictors, by_predictor, jobs, data, out)),
        controls=(
            *controls_of(data, trained_predictors(by_predictor, jobs, data, out)),
            *chance_control(predictors, data),
        ),
        control_trace=control[0] if control else None,
        untrained=control[1] if control else {},
        journey=journey_of(by_predictor, jobs, data, out, tokens_of),
    )


def one_predictor(
    name: str, own: list[Job], jobs: dict[Job, SeedResult], data: SuiteData, out: Path
) -> PredictorResult:
    """All numbers of one predictor, except those relative to others."""
    kind = data.kind(name)
    recipe = kind.recipe
    facts: dict[str, Any] = {
        "name": name,
        "category": recipe.category,
        "sees": recipe.sees,
        "needs": tuple(sorted(recipe.needs)),
        "source": recipe.source,
        "learned": recipe.epochs > 0,
        "parameters": parameter_count(kind(data.topology, data.horizons)),
        "recipe": dict(data.recipes.get(name, {})),
    }
    lacks = data.lacks(kind)
    if lacks:
        return PredictorResult(**facts, status="skipped", reason=lacks)
    seeds = tuple(jobs[job] for job in own)
    finished = [job for job in own if jobs[job].status == "ok"]
    if not finished:
        reason = next((seed.reason for seed in seeds if seed.reason), "no seed finished")
        return PredictorResult(**facts, status="failed", reason=reason, seeds=seeds)
    tallies = tallies_of(finished, out, "test")
    held_out = tallies_of(finished, out, "held_out_domain")
    scores = {metric: by_horizon(Ratios.of(tallies, metric), data.horizons) for metric in tallies[0].sums}
    scores["ece"] = expected_calibration_error(tallies, data.horizons)
    return PredictorResult(
        **facts,
        seeds=seeds,
        scores=scores,
        per_layer=recall_by_layer(tallies),
        per_domain=per_domain(tallies, data),
        per_phase=per_phase(tallies, data),
        held_out_domain=by_horizon(Ratios.of(held_out, "recall@K"), data.horizons) if held_out else {},
        calibration=reliability(tallies, data.horizons),
        document_sums=sums_by_document(tallies, MAIN_METRICS),
        latency=measure_latency(load_predictor(finished[0], out, data), data.journey[1]),
    )


def trained_predictors(
    by_predictor: dict[str, list[Job]], jobs: dict[Job, SeedResult], data: SuiteData, out: Path
) -> Iterator[tuple[str, Predictor]]:
    """Each predictor that finished, with the weights of its first seed; one at a time, as some are large."""
    for name, own in by_predictor.items():
        finished = [job for job in own if jobs[job].status == "ok"]
        if finished:
            yield name, load_predictor(finished[0], out, data)


def tallies_of(jobs: Sequence[Job], out: Path, part: str) -> list[Tally]:
    """The sums of one part, one entry a seed."""
    return [tally for job in jobs if (tally := load_tally(job, out, part)) is not None]


def per_domain(tallies: Sequence[Tally], data: SuiteData) -> dict[str, dict[str, ByHorizon]]:
    """The main metrics by domain of the test documents: domain → metric → horizon. Empty where there is one domain."""
    domains = [data.trace.documents[int(index)].domain for index in tallies[0].documents]
    if len(set(domains)) < 2:
        return {}
    return {
        domain: main_scores(tallies, data, documents=torch.tensor([name == domain for name in domains]))
        for domain in sorted(set(domains))
    }


def per_phase(tallies: Sequence[Tally], data: SuiteData) -> dict[str, dict[str, ByHorizon]]:
    """The main metrics by phase: ``prefill`` or ``decode`` → metric → horizon. Empty where there is one phase."""
    phases = [phase for phase in Phase if tallies[0].events[:, int(phase)].any()]
    if len(phases) < 2:
        return {}
    return {phase.name.lower(): main_scores(tallies, data, phase=int(phase)) for phase in phases}


def main_scores(
    tallies: Sequence[Tally], data: SuiteData, documents: Tensor | None = None, phase: int | None = None
) -> dict[str, ByHorizon]:
    """The main metrics over some documents or one phase."""
    return {metric: by_horizon(Ratios.of(tallies, metric, documents, phase), data.horizons) for metric in MAIN_METRICS}


def with_lift(
    predictors: list[PredictorResult],
    by_predictor: dict[str, list[Job]],
    jobs: dict[Job, SeedResult],
    data: SuiteData,
    out: Path,
) -> list[PredictorResult]:
    """Add the paired differences to ridge and to the strongest training-free predictor of each horizon.

    The strongest is chosen on the test part itself, which can only make it look better.
    """

    def ratios(name: str) -> Ratios:
        finished = [job for job in by_predictor[name] if jobs[job].status == "ok"]
        return Ratios.of(tallies_of(finished, out, "test"), "recall@K")

    free = [p for p in predictors if not p.learned and p.status == "ok"]
    strongest = {
        horizon: max(free, key=lambda p: p.scores["recall@K"][horizon].value).name
        for horizon in data.horizons
        if free and all(horizon in p.scores["recall@K"] for p in free)
    }
    has_ridge = any(p.name == _RIDGE for p in free)
    extended = []
    for predictor in predictors:
        if predictor.status != "ok":
            extended.append(predictor)
            continue
        own = ratios(predictor.name)
        differences = {name: paired_difference(own, ratios(name), data.horizons) for name in set(strongest.values())}
        lift = {
            horizon: differences[name][horizon] for horizon, name in strongest.items() if horizon in differences[name]
        }
        over_ridge = {}
        if has_ridge and predictor.name != _RIDGE:
            over_ridge = paired_difference(own, ratios(_RIDGE), data.horizons)
        extended.append(predictor.model_copy(update={"lift": lift, "over_ridge": over_ridge}))
    return extended


def chance_control(predictors: Sequence[PredictorResult], data: SuiteData) -> list[Control]:
    """The random predictor must find K of E; where layers differ in E, on average over them."""
    for predictor in predictors:
        if predictor.name == "RandomGuess" and predictor.status == "ok":
            measured = predictor.scores["recall@K"][data.horizons[0]]
            counts = data.topology.experts_L
            chance = sum(data.topology.top_k / experts for experts in counts) / len(counts)
            return [
                Control(
                    name="random guesses (recall@K, first horizon)",
                    expected=f"K / E = {100 * chance:.1f} %",
                    value=round(100 * measured.value, 3),
                    holds=abs(measured.value - chance) < max(0.01, 0.1 * chance),
                )
            ]
    return []


def journey_of(
    by_predictor: dict[str, list[Job]], jobs: dict[Job, SeedResult], data: SuiteData, out: Path, tokens_of: Any
) -> Journey:
    """A stretch of one test document: where each token went, and what was foreseen for that place."""
    index, window = data.journey
    shown = min(_JOURNEY_TOKENS, int(window.valid_BT.sum()))
    layers = data.topology.layers
    predictions = {}
    for name, own in by_predictor.items():
        finished = [job for job in own if jobs[job].status == "ok"]
        if finished:
            foreseen = load_foreseen(finished[0], out).flatten(0, 1)
            predictions[name] = {
                horizon: tuple(
                    tuple(
                        tuple(foreseen[place - horizon, i].tolist()) if place >= horizon else None
                        for place in range(t * layers, (t + 1) * layers)
                    )
                    for t in range(shown)
                )
                for i, horizon in enumerate(data.horizons)
            }
    token_ids = window.token_ids_BT[0, :shown].tolist()
    return Journey(
        document=data.trace.documents[index].doc_id,
        tokens=tuple(tokens_of(token_ids)) if tokens_of else tuple("" for _ in token_ids),
        actual=tuple(
            tuple(tuple(e for e in ids if e >= 0) for ids in token)
            for token in window.expert_ids_BTLK[0, :shown].tolist()
        ),
        predictions=predictions,
    )


def trace_facts(trace: Trace) -> TraceFacts:
    """What a results file keeps of a trace."""
    return TraceFacts(
        name=trace.directory.name,
        fingerprint=trace_fingerprint(trace),
        topology=trace.topology,
        tokens=trace.tokens,
        documents=len(trace),
        domains=len({document.domain for document in trace.documents}),
        fields=trace.manifest.fields,
        source=trace.manifest.source.model_dump(mode="json"),
        layer_us_p50=trace.manifest.timing.layer_us_p50 if trace.manifest.timing else None,
    )


def made_now(seconds: float) -> Made:
    """Date, commit, command, versions and hardware of this process."""
    return Made(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=commit(),
        command=" ".join(["specmoe", *sys.argv[1:]]),
        versions={"specmoe": specmoe.__version__, "torch": torch.__version__, "python": platform.python_version()},
        hardware={
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        seconds=round(seconds, 1),
    )


@functools.cache
def commit() -> str:
    """The commit of the checkout that this package runs from; the version where it is installed otherwise.

    Never fatal and asked once, before the work that it is recorded with. A repository that merely holds the environment
    which specmoe is installed in is somebody else's.
    """
    package = Path(specmoe.__file__).resolve().parent
    checkout = package.parents[1]
    version = f"v{specmoe.__version__}"
    if not (checkout / ".git").exists() or package != checkout / "src" / "specmoe":
        return version
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return version
    return found.stdout.strip() or version


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
