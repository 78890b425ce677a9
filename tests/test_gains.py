"""Gains: what is resampled, when there is an interval, and that every sentence about them is true of its numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from results_fixture import full_results
from specmoe.offload.charts import bandwidth_chart, recall_chart
from specmoe.offload.comparing import (
    FEWEST_UNITS,
    _student,
    compared,
    gain_between,
    resampling_units,
)
from specmoe.offload.hardware.profile import Compute, Hardware, Link
from specmoe.offload.page import render_simulation
from specmoe.offload.results import (
    DemandFacts,
    Gain,
    MachineFacts,
    PredictorFacts,
    RunResult,
    SimulationResults,
)
from specmoe.offload.words import found, gain_sentence, gain_text, run_table
from specmoe.trace import DocumentRecord

DOCUMENTS = 8
SIZE = 1_000_000


def document(number: int, group: str = "", text: str | None = None) -> DocumentRecord:
    return DocumentRecord(
        doc_id=f"d{number}",
        domain="d",
        text_sha256=str(number) if text is None else text,
        group=group,
        start=0,
        tokens=10,
        crc32={},
    )


# --- what is resampled ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "batch", "units"),
    [
        (("", "", ""), 1, (0, 1, 2)),
        (("a", "b", "a", "b", "c"), 1, (0, 1, 0, 1, 2)),
        (("a", "", "a", ""), 1, (0, 1, 0, 2)),
        # Batches of two: (a, b), (c, d), (b, e): the first and the last share a group.
        (("a", "b", "c", "d", "b", "e"), 2, (0, 1, 0)),
        # A chain: (a, b), (b, c), (c, d).
        (("a", "b", "b", "c", "c", "d"), 2, (0, 0, 0)),
        # A chain that closes late, and a batch that is not full.
        (("a", "b", "c", "d", "e", "f", "a", "c", "g"), 2, (0, 0, 1, 0, 2)),
        (("a", "a", "b"), 4096, (0,)),
    ],
)
def test_documents_of_one_group_are_one_unit(groups: tuple[str, ...], batch: int, units: tuple[int, ...]) -> None:
    assert resampling_units([document(i, group) for i, group in enumerate(groups)], batch) == units


def test_copies_of_a_text_are_one_unit_and_a_text_is_no_group() -> None:
    copies = [document(0, text="x"), document(1), document(2, text="x"), document(3, text=""), document(4, text="")]
    assert resampling_units(copies) == (0, 1, 0, 2, 3)
    assert resampling_units([document(0, group="x", text="1"), document(1, text="x")]) == (0, 1)
    # As for a split, groups are not bound together by a text that both hold.
    assert resampling_units([document(0, group="a", text="t"), document(1, group="b", text="t")]) == (0, 1)


# --- intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 2, 3, 4])
def test_few_units_have_no_interval(units: int) -> None:
    gain = gain_between([1.1] * units, [1.0] * units, range(units))
    assert gain == Gain(value=0.1, low=None, high=None, units=units)
    assert gain.settled == 0
    assert json.loads(gain.model_dump_json()) == {"value": 0.1, "low": None, "high": None, "units": units}
    assert "NaN" not in gain.model_dump_json()
    # However many documents they are.
    many = gain_between([1.1] * 100, [1.0] * 100, [i % units for i in range(100)])
    assert many == gain


def test_units_are_resampled_whole() -> None:
    # Half of the documents gain 20 %, half nothing. A group may hold both kinds, or one.
    theirs, ours = [1.2, 1.0] * 50, [1.0] * 100
    alone = gain_between(theirs, ours, range(100))
    mixed = gain_between(theirs, ours, [place // 20 for place in range(100)])
    apart = gain_between(theirs, ours, [place % 2 + 2 * (place // 20) for place in range(100)])
    assert alone.value == mixed.value == apart.value == 0.1
    assert alone.low is not None
    assert 0.07 < alone.low < 0.085
    # Each of five groups is half and half, so they do not differ at all.
    assert (mixed.low, mixed.high, mixed.units) == (0.1, 0.1, 5)
    assert apart.low is not None
    assert apart.low < 0.05
    assert apart.units == 10


def test_a_gain_is_that_of_all_seconds_together() -> None:
    gain = gain_between([1.0, 2.0, 3.0, 4.0, 10.0], [1.0, 1.0, 3.0, 4.0, 7.0], range(5))
    assert gain.value == 0.25
    assert gain.low is not None
    assert gain.high is not None
    assert gain.low < 0.25 < gain.high <= 1.0


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.7764), (5, 2.5706), (9, 2.2622), (19, 2.0930), (1000, 1.9623)])
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert _student(freedom) == pytest.approx(quantile, abs=0.01)


@pytest.mark.parametrize(("units", "least"), [(FEWEST_UNITS, 0.88), (8, 0.91), (30, 0.91)])
def test_intervals_hold_the_truth_nearly_as_often_as_they_say(units: int, least: float) -> None:
    """Percentiles that are not moved out would hold it in 82, 88 and 93 %."""
    rng = np.random.default_rng(units)
    held = 0
    for _ in range(600):
        theirs = rng.lognormal(0, 0.5, units)
        gain = gain_between(theirs.tolist(), (theirs / (1 + rng.normal(0.1, 0.03, units))).tolist(), range(units))
        assert gain.low is not None
        assert gain.high is not None
        held += gain.low <= 0.0992 <= gain.high
    assert least < held / 600 < 0.975


def test_how_gains_are_written() -> None:
    sure, none = Gain(value=0.098, low=0.09, high=0.11, units=9), Gain(value=-0.0981, units=1)
    assert gain_text(sure) == "+9.8 ± 1.0"
    assert gain_text(none) == "−9.8"
    assert gain_text(Gain(value=-0.0001, units=1)) == "0.0"
    assert gain_sentence(sure, "9 documents") == "+9.8 % (95 % interval +9.0 to +11.0, 9 documents)"
    assert gain_sentence(none, "one document") == "−9.8 % (no interval: one document)"


# --- sentences -----------------------------------------------------------------------------------------


def made_run(kind: str, gain: float, prefetched: int = 100, documents: int = DOCUMENTS, **facts: Any) -> RunResult:
    """A run that gains so much over ten seconds a document; every document differs a little, but for the baseline."""
    spread = [1 + (0.001 * (-1) ** i if gain and documents > 1 else 0) for i in range(documents)]
    seconds = [10 * each / (1 + gain) for each in spread]
    policy = facts.pop("policy", "belady" if kind == "oracle" else "lru")
    admission = facts.pop("admission", "" if kind in {"none", "oracle"} else "expected-value")
    predictor = facts.pop("predictor", "" if kind in {"none", "oracle"} else "P")
    return RunResult(
        key="/".join(filter(None, (kind, predictor, policy, admission, str(facts.get("x", ""))))),
        fingerprint="",
        kind=kind,  # type: ignore[arg-type]
        policy=policy,
        admission=admission,
        predictor=predictor,
        horizons=(1,),
        recall={1: 0.5} if predictor else {},
        tokens=100,
        seconds=sum(seconds),
        compute=40.0,
        stall=sum(seconds) - 40.0,
        link_seconds=(30.0,),
        loading=40.0,
        counts={"decode": {"misses": 40}},
        largest=4,
        hit_rate=0.5,
        demand_bytes=40 * SIZE,
        prefetch_bytes=0 if kind == "none" else prefetched * SIZE,
        used_bytes=0,
        late_bytes=0,
        wasted_bytes=0,
        cancelled_bytes=0,
        group_seconds=tuple(seconds),
        **facts,
    )


def simulation(
    runs: Sequence[RunResult],
    *,
    predictors: Sequence[tuple[str, float]] = (("P", 0.5),),
    documents: int = DOCUMENTS,
    timed: str = "given",
    seconds: float = 1e-5,
    bound: float = 60.0,
    **facts: Any,
) -> SimulationResults:
    """A simulation of these runs and a baseline."""
    example = full_results()
    link = Link(name="link", bandwidth=1e10, latency=1e-6)
    every = (made_run("none", 0.0, documents=documents), *runs)
    demand = DemandFacts(
        part=facts.pop("part", "test"),
        documents=tuple(f"d{i}" for i in range(documents)),
        replay="decode",
        batch=1,
        prefill_chunk=512,
        tokens=100,
        steps=100,
        events=200,
        accesses=400,
        prefill_steps=0,
        groups=documents,
        units=facts.pop("units", tuple(range(documents))),
        learned=facts.pop("learned", 0),
    )
    results = SimulationResults(
        complete=True,
        made=example.made,
        trace=example.trace,
        split_hash="abc",
        demand=demand,
        machine=MachineFacts(
            hardware=Hardware(
                name="h",
                description="h",
                source="h",
                links=(link,),
                compute=Compute(memory_bandwidth=1e12, flops=1e13, kernel_seconds=1e-4),
            ),
            expert_bytes=SIZE,
            capacity=4,
            experts=16,
            asked="25%",
            per_layer=False,
            host_capacity=None,
            policy="lru",
            layer_seconds=1.0,
            token_layer_seconds=0.0,
            expert_seconds=0.0,
            token_seconds=0.0,
            other_seconds=0.0,
            compute=40.0,
            bound=bound,
        ),
        horizons=(1,),
        predictors=tuple(
            PredictorFacts(name=n, learned=False, seed=0, validation=v, seconds=seconds, timed=timed)  # type: ignore[arg-type]
            for n, v in predictors
        ),
        best=predictors[0][0] if predictors else "",
        admission="expected-value",
        **facts,
    )
    return results.model_copy(update={"runs": compared(every, "lru", demand.units)})


ORACLE = made_run("oracle", 0.4)
PREDICTOR = made_run("predictor", 0.2, prediction_seconds=1e-5)


def control(shuffled: float, frequency: float, documents: int = DOCUMENTS) -> list[RunResult]:
    return [
        made_run("oracle", 0.4, documents=documents),
        made_run("predictor", 0.2, documents=documents),
        made_run("shuffled", shuffled, documents=documents),
        made_run("frequency", frequency, predictor="LayerFrequency", documents=documents),
    ]


IDLE, WORTH = "nothing that P foresees was prefetched", "Nothing was worth prefetching"


@pytest.mark.parametrize(
    ("results", "true", "false"),
    [
        # The control is held against frequencies and against nothing, by intervals.
        (
            simulation(control(0.05, 0.06)),
            ("control, comes to +5.0 % (95 % interval", "LayerFrequency with the same admission to +6.0 %",
             "is not shown to be above it, as it should be"),
            ("should not", "not settled"),
        ),
        (
            simulation(control(0.05, 0.01)),
            ("is above it by +4.0 % (95 % interval", "more than the frequencies of the training part explain"),
            ("as it should be",),
        ),
        (
            simulation(control(-0.02, -0.05)),
            ("comes to −2.0 %", "the control is not shown to be above no prefetching, as it should be"),
            ("above it by", "gains −"),
        ),
        (
            simulation(control(0.05, 0.01, 4), documents=4),
            ("+5.0 % (no interval: 4 documents)", "whether it is above both that and no prefetching is not settled"),
            ("as it should be", "above it by", "95 % interval"),
        ),
        # What prefetched nothing: every admission of a predictor, or one.
        (
            simulation([ORACLE, PREDICTOR, made_run("predictor", 0.1, 0, admission="top:2")]),
            ("By top:2 " + IDLE,),
            (WORTH,),
        ),
        (
            simulation([ORACLE, made_run("predictor", 0.0, 0), made_run("predictor", 0.1, 4500, admission="top:2")]),
            ("By expected-value " + IDLE,),
            (WORTH,),
        ),
        (
            simulation(
                [ORACLE, made_run("predictor", 0.0, 0), made_run("predictor", 0.0, 0, admission="top:2"),
                 made_run("predictor", 0.1, predictor="Q")],
                predictors=(("P", 0.5), ("Q", 0.4)),
            ),
            (WORTH + " by P, whatever the admission", "--predictor-seconds 0"),
            (IDLE, "by P, Q"),
        ),
        (
            simulation([ORACLE, made_run("predictor", 0.0, 0)], seconds=0.0),
            (WORTH + " by P, whatever the admission: too little is missing, the predictions are too weak.",),
            ("--predictor-seconds",),
        ),
        # A run that prefetches nothing because the predictor only evicts is no admission.
        (
            simulation([ORACLE, PREDICTOR, made_run("predictor", 0.0, 0, admission="", policy="predicted")]),
            (),
            (WORTH, IDLE),
        ),
        # Verbs follow the sign.
        (simulation([made_run("oracle", 0.4)]), ("Belady's rule, gains +40.0 % (95 % interval",), ("loses",)),
        (simulation([made_run("oracle", -0.01)]), ("Belady's rule, loses −1.0 % (95 % interval",), ("gains −",)),
        (simulation([made_run("oracle", 0.0)]), ("Belady's rule, changes nothing: 0.0 %",), ("gains", "loses")),
        # Best by the validation part, where that was a choice.
        (simulation([ORACLE, PREDICTOR]), ("P with admission by expected-value: +20.0 %",), ("validation part",)),
        (
            simulation([ORACLE, PREDICTOR], predictors=(("P", 0.5), ("Q", 0.4))),
            ("P, the best on the validation part, with admission",),
            (),
        ),
        (simulation([ORACLE, PREDICTOR], predictors=(("P", 0.0), ("Q", 0.0))), (), ("the best on the validation",)),
        # Shares of the oracle's and times only where they mean something.
        (simulation([ORACLE, PREDICTOR]), ("of the time that the oracle saves; a prediction takes 10 µs",), ()),
        (
            simulation([ORACLE, made_run("predictor", -0.1)], timed="unknown"),
            ("counts as nothing for: P",),
            ("of the time that the oracle saves", "; a prediction takes"),
        ),
        (simulation([made_run("oracle", -0.1), PREDICTOR]), (), ("of the time that the oracle saves",)),
        # Other policies.
        (
            simulation([made_run("none", 0.02, policy="lfu"), made_run("none", 0.01, policy="sieve")]),
            ("LFU does best: +2.0 %", "chosen on these very documents"),
            (),
        ),
        (
            simulation([made_run("none", 0.0, policy="lfu"), made_run("none", 0.0, policy="sieve")]),
            ("all come to the same: 0.0 %",),
            ("does best", "chosen on"),
        ),
        (
            simulation([made_run("none", -0.02, policy="lfu")]),
            ("The other eviction policy without prefetching, LFU: −2.0 %",),
            ("does best", "chosen on"),
        ),
        # How much text.
        (
            simulation([made_run("oracle", 0.4, documents=1)], documents=1, predictors=(), unsplit="it is one text"),
            ("100 tokens of 1 test document on", "No gain has an interval: one document is too little",
             "which takes 5", "No predictor was simulated: it is one text.", "+40.0 % (no interval: one document)"),
            ("documents on", "95 %"),
        ),
        (
            simulation([ORACLE], predictors=(), units=(0, 0, 0, 0, 1, 1, 1, 1)),
            ("No gain has an interval: 2 groups of documents are too little", "No predictor was simulated."),
            ("95 %",),
        ),
        (
            simulation([ORACLE, PREDICTOR], learned=6, part="all"),
            ("6 of the 8 documents are ones that the predictors learned from", "tokens of 8 documents on"),
            ("No gain",),
        ),
        (simulation([ORACLE, PREDICTOR]), (), ("learned from", "No gain has")),
        # Bounds.
        (simulation([ORACLE], bound=60.0), ("Nothing can gain more than 33.3 %", "could gain 100.0 %"), ()),
        (simulation([ORACLE], bound=80.0 + 1e-9), ("Nothing can gain more than 0.0 %",), ("-0.0", "−0.0 %")),
    ],
)  # fmt: skip
def test_every_sentence_is_true_of_its_numbers(
    results: SimulationResults, true: tuple[str, ...], false: tuple[str, ...]
) -> None:
    said = "\n".join(found(results))
    for text in true:
        assert text in said, f"{text!r} is missing:\n{said}"
    for text in false:
        assert text not in said, f"{text!r} is false:\n{said}"


def test_tables_charts_and_page_say_when_there_is_no_interval() -> None:
    sweep = [
        made_run("none", 0.0, documents=1, group="bandwidth", x=2.0),
        made_run("predictor", 0.1, documents=1, group="bandwidth", x=2.0),
        made_run("recall", 0.1, documents=1, predictor="", group="recall", x=0.5),
    ]
    one = simulation([*control(0.05, 0.01, 1), *sweep], documents=1)
    eight = simulation(control(0.05, 0.01))
    columns, rows = run_table(one)
    assert "gain, % (no interval: one document)" in columns
    assert [row[4] for row in rows][:2] == ["0.0", "+40.0"]
    assert not any("±" in cell for row in rows for cell in row)
    columns, rows = run_table(eight)
    assert "gain, % (95 % interval over 8 documents)" in columns
    assert any("±" in row[4] for row in rows)
    page = render_simulation(one)
    assert "no interval: one document" in page
    assert "+40.0 % (no interval: one document)" in page
    labels = json.dumps([bandwidth_chart(one), recall_chart(one)], ensure_ascii=False)
    assert "+10.0 %, no interval" in labels
    assert "NaN" not in one.model_dump_json()
    assert json.loads(one.model_dump_json())["runs"][1]["against"]["gain"]["low"] is None


def test_predictors_beside_the_line_are_spoken_of_only_where_there_are_some() -> None:
    sweep = [made_run("recall", 0.1, predictor="", group="recall", x=0.5)]
    assert "Beside it the predictors" in render_simulation(simulation([ORACLE, PREDICTOR, *sweep]))
    assert "Beside it the predictors" not in render_simulation(simulation([ORACLE, *sweep], predictors=()))
