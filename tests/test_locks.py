"""One run at a time writes to a folder, whatever the verb, and whoever is killed does not keep others out."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from specmoe import files, locks
from specmoe.cli import app, run_verb
from specmoe.errors import SpecmoeError
from specmoe.locks import at_work, hold, locked, writes
from specmoe.sources.synthetic import synthetic_trace
from specmoe.topology import Topology

HOLDER = """
import sys, time
from pathlib import Path
from specmoe.locks import at_work, locked
if sys.argv[2] == "worker":
    at_work(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
else:
    with locked(Path(sys.argv[1]), sys.argv[2]):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
"""


def holder(folder: Path, verb: str = "train", seconds: float = 60.0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), verb, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_second_process_is_told_who_writes_and_goes_on_when_that_one_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = holder(out, "learning-curve")
    try:
        with pytest.raises(
            SpecmoeError, match=r"another process is writing to .*run \(specmoe learning-curve"
        ) as caught:
            hold(out, "train")
        assert f"process {first.pid}, since 20" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert json.loads((out / locks.LOCK).read_text())["pid"] == first.pid
    finally:
        end(first)
    with locked(out, "train"):
        assert json.loads((out / locks.LOCK).read_text())["verb"] == "train"
    assert list(out.iterdir()) == []


def test_of_many_at_once_one_at_a_time_holds_the_folder(tmp_path: Path) -> None:
    # Each adds one to a number and would lose what another added between its reading and its writing.
    count = tmp_path / "count"
    count.write_text("0")
    script = """
import sys, time
from pathlib import Path
from specmoe.errors import SpecmoeError
from specmoe.locks import locked
folder, count = Path(sys.argv[1]) / "new", Path(sys.argv[1]) / "count"
done = 0
while done < 40:
    try:
        with locked(folder, "train"):
            before = int(count.read_text())
            time.sleep(0.0005)
            count.write_text(str(before + 1))
            done += 1
    except SpecmoeError as error:
        assert "another process is writing" in str(error), error
        time.sleep(0.0005)
"""
    runs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert count.read_text() == "120"


def test_what_holds_a_folder_may_hold_it_again_and_its_subfolders(tmp_path: Path) -> None:
    with locked(tmp_path / "a", "demo"):
        with locked(tmp_path / "a", "train"), locked(tmp_path / "a" / "trace", "collect"):
            held = json.loads((tmp_path / "a" / locks.LOCK).read_text())
        assert held["verb"] == "demo"
        # Leaving the inner one has not given the outer one back.
        with pytest.raises(SpecmoeError, match="another process is writing"):
            hold(tmp_path / "a", "train")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "a")
        with locked(link, "train"):
            pass
        assert (tmp_path / "a" / locks.LOCK).exists()
    with locked(tmp_path / "a", "train"):
        pass


def test_another_thread_is_another_run(tmp_path: Path) -> None:
    errors: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path, "train"):
                errors.append("both")
        except SpecmoeError as error:
            errors.append(str(error))

    with locked(tmp_path, "train"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert f"process {os.getpid()}" in errors[0]


def test_an_error_gives_the_folder_back_and_takes_away_only_what_was_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "deep" / "below", "train"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine", "train"):
        pass
    assert (tmp_path / "mine").is_dir()
    with locked(tmp_path / "deep" / "below", "train"):
        (tmp_path / "deep" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result"]


def test_the_next_run_waits_for_workers_that_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = holder(tmp_path, "worker", 0.8)
    begun = time.monotonic()
    with locked(tmp_path, "train"):
        worker.communicate(timeout=5)
        assert worker.returncode == 0
        assert time.monotonic() - begun > 0.3
    assert list(tmp_path.iterdir()) == []
    worker = holder(tmp_path, "worker")
    monkeypatch.setattr(locks, "_ORPHAN_SECONDS", 0.2)
    try:
        with pytest.raises(SpecmoeError, match="workers of an earlier run are still at work"):
            hold(tmp_path, "train")
    finally:
        end(worker)
    with locked(tmp_path, "train"):  # The lock was not kept by the run that gave up.
        os.close(at_work(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files._fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_told", False)
    for name in ("a", "b"):
        with locked(tmp_path / name, "train"):
            (tmp_path / name / "result").write_text("x")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "nothing is locked here" in said[0]
    assert os.strerror(number) in said[0]
    assert (tmp_path / "b" / "result").exists()


def test_a_system_without_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_fcntl", None)
    monkeypatch.setattr(locks, "_told", False)
    with locked(tmp_path / "a", "train"), locked(tmp_path / "b", "train"):
        pass
    assert capsys.readouterr().err.count("nothing is locked here") == 1


def test_another_failure_of_the_lock_is_an_error_for_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, kind: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files._fcntl, "flock", fail)
    with pytest.raises(SpecmoeError, match=os.strerror(errno.EIO)):
        hold(tmp_path / "a", "train")


def test_what_was_planted_in_the_locks_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for plant in (
        lambda path: path.symlink_to(victim),
        lambda path: path.symlink_to(tmp_path / "dangling"),
        lambda path: os.link(victim, path),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        plant(out / locks.LOCK)
        with pytest.raises(SpecmoeError, match="is no lock file of specmoe; remove it"):
            hold(out, "train")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "dangling").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"pid": 1}', b'{"pid": "1", "verb": "train", "since": "x"}', b"[]"]
)
def test_a_holder_that_is_not_legible_is_still_a_holder(tmp_path: Path, content: bytes) -> None:
    with locked(tmp_path, "train"):
        (tmp_path / locks.LOCK).write_bytes(content)
        with pytest.raises(SpecmoeError, match=r"writing to \S+; wait for it"):
            hold(tmp_path, "train")


def test_places_that_cannot_be_written_to_are_errors_for_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, words in (
        (tmp_path / "file", "is a file; name a folder with --out"),
        (tmp_path / "file" / "below", "cannot write to"),
        (tmp_path / ("n" * 256), "File name too long"),
        (Path("/proc/nowhere"), "cannot write to"),
    ):
        with pytest.raises(SpecmoeError, match=words):
            hold(out, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_decorator_finds_the_folder_however_it_is_given(tmp_path: Path) -> None:
    seen = []

    @writes("train")
    def run(trace: Path, out: Path = tmp_path / "default", **options: Any) -> str:
        seen.append(json.loads((out / locks.LOCK).read_text())["verb"])
        return out.name

    assert run(tmp_path) == "default"
    assert run(tmp_path, tmp_path / "a") == "a"
    assert run(tmp_path, out=tmp_path / "b", more=1) == "b"
    assert seen == ["train"] * 3


# Every verb that writes a folder, each with what it needs besides; none gets as far as reading it.
VERBS = {
    "train": ["train", "TRACE", "--out", "OUT"],
    "simulate": ["simulate", "TRACE", "--out", "OUT"],
    "verdict": ["verdict", "TRACE", "--out", "OUT"],
    "ensemble": ["ensemble", "TRACE", "--out", "OUT"],
    "pretrain": ["pretrain", "--out", "OUT", "--steps", "1"],
    "learning-curve": ["learning-curve", "TRACE", "--out", "OUT"],
    "leave-one-domain-out": ["leave-one-domain-out", "TRACE", "--out", "OUT"],
    "demo": ["demo", "--out", "OUT"],
    "tune": ["tune", "TRACE", "--out", "OUT", "--only", "Tiny*"],
}


def test_every_verb_with_a_folder_to_write_to_is_here() -> None:
    from typer.main import get_command

    command: Any = get_command(app)
    with_out = {
        name
        for name, verb in command.commands.items()
        for option in getattr(verb, "params", ())
        if "--out" in option.opts and "Folder" in (option.help or "")
    }
    # Collecting and importing hold their trace while they write it (test_trace).
    assert with_out - {"collect", "import"} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_folder_that_another_run_writes_to(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first = holder(out, "simulate")
    try:
        places = {"OUT": str(out), "TRACE": str(tmp_path / "no-trace")}
        assert run_verb([places.get(word, word) for word in VERBS[verb]]) == 2
    finally:
        end(first)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: another process is writing to {out} (specmoe simulate, process {first.pid}")


def train(trace: Path, out: Path) -> subprocess.Popen[str]:
    words = ["train", str(trace), "--out", str(out), "--only", "Tiny*", "--seeds", "2", "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "specmoe", *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_of_two_runs_on_one_folder_one_does_the_work_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace", tmp_path / "out"
    topology = Topology(model_id="synthetic", layers=6, experts=16, top_k=2, hidden_size=64)
    synthetic_trace(trace, topology=topology, documents=60, tokens=128, determinism=0.8, seed=5)
    pair = [train(trace, out) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in pair]
    codes = [process.returncode for process in pair]
    assert sorted(codes) == [0, 2], said
    refused, done = codes.index(2), codes.index(0)
    # Workers' first lines may come before it.
    assert (
        said[refused][1]
        .splitlines()[-1]
        .startswith(f"error: another process is writing to {out} (specmoe train, process {pair[done].pid}, since 20")
    )
    assert len(json.loads(said[done][0])["predictors"][0]["seeds"]) == 2
    assert not [path.name for path in out.iterdir() if path.name.startswith(".specmoe")]

    other = tmp_path / "other"
    killed = train(trace, other)
    while not (other / "jobs").is_dir():
        assert killed.poll() is None
        time.sleep(0.02)
    end(killed)
    assert (other / locks.LOCK).exists()
    after = train(trace, other)
    printed, errors = after.communicate(timeout=300)
    assert after.returncode == 0, errors
    assert (
        json.loads(printed)["predictors"][0]["seeds"][0]["recall"]
        == (json.loads(said[done][0])["predictors"][0]["seeds"][0]["recall"])
    )
    assert not [path.name for path in other.iterdir() if path.name.startswith(".specmoe")]


def test_the_next_run_removes_what_a_killed_one_left_in_its_own_folders(tmp_path: Path) -> None:
    left = ".job.json.0123456789abcdef.tmp"
    places = [tmp_path / place for place in (".", "jobs/a", "taught/jobs/a", "trials", "trace", "cuts/share-50/jobs/a")]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / left).write_text("x")
    with locked(tmp_path, "train"):
        assert [(place / left).exists() for place in places] == [False] * 4 + [True] * 2
    with locked(tmp_path / "cuts" / "share-50", "train"):
        assert not (places[5] / left).exists()
