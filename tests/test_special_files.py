"""Pipes, sockets and devices in the place of files: one line at once, where opening them would wait for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from specmoe.checkpoint import load_checkpoint
from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.files import impostor, read_json, regular_file, sha256_file
from specmoe.sources.bundled import bundled_model
from specmoe.tuning.storage import mend


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """End a test that hangs in an open or a read."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it waits for somebody to write")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "pipe"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "character device"


def plug(path: Path) -> str:
    # The address of a socket must be short.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)
    return "socket"


SPECIAL = [pipe, device, plug]
Plant = Callable[[Path], str]


def refused(capsys: pytest.CaptureFixture[str], kind: str, place: Path, *words: object) -> None:
    assert run_verb([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1
    assert f"{place} is a {kind}, not a regular file" in lines[0]


@pytest.mark.parametrize("plant", SPECIAL)
def test_functions_that_open_files(tmp_path: Path, plant: Plant) -> None:
    place = tmp_path / "place"
    kind = plant(place)
    for function in (regular_file, read_json, sha256_file, load_checkpoint):
        with pytest.raises(SpecmoeError, match=f"place is a {kind}, not a regular file"):
            function(place)
    assert impostor(place) is None
    file = tmp_path / "file"
    file.write_text("{}")
    (tmp_path / "link").symlink_to(file)
    assert regular_file(tmp_path / "link") == tmp_path / "link"
    assert regular_file(tmp_path / "missing") == tmp_path / "missing"
    assert regular_file(tmp_path) == tmp_path


@pytest.mark.parametrize("plant", SPECIAL)
@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors"])
def test_a_traces_files(
    synthetic_path: Path, tmp_path: Path, plant: Plant, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    shutil.copytree(synthetic_path, trace)
    (trace / name).unlink()
    kind = plant(trace / name)
    refused(capsys, kind, trace / name, "validate", trace)


@pytest.mark.parametrize("plant", SPECIAL)
def test_files_that_a_user_names(
    synthetic_path: Path, tmp_path: Path, plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = tmp_path / "place.json", tmp_path / "out"
    kind = plant(place)
    refused(capsys, kind, place, "collect", "--text", place, "--out", out)
    refused(capsys, kind, place, "import", place, "--out", out)
    refused(capsys, kind, place, "import", place, "--out", out, "--format", "rows")
    refused(capsys, kind, place, "report", place)
    refused(capsys, kind, place, "compare", place, place)
    refused(capsys, kind, place, "hardware", "show", place)
    refused(capsys, kind, place, "train", synthetic_path, "--out", out, "--recipes", place)
    assert not out.exists()


def test_a_tokenizer_beside_a_trace(synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace"
    shutil.copytree(synthetic_path, trace)
    kind = pipe(trace / "tokenizer.json")
    refused(capsys, kind, trace / "tokenizer.json", "train", trace, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_models_files(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(bundled_model(), model)
    (model / name).unlink()
    kind = pipe(model / name)
    text = tmp_path / "text.txt"
    text.write_text("Some words to read.")
    refused(capsys, kind, model / name, "collect", "--model", model, "--text", text, "--out", tmp_path / "out")


def test_the_journal_of_a_search(tmp_path: Path) -> None:
    pipe(tmp_path / "trials.journal")
    with pytest.raises(SpecmoeError, match="is a pipe"):
        mend(tmp_path)


def test_a_folder_of_texts_skips_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Some words that a model can read, and some more of them.")
    pipe(tmp_path / "texts" / "b.txt")
    words = ["collect", "--text", str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--json"]
    assert run_verb(words) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 1
