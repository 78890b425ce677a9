"""What belongs together: samples of one prompt, conversations that grow; and what does not: a shared system prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_samples import dump, ids_of, jsonl, npy_text, pass_record
from text_samples import jsonl as rows_of
from text_samples import megatron, problems, routing

from specmoe.cli import run_verb
from specmoe.dataset import split_documents
from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace
from specmoe.sources.importers.grouping import Grouping, facts_of, routing_words
from specmoe.trace import Trace

SYSTEM = list(range(1000, 1040))


def grouped(*requests: tuple[list[int], list[int]], warnings: list[str] | None = None) -> list[list[int]]:
    """Requests (prompt, answer) with known ids, as sets of those that belong together."""
    grouping = Grouping()
    for prompt, answer in requests:
        grouping.add(np.array([*prompt, *answer], np.int64), None, len(prompt))
    return sets_of(grouping.groups([] if warnings is None else warnings))


def sets_of(groups: list[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        found.setdefault(group or f"alone {number}", []).append(number)
    return sorted(found.values())


def text(seed: int, length: int = 30) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


def test_samples_of_one_prompt() -> None:
    assert grouped((text(1), text(2)), (text(3), text(4)), (text(1), text(5)), (text(3), []), (text(6), [])) == [
        [0, 2],
        [1, 3],
        [4],
    ]
    # However short the prompt is, as long as not most of the file begin so.
    assert grouped(([7, 8], text(1)), ([7, 8], text(2)), ([9], text(3)), ([6, 5], text(4))) == [[0, 1], [2], [3]]


def test_a_conversation_that_grows() -> None:
    first = (text(1), text(2))
    second = ([*first[0], *first[1], *text(3)], text(4))
    third = ([*second[0], *second[1], *text(5)], text(6))
    assert grouped(third, (text(9), text(2)), first, second) == [[0, 2, 3], [1]]
    # The last generated token is often left out, and an answer may lose its reasoning on the way.
    stripped = ([*first[0], *first[1][20:], *text(7)], text(8))
    assert grouped(first, (text(9), text(2)), stripped) == [[0, 2], [1]]


def test_branches_of_a_conversation_are_one_group() -> None:
    first = (text(1), text(2))
    branches = [([*first[0], *first[1], *text(10 + number)], text(20 + number)) for number in range(6)]
    others = [(text(40 + number), text(50 + number)) for number in range(3)]
    assert grouped(*branches, *others, first) == [[0, 1, 2, 3, 4, 5, 9], [6], [7], [8]]


def test_a_shared_system_prompt_binds_nothing() -> None:
    requests = [([*SYSTEM, *text(number)], text(100 + number)) for number in range(9)]
    alone = [[number] for number in range(9)]
    assert grouped(*requests) == alone
    # Nor if it was sent on its own to warm a cache, with or without an answer of one token that is never read.
    assert grouped(*requests, (SYSTEM, [])) == [*alone, [9]]
    assert grouped(*requests, (SYSTEM, []), (SYSTEM, [])) == [*alone, [9, 10]]
    # Conversations below it are still told apart.
    turns = [([*prompt, *answer, *text(200)], text(300 + number)) for number, (prompt, answer) in enumerate(requests)]
    assert grouped(*requests, (SYSTEM, []), *turns) == [*([number, 10 + number] for number in range(9)), [9]]


def test_the_mark_of_a_beginning_binds_nothing() -> None:
    assert grouped(*(([1], text(number)) for number in range(6))) == [[number] for number in range(6)]
    # A few words that others begin with, too, are no conversation.
    assert grouped((text(1)[:5], text(2)), (text(1), text(3)), (text(4), [])) == [[0], [1], [2]]
    assert grouped(([1], [2]), ([1, 2, *text(1)], []), ([1, 2, *text(2)], []), ([1, 2, *text(3)], [])) == [
        [0],
        [1],
        [2],
        [3],
    ]


def test_what_cannot_be_split_is_said() -> None:
    warnings: list[str] = []
    assert grouped(*((text(1), text(number)) for number in range(4)), warnings=warnings) == [[0, 1, 2, 3]]
    assert len(warnings) == 1
    assert "the 4 requests answer or continue only 1 distinct prompt(s)" in warnings[0]
    assert "--group-by" in warnings[0]
    warnings = []
    assert grouped((text(1), []), (text(2), []), (text(3), []), warnings=warnings) == [[0], [1], [2]]
    assert grouped(warnings=warnings) == []
    assert warnings == []


def by_routing(
    *requests: tuple[np.ndarray, int | None], tokens: dict[int, np.ndarray] | None = None
) -> list[list[int]]:
    """Requests (expert ids, length of the prompt) without token ids, or with some."""
    grouping = Grouping()
    for number, (ids_TLK, prompt) in enumerate(requests):
        unknown = np.full(len(ids_TLK), -1)
        grouping.add((tokens or {}).get(number, unknown), routing_words(ids_TLK), prompt)
    return sets_of(grouping.groups([]))


def test_routing_stands_in_for_unknown_tokens() -> None:
    prompt, other = ids_of(12, 1), ids_of(12, 2)
    sample = [np.concatenate([prompt, ids_of(9, 10 + number)]) for number in range(2)]
    grown = np.concatenate([sample[0], ids_of(8, 20)])
    requests = [(sample[0], 12), (np.concatenate([other, ids_of(9, 30)]), 12), (sample[1], 12), (grown, 25)]
    assert by_routing(*requests) == [[0, 2, 3], [1]]
    # The answer's tokens are known, as SGLang tells them; the prompt's are not.
    known = {number: np.r_[np.full(12, -1), np.arange(len(ids) - 12)] for number, (ids, _) in enumerate(requests)}
    assert by_routing(*requests, tokens=known) == [[0, 2, 3], [1]]
    # One expert in one layer of one token is another text.
    changed = sample[1].copy()
    changed[5, 0] = (changed[5, 0] + 1) % 16
    assert by_routing(requests[0], (changed, 12)) == [[0], [1]]
    # Where the prompt ends is not known: all of it must be the beginning of another.
    assert by_routing((sample[0], None), (sample[1], None), (grown, None)) == [[0, 2], [1]]


def test_routing_that_is_alike_by_chance_binds_nothing() -> None:
    # A collapsed router, and rows of padding: every prefix is that of all others.
    constant = [np.ones((20 + number, 2, 2), np.int64) for number in range(5)]
    assert by_routing(*((ids, 10) for ids in constant)) == [[number] for number in range(5)]
    # Two experts in one layer: five rows are often equal by chance.
    draw = np.random.default_rng(0)
    small = [(draw.integers(0, 2, (30, 1, 1)), 5) for _ in range(40)]
    assert by_routing(*small) == [[number] for number in range(40)]


def response(name: str, prompt: list[int] | int, answers: list[list[int]], seed: int, **more: Any) -> dict[str, Any]:
    """A completion of which the experts follow from the text so far, as a causal model's do."""
    length = prompt if isinstance(prompt, int) else len(prompt)
    choices = []
    for index, answer in enumerate(answers):
        ids = np.concatenate([ids_of(length, seed), ids_of(max(0, len(answer) - 1), seed + 1000 * (index + 1))])
        choices.append({"index": index, "token_ids": answer, "routed_experts": npy_text(ids)})
    known = {"prompt_token_ids": prompt} if isinstance(prompt, list) else {}
    usage = {"prompt_tokens": length, "completion_tokens": sum(map(len, answers))}
    return {"id": name, "choices": choices, "usage": usage, **known, **more}


