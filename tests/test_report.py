"""What is shown says what the results file says, no more, and survives hostile or missing data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from results_fixture import EVENTS, bare_results, full_results, nasty_results, only
from specmoe.errors import SpecmoeError
from specmoe.report.charts import ranking_figure
from specmoe.report.generalisation import independent_difference
from specmoe.report.html import render_report, write_report
from specmoe.report.journey import foreseen_share, visible
from specmoe.report.labels import label_places
from specmoe.report.pareto import pareto_front
from specmoe.report.questions import answers, headline
from specmoe.report.select import (
    best_per_category,
    excludes_zero,
    finished,
    groups,
    paired_difference,
    ridge,
    spread,
    spread_limits,
)
from specmoe.report.terminal import print_results
from specmoe.report.text import margin, percent, percent_range, points, points_range
from specmoe.results import Interval, Journey, PredictorResult, Results, TestDocuments

FULL = full_results()
NASTY = nasty_results()


class Page(HTMLParser):
    """Tags, attributes, visible text and scripts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.styles = ""
        self.text = ""
        self.rows: list[list[str]] = []
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        self._open = tag if tag in ("script", "style") else self._open
        if tag == "script":
            self.scripts.append((attributes, ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._open == "style":
            self.styles += data
        else:
            self.text += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    def json(self, id: str) -> Any:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == id))


@pytest.fixture(scope="module")
def full_page() -> Page:
    return Page(render_report(FULL))


@pytest.fixture(scope="module")
def nasty_page() -> Page:
    return Page(render_report(NASTY))


def changed(results: Results, name: str, /, **changes: Any) -> Results:
    """The results with one predictor altered."""
    altered = tuple(r.model_copy(update=changes) if r.name == name else r for r in results.predictors)
    return results.model_copy(update={"predictors": altered})


def named(results: Results, name: str) -> PredictorResult:
    return next(r for r in results.predictors if r.name == name)


def said(results: Results, question: int) -> str:
    return " ".join(answers(results)[question - 1].sentences)


# The page


def test_table_holds_every_number(full_page: Page) -> None:
    rows = [[cell.strip() for cell in row] for row in full_page.rows]
    for result in FULL.predictors:
        # The symbol before the name says its category.
        row = next(row for row in rows if row[0].split() == [result.category, result.name] and len(row) == 12)
        assert row[3:7] == [percent(result.scores["recall@K"][h]) for h in (1, 2, 3, 4)]
        assert row[7:9] == [margin(result.over_ridge.get(h)) for h in (1, 3)]
        assert row[9] == percent(result.scores["recall@2K"][1])


def test_charts_hold_the_numbers(full_page: Page) -> None:
    charts = full_page.json("charts")
    drawn = [row for id, spec in charts.items() if id.startswith("chart-ranking-") for row in spec["datasets"]["rows"]]
    assert len(drawn) == 4 * len(FULL.predictors)
    for row in drawn:
        interval = named(FULL, row["name"]).scores["recall@K"][row["h"]]
        assert (row["value"], row["low"], row["high"]) == pytest.approx(
            (100 * interval.value, 100 * interval.low, 100 * interval.high)
        )
    for row in charts["chart-over-ridge"]["datasets"]["rows"]:
        difference = named(FULL, row["name"]).over_ridge[row["h"]]
        assert row["value"] == pytest.approx(100 * difference.value)
        assert (row["verdict"] == "open") == (not excludes_zero(difference))
    # The best of four categories, ridge, and one of each other kind of input.
    maps = [id for id in charts if id.startswith("chart-layers-")]
    assert len(maps) == 9
    assert {"chart-front-parameters", "chart-front-latency", "chart-domains", "chart-untrained"} <= set(charts)


def test_every_chart_has_its_place_and_a_label(full_page: Page) -> None:
    places = {
        attributes["id"]: attributes
        for tag, attributes in full_page.tags
        if tag == "div" and attributes.get("role") == "img"
    }
    assert set(places) == set(full_page.json("charts"))
    assert all(len(attributes["aria-label"]) > 20 for attributes in places.values())
    ids = [attributes["id"] for _, attributes in full_page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for tag, attributes in full_page.tags if tag == "a"}
    assert targets <= set(ids)


