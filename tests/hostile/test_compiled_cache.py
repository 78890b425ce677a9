"""Where compiled loops are kept: in an installation that cannot be written to, and where nothing can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import specmoe
from specmoe.offload.compiled import place_of_cache

SOURCES = Path(specmoe.__file__).parent
# Nobody can make a folder in it, root included.
UNWRITABLE = Path("/proc/specmoe")


def sources(folder: Path) -> Path:
    (folder / "package" / "part").mkdir(parents=True)
    (folder / "package" / "a.py").touch()
    (folder / "package" / "part" / "b.py").touch()
    return folder / "package"


def test_what_the_user_asked_for_comes_first(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    assert place_of_cache(str(asked), sources(tmp_path)) == str(asked)
    assert place_of_cache(str(UNWRITABLE), sources(tmp_path / "again")) == ""


def test_then_beside_the_sources_where_every_folder_of_them_takes_files(tmp_path: Path) -> None:
    package = sources(tmp_path)
    assert place_of_cache("", package) == ""
    shutil.rmtree(package / "part" / "__pycache__")
    (package / "part" / "__pycache__").touch()  # A file in the folder's place takes no files.
    private = tmp_path / "private"
    assert place_of_cache("", package, lambda: iter([private])) == str(private)
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    package = sources(tmp_path)
    (package / "__pycache__").touch()
    open_to_all, linked, own = tmp_path / "open", tmp_path / "linked", tmp_path / "own"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    linked.symlink_to(tmp_path)
    found = place_of_cache("", package, lambda: iter([UNWRITABLE, open_to_all, linked, own]))
    assert found == str(own)
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir(mode=0o700)
        os.chown(foreign, 65534, 65534)
        assert place_of_cache("", package, lambda: iter([foreign])) is None


def test_nowhere_is_no_error(tmp_path: Path) -> None:
    package = sources(tmp_path)
    (package / "__pycache__").touch()
    assert place_of_cache("", package, lambda: iter([UNWRITABLE])) is None


# The first is what died at import; the second replays a trace as the verb does, without waiting for every loop.
READ_ONLY = """
import sys, tempfile
if sys.argv[1] == "everything unwritable":
    tempfile.gettempdir = lambda: "/proc"
import numpy as np
import specmoe
from specmoe.cli import run_verb
assert run_verb(["simulate", "--help"]) == 0
import specmoe.offload.study
from specmoe.offload import compiled
from specmoe.offload.demand import Demand
from specmoe.topology import Topology
topology = Topology(model_id="x", layers=1, experts=4, top_k=2, hidden_size=8)
ids = np.array([[[0, 1]], [[1, 2]], [[0, 3]]], dtype=np.int16)
demand = Demand.of_records(topology, [ids], [np.zeros(3, dtype=np.uint8)])
assert demand.next_use_M.tolist() == [2, 1, 3, 3, 3, 3]
print(f"FROM {specmoe.__file__} KEPT {compiled.place}")
"""


@pytest.mark.parametrize("unwritable", ["home and sources", "everything unwritable"])
def test_an_installation_that_cannot_be_written_to(unwritable: str, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    shutil.copytree(SOURCES, installed / "specmoe", ignore=shutil.ignore_patterns("__pycache__"))
    # A file in its place: permissions would not bind root, who may be running this.
    for folder in {file.parent for file in (installed / "specmoe").rglob("*.py")}:
        (folder / "__pycache__").touch()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_"))}
    environment |= {"PYTHONPATH": str(installed), "HOME": str(UNWRITABLE), "TMPDIR": str(temporary)}
    run = subprocess.run(
        [sys.executable, "-c", READ_ONLY, unwritable], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    everything = unwritable == "everything unwritable"
    place = None if everything else temporary / f"specmoe-numba-{os.geteuid()}"
    assert f"FROM {installed}/specmoe/__init__.py KEPT {place}" in run.stdout
    # _merge and _next_uses.
    assert len(list(temporary.glob("specmoe-numba-*/*/*.nbi"))) == (0 if everything else 2)
