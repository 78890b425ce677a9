"""JSONL of responses: shapes told or inferred, tokens and phases aligned."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_samples import (
    LAYERS,
    TOP_K,
    batch,
    chunks_of,
    events,
    ids_of,
    indented,
    jsonl,
    npy_text,
    packed,
    responses,
    sglang_response,
    stream,
    vllm_response,
)

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import import_trace, recognise, response_files
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
        (changed(prompt_tokens=None), "no response says how many tokens"),
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


# --- other forms of a file -----------------------------------------------------------------------------------


def same_as(trace: Trace, *samples: tuple[str, int, int, int]) -> None:
    """The trace holds vLLM's responses (name, prompt, generated, seed), token by token."""
    assert [document.doc_id for document in trace.documents] == [name for name, *_ in samples]
    for index, (_, prompt, generated, seed) in enumerate(samples):
        record = trace.read(index)
        assert record.expert_ids.tolist() == ids_of(prompt + generated - 1, seed).tolist()
        assert record.token_ids.tolist() == [*range(900, 900 + prompt), *range(generated - 1)]
        assert record.phase.tolist() == [0] * prompt + [1] * (generated - 1)


def test_a_stream_of_events(tmp_path: Path) -> None:
    path = stream(tmp_path)
    assert recognise(path).name == "routed-responses"
    trace, warnings = imported(path, tmp_path / "trace")
    same_as(trace, ("a", 6, 3, 0), ("b", 4, 4, 1))
    assert warnings == []


def test_streams_that_are_interleaved_and_have_several_choices(tmp_path: Path) -> None:
    one, two = vllm_response("a", 6, 3, 0), vllm_response("b", 4, 3, 1)
    one["choices"].append({**vllm_response("a", 6, 3, 2)["choices"][0], "index": 1})
    mixed = [chunk for pair in zip(chunks_of(one)[:4], chunks_of(two), strict=True) for chunk in pair]
    path = tmp_path / "log.txt"
    # Windows' line ends, no blank lines between events, other fields, and an end of one stream amid the other.
    text = events(*mixed, "[DONE]", *chunks_of(one)[4:], "[DONE]").replace("\n\n", "\r\n")
    path.write_text("event: message\r\nid: 7\r\n" + text, newline="")
    trace, warnings = imported(path, tmp_path / "trace")
    assert [warning for warning in warnings if "left out" in warning] == []
    same_as(trace, ("b", 4, 3, 1), ("a/0", 6, 3, 0), ("a/1", 6, 3, 2))
    assert trace.documents[0].group != trace.documents[1].group == trace.documents[2].group


def test_a_stream_that_was_cut_off_or_broke_down(tmp_path: Path) -> None:
    one, two, three = (chunks_of(vllm_response(name, 6, 3, 0), bearer=2) for name in "abc")
    path = tmp_path / "log.sse"
    error = {"error": {"message": "overloaded"}}
    path.write_text(
        events(*two[:1], error, "[DONE]") + events(*one, "[DONE]") + json.dumps(error) + "\n" + events(three[0])
    )
    trace, warnings = imported(path, tmp_path / "trace")
    same_as(trace, ("a", 6, 3, 0))
    assert warnings == ["3 of 4 responses were left out, the first in line 1: the request failed (overloaded)"]


def test_an_event_of_several_lines(tmp_path: Path) -> None:
    lines = json.dumps(vllm_response("a", 5, 3, 0), indent=1).splitlines()
    path = tmp_path / "log.sse"
    path.write_text("".join(f"data: {line}\n" for line in lines) + "\n" + events(vllm_response("b", 3, 2, 1)))
    trace, _ = imported(path, tmp_path / "trace")
    same_as(trace, ("a", 5, 3, 0), ("b", 3, 2, 1))
    path.write_text("".join(f"data: {line}\n" for line in lines[:-4]))
    refused(path, "line 1 cannot be read")


@pytest.mark.parametrize("repeating", [True, False])
def test_sglangs_own_stream(tmp_path: Path, repeating: bool) -> None:
    whole = sglang_response("a", 70, 4, 0)
    chunks = []
    for end in range(1, 5):
        meta = {**whole["meta_info"], "completion_tokens": end, "routed_experts": None}
        given = whole["output_ids"][:end] if repeating else whole["output_ids"][end - 1 : end]
        chunks.append({"text": "…", "output_ids": given, "meta_info": meta})
    chunks[-1]["meta_info"] = whole["meta_info"]
    path = tmp_path / "log.sse"
    path.write_text(events(*chunks, "[DONE]"))
    trace, _ = imported(path, tmp_path / "trace")
    assert trace.read(0).token_ids.tolist() == [-1] * 70 + [500, 501, 502]
    assert trace.read(0).expert_ids.tolist() == ids_of(73, layers=LAYERS + 1)[:, 1:].tolist()


