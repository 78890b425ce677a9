"""What lies in a file's place: a Git LFS pointer, a web page, or nothing; each verb that opens a file says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.files import impostor, read_json
from specmoe.results import Results
from specmoe.sources.capture import load_model
from specmoe.sources.importers import import_trace
from specmoe.trace import Trace, TraceWriter
from test_capture import olmoe_dir, tokenizer  # noqa: F401

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4976698672\n"
)
PAGE = b"\n<!DOCTYPE html>\n<html class='dark'><head><title>Sign in</title></head></html>\n"
IMPOSTORS = [
    pytest.param(POINTER, "is a Git LFS pointer, not the file; run `git lfs pull`", id="pointer"),
    pytest.param(PAGE, "is an HTML page, not the file; download the file itself", id="page"),
    pytest.param(b"", "is empty", id="empty"),
]
# Of an empty file to import, the format itself has something to say.
NOT_EMPTY = IMPOSTORS[:2]


def test_what_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, words in [
        (POINTER, "Git LFS"),
        (PAGE, "HTML"),
        (b"<HTML>", "HTML"),
        (b"\xef\xbb\xbf<!doctype HTML>", "HTML"),
        (b"", "empty"),
    ]:
        path.write_bytes(content)
        assert words in str(impostor(path))
    for content in (b"{}", b"<h1>a heading</h1>", b"the version https://git-lfs.github.com/spec/v1", b"\x00" * 600):
        path.write_bytes(content)
        assert impostor(path) is None
    assert impostor(tmp_path / "nowhere") is None
    assert impostor(tmp_path) is None


@pytest.mark.parametrize(("content", "words"), IMPOSTORS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_in_a_model(olmoe_dir: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:  # noqa: F811
    shutil.copytree(olmoe_dir, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(SpecmoeError) as caught:
        load_model(tmp_path / "model")
    assert str(caught.value).startswith(f"{tmp_path / 'model' / name} {words}")
    assert "\n" not in str(caught.value)


def test_a_file_of_a_model_that_nobody_reads_is_not_blamed(olmoe_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(olmoe_dir, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_bytes(PAGE)
    (tmp_path / "model" / "picture.json").write_bytes(POINTER)
    assert load_model(tmp_path / "model").topology.experts == 8


@pytest.mark.parametrize(("content", "words"), IMPOSTORS)
@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors", "routers.safetensors"])
def test_in_a_trace(synthetic_path: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    shutil.copytree(synthetic_path, tmp_path / "trace")
    shape = Trace.open(synthetic_path).topology
    with TraceWriter(tmp_path / "trace", Trace.open(synthetic_path).manifest) as writer:
        writer.keep_routers(torch.zeros(shape.layers, shape.experts, shape.hidden_size))
    assert Trace.open(tmp_path / "trace").routers() is not None
    (tmp_path / "trace" / name).write_bytes(content)
    with pytest.raises(SpecmoeError) as caught:
        Trace.open(tmp_path / "trace").routers()
    assert words in str(caught.value)
    assert str(tmp_path / "trace" / name) in str(caught.value)


@pytest.mark.parametrize(("content", "words"), NOT_EMPTY)
@pytest.mark.parametrize("format", [None, "npz", "megatron-jsonl", "safetensors", "bigmoeonedge-csv"])
@pytest.mark.parametrize("suffix", ["npz", "jsonl", "safetensors", "csv", "pt"])
def test_in_what_is_imported(tmp_path: Path, suffix: str, format: str | None, content: bytes, words: str) -> None:
    path = tmp_path / f"routes.{suffix}"
    path.write_bytes(content)
    with pytest.raises(SpecmoeError) as caught:
        import_trace(path, tmp_path / "out", format=format)
    assert str(caught.value).startswith(f"{path} {words}")


def test_in_a_folder_that_is_imported(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("routes of a model")
    (folder / "run.pt").write_bytes(POINTER)
    with pytest.raises(SpecmoeError, match=r"run.pt is a Git LFS pointer"):
        import_trace(folder, tmp_path / "out")


def test_an_error_is_not_blamed_on_a_file_that_it_does_not_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"step": 1}\n')
    (folder / "about.html").write_bytes(PAGE)
    with pytest.raises(SpecmoeError, match=r"rows.jsonl"):
        import_trace(folder, tmp_path / "out", format="megatron-jsonl")


@pytest.mark.parametrize(("content", "words"), IMPOSTORS)
def test_in_results(tmp_path: Path, content: bytes, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(SpecmoeError, match=words):
        Results.load(path)
    with pytest.raises(SpecmoeError, match=words):
        read_json(path)
    assert run_verb(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("content", "words"), IMPOSTORS)
def test_on_the_command_line(tmp_path: Path, content: bytes, words: str, capsys: Any, olmoe_dir: Path) -> None:  # noqa: F811
    text = tmp_path / "prompts.jsonl"
    text.write_bytes(content)
    assert run_verb(["collect", "--model", str(olmoe_dir), "--text", str(text), "--out", str(tmp_path / "t")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
