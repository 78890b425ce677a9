"""The house rule: data flows one way, and a module imports only what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import specmoe

ROOT = Path(specmoe.__file__).parent

# From the source of the data to what people see of it. A module may import from its own and earlier rows.
ORDER = [
    ("errors",),
    ("files", "locks", "topology", "memory", "schema"),
    ("checkpoint", "threads"),
    ("trace",),
    ("sources",),
    ("dataset",),
    ("residency",),
    ("metrics",),
    ("diagnostics",),
    ("predictors",),
    ("training",),
    ("calibration",),
    ("results",),
    ("evaluation",),
    ("latency",),
    ("suite",),
    ("report",),
    ("tuning",),
    ("ensembling",),
    ("offload",),
    ("cli", "__main__"),
]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}

# Imports that a place must never make, whatever their order.
NEVER = {"topology": {"torch", "numpy"}, "trace": {"pickle"}, "sources": set(), "metrics": {"transformers"}}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def test_every_place_has_a_rank() -> None:
    assert {place_of(path) for path in modules()} == set(RANK)


def test_imports_point_one_way() -> None:
    wrong = []
    for path in modules():
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "specmoe" and len(parts) > 1 and parts[1] in RANK and RANK[parts[1]] > RANK[place_of(path)]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_sources_and_dataset_know_no_predictor_and_training_no_single_one() -> None:
    for path in modules():
        names = {name for name in imports_of(path) if name.startswith("specmoe.predictors")}
        if place_of(path) in {"sources", "dataset", "trace", "metrics"}:
            assert names == set(), path
        if place_of(path) in {"training", "calibration", "evaluation", "latency"}:
            assert all(name.startswith("specmoe.predictors.base") or name == "specmoe.predictors" for name in names), (
                path
            )


def test_forbidden_imports() -> None:
    for path in modules():
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots & NEVER.get(place_of(path), set()) == set(), path
        if path.name != "restricted_pickle.py":
            assert "pickle" not in roots, path


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): count for path in modules() if (count := len(path.read_text().splitlines())) > 450
    }
    assert long == {}
