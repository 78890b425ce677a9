"""Studies: the same predictors under several cuts of one trace, as jobs that resume."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specmoe.dataset import Split, split_documents
from specmoe.errors import SpecmoeError
from specmoe.evaluation import BOOTSTRAP_DRAWS, Ratios, Tally, by_horizon, paired_difference
from specmoe.locks import writes
from specmoe.metrics import budgets_of
from specmoe.predictors.recipes import Recipes, kind_of
from specmoe.results import Protocol, SeedResult
from specmoe.suite.assemble import made_now, tallies_of, trace_facts
from specmoe.suite.cut import Cut, cut_documents
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import Job
from specmoe.suite.run import JobEvent, cost, jobs_of, run_jobs
from specmoe.suite.study_results import (
    CurvePoint,
    CurveResult,
    DomainResult,
    DomainStudy,
    HeldOut,
    LearningCurve,
    Studied,
    save_study,
)
from specmoe.suite.train import Plan
from specmoe.trace import Trace

__all__ = ["SHARES", "Conditions", "learning_curve", "leave_one_domain_out", "with_companions"]

SHARES = (0.125, 0.25, 0.5, 1.0)
# What every study shows beside the predictors asked for: solved or counted in seconds.
_COMPANIONS = ("Ridge", "TokenMarkov")
_FEWEST_DOMAINS = 3
# In the normal split's test part: the unit of resampling is the document.
_FEWEST_TEST_DOCUMENTS = 2
# A domain that holds a larger share of the training documents is also held against a training on as few.
_NEGLIGIBLE = 0.1


@dataclass(frozen=True)
class Conditions:
    """What all runs of a study share.

    Attributes:
        seeds: one run each for what is trained. recipes: by predictor, what its recipe is changed to.
        workers: processes; None for one a core (one in all on a GPU).
        on_stage: told which cut comes next. on_plan, on_event: told of its jobs.
    """

    seeds: Sequence[int] = (0, 1, 2)
    horizons: tuple[int, ...] = (1, 2, 3, 4)
    recipes: Recipes | None = None
    workers: int | None = None
    device: str = "cpu"
    on_stage: Callable[[str], None] = lambda _: None
    on_plan: Callable[[Plan], None] = lambda _: None
    on_event: Callable[[JobEvent], None] = lambda _: None


@dataclass(frozen=True)
class _Done:
    """One cut, all of its jobs finished: the sums of each predictor over the test part and the held-out one.

    The windows themselves are let go of: those of several cuts would fill the memory.
    """

    split: Split
    test: Mapping[str, list[Tally]]
    held_out: Mapping[str, list[Tally]]
    reasons: Mapping[str, str]


def with_companions(names: Sequence[str]) -> list[str]:
    """The predictors asked for, and ridge and a training-free one to hold them against."""
    return list(dict.fromkeys((*names, *_COMPANIONS)))


@writes("learning-curve")
def learning_curve(
    trace: Path, out: Path, names: Sequence[str], conditions: Conditions, *, shares: Sequence[float] = SHARES
) -> LearningCurve:
    """recall@K on the test part by the share of the training documents; writes ``out/learning-curve.json``.

    Validation and test documents are the same throughout; smaller shares lie within larger ones. Which documents come
    first is drawn once, so intervals cover the choice of test documents and seeds, not that of training documents.

    Args:
        shares: of the training documents, each above 0 and at most 1. Those that come to the same documents as a
            smaller one are left out.

    Raises:
        SpecmoeError: fewer than two distinct shares, no predictor can run, or as :func:`train_suite`.
    """
    started = time.monotonic()
    opened = Trace.open(trace)
    documents = opened.documents
    cuts: dict[str, Cut] = {}
    for share in sorted(set(shares)):
        cut = Cut(train_share=share)
        cuts.setdefault(cut_documents(documents, cut).hash, cut)
    if len(cuts) < 2:
        raise SpecmoeError("a learning curve needs at least two different shares of the documents; collect more text")
    names = with_companions(names)
    done: list[tuple[Cut, _Done]] = []
    for cut in cuts.values():
        said = f"{100 * cut.train_share:g} % of the training documents"
        done.append((cut, _run(trace, out / "cuts" / f"share-{100 * cut.train_share:g}", names, cut, conditions, said)))
    points = []
    for place, (cut, here) in enumerate(done):
        before = done[place - 1][1].test if place else {}
        results = tuple(
            CurveResult(
                name=name,
                seeds=len(tallies),
                recall=by_horizon(_ratios(tallies), conditions.horizons),
                gain=paired_difference(_ratios(tallies), _ratios(before[name]), conditions.horizons)
                if name in before
                else {},
            )
            for name, tallies in here.test.items()
        )
        train = here.split.parts["train"]
        points.append(
            CurvePoint(
                share=cut.train_share,
                documents=len(train),
                tokens=sum(documents[index].tokens for index in train),
                split_hash=here.split.hash,
                results=results,
            )
        )
    last = done[-1][1]
    study = LearningCurve(
        made=made_now(time.monotonic() - started),
        trace=trace_facts(opened),
        protocol=_protocol(opened, conditions),
        test_documents=len(last.split.parts["test"]),
        validation_documents=len(last.split.parts["validation"]),
        predictors=_studied(names, [here for _, here in done], conditions),
        points=tuple(points),
    )
    save_study(study, out / "learning-curve.json")
    return study


@writes("leave-one-domain-out")
def leave_one_domain_out(trace: Path, out: Path, names: Sequence[str], conditions: Conditions) -> DomainStudy:
    """Keep each domain in turn out of training and validation and judge on it; writes ``out/domains.json``.

    Beside it stands the same predictor trained with all domains, on the same documents: the test documents of that
    domain in the normal split, which no training saw in either case. What is left of training and validation is the
    normal split without the domain, so it is also smaller: where the domain holds more than a tenth of the training
    documents, a training on as few documents of all domains tells how much of the loss is only that.

    Raises:
        SpecmoeError: fewer than three domains, too few with enough documents, no predictor can run, or as
            :func:`train_suite`.
    """
    started = time.monotonic()
    opened = Trace.open(trace)
    domains, left_out = _domains(opened)
    names = with_companions(names)
    normal = _run(trace, out / "cuts" / "all", names, Cut(held_out=()), conditions, "trained with all domains")
    held_out, paired = [], []
    for number, (domain, test) in enumerate(domains.items(), 1):
        said = f"without {domain} ({number} of {len(domains)})"
        cut = Cut(held_out=(domain,))
        here = _run(trace, out / "cuts" / _folder(domain), names, cut, conditions, said)
        share = len(here.split.parts["train"]) / len(normal.split.parts["train"])
        matched = normal
        if share < 1 - _NEGLIGIBLE:
            fewer = Cut(train_share=share, held_out=())
            said = f"with all domains, on as few documents as without {domain}"
            matched = _run(trace, out / "cuts" / f"as-few-{_folder(domain)}", names, fewer, conditions, said)
        pairs = {
            name: (
                _on(normal.test[name], test),
                _on(here.held_out[name], test),
                _on(matched.test[name], test),
            )
            for name in names
            if name in normal.test and name in here.held_out and name in matched.test
        }
        paired.append(pairs)
        held_out.append(
            HeldOut(
                domain=domain,
                documents=len(here.split.parts["held_out_domain"]),
                test_documents=len(test),
                train_documents=len(here.split.parts["train"]),
                matched_documents=len(matched.split.parts["train"]),
                split_hash=here.split.hash,
                results=tuple(
                    _fallen(name, pair, conditions.horizons, whole=_ratios(here.held_out[name]))
                    for name, pair in pairs.items()
                ),
            )
        )
    everywhere = [name for name in names if all(name in pairs for pairs in paired)]
    study = DomainStudy(
        made=made_now(time.monotonic() - started),
        trace=trace_facts(opened),
        protocol=_protocol(opened, conditions),
        split_hash=normal.split.hash,
        train_documents=len(normal.split.parts["train"]),
        predictors=_studied(names, [normal], conditions),
        domains=tuple(held_out),
        left_out=left_out,
        together=tuple(
            _fallen(
                name,
                [_joined([pairs[name][side] for pairs in paired]) for side in range(3)],
                conditions.horizons,
            )
            for name in everywhere
        ),
    )
    save_study(study, out / "domains.json")
    return study


def _domains(trace: Trace) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Domain → its test documents in the normal split, and domain → why it cannot be kept out."""
    documents = trace.documents
    named = sorted({document.domain for document in documents})
    if len(named) < _FEWEST_DOMAINS:
        raise SpecmoeError(
            f"the trace has {len(named)} domain{'' if len(named) == 1 else 's'}; keeping one out needs at least "
            f"{_FEWEST_DOMAINS}: collect text of other kinds, or give documents a domain when importing"
        )
    split = split_documents(documents, hold_out=False)
    domains, left_out = {}, {}
    for domain in named:
        test = tuple(index for index in split.parts["test"] if documents[index].domain == domain)
        if len(test) < _FEWEST_TEST_DOCUMENTS:
            left_out[domain] = f"{len(test)} of its documents in the test part; {_FEWEST_TEST_DOCUMENTS} are needed"
            continue
        try:
            cut_documents(documents, Cut(held_out=(domain,)))
        except SpecmoeError as error:
            left_out[domain] = str(error)
        else:
            domains[domain] = test
    if not domains:
        raise SpecmoeError(
            f"none of the {len(named)} domains has {_FEWEST_TEST_DOCUMENTS} documents in the test part and leaves "
            "enough to train on: collect more text"
        )
    return domains, left_out


