"""A finished run is believed only if its files are those that it was written for, whoever was killed when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import specmoe
from specmoe.checkpoint import save_tensors
from specmoe.ensembling.members import members_of, open_run
from specmoe.results import Results
from specmoe.suite import assemble, jobs
from specmoe.suite.assemble import commit
from specmoe.suite.data import SuiteData, trace_fingerprint
from specmoe.suite.jobs import Job, finished, job_fingerprint
from specmoe.suite.train import train_suite
from specmoe.threads import one_thread
from specmoe.topology import Topology
from specmoe.trace import Trace, TraceWriter

TINY, FREQUENCY = "TinySpeculationModel", "LayerFrequency"
HORIZONS = (1, 2)
SHORT = {TINY: {"epochs": 1}}


@pytest.fixture(scope="module")
def trained(synthetic_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    out = tmp_path_factory.mktemp("vouching") / "run"
    return train(synthetic_path, out), out


def train(trace: Path, out: Path, **options: object) -> Results:
    return train_suite(trace, out, [TINY, FREQUENCY], seeds=(0, 1), horizons=HORIZONS, workers=1, **options)  # pyright: ignore[reportArgumentType]


def recalls(results: Results) -> list[object]:
    return [seed.recall for predictor in results.predictors for seed in predictor.seeds]


def copied(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "run"))


@pytest.mark.parametrize("after", ["retract", "save_predictor", "save_file"])
def test_a_rerun_that_was_killed_half_way_is_not_published_as_the_old_run(
    after: str,
    trained: tuple[Results, Path],
    synthetic_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = copied(trained[1], tmp_path)
    real = getattr(jobs, after)

    def killed(*arguments: object, **named: object) -> None:
        real(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jobs, after, killed)
        train(synthetic_path, out, recipes=SHORT, replace=True)
    data = SuiteData.load(synthetic_path, HORIZONS)
    assert finished(Job(TINY, 0), out, job_fingerprint(Job(TINY, 0), data)) is None
    assert finished(Job(TINY, 1), out, job_fingerprint(Job(TINY, 1), data)) is not None
    # Nobody simulates or blends with weights that the results are not about.
    members, _ = members_of(open_run(out, synthetic_path))
    assert [(m.name, m.seeds) for m in members if m.name == TINY] == [(TINY, (1,))]
    assert recalls(train(synthetic_path, out)) == recalls(trained[0])


def test_weights_of_another_recipe_are_not_taken_for_those_that_were_judged(
    trained: tuple[Results, Path], synthetic_path: Path, tmp_path: Path
) -> None:
    out, other = copied(trained[1], tmp_path), tmp_path / "other"
    train(synthetic_path, other, recipes=SHORT)
    for seed in (0, 1):
        folder = Job(TINY, seed).folder(out)
        shutil.rmtree(folder)
        shutil.copytree(Job(TINY, seed).folder(other), folder)
    _, left_out = members_of(open_run(out, synthetic_path))
    assert "no longer holds the weights that were judged" in left_out[TINY]


@pytest.mark.parametrize("name", ["model.safetensors", "tally.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "one bit", "another seed's"])
def test_a_damaged_job_is_one_that_is_not_done(
    name: str, how: str, trained: tuple[Results, Path], synthetic_path: Path, tmp_path: Path
) -> None:
    out = copied(trained[1], tmp_path)
    file = Job(TINY, 0).folder(out) / name
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-7])
    elif how == "one bit":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        shutil.copy(Job(TINY, 1).folder(out) / name, file)
    data = SuiteData.load(synthetic_path, HORIZONS)
    assert finished(Job(TINY, 0), out, job_fingerprint(Job(TINY, 0), data)) is None
    assert recalls(train(synthetic_path, out)) == recalls(trained[0])
    assert finished(Job(TINY, 0), out, job_fingerprint(Job(TINY, 0), data)) is not None


@pytest.mark.parametrize("content", ["", "{}", '{"files": {}}', '{"fingerprint": 1, "files": [1]}', "[]", "null"])
def test_a_damaged_voucher_vouches_for_nothing(
    content: str, trained: tuple[Results, Path], synthetic_path: Path, tmp_path: Path
) -> None:
    out = copied(trained[1], tmp_path)
    (Job(TINY, 0).folder(out) / "job.json").write_text(content)
    data = SuiteData.load(synthetic_path, HORIZONS)
    assert finished(Job(TINY, 0), out, job_fingerprint(Job(TINY, 0), data)) is None


def test_results_do_not_depend_on_threads(synthetic_path: Path, tmp_path: Path) -> None:
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        arguments = ["train", str(synthetic_path), "--out", str(tmp_path / threads), "--workers", "1", "--seeds", "1"]
        command = [sys.executable, "-m", "specmoe", *arguments, "--only", "Regular*", "--only", "Ridge"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    one, four = (Results.load(tmp_path / threads / "results.json") for threads in ("1", "4"))
    assert recalls(one) == recalls(four)
    folder = Job("RegularizedSpeculationModel", 0).folder(Path())
    ours, theirs = (load_file(tmp_path / threads / folder / "model.safetensors") for threads in ("1", "4"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_threads_are_given_back_whatever_happens() -> None:
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="stop"), one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError("stop")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def rewritten(source: Path, target: Path, *, every: int, change: bool = False) -> str:
    """The fingerprint of the same documents in shards of ``every`` documents."""
    trace = Trace.open(source)
    with TraceWriter(target, trace.manifest.model_copy(update={"shards": (), "complete": False})) as writer:
        for index, document in enumerate(trace.documents):
            record = trace.read(index)
            if change and index == len(trace) - 1:
                record.expert_ids[-1] = record.expert_ids[-1].flip(-1)
            writer.add(document.doc_id, document.domain, document.text_sha256, record, group=document.group)
            if index % every == every - 1:
                writer.flush()
    return trace_fingerprint(Trace.open(target))


def test_a_fingerprint_is_of_the_documents_and_not_of_how_they_were_written(
    synthetic_path: Path, tmp_path: Path
) -> None:
    whole = rewritten(synthetic_path, tmp_path / "whole", every=1000)
    assert rewritten(synthetic_path, tmp_path / "cut", every=3) == whole
    assert len(Trace.open(tmp_path / "cut").manifest.shards) > len(Trace.open(tmp_path / "whole").manifest.shards)
    assert rewritten(synthetic_path, tmp_path / "changed", every=1000, change=True) != whole


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    facts = {f"fact {number}": f'"{number}" ü\n\x1f' for number in range(12)}
    tensors = {"b": torch.arange(6.0), "a": torch.ones(2, 3, dtype=torch.float16)}
    files = []
    for number in range(6):
        save_tensors(tensors, tmp_path / str(number), facts)
        files.append((tmp_path / str(number)).read_bytes())
    assert len(set(files)) == 1
    with safe_open(str(tmp_path / "0"), framework="pt") as file:
        assert file.metadata() == facts
        assert torch.equal(file.get_tensor("b"), tensors["b"])


@pytest.fixture
def asked_anew() -> None:
    commit.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("git", 10), FileNotFoundError("git")])
def test_git_decides_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(assemble.subprocess, "run", failing)
    assert commit() == f"v{specmoe.__version__}"
    commit.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_somebody_elses_repository_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    package = tmp_path / "venv" / "site-packages" / "specmoe"
    package.mkdir(parents=True)
    monkeypatch.setattr(specmoe, "__file__", str(package / "__init__.py"))
    assert commit() == f"v{specmoe.__version__}"
    commit.cache_clear()


def test_shapes_of_topologies_enter_the_fingerprint(synthetic_path: Path) -> None:
    trace = Trace.open(synthetic_path)
    before = trace_fingerprint(trace)
    trace.manifest = trace.manifest.model_copy(
        update={"topology": Topology(**{**trace.topology.model_dump(), "revision": "other"})}
    )
    assert trace_fingerprint(trace) != before
