"""JSONL by problem: rows may lie in any order, each problem becomes a document of its dataset."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_samples import TOP_K, jsonl, problems, refused, routing, run

from specmoe.sources.importers import _text, problem_jsonl
from specmoe.trace import Phase


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize("block", [100, 1 << 22])
@pytest.mark.parametrize("shuffled", [False, True])
def test_everything_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffled: bool, block: int) -> None:
    monkeypatch.setattr(_text, "_BLOCK_BYTES", block)
    sources = {("gsm8k", 0): routing(8), ("gsm8k", 1): routing(5, 1), ("humaneval", 0): routing(6, 2)}
    rows = [row for (dataset, n), source in sources.items() for row in problems(source, dataset=dataset, problem=n)]
    if shuffled:
        random.Random(0).shuffle(rows)
    trace, warnings = run(write(tmp_path / "routing.jsonl", jsonl(rows)), tmp_path / "trace")
    assert warnings == []
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (3, 16, TOP_K)
    found = {document.doc_id: (number, document.domain) for number, document in enumerate(trace.documents)}
    assert found.keys() == {"gsm8k/0", "gsm8k/1", "humaneval/0"}
    for (dataset, problem), source in sources.items():
        number, domain = found[f"{dataset}/{problem}"]
        record = trace.read(number)
        assert record.gate_weights is not None
        assert domain == dataset
        assert (record.phase == Phase.DECODE).all()
        assert np.array_equal(record.expert_ids.numpy(), source.ids_TLK)
        torch.testing.assert_close(record.gate_weights, torch.from_numpy(source.weights_TLK).float())


def test_rows_without_names_or_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [without(row, "dataset", "problem_id", "gating_probs") for row in problems(routing(4))]
        write(tmp_path / f"in/{name}.jsonl", jsonl(rows))
    trace, _ = run(tmp_path / "in", tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["a.jsonl", "b.jsonl"]
    assert trace.manifest.fields == ("token_ids", "phase", "expert_ids")


def test_missing_rows_and_tokens_are_counted(tmp_path: Path) -> None:
    rows = [row for row in problems(routing(8)) if row["token_idx"] != 3 and (row["layer"], row["token_idx"]) != (2, 5)]
    trace, warnings = run(write(tmp_path / "r.jsonl", jsonl(rows)), tmp_path / "trace")
    assert trace.read(0).expert_ids[4, 1].tolist() == [-1] * TOP_K
    assert warnings == [
        "1 of 21 (token, layer) places have no row; they hold no expert (-1)",
        "1 tokens are missing by their numbers; those around them became neighbours",
    ]


GOOD = {"dataset": "d", "problem_id": 0, "layer": 1, "experts": [1, 2], "gating_probs": [0.5, 0.5], "token_idx": 0}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"a": 1}, {"b": 2}', "expected a JSON object"),
        ("\udcff", "expected a JSON object"),
        ("[" * 50_000, "expected a JSON object"),
        ({**GOOD, "experts": "12"}, "expected whole numbers"),
        ({**GOOD, "experts": 3}, "expected whole numbers"),
        ({**GOOD, "experts": [[1], [2]]}, "expected whole numbers"),
        ({**GOOD, "experts": [1.0, 2.0]}, "expected whole numbers"),
        ({**GOOD, "experts": [1, None]}, "expected whole numbers"),
        ({**GOOD, "experts": [1, 10**30]}, "expected whole numbers"),
        ({**GOOD, "experts": [1, 2, 3]}, "expected whole numbers"),
        ({**GOOD, "token_idx": -1}, "expected whole numbers"),
        ({**GOOD, "layer": True and "1"}, "expected whole numbers"),
        (without(GOOD, "layer"), "expected whole numbers"),
        (without(GOOD, "gating_probs"), "some rows have gating_probs"),
        ({**GOOD, "token_idx": 1, "experts": [1, -2]}, "expert id -2"),
        ({**GOOD, "token_idx": 1, "layer": -2}, "layer -2"),
        ({**GOOD, "token_idx": 1, "gating_probs": [0.5, float("nan")]}, "gate weight nan"),
        ({**GOOD, "token_idx": 1, "gating_probs": [0.5, 1e300]}, "gate weight 1e\\+300"),
        (GOOD, "slot 0 of layer 1"),
    ],
)
def test_bad_rows_are_described(tmp_path: Path, row: Any, words: str) -> None:
    text = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "r.jsonl"
    path.write_bytes(f"{json.dumps(GOOD)}\n\n{text}\n".encode(errors="surrogateescape"))
    refused(path, tmp_path / "trace", f"line 3: {words}", format="problem-jsonl")


def test_one_problem_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"in/{name}.jsonl", json.dumps(GOOD) + "\n")
    refused(tmp_path / "in", tmp_path / "trace", "both hold d/0")


def test_problems_mixed_row_by_row_are_refused_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_jsonl, "_MOST_SEGMENTS", 10)
    rows = [{**GOOD, "problem_id": n % 2, "token_idx": n} for n in range(20)]
    refused(write(tmp_path / "r.jsonl", jsonl(rows)), tmp_path / "trace", "sort the file")
