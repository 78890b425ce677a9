"""``specmoe verdict``: the answer follows from the numbers, and "don't" is one of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specmoe.cli import run_verb
from specmoe.offload.hardware.profile import Compute, Hardware, Link
from specmoe.offload.study import Settings
from specmoe.offload.verdict.decide import Answer, decide
from specmoe.offload.verdict.evidence import Change, Evidence, _break_even
from specmoe.offload.verdict.judge import Judged, judge
from specmoe.offload.verdict.sensitivity import Cell, Precision
from specmoe.offload.verdict.words import verdict_page
from specmoe.results import Interval

SIZE = 1_000_000


def interval(value: float, half: float = 0.0) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


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


def test_what_cannot_be_built_is_never_advised() -> None:
    future = Change(what="eviction by Belady (knows the future: …)", gain=interval(0.9))
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