@pytest.mark.parametrize("page", ["full_page", "nasty_page"])
def test_nothing_is_fetched(page: str, request: pytest.FixtureRequest) -> None:
    shown: Page = request.getfixturevalue(page)
    for tag, attributes in shown.tags:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "url(" not in shown.styles
    assert "@import" not in shown.styles
    policy = next(a["content"] for _, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    for spec in shown.json("charts").values():
        assert '"url"' not in json.dumps(spec)


def test_hostile_text_stays_text(full_page: Page, nasty_page: Page) -> None:
    assert len(nasty_page.scripts) == len(full_page.scripts) == 5
    assert not {"img", "i", "u"} & ({tag for tag, _ in nasty_page.tags} - {tag for tag, _ in full_page.tags})
    assert not any(name.startswith("on") for _, attributes in nasty_page.tags for name in attributes)
    assert "</script><script>alert('model')</script>" in nasty_page.text
    assert "loss is NaN at epoch 3 <script>alert('reason')</script>" in nasty_page.text
    evil = NASTY.predictors[0].name
    assert evil in nasty_page.text
    assert "{{ 7 * 7 }}" in nasty_page.text
    journey = nasty_page.json("journey-data")
    assert journey["tokens"][:6] == ["</script>", "<!--", "{{7*7}}", "⏎", "⇥", "∅"]
    assert any(row["name"] == evil for row in nasty_page.json("charts")["chart-over-ridge"]["datasets"]["rows"])


def test_a_broken_control_is_announced_at_the_top(full_page: Page, nasty_page: Page) -> None:
    assert "1 of 1 controls do not hold" in nasty_page.text
    assert "all 3 controls hold" in full_page.text
    assert "do not hold" not in full_page.text


def test_reasons_are_shown(nasty_page: Page) -> None:
    text = re.sub(r"\s+", " ", nasty_page.text)
    assert "sequence-activation skipped: the trace keeps no hidden states" in text
    assert "HierarchicalGatingPredictor seed 2 failed: Inf gradient" in text


def test_provenance_is_shown(full_page: Page) -> None:
    for fact in (FULL.made.commit, FULL.split.hash, FULL.trace.fingerprint, FULL.made.command, "a test fixture"):
        assert fact in full_page.text


def test_expected_never_stands_beside_measured(full_page: Page) -> None:
    words = full_page.text + " ".join(a.get("aria-label", "") for _, a in full_page.tags)
    assert "expected" not in words.lower()


def test_bare_results_make_a_page() -> None:
    page = Page(render_report(bare_results()))
    assert page.json("charts") == {}
    assert page.json("journey-data") is None
    assert "No predictor finished" in page.text


def test_report_goes_to_disk_or_says_why_not(tmp_path: Path) -> None:
    write_report(bare_results(), tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecmoeError, match="cannot write"):
        write_report(bare_results(), tmp_path / "file" / "report.html")


def test_ranking_figure(tmp_path: Path) -> None:
    ranking_figure(FULL, tmp_path / "ranking.svg")
    svg = (tmp_path / "ranking.svg").read_text(encoding="utf-8")
    for result in FULL.predictors:
        assert f">{result.name}<" in svg
        assert f">{percent(result.scores['recall@K'][1])}<" in svg
        assert f">{percent(result.scores['recall@K'][3])}<" in svg
    ranking_figure(bare_results(), tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="png"):
        ranking_figure(FULL, tmp_path / "ranking.pdf")


# The five questions


def test_headline_quotes_the_best_and_its_margin() -> None:
    winner = named(FULL, "HierarchicalEnsemble")
    text = headline(FULL)
    assert text.startswith("HierarchicalEnsemble foresees 88.4 %")
    assert f"{100 * winner.over_ridge[1].value:.1f} points" in text
    assert "Three layers ahead" in text
    assert "81.8 %" in text


def test_headline_begins_with_controls_that_do_not_hold() -> None:
    first, second, *_ = FULL.controls
    broken = [control.model_copy(update={"holds": False}) for control in (first, second)]
    one, two = (FULL.model_copy(update={"controls": (*FULL.controls, *broken[:n])}) for n in (1, 2))
    assert headline(one).startswith(f"Not to be trusted: a control does not hold ({first.name}). Hierarchical")
    assert headline(two).startswith("Not to be trusted: 2 controls do not hold (")


def test_the_winner_follows_the_numbers() -> None:
    better = {h: Interval(value=0.95, low=0.94, high=0.96) for h in (1, 2, 3, 4)}
    tiny = named(FULL, "TinySpeculationModel")
    other = changed(FULL, "TinySpeculationModel", scores={**tiny.scores, "recall@K": better})
    assert headline(other).startswith("TinySpeculationModel foresees 95.0 % (94.0 to 96.0)")
    assert said(other, 1).startswith("TinySpeculationModel (edge)")
    assert "more parameters bought nothing" in said(other, 2)
    assert best_per_category(other)["edge"].name == "TinySpeculationModel"
    assert best_per_category(FULL)["edge"].name == "RegularizedSpeculationModel"


def test_a_margin_that_includes_zero_is_open() -> None:
    unclear = {h: Interval(value=0.002, low=-0.003, high=0.007) for h in (1, 2, 3, 4)}
    other = changed(FULL, "HierarchicalEnsemble", over_ridge=unclear)
    assert "more than ridge" not in headline(other)
    assert "the interval includes 0, so which is better is open" in headline(other)
    assert "at h=1, h=2, h=3, h=4 it is open which is better" in said(other, 1)
    widthless = {h: Interval(value=0.03, low=0.03, high=0.03) for h in (1, 2, 3, 4)}
    assert "unknown uncertainty" in headline(changed(FULL, "HierarchicalEnsemble", over_ridge=widthless))
    worse = {h: Interval(value=-0.03, low=-0.04, high=-0.02) for h in (1, 2, 3, 4)}
    assert "3.0 points (2.0 to 4.0) less than ridge" in headline(
        changed(FULL, "HierarchicalEnsemble", over_ridge=worse)
    )


def test_runner_up_is_compared_in_pairs() -> None:
    assert re.search(r"HierarchicalEnsemble is 0\.3 points \(.*\) ahead of ImprovedPredictor, paired", said(FULL, 1))
    twin = named(FULL, "ImprovedPredictor").document_sums["recall@K"]
    short = {"recall@K": tuple(seed[:5] for seed in twin)}
    assert "no paired interval" in said(changed(FULL, "ImprovedPredictor", document_sums=short), 1)


def test_efficiency_names_the_front_and_the_smallest_that_beats_ridge() -> None:
    answer = answers(FULL)[1]
    front = {row[0] for row in answer.rows if row[-1] == "yes"}
    assert front == {
        "TinySpeculationModel", "SmallSpeculationModel", "RegularizedSpeculationModel", "ImprovedPredictor",
        "HierarchicalEnsemble",
    }  # fmt: skip
    assert "excludes 0 is RegularizedSpeculationModel" in " ".join(answer.sentences)
    row = next(row for row in answer.rows if row[0] == "TinySpeculationModel")
    assert row[3] == f"{83.8 / 0.17052:.1f}"


def test_stability_is_measured_over_seeds_and_owns_up_to_few() -> None:
    text = said(FULL, 3)
    assert "with 3 seeds these limits overlap, so which is the steadiest is open" in text
    rows = {row[0]: row for row in answers(FULL)[2].rows}
    tiny = named(FULL, "TinySpeculationModel")
    values = [seed.recall["test"][1] for seed in tiny.seeds]
    mean = sum(values) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert rows["TinySpeculationModel"][4] == f"{100 * deviation:.2f}"
    assert "3 of 3 runs of TransformerGatingPredictor failed (loss is NaN)" in said(NASTY, 3)
    one = only(FULL, "ridge", "TinySpeculationModel")
    assert "Fewer than two seeds" in said(changed(one, "TinySpeculationModel", seeds=tiny.seeds[:1]), 3)


def test_generalisation_compares_parts_and_domains() -> None:
    text = said(FULL, 4)
    assert "+2.0 points" in text
    assert "On xml, which no training document comes from, HierarchicalEnsemble reaches 85.4 %" in text
    here, there = (
        named(FULL, "HierarchicalEnsemble").scores["recall@K"][1],
        Interval(value=0.854, low=0.842, high=0.866),
    )
    loss = independent_difference(here, there)
    assert f"it foresees {points_range(loss)} less there" in text
    # Wider than each of the two, narrower than both end to end.
    assert there.high - there.low < loss.high - loss.low < here.high - here.low + there.high - there.low
    more = {h: Interval(value=0.95, low=0.94, high=0.96) for h in (1, 2, 3, 4)}
    assert "more there" in said(changed(FULL, "HierarchicalEnsemble", held_out_domain=more), 4)
    away = named(FULL, "HierarchicalEnsemble").scores["recall@K"]
    same = said(changed(FULL, "HierarchicalEnsemble", held_out_domain=away), 4)
    assert "a difference of 0.0 ±" in same
    assert "a loss is not shown" in same
    assert "specmoe leave-one-domain-out" in text


def test_deployment_says_what_is_foreseen_of_the_cold_experts() -> None:
    assert "cache" not in said(FULL, 5)
    cold = {h: Interval(value=0.7, low=0.68, high=0.72) for h in (1, 2, 3, 4)}
    scores = named(FULL, "LayerSpecificPredictor").scores
    other = changed(FULL, "LayerSpecificPredictor", scores={**scores, "cold_recall@K": cold})
    protocol = other.protocol.model_copy(update={"cache_experts": 4})
    lacking = {h: Interval(value=0.31, low=0.3, high=0.32) for h in (1, 2, 3, 4)}
    other = other.model_copy(update={"protocol": protocol, "cold_share": lacking})
    text = said(other, 5)
    assert "A cache of the 4 experts used last in every layer lacks 31.0 % (30.0 to 32.0) of the experts needed" in text
    whole = percent_range(named(other, "LayerSpecificPredictor").scores["recall@K"][1])
    assert f"of these, LayerSpecificPredictor foresees 70.0 % (68.0 to 72.0), against {whole} of all (h=1)." in text
    columns = answers(other)[4].columns
    assert "of cold experts h=1, %" in columns
    assert all(len(row) == len(columns) for row in answers(other)[4].rows)


def test_deployment_weighs_latency_against_the_layer() -> None:
    assert said(FULL, 5).startswith("LayerSpecificPredictor foresees the most of those that answer within the 212 µs")
    quick = FULL.model_copy(update={"trace": FULL.trace.model_copy(update={"layer_us_p50": 4.0})})
    assert "No predictor answers within the 4.0 µs" in said(quick, 5)
    slow = FULL.model_copy(update={"trace": FULL.trace.model_copy(update={"layer_us_p50": 9e6})})
    assert said(slow, 5).startswith("HierarchicalEnsemble foresees the most")


def _no_ridge(results: Results) -> Results:
    rest = tuple(r.model_copy(update={"over_ridge": {}}) for r in results.predictors if r.name != "ridge")
    return results.model_copy(update={"predictors": rest})


def _all_failed(results: Results) -> Results:
    failed = tuple(
        PredictorResult(**{**r.model_dump(include={"name", "category", "sees", "needs", "source", "learned"}),
                           "parameters": 1, "status": "failed", "reason": "out of memory"})
        for r in results.predictors
    )  # fmt: skip
    return results.model_copy(update={"predictors": failed})


def _one_horizon(results: Results) -> Results:
    def first(value: Any) -> Any:
        return {1: value[1]} if isinstance(value, dict) and 1 in value else value

    kept = tuple(
        r.model_copy(
            update={
                "scores": {name: first(score) for name, score in r.scores.items()},
                "over_ridge": first(r.over_ridge),
                "per_layer": tuple(row[:1] for row in r.per_layer),
                "document_sums": {
                    metric: tuple(tuple(row[:1] for row in seed) for seed in sums)
                    for metric, sums in r.document_sums.items()
                },
            }
        )
        for r in results.predictors
    )
    documents = results.test_documents.model_copy(
        update={"events": tuple(row[:1] for row in results.test_documents.events)}
    )
    protocol = results.protocol.model_copy(update={"horizons": (1,)})
    return results.model_copy(update={"predictors": kept, "protocol": protocol, "test_documents": documents})


def _each(results: Results, **changes: Any) -> Results:
    return results.model_copy(update={"predictors": tuple(r.model_copy(update=changes) for r in results.predictors)})


CASES: dict[str, tuple[Callable[[Results], Results], int, str]] = {
    "no ridge": (_no_ridge, 1, "Ridge was not run"),
    "all failed": (_all_failed, 1, "No predictor finished"),
    "one horizon": (_one_horizon, 1, "at h=1"),
    "training-free only": (lambda r: only(r, "ridge", "random"), 1, "of the training-free, ridge foresees the most"),
    "no baseline": (lambda r: only(r, "ImprovedPredictor"), 2, "alone has a result"),
    "no timing": (
        lambda r: r.model_copy(
            update={"predictors": tuple(p.model_copy(update={"latency": None}) for p in r.predictors)}
        ),
        5,
        "Latency was not measured",
    ),
    "no layer time": (
        lambda r: r.model_copy(update={"trace": r.trace.model_copy(update={"layer_us_p50": None})}),
        5,
        "compute time was not measured",
    ),
    "no domain": (
        lambda r: r.model_copy(update={"split": r.split.model_copy(update={"held_out_domain": None})}),
        4,
        "No domain was held out",
    ),
    "no seeds": (
        lambda r: _each(r, seeds=()),
        4,
        "not measured",
    ),
    "nothing": (lambda _: bare_results(), 5, "Latency was not measured"),
}


@pytest.mark.parametrize("case", CASES)
def test_missing_parts_are_named_not_invented(case: str) -> None:
    change, question, words = CASES[case]
    results = change(FULL)
    assert words in said(results, question)
    if case in ("no ridge", "all failed", "one horizon", "no seeds"):
        page = Page(render_report(results))
        assert headline(results) in page.text
        assert all(answer.sentences[0] in page.text for answer in answers(results))
    for answer in answers(results):
        assert not re.search(r"\bnan\b|None|inf\b", " ".join(answer.sentences))
    console = Console(width=80)
    with console.capture() as captured:
        print_results(results, console)
    assert words in re.sub(r"\s+", " ", captured.get())


# The terminal


@pytest.mark.parametrize("width", [80, 100, 160])
def test_terminal_fits_and_keeps_what_matters(width: int) -> None:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        print_results(FULL, console)
    lines = captured.get().splitlines()
    assert max(len(line) for line in lines) <= width
    assert "\x1b" not in captured.get()
    winner = next(line for line in lines if line.startswith("HierarchicalEnsemble  "))
    assert "88.4 ± 0.8" in winner
    assert "+3.2 ± 0.2" in winner
    assert "81.8 ± 0.8" in winner
    assert ("2 min" in winner) == (width == 160)
    order = [line.split()[0] for line in lines if re.match(r"\S+ +(context|hidden|token|routing|nothing) ", line)]
    assert order == [result.name for _, part in groups(FULL) for result in part]
    for number in range(1, 6):
        assert any(line.startswith(f"{number}. ") for line in lines)


def test_terminal_colours_only_what_is_settled() -> None:
    console = Console(width=160, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        print_results(FULL, console)
    coloured = {text.strip(): code for code, text in re.findall(r"\x1b\[(3[12])m([^\x1b]*)\x1b", captured.get())}
    assert coloured[margin(named(FULL, "HierarchicalEnsemble").over_ridge[1])] == "32"
    assert coloured[margin(named(FULL, "TinySpeculationModel").over_ridge[1])] == "31"
    small = margin(named(FULL, "SmallSpeculationModel").over_ridge[1])
    assert small in captured.get()
    assert small not in coloured


def test_terminal_names_failures_and_markup_is_text() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        print_results(changed(NASTY, "ridge", name="[bold red]ridge[/]"), console)
    shown = captured.get()
    assert "[bold red]ridge[/]" in shown
    assert "TransformerGatingPredictor: failed: loss is NaN at epoch 3" in shown
    assert "does not hold: <i>broken</i>: 93 %" in shown


# The functions below


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_pareto_front_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    front = pareto_front([cost for cost, _ in pairs], [gain for _, gain in pairs])

    def beaten(i: int) -> bool:
        return any(cost <= pairs[i][0] and gain >= pairs[i][1] and (cost, gain) != pairs[i] for cost, gain in pairs)

    assert {pairs[i] for i in front} == {pair for i, pair in enumerate(pairs) if not beaten(i)}
    assert len({pairs[i] for i in front}) == len(front)
    assert [pairs[i][0] for i in front] == sorted(pairs[i][0] for i in front)


def test_pareto_front_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="2 costs, but 1"):
        pareto_front([1, 2], [1])


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100)), min_size=1, max_size=15))
def test_labels_never_cover_each_other(points_: list[tuple[float, float]]) -> None:
    places = label_places(points_, ["LongPredictorName"] * len(points_), 360)
    assert len(places) == len(points_)
    # Two names of one point's place would coincide.
    used = [(point, place) for point, place in zip(points_, places, strict=True) if place]
    assert len(used) == len(set(used))