def test_experts_in_pieces_are_left_out(tmp_path: Path) -> None:
    chunks = chunks_of(vllm_response("a", 6, 3, 0))
    chunks[1]["choices"][0]["routed_experts"] = npy_text(ids_of(1, 5))
    path = tmp_path / "log.sse"
    path.write_text(events(*chunks, "[DONE]", *chunks_of(vllm_response("b", 4, 3, 1))))
    trace, warnings = imported(path, tmp_path / "trace")
    same_as(trace, ("b", 4, 3, 1))
    assert "1 of 2 responses were left out" in warnings[0]
    assert "in pieces" in warnings[0]


def test_chunks_without_the_frame_of_events(tmp_path: Path) -> None:
    chunks = [
        {**chunk, "object": "chat.completion.chunk"}
        for name, seed in (("a", 0), ("b", 1))
        for chunk in chunks_of(vllm_response(name, 5, 3, seed))
    ]
    trace, warnings = imported(jsonl(tmp_path, *chunks), tmp_path / "trace")
    same_as(trace, ("a", 5, 3, 0), ("b", 5, 3, 1))
    assert warnings == []


def test_experts_beside_the_choices(tmp_path: Path) -> None:
    """SGLang's ``sglext`` holds those of the first choice, with ``return_meta_info`` each choice has its own."""
    answer = vllm_response("a", 40, 30, 0)
    encoded = base64.b64encode(ids_of(69).astype("<i4").tobytes()).decode()
    choice = {"index": 0, "token_ids": answer["choices"][0]["token_ids"]}
    beside = {**answer, "id": "beside", "choices": [choice], "sglext": {"routed_experts": encoded}}
    within = {**answer, "id": "within", "choices": [{**choice, "meta_info": {"routed_experts": encoded}}]}
    two = {**beside, "id": "two", "choices": [choice, {**choice, "index": 1}]}
    trace, warnings = imported(jsonl(tmp_path, beside, within, two), tmp_path / "trace")
    same_as(trace, ("beside", 40, 30, 0), ("within", 40, 30, 0), ("two/0", 40, 30, 0))
    assert "1 of 4 responses were left out, the first in line 3, choice 1: it has no routed_experts" in warnings[1]


def test_batch_output(tmp_path: Path) -> None:
    trace, warnings = imported(batch(tmp_path), tmp_path / "trace")
    same_as(trace, ("one", 5, 3, 0), ("four", 3, 2, 1))
    assert warnings == ["2 of 4 responses were left out, the first in line 2: the request failed (status 500)"]


def test_indented_json(tmp_path: Path) -> None:
    path = indented(tmp_path)
    assert recognise(path).name == "routed-responses"
    trace, warnings = imported(path, tmp_path / "list")
    same_as(trace, ("a", 5, 3, 0), ("b", 3, 2, 1))
    assert warnings == []
    # One response, and two of them one after the other.
    one, two = (json.dumps(vllm_response(name, 5, 3, seed), indent=4) for name, seed in (("a", 0), ("b", 1)))
    path.write_text(one)
    same_as(imported(path, tmp_path / "one")[0], ("a", 5, 3, 0))
    path.write_text(f"\ufeff\n{one}\n\n{two}\n")
    same_as(imported(path, tmp_path / "two")[0], ("a", 5, 3, 0), ("b", 5, 3, 1))
    # A fault is told by its line, and so is a failed request.
    path.write_text(f"[{one},\n{two[:-9]}\n]")
    refused(path, f"line {len(one.splitlines()) + len(two[:-9].splitlines()) + 1} cannot be read")
    path.write_text(f"[{{}},\n{one}]")
    assert "first in line 1: it has neither" in imported(path, tmp_path / "failed")[1][0]
    path.write_text(f"[{one}]\n{two}")
    refused(path, "something follows the list")
    path.write_text("[\n]")
    refused(path, "no token")


def test_indented_json_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    answers = [vllm_response(f"r{number}", 2000, 2, number) for number in range(24)]
    for number, answer in enumerate(answers):
        answer["choices"][0]["routed_experts"] = ids_of(2001, number).tolist()
    path = tmp_path / "responses.json"
    path.write_text(json.dumps(answers, indent=1))
    assert path.stat().st_size > 5 << 20
    trace, _ = imported(path, tmp_path / "trace")
    same_as(trace, *((f"r{number}", 2000, 2, number) for number in range(24)))


