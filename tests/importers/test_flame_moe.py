"""FLAME-MoE's Parquet per layer: rows of all layers and of the samples are brought together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_samples import flame, flame_arrays

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace, recognise
from specmoe.trace import Trace

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def imported(path: Path, out: Path, **options: Any) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out, options=ImportOptions(**options))
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def refused(path: Path, words: str) -> None:
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, path.parent.parent / "trace", format="flame-moe")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("whole_model", [True, False])
def test_a_checkpoint(tmp_path: Path, statistics: bool, whole_model: bool) -> None:
    actives = flame(tmp_path, statistics=statistics)
    path = actives.parent.parent if whole_model else actives
    assert recognise(path).name == "flame-moe"
    trace, warnings = imported(path, tmp_path / "trace", experts=64)
    assert len(warnings) == 1
    assert "every 2048 rows" in warnings[0]
    assert [document.tokens for document in trace.documents] == [2048, 2048, 904]
    assert trace.documents[1].doc_id == "iter_0540/rows-000002048"
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (2, 64, 6)
    assert trace.manifest.source.settings["layers"] == [2, 3]
    ids, scores = flame_arrays(5000, 2)
    record = trace.read(1)
    assert record.gate_weights is not None
    assert record.token_ids.tolist() == list(range(2048, 4096))
    assert record.expert_ids.tolist() == ids[2048:4096].tolist()
    assert record.gate_weights.tolist() == scores[2048:4096].astype(np.float32).tolist()


def test_without_samples(tmp_path: Path) -> None:
    actives = flame(tmp_path, tokens=30)
    for file in (actives.parent.parent / "samples").iterdir():
        file.unlink()
    trace, warnings = imported(actives, tmp_path / "trace")
    assert "tokens are unknown" in warnings[1]
    assert trace.read(0).token_ids.eq(-1).all()
    assert trace.topology.experts == int(flame_arrays(30, 2)[0].max()) + 1


def replaced(folder: Path, **columns: Any) -> Path:
    actives = flame(folder, tokens=20)
    pq.write_table(pa.table(columns), actives / "layer_03.parquet")
    return actives


GOOD = {"scores": [[0.5] * 6] * 20, "indices": [[1, 2, 3, 4, 5, 6]] * 20}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"scores": GOOD["scores"]}, "no column 'indices'"),
        ({"scores": GOOD["scores"][:9], "indices": GOOD["indices"][:9]}, "different numbers of rows"),
        ({**GOOD, "indices": [[1, 2, 3]] * 20}, "layer 3 chooses 3 experts"),
        ({**GOOD, "indices": [[1, 2, 3, 4, 5, 6]] * 19 + [[1]]}, "one and the same length"),
        ({**GOOD, "indices": [[1, 2, 3, 4, 5, 6]] * 19 + [None]}, "one and the same length"),
        ({**GOOD, "indices": [[1, 2, 3, 4, 5, None]] * 20}, "lacks a number"),
        ({**GOOD, "indices": [["a"] * 6] * 20}, "expected numbers"),
        ({**GOOD, "indices": [[0.5] * 6] * 20}, "indices has dtype float64|whole numbers"),
        ({**GOOD, "indices": [[-3] * 6] * 20}, "indices holds -3"),
        ({**GOOD, "indices": [[70000] * 6] * 20}, "no possible model|indices holds 70000"),
        ({**GOOD, "scores": [[1] * 6] * 20}, "scores has dtype int64"),
        ({**GOOD, "scores": [[float("nan")] * 6] * 20}, "NaN"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    refused(replaced(tmp_path, **columns), words)


def test_other_folders(tmp_path: Path) -> None:
    actives = flame(tmp_path, tokens=20)
    (actives.parent / "iter_1080").mkdir()
    refused(actives.parent.parent, "there is: iter_0540, iter_1080")
    refused(actives / "layer_02.parquet", "it is a file")
    (actives.parent.parent / "samples" / "001.parquet").unlink()
    refused(actives, "fewer rows")
    (actives / "layer_02.parquet").write_bytes(b"PAR1 and more PAR1")
    refused(actives, "damaged")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actives = flame(tmp_path, tokens=20)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(actives, r"pip install 'specmoe\[parquet\]'")