@writes("train")
def _run(trace: Path, out: Path, names: Sequence[str], cut: Cut, conditions: Conditions, said: str) -> _Done:
    """Run the jobs of one cut that are not done yet."""
    conditions.on_stage(said)
    data = SuiteData.load(trace, conditions.horizons, cut, conditions.recipes)
    jobs = jobs_of(names, conditions.seeds, data)
    reasons = {name: reason for name in names if (reason := data.lacks(data.kind(name)))}
    if not jobs:
        raise SpecmoeError(f"no predictor can run: {'; '.join(f'{n}: {reason}' for n, reason in reasons.items())}")
    epochs = {job: data.kind(job.predictor).recipe.epochs for job in jobs}
    conditions.on_plan(Plan(tuple(jobs), {job: cost(job, data) for job in jobs}, epochs, reasons))
    workers = conditions.workers
    if workers is None:
        workers = 1 if conditions.device.startswith("cuda") else os.cpu_count() or 1
    results = run_jobs(jobs, trace, data, out, workers=workers, device=conditions.device, on_event=conditions.on_event)
    finished = _finished(results)
    failed = {job.predictor: result.reason for job, result in results.items() if job.predictor not in finished}
    return _Done(
        data.split,
        {name: tallies_of(own, out, "test") for name, own in finished.items()},
        {name: found for name, own in finished.items() if (found := tallies_of(own, out, "held_out_domain"))},
        reasons | failed,
    )


