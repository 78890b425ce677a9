"""Damaged files of every kind: our own error and nothing else, within bounded memory.

A few hundred by default; ``SPECMOE_FUZZ=10000 pytest tests/test_fuzz_readers.py`` reads that many, and
``SPECMOE_FUZZ_SEED`` draws others. ``python tests/fuzz.py MUTATIONS SEED TARGET`` repeats one target's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fuzz
from specmoe.sources.importers import IMPORTERS

TOTAL = int(os.environ.get("SPECMOE_FUZZ", "400"))
SEED = os.environ.get("SPECMOE_FUZZ_SEED", "0")


@pytest.fixture(scope="module")
def report() -> dict[str, list[Any]]:
    """Failures by target; a target that killed the process has the last thing that it was given."""
    mutations = max(1, TOTAL // len(fuzz.TARGETS))
    command = [sys.executable, str(Path(fuzz.__file__)), str(mutations), SEED]
    names = list(fuzz.TARGETS)
    found: dict[str, list[Any]] = {}
    while names:
        done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for line in lines:
            if "problem" in line:
                found.setdefault(line["target"], []).append(line)
            else:
                found.setdefault(line["about"].split()[0], [])
        if done.returncode == 0:
            break
        last = lines[-1]["about"] if lines else "start"
        target = last.split()[0]
        found.setdefault(target, []).append(f"died with {done.returncode} at {last}: {done.stderr[-2000:]}")
        names = names[names.index(target) + 1 :] if target in names else []
    return found


@pytest.mark.parametrize("name", sorted({*fuzz.TARGETS, *IMPORTERS}))
def test_damage_is_refused_in_one_line(name: str, report: dict[str, list[Any]]) -> None:
    assert name in fuzz.TARGETS, f"the importer {name} has no sample in tests/fuzz.py"
    assert name in report, f"{name} was not reached: {report}"
    assert report[name] == []


def test_the_fuzzer_notices_what_it_is_for() -> None:
    def fails(error: BaseException) -> str | None:
        def read(path: Path, scratch: Path) -> None:
            raise error

        return fuzz._problem(fuzz.Target(lambda folder: folder, read), Path(), Path(), whole=False)

    def caused(cause: Exception) -> Exception:
        error = fuzz.SpecmoeError("x")
        error.__cause__ = cause
        return error

    assert fails(fuzz.SpecmoeError("one line")) is None
    assert "several lines" in str(fails(fuzz.SpecmoeError("two\nlines")))
    assert "KeyError" in str(fails(KeyError("x")))
    assert "too much memory" in str(fails(caused(MemoryError())))
    assert "too much memory" in str(fails(caused(RuntimeError("can't allocate memory"))))
