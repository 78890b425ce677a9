"""Studies over cuts of one trace: learning curves, and domains kept out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from specmoe.cli import run_verb
from specmoe.cli.studying import parse_shares
from specmoe.dataset import split_documents
from specmoe.errors import SpecmoeError
from specmoe.report.study_page import render_study
from specmoe.report.study_text import found, study_lines
from specmoe.results import Interval
from specmoe.sources.synthetic import synthetic_trace
from specmoe.suite.cut import Cut, cut_documents
from specmoe.suite.run import JobEvent
from specmoe.suite.study import Conditions, learning_curve, leave_one_domain_out
from specmoe.suite.study_results import DomainStudy, LearningCurve, load_study
from specmoe.suite.train import train_suite
from specmoe.topology import Topology
from specmoe.trace import DocumentRecord, Manifest, Source, Trace, TraceWriter
from study_fixture import EVIL, curve_study
from study_fixture import domain_study as made_up_domains

SMALL = Topology(model_id="synthetic", layers=3, experts=6, top_k=2, hidden_size=8)
HORIZONS = (1, 3)
FAST = Conditions(seeds=(0, 1), horizons=HORIZONS, workers=1)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains that follow one law of routing, and one, ``odd``, that follows another."""
    folder = tmp_path_factory.mktemp("odd")
    options = {"topology": SMALL, "tokens": 40, "determinism": 0.8}
    synthetic_trace(folder / "usual", documents=36, seed=1, domains=3, **options)
    synthetic_trace(folder / "other", documents=12, seed=2, domains=1, **options)
    usual = Trace.open(folder / "usual")
    manifest = Manifest(topology=SMALL, source=Source(kind="test"), fields=usual.manifest.fields)
    with TraceWriter(folder / "trace", manifest) as writer:
        for trace, prefix in ((usual, ""), (Trace.open(folder / "other"), "odd-")):
            for index, document in enumerate(trace.documents):
                domain = "odd" if prefix else document.domain
                writer.add(prefix + document.doc_id, domain, document.text_sha256, trace.read(index))
        writer.add("lonely", "lone wolf", "0" * 64, usual.read(0))
    return folder / "trace"


def documents(*places: tuple[str, str, str]) -> list[DocumentRecord]:
    """Documents by domain, text and group."""
    return [
        DocumentRecord(doc_id=f"d{n:03d}", domain=domain, text_sha256=text, group=group, start=0, tokens=10, crc32={})
        for n, (domain, text, group) in enumerate(places)
    ]


MANY = documents(*((f"dom{n % 5}", f"text{n}", f"group{n // 2}" if n < 40 else "") for n in range(80)))


def test_shares_are_nested_and_nothing_else_moves() -> None:
    whole = split_documents(MANY, 3)
    assert cut_documents(MANY, Cut(seed=3)) == whole
    before: set[int] = set()
    hashes = set()
    for share in (0.125, 0.25, 0.5, 1.0):
        split = cut_documents(MANY, Cut(seed=3, train_share=share))
        train = set(split.parts["train"])
        assert before < train <= set(whole.parts["train"])
        assert len(train) == pytest.approx(share * len(whole.parts["train"]), abs=1)
        for part in ("validation", "test", "held_out_domain"):
            assert split.parts[part] == whole.parts[part]
        for index in train:
            group = MANY[index].group
            assert {i for i in whole.parts["train"] if group and MANY[i].group == group} <= train
        before = train
        hashes.add(split.hash)
    assert len(hashes) == 4


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_shares_out_of_range(share: float) -> None:
    with pytest.raises(SpecmoeError, match="between 0 and 1"):
        cut_documents(MANY, Cut(train_share=share))


def test_a_domain_kept_out_takes_its_copies_and_groups_along() -> None:
    split = cut_documents(MANY, Cut(held_out=("dom1",)))
    normal = cut_documents(MANY, Cut(held_out=()))
    assert normal.parts["held_out_domain"] == ()
    kept_out = {i for i, d in enumerate(MANY) if d.domain == "dom1" and any(i in p for p in normal.parts.values())}
    assert set(split.parts["held_out_domain"]) == kept_out
    groups = {MANY[i].group for i in kept_out} - {""}
    for part in ("train", "validation", "test"):
        assert set(split.parts[part]) <= set(normal.parts[part])
        assert not {i for i in split.parts[part] if MANY[i].domain == "dom1" or MANY[i].group in groups}
    left = set(normal.parts["train"]) - set(split.parts["train"])
    assert all(MANY[i].domain == "dom1" or MANY[i].group in groups for i in left)
    assert split.hash != normal.hash