def _finished(results: Mapping[Job, SeedResult]) -> dict[str, list[Job]]:
    finished: dict[str, list[Job]] = {}
    for job, result in results.items():
        if result.status == "ok":
            finished.setdefault(job.predictor, []).append(job)
    return finished


def _ratios(tallies: Sequence[Tally]) -> Ratios:
    return Ratios.of(tallies, "recall@K")


def _on(tallies: Sequence[Tally], documents: Sequence[int]) -> Ratios:
    """recall@K on some documents of the trace, in ascending order."""
    return Ratios.of(tallies, "recall@K", torch.isin(tallies[0].documents, torch.tensor(documents)))


def _joined(ratios: Sequence[Ratios]) -> Ratios:
    """Documents of several domains as one; seeds that are missing in one of them are left out."""
    seeds = min(len(each.sums_SGH) for each in ratios)
    return Ratios(
        torch.cat([each.sums_SGH[:seeds] for each in ratios], 1), torch.cat([each.events_GH for each in ratios])
    )


def _fallen(name: str, ratios: Sequence[Ratios], horizons: Sequence[int], whole: Ratios | None = None) -> DomainResult:
    """``ratios``: with the domain seen, unseen, and seen but trained on as few documents."""
    seen, unseen, matched = ratios
    return DomainResult(
        name=name,
        seen=by_horizon(seen, horizons),
        unseen=by_horizon(unseen, horizons),
        drop=paired_difference(seen, unseen, horizons),
        own_drop=paired_difference(matched, unseen, horizons),
        whole=by_horizon(whole, horizons) if whole else {},
    )


def _studied(names: Sequence[str], done: Sequence[_Done], conditions: Conditions) -> tuple[Studied, ...]:
    """What each predictor is, and why it is missing somewhere."""
    found = []
    for name in names:
        reason = next((here.reasons[name] for here in done if here.reasons.get(name)), "")
        recipe = kind_of(name, conditions.recipes or {}).recipe
        facts: dict[str, Any] = {"category": recipe.category, "sees": recipe.sees, "learned": recipe.epochs > 0}
        found.append(Studied(name=name, reason=reason, **facts))
    return tuple(found)


def _protocol(trace: Trace, conditions: Conditions) -> Protocol:
    return Protocol(
        horizons=conditions.horizons,
        budgets=budgets_of(trace.topology.top_k, trace.topology.experts),
        seeds=tuple(conditions.seeds),
        bootstrap_draws=BOOTSTRAP_DRAWS,
    )


def _folder(domain: str) -> str:
    """A folder's name for a domain of whatever name."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", domain).strip("-.")[:40]
    return f"without-{plain}-{hashlib.sha256(domain.encode()).hexdigest()[:8]}"
