"""The page of a study: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specmoe.files import write_text
from specmoe.report.charts import Spec
from specmoe.report.page import Figure, as_script, environment, made_facts, page_parts, trace_facts
from specmoe.report.select import CATEGORIES
from specmoe.report.study_charts import curve, differences
from specmoe.report.study_text import curve_table, domain_table, found
from specmoe.report.theme import CATEGORY_SHAPES
from specmoe.suite.study_results import DomainStudy, LearningCurve, Study

__all__ = ["render_study", "write_study_page"]


def write_study_page(study: Study, path: Path) -> None:
    """Write the page of ``study`` to ``path``, atomically.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    write_text(path, render_study(study))


def render_study(study: Study) -> str:
    """The page as HTML, complete in itself."""
    specs: dict[str, Spec] = {}

    def figure(id: str, spec: Spec | None, label: str, title: str = "") -> list[Figure]:
        if spec is None:
            return []
        specs[f"chart-{id}"] = {**spec, "description": label}
        return [Figure(f"chart-{id}", label, title)]

    is_curve = isinstance(study, LearningCurve)
    content = _curve_content(study, figure) if is_curve else _domain_content(study, figure)
    first = study.protocol.horizons[0]
    columns, rows = curve_table(study, first) if is_curve else domain_table(study, first)
    sentences = found(study)
    return (
        environment()
        .get_template("study.html.jinja")
        .render(
            study=study,
            first=first,
            lead=sentences[0],
            more=sentences[1:],
            columns=columns,
            rows=rows,
            missing=[p for p in study.predictors if p.reason],
            left_out={} if is_curve else study.left_out,
            categories=[(name, CATEGORY_SHAPES[name]) for name in CATEGORIES],
            facts=_facts(study),
            journey_json=as_script(None),
            **content,
            **page_parts(specs),
        )
    )


def _curve_content(study: LearningCurve, figure: Any) -> dict[str, Any]:
    last = study.points[-1]
    gains = [(r.name, h, gain) for r in last.results for h, gain in r.gain.items()]
    return {
        "kicker": "Learning curve",
        "title": "Would more data help?",
        "panels_title": "Recall by training documents",
        "panels_note": "One panel a predictor, one vertical axis for all; each step to the right doubles the documents "
        "where the axis does. The dashed line is ridge. Bars are 95 % intervals over test documents and seeds.",
        "panels": [
            each
            for number, p in enumerate(study.predictors)
            for each in figure(
                f"curve-{number}",
                curve(study, p),
                f"Recall at K of {p.name} at {', '.join(str(point.documents) for point in study.points)} documents",
                p.name,
            )
        ],
        "settled_title": "What the last step bought",
        "settled_note": f"From {100 * study.points[-2].share:g} % to {100 * last.share:g} % of the training documents, "
        "on the same test documents. Grey: the interval includes 0.",
        "settled": figure(
            "gain",
            differences(gains, "points of recall@K gained", study.protocol.horizons, good=True),
            "Points of recall gained by the last step, by predictor",
        ),
    }


def _domain_content(study: DomainStudy, figure: Any) -> dict[str, Any]:
    together = [(r.name, h, drop) for r in study.together for h, drop in r.drop.items()]
    together += [(f"{r.name}, equal size", h, drop) for r in study.together for h, drop in r.own_drop.items()]
    together.sort(key=lambda row: row[0])
    title = "points of recall@K lost"

    def of(name: str) -> list[tuple[str, int, Any]]:
        return [
            (f"{kept.domain or '(no name)'} ({kept.test_documents})", h, drop)
            for kept in study.domains
            for r in kept.results
            if r.name == name
            for h, drop in r.drop.items()
        ]

    return {
        "kicker": "Leave one domain out",
        "title": "What does text of another kind cost?",
        "panels_title": "Domain by domain",
        "panels_note": "Recall where training had seen the domain minus recall where it had not, on the same test "
        "documents (how many stands in brackets). Grey: the interval includes 0.",
        "panels": [
            each
            for number, p in enumerate(study.predictors)
            for each in figure(
                f"domains-{number}",
                differences(of(p.name), title, study.protocol.horizons, good=False),
                f"Points of recall that {p.name} loses in each domain that training did not see",
                p.name,
            )
        ],
        "settled_title": "All domains together",
        "settled_note": "Points lost, over the test documents of all domains that were kept out in turn; at equal "
        "size: against a training on as few documents of all domains.",
        "settled": figure(
            "together",
            differences(together, title, study.protocol.horizons, good=False),
            "Points of recall lost over all domains, by predictor",
        ),
    }


def _facts(study: Study) -> list[tuple[str, list[tuple[str, str]]]]:
    if isinstance(study, LearningCurve):
        splits = [(f"split at {100 * p.share:g} %", f"{p.documents} documents, {p.split_hash}") for p in study.points]
        splits.append(("validation and test documents", f"{study.validation_documents} and {study.test_documents}"))
    else:
        splits = [("normal split", f"{study.train_documents} training documents, {study.split_hash}")]
        splits += [(f"without {k.domain}", f"{k.train_documents} documents, {k.split_hash}") for k in study.domains]
    return [
        trace_facts(study.trace),
        (
            "Protocol",
            [
                *splits,
                ("seeds", ", ".join(map(str, study.protocol.seeds))),
                ("bootstrap draws", f"{study.protocol.bootstrap_draws:,}, over documents and seeds"),
                ("metric version", str(study.protocol.metric_version)),
            ],
        ),
        made_facts(study.made),
    ]
