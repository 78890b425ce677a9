"""The command line as a user meets it: verbs, JSON, and one clear line where something is wrong."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import specmoe
from specmoe.cli import run_verb
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import Results

SMALL_RUN = ["--only", "Tiny*", "--only", "LayerM*", "--seeds", "1", "--workers", "1", "--horizons", "1,2"]


def errors_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a verb that must fail: exit code 2, nothing on standard output, one line, no traceback."""
    assert run_verb(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.fixture(scope="module")
def trained(synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert run_verb(["train", str(synthetic_path), "--out", str(out), *SMALL_RUN]) == 0
    return out


def test_train_writes_results_and_report(trained: Path) -> None:
    results = Results.load(trained / "results.json")
    assert [p.name for p in results.predictors] == ["TinySpeculationModel", "LayerMarkov"]
    assert results.protocol.horizons == (1, 2)
    assert "TinySpeculationModel" in (trained / "report.html").read_text()


def test_train_prints_json(trained: Path, synthetic_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A checkpoint of other settings, whose training was killed; the job here is done.
    stale = next((trained / "jobs").iterdir()) / "checkpoint-0123456789abcdef.safetensors"
    stale.write_bytes(b"state")
    assert run_verb(["train", str(synthetic_path), "--out", str(trained), *SMALL_RUN, "--json"]) == 0
    printed = Results.model_validate_json(capsys.readouterr().out)
    assert not stale.exists()
    assert printed.predictors[0].seeds == Results.load(trained / "results.json").predictors[0].seeds


def test_report_is_made_again_from_the_results(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, figure = tmp_path / "page.html", tmp_path / "ranking.png"
    code = run_verb(["report", str(trained / "results.json"), "--html", str(page), "--figure", str(figure)])
    assert code == 0
    assert "TinySpeculationModel" in capsys.readouterr().out.replace("\n", "")
    assert page.stat().st_size > 100_000
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_report_replaces_only_what_it_made(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    results.write_bytes((trained / "results.json").read_bytes())
    before = results.read_bytes()
    for name in ("page.svg", "figure.png", "figure.svg"):
        (tmp_path / name).write_text("somebody's own")
    message = errors_of(capsys, "report", str(results), "--html", str(results))
    assert "over what it is made from" in message
    message = errors_of(capsys, "report", str(results), "--html", str(results), "--force")
    assert "over what it is made from" in message
    assert "--force" in errors_of(capsys, "report", str(results), "--html", str(tmp_path / "page.svg"))
    for name in ("figure.png", "figure.svg"):
        figure = tmp_path / name
        assert "--force" in errors_of(capsys, "report", str(results), "--figure", str(figure))
        assert figure.read_text() == "somebody's own"
        assert run_verb(["report", str(results), "--figure", str(figure), "--force"]) == 0
        assert figure.read_bytes() != b"somebody's own"
        assert run_verb(["report", str(results), "--figure", str(figure)]) == 0
        capsys.readouterr()
    message = errors_of(
        capsys, "report", str(results), "--html", str(tmp_path / "x.svg"), "--figure", str(tmp_path / "x.svg")
    )
    assert "name two files" in message
    assert (tmp_path / "page.svg").read_text() == "somebody's own"
    assert results.read_bytes() == before
    # What was added to the picture is a chunk like any other.
    chunks, data, at = [], (tmp_path / "figure.png").read_bytes(), 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        chunks.append(body[:4])
        at += 12 + size
    assert chunks[0] == b"IHDR"
    assert chunks[-2:] == [b"tEXt", b"IEND"]


def test_measuring_replaces_only_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("notes", '{"format": "other"}', "[]"):
        (tmp_path / "here.json").write_text(content)
        assert "--force" in errors_of(capsys, "hardware", "measure", "--quick", "--out", str(tmp_path / "here.json"))
        assert (tmp_path / "here.json").read_text() == content


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == len(PREDICTORS)
    assert {entry["category"] for entry in entries} == {
        "attention-based",
        "ensemble",
        "multi-scale",
        "edge",
        "training-free",
    }
    assert all(entry["source"] for entry in entries)


def test_help_is_instant_because_heavy_packages_are_not_loaded() -> None:
    code = "import sys, specmoe.cli; sys.exit(bool({'torch', 'transformers', 'altair'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "specmoe collect" in errors_of(capsys, "train", str(tmp_path / "none"), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("horizons", ["", "0", "x", "4-1", "1-99999", "1,,2"])
def test_bad_horizons(horizons: str, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = errors_of(capsys, "train", str(synthetic_path), "--out", str(tmp_path), "--horizons", horizons)
    assert "--horizons" in message


def test_an_unknown_predictor(synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = errors_of(capsys, "train", str(synthetic_path), "--out", str(tmp_path), "--only", "Rigde")
    assert "did you mean Ridge?" in message


def test_a_gpu_that_is_not_there(synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    device = "cuda:99" if torch.cuda.is_available() else "cuda"
    if not torch.cuda.is_available():
        assert "no GPU" in errors_of(capsys, "train", str(synthetic_path), "--out", str(tmp_path), "--device", device)
    assert "--device" in errors_of(capsys, "train", str(synthetic_path), "--out", str(tmp_path), "--device", "tpu")


def edit_manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def edit(trace: Path) -> None:
        path = trace / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        # Signed again: this is a manifest that lies, not one that was damaged.
        content.pop("sha256")
        content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content))

    return edit


def flip_bit(trace: Path) -> None:
    shard = next(trace.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 4
    shard.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda trace: next(trace.glob("shard-*")).unlink(), "missing"),
    "truncated shard": (lambda trace: os.truncate(next(trace.glob("shard-*")), 5000), "truncated"),
    "flipped bit": (flip_bit, "damaged"),
    "empty manifest": (lambda trace: (trace / "manifest.json").write_text(""), "JSON"),
    "other version": (edit_manifest(lambda m: m.update(version=99)), "version 99"),
    "wrong shape": (edit_manifest(lambda m: m["topology"].update(experts=9)), "shape"),  # type: ignore[attr-defined]
    "impossible topology": (edit_manifest(lambda m: m["topology"].update(top_k=99)), "top_k"),  # type: ignore[attr-defined]
    "unfinished": (edit_manifest(lambda m: m.update(complete=False)), "not finished"),
    "another file": (edit_manifest(lambda m: m.update(format="something")), "not describe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_traces(damage: str, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace"
    shutil.copytree(synthetic_path, trace)
    harm, words = DAMAGE[damage]
    harm(trace)
    assert words in errors_of(capsys, "train", str(trace), "--out", str(tmp_path / "out"), *SMALL_RUN)


def test_a_trace_with_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from specmoe.sources.synthetic import synthetic_trace
    from specmoe.topology import Topology

    topology = Topology(model_id="one", layers=2, experts=4, top_k=1, hidden_size=8)
    synthetic_trace(tmp_path / "t", topology=topology, documents=1, tokens=20, determinism=0.5, seed=0)
    message = errors_of(capsys, "train", str(tmp_path / "t"), "--out", str(tmp_path / "out"))
    assert "at least 3" in message


def test_fewer_layers_than_the_horizon_and_experts_never_used(tmp_path: Path) -> None:
    import torch

    from specmoe.topology import Topology
    from specmoe.trace import Manifest, RoutingRecord, Source, TraceWriter

    topology = Topology(model_id="two layers", layers=2, experts=8, top_k=2, hidden_size=8)
    fields = ("token_ids", "phase", "expert_ids", "router_logits", "hidden")
    generator = torch.Generator().manual_seed(0)
    with TraceWriter(tmp_path / "t", Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        for document in range(8):
            logits = torch.randn(24, 2, 8, generator=generator)
            logits[..., 3:] = -9.0  # experts 3 to 7 are never used
            record = RoutingRecord(
                token_ids=torch.arange(24, dtype=torch.int32),
                phase=torch.zeros(24, dtype=torch.uint8),
                expert_ids=logits.topk(2, -1).indices.short(),
                router_logits=logits,
                hidden=torch.randn(24, 2, 8, generator=generator).half(),
            )
            writer.add(f"d{document}", "a", f"{document}", record)
    only = [part for name in ("Tiny*", "Ridge", "LayerM*", "Prev*", "Token*", "Seq*") for part in ("--only", name)]
    code = run_verb(["train", str(tmp_path / "t"), "--out", str(tmp_path / "out"), "--seeds", "1", "--workers", "1",
                     "--horizons", "1-5", *only])  # fmt: skip
    assert code == 0
    results = Results.load(tmp_path / "out" / "results.json")
    assert all(predictor.status == "ok" for predictor in results.predictors)
    assert all(set(p.scores["recall@K"]) == {1, 2, 3, 4, 5} for p in results.predictors)


def test_a_pickle_that_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    path = tmp_path / "robust_traces.pkl"
    path.write_bytes(pickle.dumps([Harmful()]))
    assert "system" in errors_of(capsys, "import", str(path), "--out", str(tmp_path / "t"), "--format", "gating-pickle")
    assert not (tmp_path / "harmed").exists()


def test_import_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in errors_of(capsys, "import", str(tmp_path / "none.pkl"), "--out", str(tmp_path / "t"))
    (tmp_path / "a.pkl").write_bytes(b"")
    errors_of(capsys, "import", str(tmp_path / "a.pkl"), "--out", str(tmp_path / "t"))
    message = errors_of(capsys, "import", str(tmp_path / "a.pkl"), "--out", str(tmp_path / "t"), "--format", "gating")
    assert "did you mean gating-pickle" in message


def test_report_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("{}")
    assert "not a specmoe results file" in errors_of(capsys, "report", str(tmp_path / "results.json"))
    assert "does not exist" in errors_of(capsys, "report", str(tmp_path / "none.json"))


def test_collect_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in errors_of(
        capsys, "collect", "--out", str(tmp_path / "t"), "--text", str(tmp_path / "no")
    )
    (tmp_path / "model").mkdir()
    errors_of(capsys, "collect", "--out", str(tmp_path / "t"), "--model", str(tmp_path / "model"))
    message = errors_of(capsys, "collect", "--out", str(tmp_path / "t"), "--keep-hidden", "some")
    assert "sample:0.1" in message
    assert not (tmp_path / "t" / "manifest.json").exists()


def limit_file_size() -> None:
    # The kernel then refuses to write past this size, as it would on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_full_disk_during_training_loses_nothing(synthetic_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "specmoe", "train", str(synthetic_path), "--out", str(tmp_path), *SMALL_RUN]
    full = subprocess.run(command, preexec_fn=limit_file_size, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert "limit on file size" in full.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert Results.load(tmp_path / "results.json").predictors[0].status == "ok"


def test_the_original_command_trains_on_the_pickle(tmp_path: Path) -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    points = []
    readout = generator.normal(size=(3, 32, 4))
    for sample in range(16):
        tokens = generator.integers(1, 90, size=20)
        for layer in range(3):
            hidden = generator.normal(size=(20, 32)).astype(np.float32)
            logits = hidden @ readout[layer]
            routing = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            points.append(
                {
                    "layer_id": layer,
                    "hidden_states": hidden,
                    "input_embeddings": tokens,
                    "target_routing": routing.astype(np.float32),
                    "target_top_k": routing.argmax(-1)[:, None],
                    "prev_layer_gates": [],
                    "sample_id": f"s{sample}",
                    "dataset_name": f"set {sample % 2}",
                }
            )
    (tmp_path / "routing_data").mkdir()
    (tmp_path / "routing_data" / "robust_traces.pkl").write_bytes(pickle.dumps(points))
    script = Path(__file__).parents[1] / "scripts" / "training" / "comprehensive_speculation_training.py"
    arguments = ["--only", "Small*", "--only", "Ridge", "--seeds", "1", "--workers", "1"]
    run = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "warning" in run.stderr  # gates are always empty in this file
    (results,) = (tmp_path / "results").glob("comprehensive_speculation_training_*.json")
    assert [p.name for p in Results.load(results).predictors] == ["SmallSpeculationModel", "Ridge"]
    assert (tmp_path / "trained_models" / "jobs" / "SmallSpeculationModel-seed0" / "model.safetensors").exists()


def test_the_version_is_said_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["--version"]) == 0
    assert capsys.readouterr().out == f"specmoe {specmoe.__version__}\n"
    assert importlib.metadata.version("specmoe") == specmoe.__version__


WARNING_VERB = """
import logging, sys, warnings
from specmoe import cli

def warn():
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.warn_explicit(f"said as {category.__name__}", category, "other.py", 1, module="other")

cli.app.command("warn")(warn)
sys.argv = ["specmoe", "warn"]
cli.main()
"""


@pytest.mark.parametrize("asked", [False, True])
def test_users_do_not_see_what_dependencies_tell_their_developers(asked: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    options = ["-W", "default"] if asked else []
    ended = subprocess.run(
        [sys.executable, *options, "-c", WARNING_VERB], env=environment, capture_output=True, text=True, check=True
    )
    assert ("said as FutureWarning" in ended.stderr) == asked
    assert ("said as DeprecationWarning" in ended.stderr) == asked
    assert "said as UserWarning" in ended.stderr


def test_collecting_prints_our_own_lines_only(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 4)
    arguments = ["collect", "--text", str(tmp_path / "text.txt"), "--generate", "4", "--out", str(tmp_path / "trace")]
    ended = subprocess.run(
        [sys.executable, "-m", "specmoe", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert [line for line in ended.stderr.splitlines() if not line.startswith("reading: ")] == []
    assert ended.stdout.count("\n") == 1