def groups_of(path: Path, out: Path, **options: Any) -> list[str]:
    format = "routed-experts" if path.is_dir() else None
    import_trace(path, out, format=format, options=ImportOptions(**options))
    return [document.group for document in Trace.open(out).documents]


def test_responses_are_grouped_and_split_together(tmp_path: Path) -> None:
    lines = []
    for number in range(12):
        prompt = [*SYSTEM, *text(number)]
        lines.append(response(f"{number}-first", prompt, [text(100 + number, 9)], number))
        grown = [*prompt, *text(100 + number, 9), *text(200 + number)]
        lines.append(response(f"{number}-second", grown, [text(300 + number, 9)], 50 + number))
    path = jsonl(tmp_path, *lines)
    groups = groups_of(path, tmp_path / "trace")
    assert groups[::2] == groups[1::2]
    assert len(set(groups)) == 12
    split = split_documents(Trace.open(tmp_path / "trace").documents)
    for part in split.parts.values():
        assert {index ^ 1 for index in part} == set(part)


def test_choices_of_a_response_belong_together_whatever_is_known(tmp_path: Path) -> None:
    one = response("a", 3, [[1, 2], [3, 4]], 0)
    path = jsonl(tmp_path, one, response("b", 3, [[5, 6]], 7), response("c", 4, [[1, 2]], 9))
    assert sets_of(groups_of(path, tmp_path / "trace")) == [[0, 1], [2], [3]]