def test_a_lone_label_finds_a_place() -> None:
    assert label_places([(1.0, 2.0), (3.0, 4.0)], ["", "name"], 360)[0] == ""
    assert label_places([(1.0, 2.0), (3.0, 4.0)], ["", "name"], 360)[1] != ""


def test_paired_difference_uses_the_pairs() -> None:
    a, b = named(FULL, "ImprovedPredictor"), named(FULL, "TinySpeculationModel")
    found = paired_difference(FULL, a, b, 1)
    assert found is not None
    ours, theirs = (np.array(r.document_sums["recall@K"])[..., 0] / EVENTS for r in (a, b))
    plain = ours.mean(0) - theirs.mean(0)
    assert found.value == pytest.approx(plain.mean())
    # Documents and the seeds of both: independent causes add their variances.
    variance = plain.var() / len(plain) + ours.mean(1).var() / 3 + theirs.mean(1).var() / 3
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.15)
    # Far narrower than the difference of two unpaired recalls, for documents are hard or easy for all.
    assert found.high - found.low < 0.5 * (a.scores["recall@K"][1].high - a.scores["recall@K"][1].low)
    reverse = paired_difference(FULL, b, a, 1)
    assert reverse is not None
    assert reverse.value == pytest.approx(-found.value)
    assert paired_difference(FULL, a.model_copy(update={"document_sums": {}}), b, 1) is None
    gone = FULL.model_copy(update={"test_documents": TestDocuments()})
    assert paired_difference(gone, a, b, 1) is None


