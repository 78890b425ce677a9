"""``specmoe verdict``: the answer follows from the numbers, and "don't" is one of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specmoe.cli import run_verb
from specmoe.offload.hardware.profile import Compute, Hardware, Link
from specmoe.offload.results import Gain
from specmoe.offload.study import Settings
from specmoe.offload.verdict.decide import Answer, decide
from specmoe.offload.verdict.evidence import Change, Evidence, _break_even
from specmoe.offload.verdict.judge import Judged, judge
from specmoe.offload.verdict.sensitivity import Cell, Precision
from specmoe.offload.verdict.words import verdict_page
from specmoe.sources.synthetic import synthetic_trace
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

SIZE = 1_000_000


def interval(value: float, half: float = 0.0) -> Gain:
    return Gain(value=value, low=value - half, high=value + half, units=10)


def evidence(**changes: Any) -> Evidence:
    """A machine that waits a third of its time, where an oracle gains 40 % and the predictor 20 ± 2 %."""
    numbers: dict[str, Any] = {
        "model": "m",
        "hardware": "h",
        "policy": "lru",
        "held": 32,
        "experts": 128,
        "expert_bytes": SIZE,
        "tokens": 1000,
        "documents": 10,
        "independent": "10 documents",
        "part": "test",
        "tokens_per_second": 10.0,
        "stall_share": 0.33,
        "seconds": 100.0,
        "computing": 67.0,
        "loading": 33.0,
        "miss_ratio": 0.4,
        "enough": 0.75,
        "oracle": interval(0.4, 0.01),
        "bound": 0.45,
        "predictor": "P",
        "admission": "expected-value",
        "gain": interval(0.2, 0.02),
        "precision": 0.6,
        "shuffled": interval(-0.01),
        "break_even": 0.3,
        "changes": (Change(what="eviction by SLRU", gain=interval(0.05, 0.01)),),
        "cells": (
            Cell(factor=1, capacity=32, none=100, oracle=71, predictor=83),
            Cell(factor=2, capacity=32, none=80, oracle=70, predictor=None),
        ),
    }
    return Evidence(**(numbers | changes))


def test_a_clear_gain_means_do() -> None:
    found = decide(evidence())
    assert found.answer is Answer.DO
    assert "50% of what an oracle brings" in found.reason
    assert found.first is not None
    assert found.first.what == "eviction by SLRU"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stall_share": 0.01}, "nothing to hide"),
        ({"oracle": interval(0.02), "loading": 300.0}, "full already"),
        ({"oracle": interval(0.02)}, "no room"),
        ({"gain": interval(0.01, 0.005)}, "too uncertain or comes too late"),
        ({"gain": interval(-0.2, 0.1)}, "too uncertain or comes too late"),
    ],
)
def test_it_can_say_do_not(changes: dict[str, Any], reason: str) -> None:
    found = decide(evidence(**changes))
    assert found.answer is Answer.DO_NOT
    assert reason in found.reason


def test_an_interval_that_holds_the_threshold_settles_nothing() -> None:
    assert decide(evidence(gain=interval(0.03, 0.02))).answer is Answer.OPEN
    assert decide(evidence(gain=interval(0.03, 0.02)), worth=0.06).answer is Answer.DO_NOT
    assert decide(evidence(predictor="", gain=None)).answer is Answer.OPEN


@pytest.mark.parametrize("units", [1, 2, 3, 4])
def test_few_documents_settle_nothing_that_no_bound_proves(units: int) -> None:
    """The whole of a gain of 9.8 % was called certain on one document."""
    words = "one document" if units == 1 else f"{units} documents"
    few = {"documents": units, "independent": words, "oracle": Gain(value=0.4, units=units)}
    changes = (Change(what="eviction by SLRU", gain=Gain(value=0.5, units=units)),)
    for value in (0.098, -0.5, 0.03):
        numbers = evidence(**few, gain=Gain(value=value, units=units), changes=changes)
        found = decide(numbers)
        assert found.answer is Answer.OPEN
        assert found.first is None
        for text in (f"(no interval: {words})", "an interval takes 5", f"this is {words}", "give a trace of more"):
            assert text in found.reason
        page = verdict_page(numbers, found)
        assert "Whether a change that was tried brings more than is asked for is not settled." in page
        assert f"gain in tokens/s (no interval: {words})" in page
        assert "±" not in page
        assert "95 %" not in page
        assert "not settled to be above" in page or numbers.over is None
    # An oracle that gains nothing on so little text shows nothing either; a bound and the lack of waiting do.
    little = few | {"oracle": Gain(value=0.0, units=units), "gain": Gain(value=0.0, units=units)}
    assert decide(evidence(**little)).answer is Answer.OPEN
    assert decide(evidence(**little, bound=0.03)).answer is Answer.DO_NOT
    assert "no more than 3.0%" in decide(evidence(**little, bound=0.03)).reason
    assert decide(evidence(**little, stall_share=0.02)).answer is Answer.DO_NOT
    assert decide(evidence(**few, gain=None, predictor="", unsplit="it is one text")).reason.endswith("it is one text")


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch": 8}, "take smaller batches (--batch)"),
        ({}, "of more groups"),
        ({"part": "test"}, "three in ten are the test part"),
    ],
)
def test_what_to_do_about_few_units(changes: dict[str, Any], advice: str) -> None:
    few = {"oracle": Gain(value=0.4, units=2), "gain": Gain(value=0.2, units=2), "part": "all"}
    assert advice in decide(evidence(**(few | changes))).reason
    assert "three in ten" not in decide(evidence(**few)).reason


def test_a_gain_on_text_that_was_learned_from_is_not_enough_to_do_it() -> None:
    found = decide(evidence(learned=7, part="all"))
    assert found.answer is Answer.OPEN
    assert "7 of the 10 documents are ones that it learned from" in found.reason
    assert "7 of the 10 documents" in verdict_page(evidence(learned=7), found)
    # What does not even gain there, gains nowhere.
    assert decide(evidence(learned=7, gain=interval(0.0, 0.01))).answer is Answer.DO_NOT


def test_another_admission_that_gains_is_not_hidden() -> None:
    weak = {"gain": interval(0.001, 0.005)}
    top = Change(what="top:2", gain=interval(0.1, 0.01))
    found = decide(evidence(**weak, admissions=(top, Change(what="confidence:0.5", gain=interval(0.02, 0.01)))))
    assert found.answer is Answer.OPEN
    assert "by top:2, which was chosen on this very text" in found.reason
    assert (
        decide(evidence(**weak, admissions=(Change(what="top:2", gain=interval(0.1, 0.08)),))).answer is Answer.DO_NOT
    )


def test_waiting_is_compared_as_the_gain_that_it_could_be() -> None:
    # 2.95 % of the time is 3.04 % more tokens a second without it.
    assert decide(evidence(stall_share=0.0295)).answer is Answer.DO
    assert decide(evidence(stall_share=0.029)).answer is Answer.DO_NOT
    assert decide(evidence(stall_share=0.0, gain=interval(0.0)), worth=0.0).answer is Answer.DO_NOT


def test_the_oracles_own_interval_counts() -> None:
    # Between 1 and 5 % it is open whether perfect knowledge would do, and then the predictor decides.
    assert decide(evidence(oracle=interval(0.02, 0.03), gain=interval(0.025, 0.02))).answer is Answer.OPEN
    assert decide(evidence(oracle=interval(0.02, 0.01), gain=interval(0.01, 0.01))).answer is Answer.DO_NOT


def test_the_best_of_the_changes_that_are_sure_comes_first() -> None:
    unsure, sure = Change(what="unsure", gain=interval(0.5, 0.49)), Change(what="sure", gain=interval(0.1, 0.01))
    found = decide(evidence(changes=(unsure, sure, Change(what="less", gain=interval(0.05, 0.01)))))
    assert found.first == sure
    page = verdict_page(evidence(changes=(unsure,)), decide(evidence(changes=(unsure,))))
    assert "is not settled." in page
    none = evidence(changes=(Change(what="no", gain=interval(0.01, 0.01)),))
    assert "No change that was tried brings more than is asked for." in verdict_page(none, decide(none))


@pytest.mark.parametrize(
    ("changes", "true", "false"),
    [
        ({"shuffled": interval(0.05, 0.01), "over": interval(0.02, 0.01)}, "are above layer frequency", "as it should"),
        ({"shuffled": interval(0.05, 0.01), "over": interval(0, 0.01)}, "not shown to be above layer f", "are above"),
        ({"shuffled": interval(0, 0.01), "over": interval(0.1, 0.01)}, "not shown to be above no prefet", "are above"),
        ({"enough": None, "curve": True}, "every cache that was tried misses more than 10 %", "not known"),
        ({"enough": None, "curve": False}, "not known, as no other cache was tried", "every cache"),
        ({"break_even": None}, "does not pay even where all of them are right", "at any recall"),
        ({"break_even": 0.0}, "pays at any recall that was tried", "loses"),
        ({"loading": 300.0}, "with these loads it cannot keep up", "whatever is foreseen"),
        ({"documents": 1}, "1,000 tokens of 1 document,", "1 documents"),
    ],
)  # fmt: skip
def test_the_reasoning_is_true_of_its_numbers(changes: dict[str, Any], true: str, false: str) -> None:
    numbers = evidence(**changes)
    page = verdict_page(numbers, decide(numbers))
    assert true in page
    assert false not in page


def test_what_cannot_be_built_is_never_advised() -> None:
    future = Change(what="eviction by Belady (knows the future: …)", gain=interval(0.9), buildable=False)
    small = Change(what="eviction by SLRU", gain=interval(0.04, 0.03))
    assert decide(evidence(changes=(future, small))).first is None


@pytest.mark.parametrize(
    ("gains", "found"),
    [
        ((-0.2, -0.1, 0.1, 0.3), pytest.approx(0.5)),
        ((0.1, 0.2, 0.3, 0.4), 0.0),
        ((-0.4, -0.3, -0.2, -0.1), None),
        ((0.1, -0.1, 0.1, 0.2), pytest.approx(0.5)),
    ],
)
def test_break_even_recall(gains: tuple[float, ...], found: float | None) -> None:
    recalls = (0.2, 0.4, 0.6, 1.0)
    assert _break_even(tuple(Precision(recall=r, gain=g) for r, g in zip(recalls, gains, strict=True))) == found


def test_the_page_shows_answer_reason_and_table() -> None:
    numbers = evidence()
    page = verdict_page(numbers, decide(numbers))
    assert page.startswith("# Prefetch experts? Do.")
    for text in (
        "ρ = F / C",
        "T / max(C, F) = 1.49",
        "about 30%",
        "| × 1 | +41 / +20 |",
        "| × 2 | +14 |",
        "+20.0 ± 2.0 %",
    ):
        assert text in page, text


def hardware(bandwidth: float) -> Hardware:
    return Hardware(
        name="made up",
        description="made up",
        source="made up for tests",
        links=(Link(name="link", bandwidth=bandwidth, latency=1e-6),),
        compute=Compute(memory_bandwidth=1e12, flops=1e13, kernel_seconds=1e-4),
    )


def judged(trace: Path, out: Path, bandwidth: float) -> Judged:
    settings = Settings(
        hardware(bandwidth),
        expert_bytes=SIZE,
        predictors=("LayerMarkov",),
        policies=("lru", "lfu"),
        prediction_seconds=0.0,
        max_tokens=600,
        horizons=(1, 2),
    )
    return judge(trace, out, settings, worth=0.03)


def test_a_link_that_is_fast_enough_needs_no_prefetching(synthetic_path: Path, tmp_path: Path) -> None:
    found = judged(synthetic_path, tmp_path, 1e13)
    assert found.verdict.answer is Answer.DO_NOT
    assert found.evidence.stall_share < 0.03
    assert (tmp_path / "verdict.md").read_text() == found.page


def test_numbers_of_a_real_run_agree_with_each_other(synthetic_path: Path, tmp_path: Path) -> None:
    found = judged(synthetic_path, tmp_path, 1e10)
    numbers = found.evidence
    assert numbers.gain is not None
    assert numbers.bound is not None
    assert numbers.gain.value <= numbers.oracle.value + 1e-9 <= numbers.bound + 2e-6
    own = next(cell for cell in numbers.cells if cell.factor == 1 and cell.capacity == numbers.held)
    assert own.none == pytest.approx(numbers.seconds, rel=1e-9)
    assert own.predictor is not None
    assert own.none / own.predictor - 1 == pytest.approx(numbers.gain.value, abs=2e-6)
    # Faster links and larger caches are never slower without prefetching.
    for cell in numbers.cells:
        for other in numbers.cells:
            if other.factor >= cell.factor and other.capacity >= cell.capacity:
                assert other.none <= cell.none * (1 + 1e-9)
    before = (tmp_path / "sensitivity.json").stat().st_mtime_ns
    again = judged(synthetic_path, tmp_path, 1e10)
    assert again.evidence == numbers
    assert (tmp_path / "sensitivity.json").stat().st_mtime_ns == before


def trace_of(path: Path, documents: int, groups: int = 0) -> Path:
    """Markov routing in documents of 20 tokens; ``groups``: how many groups they are dealt to, 0 for none."""
    topology = Topology(model_id="m", layers=4, experts=8, top_k=2, hidden_size=4, bytes_per_expert=SIZE)
    synthetic_trace(path / "made", topology=topology, documents=documents, tokens=20, determinism=0.9, seed=1)
    made = Trace.open(path / "made")
    fields = ("token_ids", "phase", "expert_ids")
    with TraceWriter(path / "trace", Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        for number, each in enumerate(made.documents):
            record = made.read(number, ())
            plain = RoutingRecord(token_ids=record.token_ids, phase=record.phase, expert_ids=record.expert_ids)
            group = f"conversation {number % groups}" if groups else ""
            writer.add(each.doc_id, "d", each.text_sha256, plain, group=group)
    return path / "trace"


@pytest.mark.parametrize(
    ("documents", "groups", "options", "code", "texts"),
    [
        # The test part of three documents is one.
        (3, 0, ["--predictor", "LayerMarkov"], 3, ("(no interval: one document)", "this is one document")),
        # One text: nothing can be split, so all of it is replayed, and nobody foresees.
        (1, 0, [], 3, ("no predictor was simulated: the trace has 1 distinct document(s)",)),
        (1, 0, ["--documents", "all"], 3, ("no predictor was simulated: the trace has 1 distinct document(s)",)),
        (12, 0, ["--documents", "all"], 3, ("no predictor was simulated: all documents are replayed", "12 documents)")),
        # Twelve turns of two conversations are two units, not twelve.
        (12, 2, [], 3, ("no interval: 2 groups of documents",)),
    ],
)  # fmt: skip
def test_little_text_is_not_settled(
    documents: int,
    groups: int,
    options: list[str],
    code: int,
    texts: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = trace_of(tmp_path, documents, groups)
    profile = tmp_path / "slow.json"
    hardware(1e10).save(profile)
    verb = ["verdict", str(trace), "--hardware", str(profile), "--out", str(tmp_path / "v"), *options]
    assert run_verb(verb) == code
    shown = capsys.readouterr().out
    assert shown.startswith("# Prefetch experts? Not settled.")
    for text in texts:
        assert text in shown, text
    kept = json.loads((tmp_path / "v" / "verdict.json").read_text())
    oracle = kept["evidence"]["oracle"]
    assert oracle["units"] == (groups or (1 if documents < 4 else documents))
    assert (oracle["low"] is None) == (oracle["units"] < 5)
    assert kept["exit_code"] == code


def test_the_verb_answers_scripts(synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "fast.json"
    hardware(1e13).save(profile)
    verb = [
        "verdict",
        str(synthetic_path),
        "--hardware",
        str(profile),
        "--expert-bytes",
        str(SIZE),
        "--max-tokens",
        "300",
    ]
    assert run_verb([*verb, "--predictor", "LayerMarkov", "--out", str(tmp_path / "v"), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["answer"] == "do_not"
    assert shown["exit_code"] == 1
    assert json.loads((tmp_path / "v" / "verdict.json").read_text()) == shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--hardware", "rtx-409"], "did you mean"),
        (["--capacity", "many"], "capacity 'many' cannot be read"),
        (["--predictor", "RidgeMarkov"], "did you mean"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    changes: list[str], message: str, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["verdict", str(synthetic_path), "--out", str(tmp_path / "v"), "--expert-bytes", str(SIZE)]
    assert run_verb([*verb, *changes]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1]
