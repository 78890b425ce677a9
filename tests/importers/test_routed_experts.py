"""Arrays per request: every kind of file, aligned with its tokens, and dense layers left out."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_samples import EXPERTS, ids_of, per_request

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace, recognise
from specmoe.sources.importers.requests import request_of
from specmoe.trace import Trace


def imported(path: Path, out: Path, **options: Any) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out, options=ImportOptions(**options))
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def refused(path: Path, words: str) -> None:
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, path.parent / "trace", format="routed-experts")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(path)) == 1


def test_a_folder_of_everything(tmp_path: Path) -> None:
    path = per_request(tmp_path)
    assert recognise(path).name == "routed-experts"
    trace, warnings = imported(path, tmp_path / "trace", experts=EXPERTS)
    names = ["alone", "deeper/mixed/000000", "deeper/mixed/000001", "many/first", "many/second"]
    assert [document.doc_id for document in trace.documents] == names
    assert warnings == ["4 of 5 requests do not say where the prompt ends; all of it counts as prefill"]
    assert trace.read(0).expert_ids.tolist() == ids_of(6).tolist()
    assert trace.read(1).expert_ids.tolist() == ids_of(2, 5).tolist()
    assert trace.read(3).expert_ids.tolist() == ids_of(4, 1).tolist()
    request = trace.read(2)
    assert request.expert_ids.tolist() == ids_of(3, 3).tolist() + ids_of(2, 4).tolist()
    assert request.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert request.phase.tolist() == [0, 0, 0, 1, 1]
    assert trace.read(0).token_ids.eq(-1).all()


def test_one_file_of_each_kind(tmp_path: Path) -> None:
    folder = per_request(tmp_path)
    for number, (name, first) in enumerate(
        [("alone.npy", "alone"), ("many.npz", "many/first"), ("deeper/mixed.pt", "mixed/000000")]
    ):
        assert recognise(folder / name).name == "routed-experts"
        trace, _ = imported(folder / name, tmp_path / f"trace-{number}")
        assert trace.documents[0].doc_id == first


@pytest.mark.parametrize("filler", [0, -1])
def test_dense_layers_are_left_out(tmp_path: Path, filler: int) -> None:
    ids = ids_of(50, layers=6)
    ids[:, [0, 4]] = filler
    np.save(tmp_path / "a.npy", ids)
    trace, warnings = imported(tmp_path / "a.npy", tmp_path / "trace")
    assert trace.topology.layers == 4
    assert any("layers [0, 4]" in warning for warning in warnings)
    assert trace.manifest.source.settings["layers"] == [1, 2, 3, 5]
    assert trace.read(0).expert_ids.tolist() == ids[:, [1, 2, 3, 5]].tolist()


def test_a_top_1_router_may_choose_expert_0_throughout(tmp_path: Path) -> None:
    ids = ids_of(9, layers=2, k=1)
    ids[:, 0] = 0
    np.save(tmp_path / "a.npy", ids)
    assert imported(tmp_path / "a.npy", tmp_path / "trace")[0].topology.layers == 2


def test_strided_shared_and_bfloat16_free_tensors(tmp_path: Path) -> None:
    base = torch.from_numpy(ids_of(20)).int()
    torch.save({"view": base[3:9], "turned": base.transpose(0, 1).contiguous().transpose(0, 1)}, tmp_path / "a.pt")
    trace, _ = imported(tmp_path / "a.pt", tmp_path / "trace")
    assert trace.read(0).expert_ids.tolist() == base[3:9].tolist()
    assert trace.read(1).expert_ids.tolist() == base.tolist()


def rows(prompt: int | None, generated: int | None, count: int, **fields: Any) -> Any:
    return request_of("r", {"routed_experts": ids_of(count), **fields}, prompt, generated)


def test_rows_are_aligned_at_their_end() -> None:
    given, written = np.arange(10, 14), np.arange(50, 53)
    whole = rows(None, None, 6, prompt_token_ids=given, token_ids=written)
    assert whole.tokens_T.tolist() == [10, 11, 12, 13, 50, 51]
    assert (whole.prompt, whole.skipped) == (4, 0)
    cut = rows(None, None, 3, prompt_token_ids=given, output_ids=written)
    assert cut.tokens_T.tolist() == [13, 50, 51]
    assert cut.skipped == 3
    assert cut.record(np.arange(4)).phase.tolist() == [0, 1, 1]
    counted = rows(4, 3, 6)
    assert counted.tokens_T.tolist() == [-1] * 6
    assert counted.record(np.arange(4)).phase.tolist() == [0, 0, 0, 0, 1, 1]
    # Versions that also forward the last token, and prompts of which nothing was generated.
    assert rows(4, 3, 7, prompt_token_ids=given, token_ids=written).tokens_T.tolist()[-1] == 52
    assert rows(4, 0, 4, prompt_token_ids=given).tokens_T.tolist() == given.tolist()
    assert rows(2**30, 2**30, 3).skipped == 2**31 - 4
    with pytest.raises(SpecmoeError, match="8 rows for 4 prompt and 3 generated"):
        rows(4, 3, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"routed_experts": torch.zeros(3, 4)}, "expected .tokens, layers, k."),
        ({"routed_experts": torch.zeros(3, 4, 2)}, "float32"),
        ({"a": {"b": 1}}, "neither an array"),
        ([1, 2], "neither an array"),
        ([], "holds a list"),
        ("text", "holds a str"),
        ({"a": torch.zeros(2, 3, 2).int(), "b": torch.zeros(2, 4, 2).int()}, "4 layers, top-2; the data before it 3"),
        ({"a": torch.full((2, 3, 2), 99999)}, "holds 99999"),
        ({"a": torch.full((2, 3, 2), -7)}, "holds -7"),
        (torch.zeros(2, 3, 2).int(), "no layer routes anything"),
        (torch.zeros(0, 3, 2).int(), "no token"),
        ({"routed_experts": torch.ones(2, 3, 2).int(), "token_ids": ["x"]}, "token_ids is a list"),
        ({"routed_experts": torch.ones(2, 3, 2).int(), "prompt_token_ids": torch.ones(2, 2)}, "token ids have shape"),
        (
            {"routed_experts": torch.ones(2, 3, 2).int(), "prompt_routed_experts": torch.ones(2, 3, 1).int()},
            "does not fit",
        ),
    ],
)
def test_wrong_content_is_described(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", words)


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_nothing_is_run_and_older_layouts_are_named(tmp_path: Path) -> None:
    torch.save({"a": Harm()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "posix.system, which is not admitted")
    torch.save(torch.ones(2, 2, 2), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "b.pt", "no zip archive")
    np.save(tmp_path / "c.npy", np.array([Harm()], object))
    refused(tmp_path / "c.npy", "Python objects")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no .npy or")


def test_a_tensor_cannot_be_larger_than_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.ones(1, dtype=torch.int32).expand(1000, 100, 10), path)
    refused(path, "declares the shape|holds 1 numbers")
    # A small archive with one array under a million names.
    array = torch.from_numpy(ids_of(2000))
    torch.save([array] * 200_000, path)
    refused(path, "far more than the file holds")


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.from_numpy(ids_of(9)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    refused(path, "damaged")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
    refused(path, "is compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"")
    refused(path, "no data.pkl")