def test_a_document_weighs_by_its_events() -> None:
    # The first of two documents has nine times the events of the second.
    documents = TestDocuments(ids=("long", "short"), events=((90,), (10,)))
    protocol = FULL.protocol.model_copy(update={"horizons": (1,)})
    results = FULL.model_copy(update={"test_documents": documents, "protocol": protocol})
    a, b = (
        named(FULL, "ridge").model_copy(update={"document_sums": {"recall@K": sums}})
        for sums in ((((81.0,), (1.0,)),), (((45.0,), (9.0,)),))
    )
    found = paired_difference(results, a, b, 1)
    assert found is not None
    assert found.value == pytest.approx((81 + 1 - 45 - 9) / 100)
    assert (found.low, found.high) == (pytest.approx(-0.8), pytest.approx(0.4))


def test_spread_has_chi_squared_limits() -> None:
    found = spread([0.80, 0.81, 0.82])
    assert found is not None
    assert found.value == pytest.approx(0.01)
    # With two degrees of freedom chi-squared has a closed form: -2 log(1 - p).
    assert found.low == pytest.approx(0.01 * math.sqrt(2 / (-2 * math.log(0.025))), rel=1e-3)
    assert found.high == pytest.approx(0.01 * math.sqrt(2 / (-2 * math.log(0.975))), rel=1e-3)
    assert spread([0.8]) is None
    assert spread_limits(10) == pytest.approx((0.699, 1.755), abs=8e-3)
    assert spread_limits(27) == pytest.approx((0.791, 1.361), abs=2e-3)


