"""JSONL of responses: shapes told or inferred, tokens and phases aligned."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_samples import LAYERS, TOP_K, ids_of, jsonl, npy_text, responses, sglang_response, vllm_response

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import import_trace, recognise
from specmoe.trace import Trace


def imported(path: Path, out: Path) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out)
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def refused(path: Path, words: str) -> None:
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, path.parent / "trace", format="routed-responses")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(path)) == 1


def test_sglang_without_shape(tmp_path: Path) -> None:
    path = responses(tmp_path)
    assert recognise(path).name == "routed-responses"
    trace, warnings = imported(path, tmp_path / "trace")
    assert (trace.topology.layers, trace.topology.top_k) == (LAYERS, TOP_K)
    assert [document.doc_id for document in trace.documents] == ["a", "b"]
    assert len(warnings) == 3
    assert "layers [0]" in warnings[0]
    assert "1 of 2 requests lack their first tokens" in warnings[1]
    assert f"{LAYERS + 1} layers, top-{TOP_K}, were inferred" in warnings[2]
    first, second = trace.read(0), trace.read(1)
    assert first.expert_ids.tolist() == ids_of(68, layers=LAYERS + 1)[:, 1:].tolist()
    assert first.phase.tolist() == [0] * 60 + [1] * 8
    assert first.token_ids.tolist() == [-1] * 60 + list(range(500, 508))
    assert len(second) == 16
    assert second.phase.eq(0).all()


def test_sglang_by_the_openai_endpoint(tmp_path: Path) -> None:
    answer = sglang_response("x", 70, 3, 0)
    encoded = answer["meta_info"]["routed_experts"]
    line = {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": "…", "sgl_ext": {"routed_experts": encoded}}],
        "usage": {"prompt_tokens": 70, "completion_tokens": 3},
    }
    trace, _ = imported(jsonl(tmp_path, line), tmp_path / "trace")
    assert trace.documents[0].doc_id == "cmpl-1"
    assert trace.read(0).phase.tolist() == [0] * 70 + [1] * 2


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_any_k_is_inferred(tmp_path: Path, k: int) -> None:
    answer = sglang_response("x", 400, 1, 0)
    ids = ids_of(400, 5, layers=12, experts=24, k=k).astype("<i4")
    answer["meta_info"]["routed_experts"] = base64.b64encode(ids.tobytes()).decode()
    trace, _ = imported(jsonl(tmp_path, answer), tmp_path / "trace")
    assert trace.topology.top_k == k
    assert trace.read(0).expert_ids.tolist() == ids.tolist()


def test_vllm_new_and_old(tmp_path: Path) -> None:
    old = {
        "id": "old",
        "prompt_token_ids": [5, 6],
        "prompt_routed_experts": ids_of(2, 7).tolist(),
        "choices": [
            {"token_ids": [7, 8, 9], "routed_experts": ids_of(2, 8).tolist()},
            {"token_ids": [3], "routed_experts": []},
        ],
    }
    old["choices"][1]["routed_experts"] = npy_text(np.zeros((0, LAYERS, TOP_K), np.int16))
    path = jsonl(tmp_path, vllm_response("new", 4, 3, 0), [old, vllm_response("new", 2, 2, 1)])
    trace, warnings = imported(path, tmp_path / "trace")
    assert warnings == []
    assert [document.doc_id for document in trace.documents] == ["new", "old/0", "old/1", "new#2"]
    assert trace.read(0).token_ids.tolist() == [900, 901, 902, 903, 0, 1]
    assert trace.read(0).expert_ids.tolist() == ids_of(6).tolist()
    assert trace.read(1).token_ids.tolist() == [5, 6, 7, 8]
    assert trace.read(1).phase.tolist() == [0, 0, 1, 1]
    assert trace.read(2).token_ids.tolist() == [5, 6]


def changed(**changes: Any) -> dict[str, Any]:
    answer = sglang_response("a", 70, 2, 0)
    return {**answer, "meta_info": {**answer["meta_info"], **changes}}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([1], "line 1: it is no response"),
        ({"a": 1}, "line 1: it has neither meta_info"),
        ({"choices": [3]}, "choice is no JSON object"),
        ({"choices": [{}]}, "no routed_experts"),
        (changed(routed_experts=None), "no routed_experts"),
        (changed(routed_experts=7), "neither a list nor base64"),
        (changed(routed_experts="???"), "line 1 cannot be read"),
        (changed(routed_experts="AAA="), "neither a numpy array nor"),
        (changed(routed_experts=base64.b64encode(b"\x93NUMPY..").decode()), "no readable numpy header"),
        (changed(routed_experts=[[[1, 2]], [[1]]]), "line 1 cannot be read"),
        (changed(routed_experts=[[[1, "x"]]]), "expected .tokens, layers, k."),
        (changed(routed_experts=[[[10**30, 1]]]), "expected .tokens, layers, k."),
        (changed(prompt_tokens=-1), "prompt_tokens is no number"),
        (changed(prompt_tokens=None), "does not say how many tokens"),
        (changed(prompt_tokens=3.5), "prompt_tokens is no number"),
        (sglang_response("a", 5, 2, 0), "6 tokens are too few"),
        (changed(routed_experts=""), "no token"),
    ],
)
def test_wrong_lines_are_described(tmp_path: Path, line: Any, words: str) -> None:
    refused(jsonl(tmp_path, line), words)


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    refused(jsonl(tmp_path, changed(), changed(prompt_tokens=1)), "do not fit|rows for")
    refused(jsonl(tmp_path, sglang_response("a", 70, 2, 0, skipped=3)), "do not fit")


def test_no_json_and_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, words in ((b"", "no token"), (b"\n\n", "no token"), (b"{", "line 1 cannot"), (b"[" * 9999, "line 1")):
        path.write_bytes(content)
        refused(path, words)
    path.write_text(json.dumps(changed()) + "\n" + "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"))
    refused(path, "line 2 cannot be read")
