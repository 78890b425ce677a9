"""Rows that are no routing: left out with their tokens where that is certain, counted in every case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_samples import recall_of, texts

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace
from specmoe.sources.importers.cleaning import Cleaning
from specmoe.sources.unrouted import alike_to_last, blank_rows, counting_layers, in_runs, run_bounds
from specmoe.topology import Topology
from specmoe.trace import RoutingRecord, Trace

TEXTS = texts()
LAYERS, TOP_K = 5, 3
COUNTING = np.broadcast_to(np.arange(TOP_K), (2048, LAYERS, TOP_K))
FOREIGN = np.broadcast_to(TEXTS["experts"][500], (2048, LAYERS, TOP_K))


def imported(folder: Path, arrays: dict[str, Any], **options: Any) -> tuple[Trace, list[str]]:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "a.npz", **arrays)
    warnings = import_trace(folder / "a.npz", folder / "trace", options=ImportOptions(**options))
    trace = Trace.open(folder / "trace")
    trace.verify()
    return trace, warnings


def inserted(at: int, rows: np.ndarray, *, token: int = -1, document: int | None = None) -> dict[str, Any]:
    """The texts with rows put in before row ``at``: into the document there, or as a document of their own."""
    offsets = TEXTS["seq_offsets"]
    if document is None:
        ends = np.where(offsets[1:] > at, offsets[1:] + len(rows), offsets[1:])
        ends = np.concatenate([[0], ends])
    else:
        ends = np.concatenate([offsets[: document + 1], offsets[document:] + len(rows)])
    return {
        "experts": np.insert(TEXTS["experts"].astype(np.int16), [at] * len(rows), rows, axis=0),
        "token_ids": np.insert(TEXTS["token_ids"], [at] * len(rows), token),
        "seq_offsets": ends,
    }


def same_documents(trace: Trace) -> None:
    assert len(trace) == 40
    for number in range(40):
        record = trace.read(number)
        assert record.expert_ids.tolist() == TEXTS["experts"][60 * number : 60 * number + 60].tolist()
        assert record.token_ids.tolist() == TEXTS["token_ids"][60 * number : 60 * number + 60].tolist()


PLACES = {
    "a document of its own": (0, 0),
    "another one": (600, 10),
    "before a text": (120, None),
    "after one": (119, None),
}


@pytest.mark.parametrize("kind", ["counting", "zero"])
@pytest.mark.parametrize("place", PLACES)
def test_recall_is_that_without_those_rows(tmp_path: Path, kind: str, place: str) -> None:
    rows = COUNTING if kind == "counting" else np.zeros_like(COUNTING)
    at, document = PLACES[place]
    arrays = inserted(at, rows, document=document)
    if place == "after one":  # row 119 is the last of its document
        arrays["experts"][119:2168] = np.roll(arrays["experts"][119:2168], 1, axis=0)
        arrays["token_ids"][119:2168] = np.roll(arrays["token_ids"][119:2168], 1)
    trace, warnings = imported(tmp_path / "junk", arrays)
    plain, none = imported(tmp_path / "plain", TEXTS)
    assert none == []
    assert warnings[0].startswith("2,048 tokens")
    assert ("experts 0 to 2 in every layer" if kind == "counting" else "expert 0 in every slot") in warnings[0]
    assert warnings[0].endswith("they were left out")
    whole = document is not None
    assert warnings[1:] == (["1 documents held nothing else and are not in the trace"] if whole else [])
    same_documents(trace)
    assert recall_of(trace, "LayerFrequency") == recall_of(plain, "LayerFrequency")


def test_recall_would_be_another_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recall_of(imported(tmp_path / "plain", TEXTS)[0], "LayerFrequency")
    monkeypatch.setattr(Cleaning, "__call__", lambda _self, record: record)
    moved = [
        recall_of(imported(tmp_path / f"{at}", inserted(at, COUNTING))[0], "LayerFrequency") for at in (0, 600, 1800)
    ]
    assert max(abs(one - plain) for one in moved) > 0.05


def test_tails_without_experts_go_with_their_tokens(tmp_path: Path) -> None:
    ids = TEXTS["experts"].astype(np.int16)
    ids[55:60] = -1
    ids[130:135] = -1  # before the end of the third text
    ids[179] = -1
    ids[170, 2] = -1  # some layers only
    trace, warnings = imported(tmp_path / "a", {**TEXTS, "experts": ids})
    assert warnings == [
        "6 tokens at the ends of documents hold no expert in any layer (-1); they were left out",
        "5 tokens hold no expert in any layer (-1) before others that do; they were kept",
    ]
    assert [len(trace.read(number)) for number in range(4)] == [55, 60, 59, 60]
    assert trace.read(0).token_ids.tolist() == TEXTS["token_ids"][:55].tolist()
    assert trace.read(2).expert_ids.tolist() == ids[120:179].tolist()


def test_rows_left_out_of_the_middle_are_told(tmp_path: Path) -> None:
    ids = TEXTS["experts"].copy()
    ids[10:13] = 0
    ids[60:62] = 0
    ids[100:108] = np.arange(TOP_K)
    trace, warnings = imported(tmp_path / "a", {**TEXTS, "experts": ids})
    assert warnings[-1] == (
        "11 of the tokens left out stood between others of their document; those around them became neighbours"
    )
    assert trace.read(0).token_ids.tolist() == np.delete(TEXTS["token_ids"][:60], [10, 11, 12]).tolist()
    assert trace.read(1).token_ids.tolist() == TEXTS["token_ids"][[*range(62, 100), *range(108, 120)]].tolist()
    assert trace.read(1).expert_ids.tolist() == ids[[*range(62, 100), *range(108, 120)]].tolist()


def test_all_fields_lose_the_same_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = TEXTS["experts"].copy()
    ids[[3, 4]] = 0
    fields = {
        "phase": (np.arange(2400) % 2).astype(np.uint8),
        "gate_weights": rng.random((2400, LAYERS, TOP_K)).astype(np.float32),
        "router_logits": rng.random((2400, LAYERS, 16)).astype(np.float32),
        "hidden": rng.random((2400, LAYERS, 4)).astype(np.float16),
    }
    trace, _ = imported(tmp_path / "a", {**TEXTS, "experts": ids, **fields})
    kept = np.delete(np.arange(60), [3, 4])
    for name, tensor in trace.read(0).tensors():
        expected = {**TEXTS, **fields, "expert_ids": ids}[name][:60][kept]
        assert tensor.tolist() == expected.tolist(), name


def test_formats_that_keep_dense_layers_see_padding_too(tmp_path: Path) -> None:
    ids = np.insert(TEXTS["experts"], 2, 0, axis=1)
    ids[100:110] = np.arange(TOP_K)
    ids[100:110, 2] = 0
    trace, warnings = imported(tmp_path / "a", {**TEXTS, "experts": ids})
    assert warnings[0].startswith("10 tokens, 8 or more in a row, hold the experts 0 to 2")
    assert trace.read(1).expert_ids.tolist() == ids[[*range(60, 100), *range(110, 120)]].tolist()
    # In two layers of six a router may choose them.
    ids[:, [0, 1, 3]] = 0
    assert "were kept" in imported(tmp_path / "b", {**TEXTS, "experts": ids, "token_ids": np.full(2400, -1)})[1][0]


def test_fewer_than_eight_in_a_row_may_be_chance(tmp_path: Path) -> None:
    ids = TEXTS["experts"].copy()
    ids[30:37] = np.arange(TOP_K)
    assert imported(tmp_path / "a", {**TEXTS, "experts": ids})[1] == []
    # Two documents' ends are no run.
    ids = TEXTS["experts"].copy()
    ids[53:67] = np.arange(TOP_K)
    assert imported(tmp_path / "b", {**TEXTS, "experts": ids})[1] == []


def test_other_rows_that_are_routed_alike_are_kept_and_told(tmp_path: Path) -> None:
    arrays = inserted(600, FOREIGN, document=10)
    trace, warnings = imported(tmp_path / "a", arrays)
    assert len(trace) == 41
    assert len(warnings) == 1
    assert warnings[0].startswith("2,048 tokens stand in runs of 8 or more that are routed alike in every layer")
    # One known token again and again may be routed alike; different ones are not.
    assert imported(tmp_path / "b", inserted(600, FOREIGN, token=7, document=10))[1] == []
    assert imported(tmp_path / "d", inserted(630, FOREIGN, token=77))[1] == []
    arrays["token_ids"][600 : 600 + 2048] = np.arange(2048) % 9
    assert imported(tmp_path / "c", arrays)[1] == warnings


def test_a_small_or_top_1_router_may_choose_the_first_experts(tmp_path: Path) -> None:
    def one(layers: int, top_k: int, experts: int) -> list[str]:
        topology = Topology(model_id="m", layers=layers, experts=experts, top_k=top_k, hidden_size=0)
        cleaning = Cleaning(topology)
        ids = torch.arange(top_k, dtype=torch.int16).expand(20, layers, top_k).contiguous()
        record = RoutingRecord(torch.full((20,), -1, dtype=torch.int32), torch.zeros(20, dtype=torch.uint8), ids)
        kept = len(cleaning(record))
        assert kept in (0, 20)
        assert ("left out" in cleaning.warnings()[0]) == (kept == 0)
        return [str(kept), *cleaning.warnings()]

    assert [one(*shape)[0] for shape in ((1, 2, 8), (4, 2, 8), (6, 2, 8), (1, 6, 64))] == ["20", "20", "0", "0"]
    assert [one(*shape)[0] for shape in ((1, 1, 64), (5, 1, 64), (6, 1, 64))] == ["20", "20", "0"]
    # All experts of the layer, in order: nothing else could stand there.
    assert one(40, 4, 4)[0] == "20"


def test_a_file_of_nothing_else_is_refused(tmp_path: Path) -> None:
    arrays = {"experts": COUNTING[:60].astype(np.uint8), "token_ids": np.arange(60), "seq_offsets": np.array([0, 60])}
    with pytest.raises(SpecmoeError, match="no token in it; 60 tokens, 8 or more in a row, hold the experts 0 to 2"):
        imported(tmp_path / "a", arrays, experts=64)


def test_rows_that_say_nothing_of_layers_are_believed_where_there_are_no_others(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.insert(np.broadcast_to(np.arange(2), (20, 1, 2)), 1, 0, axis=1))
    import_trace(tmp_path / "a.npy", tmp_path / "trace", options=ImportOptions(experts=8))
    trace = Trace.open(tmp_path / "trace")
    assert (len(trace.read(0)), trace.manifest.source.settings["layers"]) == (20, [0])


def test_padding_in_dense_layers_too_does_not_make_them_route(tmp_path: Path) -> None:
    ids = np.insert(TEXTS["experts"], 0, 0, axis=1)
    ids[100:120] = np.arange(TOP_K)
    np.save(tmp_path / "a.npy", ids)
    warnings = import_trace(tmp_path / "a.npy", tmp_path / "trace")
    trace = Trace.open(tmp_path / "trace")
    assert trace.manifest.source.settings["layers"] == [1, 2, 3, 4, 5]
    assert sum("20 tokens, 8 or more in a row" in warning for warning in warnings) == 1
    kept = np.delete(np.arange(2400), np.arange(100, 120))
    assert trace.read(0).expert_ids.tolist() == TEXTS["experts"][kept].tolist()


def test_an_import_that_was_killed_continues_past_such_documents(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **inserted(0, COUNTING, document=0))

    def stop(done: int, _total: int | None) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_trace(tmp_path / "a.npz", tmp_path / "trace", on_progress=stop)
    warnings = import_trace(tmp_path / "a.npz", tmp_path / "trace")
    assert warnings[0].startswith("2,048 tokens")
    same_documents(Trace.open(tmp_path / "trace"))


# --- the parts, against plain loops ------------------------------------------------------------------------


def test_rows_and_runs_as_a_loop_finds_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        layers, top_k = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        ids = rng.integers(-1, 2, (int(rng.integers(0, 40)), layers, top_k))
        ids[rng.random(len(ids)) < 0.5] = np.arange(top_k)
        ids[rng.random(len(ids)) < 0.2] = 0
        rows = ids.tolist()
        blank = [all(place in ([0] * top_k, [-1] * top_k, list(range(top_k))) for place in row) for row in rows]
        assert blank_rows(ids).tolist() == blank
        first = list(range(top_k))
        layers_T = [
            sum(place == first for place in row) if all(place in ([0] * top_k, first) for place in row) else 0
            for row in rows
        ]
        assert counting_layers(ids).tolist() == layers_T
        counting = [layers > 0 for layers in layers_T]
        alike = [t > 0 and rows[t] == rows[t - 1] for t in range(len(rows))]
        assert alike_to_last(ids).tolist() == alike
        runs, long = [], [False] * len(rows)
        for t in range(len(rows)):
            if alike[t]:
                runs[-1][1] = t + 1
            else:
                runs.append([t, t + 1])
        assert np.stack(run_bounds(np.array(alike, bool)), 1).tolist() == runs
        for least in (1, 3):
            for t, chosen in enumerate(counting):
                begin, end = t, t
                while chosen and begin > 0 and counting[begin - 1]:
                    begin -= 1
                while chosen and end < len(rows) and counting[end]:
                    end += 1
                long[t] = end - begin >= least
            assert in_runs(np.array(counting, bool), least).tolist() == long