@pytest.mark.parametrize("build", [responses, stream, batch, indented])
def test_every_form_may_be_packed(tmp_path: Path, build: Any) -> None:
    path = build(tmp_path)
    plain, _ = imported(path, tmp_path / "plain")
    small = path.with_name(f"{path.name}.gz")
    small.write_bytes(gzip.compress(path.read_bytes()))
    assert recognise(small).name == "routed-responses"
    trace, _ = imported(small, tmp_path / "packed")
    assert [trace.read(n).expert_ids.tolist() for n in range(2)] == [
        plain.read(n).expert_ids.tolist() for n in range(2)
    ]


def test_a_packed_file_that_was_cut(tmp_path: Path) -> None:
    path = packed(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, "was cut short")


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    indented(folder)
    batch(folder / "deep")
    (folder / "config.json").write_text('{"model": "m"}')
    assert recognise(folder).name == "routed-responses"
    trace, warnings = imported(folder, tmp_path / "trace")
    same_as(trace, ("one", 5, 3, 0), ("four", 3, 2, 1), ("a", 5, 3, 0), ("b", 3, 2, 1))
    assert warnings[-1] == (
        "3 of 7 responses were left out, the first in config.json, line 1: "
        "it has neither meta_info (SGLang) nor choices (vLLM, SGLang)"
    )


def test_a_first_request_that_is_long_or_failed(tmp_path: Path) -> None:
    long = vllm_response("a", 40_000, 2, 0)
    answer = {"prompt": "x" * 3_000_000, "prompt_token_ids": long.pop("prompt_token_ids"), **long}
    path = jsonl(tmp_path, answer)
    assert b"routed_experts" not in path.read_bytes()[: 3 << 20]
    assert recognise(path).name == "routed-responses"
    path = jsonl(tmp_path, *[{"error": {"message": "y" * 500}}] * 300, vllm_response("a", 5, 3, 0))
    assert recognise(path).name == "routed-responses"
    trace, warnings = imported(path, tmp_path / "trace")
    same_as(trace, ("a", 5, 3, 0))
    assert warnings[0].startswith("300 of 301 responses were left out, the first in line 1: the request failed (yyy")


@pytest.mark.parametrize("build", [stream, indented, packed])
def test_words_and_values_that_blocks_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    path = build(tmp_path)
    plain, _ = imported(path, tmp_path / "plain")
    monkeypatch.setattr(response_files, "_CHUNK", 7)
    assert recognise(path).name == "routed-responses"
    trace, _ = imported(path, tmp_path / "cut")
    assert [document.text_sha256 for document in trace.documents] == [d.text_sha256 for d in plain.documents]


def test_texts_are_no_responses(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "about routed_experts and choices"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": [], "routed_experts": [[[1]]]}\n')
    (tmp_path / "c.csv").write_text('x,"routed_experts","choices"\n')
    for name in ("a.jsonl", "c.csv"):
        with pytest.raises(SpecmoeError, match="no known format"):
            recognise(tmp_path / name)
    assert recognise(tmp_path / "b.jsonl").name == "rows"  # a table with a column of experts


def test_requests_that_failed_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path, changed(), {"error": "out of memory"}, {"choices": []}, sglang_response("b", 60, 2, 1))
    trace, warnings = imported(path, tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["a", "b"]
    assert "2 of 4 responses were left out, the first in line 2: the request failed (out of memory)" in warnings
    refused(
        jsonl(tmp_path, {"error": "a"}, {"object": "error", "message": "b"}, {"choices": [{}]}),
        "none of its 3 responses",
    )
    refused(
        jsonl(tmp_path, {"choices": [{}, {}]}),
        "none of its 2 responses can be used; the first, line 1, choice 0: it has no",
    )
    refused(
        jsonl(tmp_path, {"detail": "Not Found"}),
        "none of its 1 responses can be used; the first, line 1: it has neither",
    )


def test_answers_of_equal_tokens_to_unknown_prompts_are_no_copies(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path, sglang_response("a", 60, 3, 0), sglang_response("b", 60, 3, 1), sglang_response("c", 60, 3, 0)
    )
    trace, _ = imported(path, tmp_path / "trace")
    first, second, third = (document.text_sha256 for document in trace.documents)
    assert first == third != second
