"""What reaches the terminal: no control character of anybody's names, every encoding, and a disk that is full."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from results_fixture import full_results
from specmoe.cli import run_verb
from specmoe.cli.terminal import SafeConsole, guarded_output, shown

# Sets a window's title, clears the screen, and is an escape of the second kind.
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f"
SEEN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\x7f"


def evil_results(folder: Path) -> Path:
    content = json.loads(full_results().model_dump_json())
    content["trace"]["topology"]["model_id"] = f"model {EVIL}"
    for each in content["predictors"]:
        each["reason"] = f"reason {EVIL}"
    content["predictors"][0]["name"] = f"best {EVIL} µ日本"
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    return path


def test_control_characters_are_written_as_people_write_them() -> None:
    assert shown(EVIL) == SEEN
    assert shown("a\tb\nc\rd é日本 ~\xa0") == "a\tb\nc\rd é日本 ~\xa0"
    assert shown("\u202egnp.exe") == r"\u202egnp.exe"


def test_names_of_results_reach_no_terminal_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = evil_results(tmp_path)
    assert run_verb(["report", str(path)]) == 0
    assert run_verb(["compare", f"{path}:best {EVIL} µ日本", f"{path}:ridge"]) == 0
    captured = capsys.readouterr()
    assert [c for c in captured.out + captured.err if (c != "\n" and ord(c) < 32) or 127 <= ord(c) < 160] == []
    # By compare; the table may be folded. What click takes for colours it leaves out in a pipe.
    assert r"best \x1b]0;owned\x07" in captured.out


def test_names_of_files_in_the_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["report", f"{tmp_path}/{EVIL}.json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path}/{SEEN}.json does not exist\n"


def test_on_a_terminal_rich_sends_its_own_escapes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with guarded_output():
        table = Table(title="a title")
        table.add_column("c")
        table.add_row(EVIL)
        SafeConsole(width=60).print(table)
        print(EVIL)
    written = terminal.getvalue()
    assert "\x1b[3m" in written  # The title, in italics.
    assert "\x1b]" not in written
    assert "\x1b[2J" not in written
    assert "\x9b" not in written
    assert written.count(SEEN) == 2


def run(*arguments: str, out: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "specmoe", *arguments]
    return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_characters(encoding: str, tmp_path: Path) -> None:
    path = evil_results(tmp_path)
    done = run("compare", f"{path}:best {EVIL} µ日本", f"{path}:ridge", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(encoding)
    assert ("\\xb5\\u65e5\\u672c" if encoding == "ascii" else "µ\\u65e5\\u672c") in said
    missing = run("report", str(tmp_path / "日本.json"), PYTHONIOENCODING=encoding)
    assert missing.returncode == 2
    assert missing.stderr.decode(encoding).startswith("error: ")
    assert "\\u65e5\\u672c.json does not exist" in missing.stderr.decode(encoding)


@pytest.mark.parametrize("arguments", [["hardware", "list"], ["hardware", "list", "--json"], ["--version"]])
def test_a_full_disk_behind_the_output(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(*arguments, out=full.fileno())
    assert done.returncode == 2
    assert done.stderr == b"error: cannot write the output: No space left on device\n"


def test_help_keeps_its_colours_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    done = run("hardware", "--help", out=theirs, TERM="xterm", COLUMNS="80")
    os.close(theirs)
    assert done.returncode == 0
    written = os.read(ours, 1 << 16)
    os.close(ours)
    assert b"\x1b[1m" in written
    assert rb"\x1b" not in written


def test_without_a_verb_there_is_help_and_no_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb([]) == 2
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err
    assert "error:" not in captured.err
