"""Run the tests with other versions of the packages than the pinned ones, and say what broke.

Usage: python scripts/latest.py [REQUIREMENT ...]

Without arguments the newest release of every package is taken, but for torch, whose newest release is a CUDA build of
gigabytes on many machines; name it to have it. With arguments, such as ``transformers==5.21.0``, only those packages
differ from the pins. The report is runs/latest.md. Nothing else depends on this job: it may fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints" / "cpu.txt"
PLACE = ROOT / ".venv-latest"
REPORT = ROOT / "runs" / "latest.md"
_VERSIONS = """
import importlib.metadata as m, sys
sys.path.insert(0, "scripts")
from pin_versions import needed
print(*(f"{name}=={m.version(name)}" for name in sorted(needed("specmoe[dev]"))), sep="\\n")
"""
_UNLISTED = """
import sys
sys.path.insert(0, "tests")
from tiny_models import offered_families
from specmoe.sources.families import EXCLUDED, FAMILIES
print(*sorted(offered_families() - set(FAMILIES) - set(EXCLUDED)), sep="\\n")
"""


def main(requirements: list[str]) -> int:
    """Install, test, report; the tests' exit code."""
    python = _install(requirements)
    results = PLACE / "results.xml"
    tests = [python, "-m", "pytest", "-n", "2", f"--junitxml={results}"]
    code = subprocess.run(tests, cwd=ROOT, env={**os.environ, "SPECMOE_NEWEST": "1"}, check=False).returncode
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(_report(python, results, code), encoding="utf-8")
    print(REPORT.read_text(encoding="utf-8"))
    return code


def _install(requirements: list[str]) -> str:
    pins = [line for line in PINS.read_text(encoding="utf-8").split("\n") if "==" in line]
    named = {requirement.split("==")[0].split(">")[0].split("<")[0].strip() for requirement in requirements}
    held = [pin for pin in pins if pin.split("==")[0] not in named and (requirements or pin.startswith("torch=="))]
    shutil.rmtree(PLACE, ignore_errors=True)
    venv.create(PLACE, with_pip=True)
    (PLACE / "held.txt").write_text("\n".join(held) + "\n", encoding="utf-8")
    python = str(PLACE / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(PLACE / "held.txt")]
    first = [text for text in requirements if text.startswith("torch")] or [pin for pin in pins if "torch==" in pin]
    subprocess.run([*pip, *first, "hatchling", "editables"], check=True)
    subprocess.run([*pip, "--no-build-isolation", *requirements, "-e", f"{ROOT}[dev]"], check=True)
    return python


def _report(python: str, results: Path, code: int) -> str:
    pins = dict(line.split("==") for line in PINS.read_text(encoding="utf-8").split("\n") if "==" in line)
    found = dict(line.split("==") for line in _said(python, _VERSIONS))
    moved = [
        f"| {name} | {pins.get(name, 'not pinned')} | {version} |"
        for name, version in found.items()
        if version.split("+")[0] != pins.get(name)
    ]
    lines = ["# Tests with other versions", "", f"pytest ended with {code}.", ""]
    lines += ["| package | pinned | here |", "|---|---|---|", *moved, ""]
    if unlisted := _said(python, _UNLISTED):
        lines += [f"Families of transformers without a row: {', '.join(unlisted)}.", ""]
    if not results.exists():
        return "\n".join([*lines, "The tests did not get as far as a result.", ""])
    cases = list(ET.parse(results).getroot().iter("testcase"))
    failed = [(case, problem) for case in cases for problem in (*case.findall("failure"), *case.findall("error"))]
    lines += [f"{len(cases)} tests, {len(failed)} of them failed.", ""]
    reasons = Counter(" ".join((problem.get("message") or "").split())[:200] for _, problem in failed)
    for reason, count in reasons.most_common():
        names = [
            f"{case.get('classname')}::{case.get('name')}"
            for case, problem in failed
            if " ".join((problem.get("message") or "").split())[:200] == reason
        ]
        lines.append(f"- {count} ×: {reason} (first: `{names[0]}`)")
    return "\n".join([*lines, ""])


def _said(python: str, script: str) -> list[str]:
    ended = subprocess.run([python, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.stdout.split()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