def test_keeping_everything_out_is_refused() -> None:
    with pytest.raises(SpecmoeError, match="no train document is left"):
        cut_documents(MANY, Cut(held_out=tuple(f"dom{n}" for n in range(5))))


def test_learning_curve(synthetic_path: Path, tmp_path: Path) -> None:
    study = learning_curve(synthetic_path, tmp_path / "study", ["LayerMarkov"], FAST, shares=(0.125, 0.5, 1.0))
    assert load_study(tmp_path / "study" / "learning-curve.json") == study
    assert [p.name for p in study.predictors] == ["LayerMarkov", "Ridge", "TokenMarkov"]
    assert [point.documents for point in study.points] == [2, 8, 16]
    first, _, last = study.points
    assert all(not result.gain for result in first.results)
    # The whole of the training part is the protocol's own split: the same numbers as `train` gives.
    suite = train_suite(synthetic_path, tmp_path / "suite", ["LayerMarkov"], seeds=(0,), horizons=HORIZONS, workers=1)
    assert last.split_hash == suite.split.hash
    assert last.results[0].recall == suite.predictors[0].scores["recall@K"]
    gain, recalls = last.results[0].gain[1], [point.results[0].recall[1].value for point in study.points]
    assert gain.value == pytest.approx(recalls[2] - recalls[1])
    assert gain.low <= gain.value <= gain.high
    # All is done: nothing runs twice.
    events: list[JobEvent] = []
    told = replace(FAST, on_event=events.append)
    again = learning_curve(synthetic_path, tmp_path / "study", ["LayerMarkov"], told, shares=(0.125, 0.5, 1))
    assert all(event.reused for event in events)
    assert again.points == study.points


def test_shares_that_are_the_same_documents_count_once(synthetic_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="two different shares"):
        learning_curve(synthetic_path, tmp_path, ["LayerMarkov"], FAST, shares=(0.01, 0.02))