def test_intervals_without_width_settle_nothing() -> None:
    assert not excludes_zero(Interval(value=0.2, low=0.2, high=0.2))
    assert not excludes_zero(Interval(value=0.2, low=0.0, high=0.4))
    assert excludes_zero(Interval(value=0.2, low=0.1, high=0.3))
    assert excludes_zero(Interval(value=-0.2, low=-0.3, high=-0.1))
    assert percent(Interval(value=0.2, low=0.2, high=0.2)) == "20.0"
    assert percent(None) == "–"
    assert points(Interval(value=-0.0001, low=-0.01, high=0.01)) == "0.0 [−1.0, +1.0]"


def test_groups_rank_only_like_with_like() -> None:
    found = groups(FULL)
    assert [sees for sees, _ in found] == ["context", "hidden", "token", "routing", "nothing"]
    for sees, part in found:
        values = [result.scores["recall@K"][1].value for result in part]
        assert values == sorted(values, reverse=True)
        assert {result.sees for result in part} == {sees}
    assert len(finished(FULL)) == 19
    probe = ridge(FULL)
    assert probe is not None
    assert probe.name == "ridge"


def test_journey_counts_what_could_be_foreseen() -> None:
    journey = Journey(
        document="d",
        tokens=("a", "b"),
        actual=(((0, 1), (2, -1)), ((3, 4), (5, 6))),
        predictions={"p": {1: ((None, (2, 7)), ((4, 9), (0, 1)))}},
    )
    # The first place is too early, -1 is an empty slot: 2 of (2), (3, 4), (5, 6).
    assert foreseen_share(journey, "p", 1) == (2, 5)
    assert visible(" a\n") == "·a⏎"
