"""What a hostile and an unlucky user gives to the verbs: each row ends in one line that says what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from results_fixture import full_results
from specmoe.cli import options, run_verb
from specmoe.offload.hardware.profile import ready_hardware
from specmoe.topology import LARGEST_EXPERT, Topology
from specmoe.trace import Manifest, RoutingRecord, Source, TraceWriter


@dataclass(frozen=True)
class Case:
    """One row: what is done to the folder first, the command, and what must be said.

    ``{t}`` in a command is a sound trace, ``{d}`` the folder that ``make`` was given, ``{o}`` one that is not there.
    """

    name: str
    command: str
    words: tuple[str, ...]
    make: Callable[[Path], object] = lambda folder: None
    code: int = 2


def traced(folder: Path, experts: int = 8, layers: int = 2, nothing: bool = False, **facts: Any) -> None:
    """A trace of 8 documents of 24 tokens without logits, in ``folder/t``; ``nothing``: no token is routed."""
    topology = Topology(model_id="made", layers=layers, experts=experts, top_k=2, hidden_size=8, **facts)
    fields = ("token_ids", "phase", "expert_ids")
    generator = torch.Generator().manual_seed(0)
    with TraceWriter(folder / "t", Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        for document in range(8):
            ids = torch.rand(24, layers, min(experts, 64), generator=generator).topk(2, -1).indices.short()
            record = RoutingRecord(
                token_ids=torch.arange(24, dtype=torch.int32),
                phase=torch.zeros(24, dtype=torch.uint8),
                expert_ids=torch.full_like(ids, -1) if nothing else ids,
            )
            writer.add(f"d{document}", "a", f"{document}", record)


def recipe(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "r.json").write_text(json.dumps({"TinySpeculationModel": changes}))


SHARES = ",".join(f"{n / 10:g}" for n in range(1, 200))
TRAIN = "train {t} --out {o} --seeds 1 --workers 1"
SIMULATE = "simulate {t} --out {o} --expert-bytes 1000"

SIZES = [
    Case("a range of horizons as long as memory", f"{TRAIN} --horizons 1-99999999999", ("--horizons", "1 and 1024")),
    Case("the same of simulate", f"{SIMULATE} --horizons 1-99999999999", ("--horizons", "1 and 1024")),
    Case("the same from below", f"{TRAIN} --horizons=-99999999999-4", ("--horizons",)),
    Case("a horizon of many digits", f"{TRAIN} --horizons {'9' * 5000}", ("--horizons",)),
    Case("tables of 32,767 experts", "train {d}/t --out {o} --seeds 1 --workers 1 --only LayerMarkov",
         ("LayerMarkov", "GB of memory"), lambda folder: traced(folder, experts=32767, layers=4)),
    Case("logits of 32,767 experts in 4,096 layers", "train {d}/t --out {o} --seeds 1 --workers 1 --only Tiny*",
         ("24 tokens, 4096 layers × 32767 experts", "GB of memory", "--horizons"),
         lambda folder: traced(folder, experts=32767, layers=4096)),
    Case("more seeds than anybody waits for", "train {t} --out {o} --seeds 999999999999", ("--seeds",)),
    Case("workers", "train {t} --out {o} --workers 9999999999", ("--workers",)),
    Case("experts in the cache", f"{TRAIN} --cache-experts 99999999999", ("cache of 99999999999 experts", "8 (all)")),
    Case("a batch", f"{SIMULATE} --batch 99999999999", ("--batch",)),
    Case("a chunk of a prompt", f"{SIMULATE} --prefill-chunk {1 << 70}", ("--prefill-chunk",)),
    Case("bytes of an expert", f"simulate {{t}} --out {{o}} --expert-bytes {1 << 70}", ("--expert-bytes",)),
    Case("bytes of an expert in a manifest", "simulate {d}/t --out {o}", ("bytes_per_expert", "less than or equal"),
         lambda folder: (traced(folder, bytes_per_expert=7), edited(folder / "t", bytes_per_expert=1 << 70))),
    Case("a capacity of many digits", f"{SIMULATE} --capacity {'9' * 400}", ("capacity of 400 digits",)),
    Case("the same as a size", f"{SIMULATE} --capacity {'9' * 400}GB", ("capacity of 400 digits",)),
    Case("a timeline", f"{SIMULATE} --timeline 99999999999", ("--timeline",)),
    Case("tokens of a document", f"collect --out {{o}} --tokens-per-document {1 << 70}", ("--tokens-per-document",)),
    Case("tokens to generate", f"collect --out {{o}} --generate {1 << 70}", ("--generate",)),
    Case("a context", f"pretrain --out {{o}} --context {1 << 40}", ("--context",)),
    Case("a vocabulary", f"pretrain --out {{o}} --vocabulary {1 << 40}", ("--vocabulary",)),
    Case("a batch of sequences", f"pretrain --out {{o}} --batch {1 << 40}", ("--batch",)),
    Case("shares without end", f"learning-curve {{t}} --out {{o}} --shares {SHARES}",
         ("199 shares", "at most 100")),
    Case("a window in a recipe", f"{TRAIN} --recipes {{d}}/r.json", ("window is 100000000", "at most 1e+06"),
         recipe(window=100_000_000)),
    Case("trials", "tune {t} --out {o} --only Tiny* --trials 99999999999", ("--trials",)),
]  # fmt: skip

NUMBERS = [
    Case("an infinite bandwidth", f"{SIMULATE} --bandwidth 1e999", ("--bandwidth", "inf")),
    Case("a bandwidth of NaN", f"{SIMULATE} --bandwidth nan", ("--bandwidth", "nan")),
    Case("an infinite latency", "verdict {t} --out {o} --latency inf", ("--latency", "inf")),
    Case("seconds of NaN", f"{SIMULATE} --predictor-seconds nan", ("--predictor-seconds",)),
    Case("seconds without end", "verdict {t} --out {o} --predictor-seconds 1e999", ("--predictor-seconds",)),
    Case("a worth of NaN", "verdict {t} --out {o} --worth nan", ("--worth",)),
    Case("an infinite temperature", "collect --out {o} --generate 4 --temperature inf", ("--temperature", "inf")),
    Case("a seed beyond 64 bits", f"collect --out {{o}} --seed {1 << 64}", ("--seed",)),
    Case("a seed below 64 bits", f"collect --out {{o}} --seed={-(1 << 64)}", ("--seed",)),
    Case("a seed of pretraining", f"pretrain --out {{o}} --seed {1 << 64}", ("--seed",)),
    Case("a seed that proposals cannot take", "tune {t} --out {o} --only Tiny* --seed 5000", ("--seed",)),
    Case("a timeout of NaN", "tune {t} --out {o} --only Tiny* --timeout nan", ("--timeout",)),
    Case("a learning rate of NaN", "pretrain --out {o} --learning-rate nan", ("--learning-rate",)),
    Case("shares of NaN", "learning-curve {t} --out {o} --shares nan", ("--shares",)),
    Case("a threshold of NaN", f"{SIMULATE} --admission confidence:nan", ("confidence:nan",)),
    Case("a word for a number", f"{SIMULATE} --batch many", ("--batch", "see: specmoe simulate --help")),
    Case("an option that is not there", f"{SIMULATE} --batches 4", ("--batches", "see: specmoe simulate --help")),
]


def results(old: str = "", new: str = "", change: Callable[[Any], object] = lambda content: None) -> Any:
    """A sound results file in ``folder/r.json`` with a change made to its content, then to its text."""

    def make(folder: Path) -> None:
        content = json.loads(full_results().model_dump_json())
        change(content)
        text = json.dumps(content)
        assert old in text
        (folder / "r.json").write_text(text.replace(old, new, 1))

    return make


def profile(**changes: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        content = json.loads(ready_hardware()["rtx-4090"].read_text())
        content["links"][0].update({name: value for name, value in changes.items() if name in content["links"][0]})
        content.update({name: value for name, value in changes.items() if name not in content["links"][0]})
        # Python writes infinity as Infinity; a number that becomes it is what others write.
        (folder / "h.json").write_text(json.dumps(content).replace('"HUGE"', "1e400"))

    return make


REPORT = "report {d}/r.json --html {d}/p.html"
HARDWARE = "hardware show {d}/h.json"

FILES = [
    Case("NaN in results", REPORT, ("r.json", "NaN"), results('"value": 0', '"value": NaN, "x": 0')),
    Case("infinity in results", REPORT, ("r.json", "-Infinity"), results('"value": 0', '"value": -Infinity, "x": 0')),
    Case("1e400 in results", REPORT, ("r.json", "1e400"), results('"value": 0', '"value": 1e400, "x": 0')),
    Case("NaN where anything may stand", REPORT, ("r.json", "NaN"),
         results(change=lambda c: c["trace"].update(source={"x": float("nan")}))),
    Case("an integer that no float holds", REPORT, ("r.json", "damaged at"),
         results(change=lambda c: c["controls"][0].update(value=10**400))),
    Case("no horizon", REPORT, ("protocol.horizons", "at least 1 item"),
         results(change=lambda c: c["protocol"].update(horizons=[]))),
    Case("a horizon of none", REPORT, ("protocol.horizons.0", "greater than or equal to 1"),
         results(change=lambda c: c["protocol"]["horizons"].__setitem__(0, 0))),
    Case("half a character", REPORT, ("r.json", "surrogates not allowed"),
         results(change=lambda c: c["predictors"][0].update(name="\ud800"))),
    Case("a ragged table", REPORT, ("damaged at the whole: per_layer", "not of 4 horizons"),
         results(change=lambda c: c["predictors"][0]["per_layer"][1].pop())),
    Case("sums of other documents", REPORT, ("document_sums recall@K", "documents"),
         results(change=lambda c: next(iter(c["predictors"][0]["document_sums"].values()))[0].pop())),
    Case("fewer than no parameter", REPORT, ("parameters", "greater than or equal to 0"),
         results(change=lambda c: c["predictors"][0].update(parameters=-1))),
    Case("fewer than no token", REPORT, ("trace.tokens", "greater than or equal to 0"),
         results(change=lambda c: c["trace"].update(tokens=-1))),
    Case("no metric version", REPORT, ("does not say under which metric version",),
         results(change=lambda c: c["protocol"].pop("metric_version"))),
    Case("a metric version in words", REPORT, ("metric version '2'", "has version 2"),
         results(change=lambda c: c["protocol"].update(metric_version="2"))),
    Case("an infinite rate", HARDWARE, ("h.json", "1e400"), profile(bandwidth="HUGE")),
    Case("a rate of NaN", HARDWARE, ("h.json", "NaN"), profile(bandwidth=float("nan"))),
    Case("a rate that times overflow with", HARDWARE, ("links.0.bandwidth", "greater than or equal"),
         profile(bandwidth=1e-300)),
    Case("a cost beyond all times", HARDWARE, ("links.0.latency", "less than or equal"), profile(latency=1e300)),
    Case("a version in words", HARDWARE, ("version '1'", "reads 1"), profile(version="1")),
    Case("NaN in a recipe", f"{TRAIN} --recipes {{d}}/r.json", ("r.json", "NaN"), recipe(dropout=float("nan"))),
    Case("an integer in a recipe that no float holds", f"{TRAIN} --recipes {{d}}/r.json", ("clip", "must be"),
         recipe(clip=-(10**400))),
    Case("a trace's version in words", "validate {d}/t", ("version '1'", "reads version 1"),
         lambda folder: (traced(folder), reversioned(folder / "t"))),
    Case("NaN in what a simulation left", "simulate {t} --out {d} --expert-bytes 1000", ("simulation.json", "NaN"),
         lambda folder: (folder / "simulation.json").write_text('{"format": "specmoe-simulation", "x": NaN}')),
]  # fmt: skip

TRACES = [
    Case("a trace in which nothing is routed", "simulate {d}/t --out {o} --expert-bytes 1000",
         ("no token of these documents is routed",), lambda folder: traced(folder, nothing=True)),
    Case("the same in one step", "simulate {d}/t --out {o} --expert-bytes 1000 --documents all --replay trace",
         ("no token of these documents is routed",), lambda folder: traced(folder, nothing=True)),
    Case("the same of verdict", "verdict {d}/t --out {o} --expert-bytes 1000",
         ("no token of these documents is routed",), lambda folder: traced(folder, nothing=True)),
]  # fmt: skip

CASES = [*SIZES, *NUMBERS, *FILES, *TRACES]


def reversioned(trace: Path) -> None:
    path = trace / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": "1"'))


def edited(trace: Path, **changes: Any) -> None:
    """Change a manifest's topology and sign it again: a manifest that lies, not one that was damaged."""
    path = trace / "manifest.json"
    content = json.loads(path.read_text())
    content["topology"].update(changes)
    content.pop("sha256")
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    traced(folder)
    return folder / "t"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_ends_in_one_line(case: Case, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    case.make(folder)
    out = tmp_path / "o"
    command = [part.format(t=sound, d=folder, o=out) for part in case.command.split()]
    assert run_verb(command) == case.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert [word for word in case.words if word not in line] == [], line


def test_a_window_longer_than_every_document_is_one_of_whole_documents(sound: Path) -> None:
    from specmoe.predictors.recipes import kind_of
    from specmoe.suite.data import SuiteData

    data = SuiteData.load(sound, (1, 2))
    kind = kind_of("TinySpeculationModel", {"TinySpeculationModel": {"window": 1_000_000}})
    windows = data.training(kind)
    assert windows.valid.shape == (len(data.split.parts["train"]), 24)
    assert bool(windows.valid.all())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "memory ran out"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "memory ran out",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "memory ran out"),
    ],
)
def test_memory_that_runs_out_ends_in_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("specmoe.cli.app", fails)
    assert run_verb(["list"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_another_runtime_error_is_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr("specmoe.cli.app", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        run_verb(["list"])


def test_the_largest_expert_is_the_same_for_options_and_topologies() -> None:
    assert options.LARGEST_EXPERT == LARGEST_EXPERT


def test_no_model_of_a_file_takes_nan_or_infinity() -> None:
    from pydantic import ValidationError

    from specmoe.ensembling.outcome import EnsembleResult
    from specmoe.offload.hardware.profile import Hardware
    from specmoe.offload.results import Gain, SimulationResults
    from specmoe.offload.verdict.sensitivity import Sensitivity
    from specmoe.results import Interval, Results, SeedResult
    from specmoe.schema import FileModel
    from specmoe.suite.study_results import DomainStudy, LearningCurve
    from specmoe.tuning.outcome import Outcome, Search

    read = (EnsembleResult, Hardware, SimulationResults, Sensitivity, Results, SeedResult, DomainStudy, LearningCurve)
    for kind in (*read, Search, Gain):
        assert issubclass(kind, FileModel), kind
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="finite"):
            Interval(value=value, low=0, high=1)
        with pytest.raises(ValidationError, match="finite"):
            SeedResult(seed=0, recall={"test": {1: value}})
        with pytest.raises(ValidationError, match="finite"):
            Outcome(number=0, state="complete", values={}, recall=value)


def test_measuring_a_predictor_draws_nothing_and_gives_its_bytes() -> None:
    from specmoe.predictors.base import held_bytes
    from specmoe.predictors.registry import PREDICTORS

    topology = Topology(model_id="x", layers=3, experts=8, top_k=2, hidden_size=8)
    for name, kind in PREDICTORS.items():
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        held = held_bytes(kind, topology, (1, 2))
        assert torch.equal(torch.rand(1), expected), name
        module = kind(topology, (1, 2))
        assert held == sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers())), name