def test_killed_half_way_it_continues(tmp_path: Path) -> None:
    synthetic_trace(tmp_path / "trace", topology=SMALL, documents=30, tokens=60, determinism=0.8, seed=4)
    arguments = [
        str(tmp_path / "trace"),
        "--only",
        "LayerM*",
        "--seeds",
        "1",
        "--horizons",
        "1,3",
        "--workers",
        "1",
        "--shares",
        "25,100",
    ]
    command = [sys.executable, "-m", "specmoe", "learning-curve", *arguments, "--out", str(tmp_path / "a")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a").glob("cuts/*/jobs/*/job.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / "a" / "learning-curve.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("cuts/*/jobs/*/job.json")}
    assert kept
    for out in ("a", "b"):
        assert run_verb(["learning-curve", *arguments, "--out", str(tmp_path / out)]) == 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    a, b = (load_study(tmp_path / out / "learning-curve.json") for out in ("a", "b"))
    assert isinstance(a, LearningCurve)
    assert isinstance(b, LearningCurve)
    assert a.points == b.points


@pytest.fixture(scope="module")
def domain_study(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainStudy:
    out = tmp_path_factory.mktemp("domains")
    study = leave_one_domain_out(odd, out, ["LayerMarkov", "NextRouter"], FAST)
    assert load_study(out / "domains.json") == study
    return study


def test_only_the_odd_domain_loses(domain_study: DomainStudy) -> None:
    ridge = {kept.domain: next(r for r in kept.results if r.name == "Ridge") for kept in domain_study.domains}
    assert set(ridge) == {"odd", "domain-0", "domain-1", "domain-2"}
    # What the odd domain loses is its own, not that of fewer documents.
    assert ridge["odd"].drop[1].low > 0.3
    assert ridge["odd"].own_drop[1].low > 0.3
    assert all(abs(result.drop[1].value) < 0.05 for domain, result in ridge.items() if domain != "odd")
    for kept in domain_study.domains:
        result = ridge[kept.domain]
        assert result.drop[1].value == pytest.approx(result.seen[1].value - result.unseen[1].value)
        assert set(result.whole) == set(HORIZONS)
        assert kept.train_documents < domain_study.train_documents
        if kept.train_documents < 0.9 * domain_study.train_documents:
            assert kept.matched_documents == kept.train_documents
    # Documents are of one length here, so all together is the mean over documents.
    counts = {kept.domain: kept.test_documents for kept in domain_study.domains}
    mean = sum(ridge[domain].seen[1].value * n for domain, n in counts.items()) / sum(counts.values())
    together = next(result for result in domain_study.together if result.name == "Ridge")
    assert together.seen[1].value == pytest.approx(mean)


def test_what_is_left_out_is_named(domain_study: DomainStudy) -> None:
    assert set(domain_study.left_out) == {"lone wolf"}
    assert {p.name: p.reason for p in domain_study.predictors if p.reason} == {"NextRouter": "the trace has no routers"}
    said = "\n".join(study_lines(domain_study))
    assert "not kept out: lone wolf: " in said
    assert "without a result: NextRouter: the trace has no routers" in said


def test_few_domains_are_refused(synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_trace(tmp_path / "one", topology=SMALL, documents=9, tokens=20, determinism=0.8, seed=1, domains=1)
    assert run_verb(["leave-one-domain-out", str(tmp_path / "one"), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert "the trace has 1 domain; keeping one out needs at least 3" in errors
    assert "Traceback" not in errors
    many = documents(*((f"dom{n}", f"text{n}", "") for n in range(9)))
    with pytest.raises(SpecmoeError, match="none of the 9 domains"):
        leave_one_domain_out(_trace_of(many, tmp_path / "many"), tmp_path / "out", ["LayerMarkov"], FAST)


def _trace_of(records: list[DocumentRecord], folder: Path) -> Path:
    synthetic_trace(
        folder.with_name("source"), topology=SMALL, documents=len(records), tokens=20, determinism=0.8, seed=1
    )
    source = Trace.open(folder.with_name("source"))
    manifest = Manifest(topology=SMALL, source=Source(kind="test"), fields=source.manifest.fields)
    with TraceWriter(folder, manifest) as writer:
        for index, record in enumerate(records):
            writer.add(record.doc_id, record.domain, record.text_sha256, source.read(index))
    return folder


@pytest.mark.parametrize("text", ["", "0,50", "50,150", "a", "-5"])
def test_bad_shares(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["learning-curve", str(tmp_path), "--out", str(tmp_path), f"--shares={text}"]) == 2
    assert "--shares" in capsys.readouterr().err
    assert parse_shares("50,12.5,50") == (0.125, 0.5)


@pytest.mark.parametrize("content", ["", "{}", '{"format": "specmoe-results"}', '{"format": "specmoe-domain-study"}'])
def test_a_damaged_study_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(SpecmoeError):
        load_study(tmp_path / "study.json")


def curve_of(gain: Interval, study: LearningCurve) -> LearningCurve:
    last = study.points[-1]
    results = tuple(result.model_copy(update={"gain": {1: gain}}) for result in last.results[:1])
    return study.model_copy(update={"points": (*study.points[:-1], last.model_copy(update={"results": results}))})


def test_sentences_claim_no_more_than_was_shown() -> None:
    study = curve_study()
    gained = found(curve_of(Interval(value=0.03, low=0.02, high=0.04), study))[0]
    assert gained.startswith("HierarchicalEnsemble gains 3.0 points (2.0 to 4.0) from 50 % to 100 %")
    unclear = found(curve_of(Interval(value=0.01, low=-0.01, high=0.03), study))[0]
    assert "the interval includes 0, so no gain is shown" in unclear
    lost = found(curve_of(Interval(value=-0.03, low=-0.04, high=-0.02), study))[0]
    assert "loses 3.0 points (2.0 to 4.0)" in lost
    assert any(sentence.startswith("Nothing is known beyond") for sentence in found(study))


def test_pages_hold_the_numbers_and_their_charts() -> None:
    curve = curve_study()
    for study in (curve, made_up_domains()):
        page = render_study(study)
        text, _, after = page.partition('<script id="charts" type="application/json">')
        specs = json.loads(after.partition("</script>")[0])
        assert len(specs) >= 4
        for id, spec in specs.items():
            assert f'id="{id}"' in text
            assert spec["datasets"]["rows"]
        assert "http://" not in text
        assert EVIL not in page
        assert study.trace.fingerprint in text
    rows = json.loads(
        render_study(curve).partition('<script id="charts" type="application/json">')[2].partition("<")[0]
    )
    first = rows["chart-curve-0"]["datasets"]["rows"][0]
    assert first["value"] == pytest.approx(100 * curve.points[0].results[0].recall[1].value)
    # Nothing is drawn beyond what was measured.
    counts = {row["documents"] for row in rows["chart-curve-0"]["datasets"]["rows"]}
    assert counts == {point.documents for point in curve.points}