def test_missing_rows_do_not_hide_a_prompt_that_is_known(tmp_path: Path) -> None:
    lines = [response("a", text(1), [[5, 6]], 0), response("b", text(1), [[7, 8]], 0), response("c", text(2), [[7]], 3)]
    lines[1]["choices"][0]["routed_experts"] = npy_text(ids_of(31)[20:])
    assert sets_of(groups_of(jsonl(tmp_path, *lines), tmp_path / "trace")) == [[0, 1], [2]]


def test_answers_to_prompts_that_are_missing_are_no_prompts(tmp_path: Path) -> None:
    answer = list(range(20))
    lines = [response(name, 30, [answer], seed) for name, seed in (("a", 0), ("b", 1), ("c", 2))]
    for line, seed in zip(lines, range(3), strict=True):
        line["choices"][0]["routed_experts"] = npy_text(ids_of(49, seed)[30:])
    assert groups_of(jsonl(tmp_path, *lines), tmp_path / "trace") == ["", "", ""]


def test_grouping_by_a_field(tmp_path: Path) -> None:
    lines = [response(str(n), text(1), [[5]], 0, user=f"u{n % 2}", metadata={"session": n // 2}) for n in range(4)]
    path = jsonl(tmp_path, *lines)
    assert groups_of(path, tmp_path / "a", group_by="user") == ["user=u0", "user=u1", "user=u0", "user=u1"]
    assert groups_of(path, tmp_path / "b", group_by="metadata.session") == [
        f"metadata.session={n // 2}" for n in range(4)
    ]
    assert Trace.open(tmp_path / "b").manifest.source.settings["group_by"] == "metadata.session"
    assert groups_of(path, tmp_path / "c", group_by="id") == ["id=0", "id=1", "id=2", "id=3"]
    with pytest.raises(
        SpecmoeError, match=r"no field 'usr' to group by; there are: file, folder, id, metadata\.session, "
    ):
        groups_of(path, tmp_path / "d", group_by="usr")
    with pytest.raises(SpecmoeError):
        Trace.open(tmp_path / "d")


def test_a_field_that_some_lack_is_said(tmp_path: Path) -> None:
    path = jsonl(tmp_path, response("a", text(1), [[5]], 0, user="u"), response("b", text(1), [[6]], 0))
    warnings = import_trace(path, tmp_path / "trace", options=ImportOptions(group_by="user"))
    assert "1 of 2 requests have no field 'user'; each is a group of its own" in warnings
    assert [document.group for document in Trace.open(tmp_path / "trace").documents] == ["user=u", ""]


def test_grouping_by_place(tmp_path: Path) -> None:
    for name in ("x/a", "x/b", "y/a"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "in" / f"{name}.npy", ids_of(6, len(name)))
    assert groups_of(tmp_path / "in", tmp_path / "t", group_by="folder") == ["folder=x", "folder=x", "folder=y"]
    assert groups_of(tmp_path / "in", tmp_path / "u", group_by="file")[0] == "file=x/a.npy"


def test_not_every_format_can_be_grouped(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", experts=ids_of(4), seq_offsets=np.array([0, 4]))
    with pytest.raises(SpecmoeError, match=r"--group-by is not possible for npz; it is for .*routed-responses"):
        groups_of(tmp_path / "a.npz", tmp_path / "t", group_by="file")


def test_the_option_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path, *(response(str(n), text(n), [[5]], n, user=f"u{n}") for n in range(3)))
    assert run_verb(["import", str(path), "--out", str(tmp_path / "t"), "--group-by", "user"]) == 0
    assert [document.group for document in Trace.open(tmp_path / "t").documents] == ["user=u0", "user=u1", "user=u2"]
    capsys.readouterr()
    assert run_verb(["import", str(path), "--out", str(tmp_path / "u"), "--group-by", "nobody"]) == 2
    assert "there is no field 'nobody' to group by" in capsys.readouterr().err


def test_arrays_of_requests(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", one=ids_of(12, 1), two=ids_of(12, 2), more=np.concatenate([ids_of(12, 1), ids_of(5, 3)])
    )
    assert sets_of(groups_of(tmp_path / "a.npz", tmp_path / "t")) == [[0, 2], [1]]


def test_requests_of_a_recorder(tmp_path: Path) -> None:
    def record(number: int, mode: int, tokens: list[list[int]], start: int = 0) -> dict[str, Any]:
        made = pass_record(number, mode, [(0, start, len(one)) for one in tokens])
        return {**made, "input_ids": [token for one in tokens for token in one]}

    first, second = [*SYSTEM, *text(1)], [*SYSTEM, *text(2)]
    grown = [*first, 5, *text(3)]
    records = [record(0, 1, [first, second]), record(1, 1, [grown]), record(2, 1, [first])]
    assert sets_of(groups_of(dump(tmp_path / "expert_distribution_recorder_1_0.pt", records), tmp_path / "t")) == [
        [0, 2, 3],
        [1],
    ]
    # What was cached is not there, so equal ends tell nothing.
    records[2:] = [record(2 + number, 1, [first[30:]], start=30) for number in range(2)]
    assert sets_of(groups_of(dump(tmp_path / "expert_distribution_recorder_2_0.pt", records), tmp_path / "u")) == [
        [0, 2],
        [1],
        [3],
        [4],
    ]


def test_problems_by_their_fields(tmp_path: Path) -> None:
    rows = [{**row, "repository": f"r{n % 2}"} for n in range(4) for row in problems(routing(5, n), problem=n)]
    (tmp_path / "a.jsonl").write_text(rows_of(rows))
    assert groups_of(tmp_path / "a.jsonl", tmp_path / "t") == [""] * 4
    assert groups_of(tmp_path / "a.jsonl", tmp_path / "u", group_by="repository") == [
        f"repository=r{n % 2}" for n in range(4)
    ]
    assert groups_of(tmp_path / "a.jsonl", tmp_path / "v", group_by="problem_id") == [
        f"problem_id={n}" for n in range(4)
    ]
    with pytest.raises(SpecmoeError, match=r"there are: dataset, file, folder, problem_id, repository$"):
        groups_of(tmp_path / "a.jsonl", tmp_path / "w", group_by="layer")


def test_inference_traced_by_megatron(tmp_path: Path) -> None:
    prompt = routing(20, 1)
    parts = [prompt, routing(1, 2), prompt, routing(1, 3), routing(20, 4), routing(1, 5)]
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text("".join(megatron(part, step=step) for step, part in enumerate(parts)))
    assert sets_of(groups_of(path, tmp_path / "t")) == [[0, 1], [2]]
    assert groups_of(path, tmp_path / "u", group_by="file") == [f"file={path.name}"] * 3


def test_fields_of_an_object() -> None:
    content = {"a": "x", "b": 3, "c": {"d": True, "e": {"f": 1, "g": {"h": 2}}}, "i": [1], "j": None, "k": "y" * 999}
    assert facts_of(content) == {"a": "x", "b": "3", "c.d": "True", "c.e.f": "1"}
    assert facts_of({"\udcff": "\udcff"}) == {"?": "?"}
    assert len(facts_of({str(number): number for number in range(1000)})) == 256
