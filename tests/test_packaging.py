"""What is installed is what was tested, and the wheel works where the repository is not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import specmoe
from pin_versions import PINS, needed, pinned

ROOT = PINS.parents[1]


def test_every_package_is_pinned_in_the_version_that_is_installed() -> None:
    if os.environ.get("SPECMOE_NEWEST"):
        pytest.skip("make latest runs the tests with other versions")
    installed = {name: importlib.metadata.version(name) for name in needed("specmoe[dev]", "hatchling", "editables")}
    assert pinned().keys() == installed.keys()
    # A local part says how torch was built.
    assert pinned() == {name: Version(version).public for name, version in installed.items()}


def test_pins_are_names_and_versions_alone() -> None:
    lines = [line for line in PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) > 60
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)


def test_what_a_package_needs_is_found_through_extras_and_markers() -> None:
    alone, development = needed("specmoe"), needed("specmoe[dev]")
    assert {"torch", "transformers", "numba", "llvmlite", "mpmath"} <= alone
    assert {"pytest", "hypothesis", "sortedcontainers"} <= development - alone
    assert not {"colorama", "specmoe"} & development  # for Windows; ourselves


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the built wheel and what it needs, without what development needs.

    The packages are linked from this environment, so that no index has to be asked.
    """
    folder = tmp_path_factory.mktemp("outside")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("specmoe-*.whl")
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for name in needed("specmoe"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    target = ["--python", str(folder / "venv" / "bin" / "python")]
    install = [sys.executable, "-m", "pip", *target, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder


def run(outside: Path, *arguments: str) -> str:
    """Run the installed command far from the repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    command = [str(outside / "venv" / "bin" / "specmoe"), *arguments]
    ended = subprocess.run(command, cwd=outside, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_wheel_works_outside_the_repository_without_the_development_extra(outside: Path) -> None:
    python = [str(outside / "venv" / "bin" / "python"), "-c"]
    found = subprocess.run(
        [*python, "import specmoe; print(specmoe.__file__)"], capture_output=True, text=True, cwd=outside
    )
    assert Path(found.stdout.strip()).is_relative_to(outside)
    assert subprocess.run([*python, "import pytest"], capture_output=True, cwd=outside, check=False).returncode != 0
    assert run(outside, "--version") == f"specmoe {specmoe.__version__}\n"
    assert "RouterResidualPredictor" in {entry["name"] for entry in json.loads(run(outside, "list", "--json"))}
    collected = json.loads(
        run(outside, "collect", "--tokens-per-document", "32", "--max-tokens", "640", "--out", "trace", "--json")
    )
    assert (collected["tokens"], collected["topology"]["experts"]) == (640, 16)
    small = ["--only", "Tiny*", "--only", "LayerF*", "--seeds", "1", "--horizons", "1", "--workers", "1"]
    results = json.loads(run(outside, "train", "trace", "--out", "run", *small, "--json"))
    assert [predictor["name"] for predictor in results["predictors"]] == ["TinySpeculationModel", "LayerFrequency"]
    assert results["made"]["versions"]["specmoe"] == specmoe.__version__
    assert (outside / "run" / "report.html").stat().st_size > 100_000


def test_requirements_bound_what_is_pinned() -> None:
    requirements = [Requirement(text) for text in importlib.metadata.requires("specmoe") or ()]
    assert [
        str(each) for each in requirements if each.name in pinned() and pinned()[each.name] not in each.specifier
    ] == []
