"""Conversations: from the forms in which files write them down to the token ids that a model reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.sources.capture import collect
from specmoe.sources.chats import ChatReader
from specmoe.sources.corpus import Document
from specmoe.sources.generation import Generation
from specmoe.sources.pretraining import train_tokenizer
from specmoe.sources.texts import read_texts
from specmoe.trace import Phase, Trace
from test_capture import VOCABULARY, by_name, documents, olmoe, olmoe_dir, saved, tokenizer  # noqa: F401

# In the manner of published ones: it writes the mark of a beginning itself.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message.role }}]{{ message.content }}/{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTION = [{"role": "user", "content": "the router"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "a few experts"}]


def read(tmp_path: Path, *rows: Any, notes: list[str] | None = None) -> list[Document]:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_texts([str(tmp_path / "chats.jsonl")], ([] if notes is None else notes).append)


def messages(document: Document) -> list[tuple[str, str]]:
    assert document.is_chat
    return [(message["role"], message["content"]) for message in json.loads(document.text)["messages"]]


def with_template(template: Any) -> Any:
    own = train_tokenizer(documents(), VOCABULARY)
    own.chat_template = template
    return own


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = olmoe()
    model.generation_config.eos_token_id = None
    return saved(model, with_template(TEMPLATE), tmp_path_factory.mktemp("models") / "chat-olmoe")


# --- how files write them down -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ANSWERED},
        {"conversation": ANSWERED},
        {"prompt": ANSWERED},
        ANSWERED,
        {"conversations": [{"from": "human", "value": "the router"}, {"from": "gpt", "value": "a few experts"}]},
        {"messages": [{"role": "User", "content": ["the router"]}, {"role": "model", "content": "a few experts"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "the router"}]}, ANSWERED[1]]},
        {"messages": ANSWERED, "prompt": "the router", "text": "rendered by another model's template"},
    ],
)
def test_forms_of_conversations(tmp_path: Path, row: Any) -> None:
    (document,) = read(tmp_path, row)
    assert messages(document) == [("user", "the router"), ("assistant", "a few experts")]
    (tmp_path / "chats.json").write_text(json.dumps(row, indent=1))
    (alone,) = read_texts([str(tmp_path / "chats.json")])
    assert (alone.doc_id, alone.text) == ("chats.json", document.text)


def test_a_system_message_beside_the_conversation(tmp_path: Path) -> None:
    with_one = [{"role": "system", "content": "own"}, *QUESTION]
    (beside, inside) = read(tmp_path, {"system": "s", "messages": QUESTION}, {"system": "s", "messages": with_one})
    assert messages(beside) == [("system", "s"), ("user", "the router")]
    assert messages(inside) == [("system", "own"), ("user", "the router")]


def test_parts_that_are_no_text_are_counted(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "a"}, {"type": "audio"}, "b"]
    notes: list[str] = []
    rows = [{"messages": [{"role": "user", "content": parts}]}, {"messages": [{"role": "user", "content": parts[:1]}]}]
    (document,) = read(tmp_path, *rows, notes=notes)
    assert messages(document) == [("user", "a\nb")]
    place = tmp_path / "chats.jsonl"
    assert notes == [
        f"parts of messages that are no text, left out: 3 (first: {place}, line 1, message 1)",
        f"rows without text, left out: 1 (first: {place}, line 2)",
    ]


def test_tools_are_kept_for_the_template(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    (document,) = read(tmp_path, {"messages": [*QUESTION, call], "tools": tools})
    content = json.loads(document.text)
    assert content["tools"] == tools
    assert content["messages"][1] == {**call, "content": ""}


def test_equal_conversations_are_equal_texts_and_others_are_not(tmp_path: Path) -> None:
    turned = [dict(reversed(message.items())) for message in ANSWERED]
    one_message = [{"role": "user", "content": "the router\nassistant: a few experts"}]
    rows = [{"messages": each} for each in (ANSWERED, turned, QUESTION, one_message)]
    first, second, *others = [document.text for document in read(tmp_path, *rows)]
    assert first == second
    assert len({first, *others}) == 3


# --- how a model reads them ----------------------------------------------------------------------------


def chats(*conversations: Any) -> list[Document]:
    contents = [json.dumps({"messages": each}, sort_keys=True) for each in conversations]
    return [Document(f"chat{i}", "chats", content, is_chat=True) for i, content in enumerate(contents)]


def test_the_models_own_template_writes_the_text(chat_dir: Path, tmp_path: Path) -> None:
    plain = Document("plain", "d", "the router")
    notes: list[str] = []
    out = collect(
        chat_dir, [*chats(ANSWERED), plain], tmp_path / "trace", max_tokens_per_document=64, on_note=notes.append
    )
    records, own = by_name(out), with_template(TEMPLATE)
    expected = own("[user]the router/[assistant]a few experts/", add_special_tokens=False)["input_ids"]
    # One mark of a beginning, whoever writes it.
    assert records["chat0"].token_ids.tolist() == [own.bos_token_id, *expected]
    assert records["plain"].token_ids.tolist() == [own.bos_token_id, *own("the router")["input_ids"]]
    assert notes == []
    settings = Trace.open(out).manifest.source.settings
    assert len(settings["chat_template"]) == 16
    assert settings["chat_date"] == "2026-01-01"
    texts_only = collect(chat_dir, [plain], tmp_path / "texts", max_tokens_per_document=64)
    assert "chat_template" not in Trace.open(texts_only).manifest.source.settings


@pytest.mark.parametrize(("conversation", "end"), [(QUESTION, "[assistant]"), (ANSWERED, "")])
def test_a_question_is_answered_where_the_model_writes(
    conversation: Any, end: str, chat_dir: Path, tmp_path: Path
) -> None:
    own = with_template(TEMPLATE)
    whole = "".join(f"[{message['role']}]{message['content']}/" for message in conversation)
    for generation, text in [(None, whole), (Generation(3), whole + end)]:
        out = collect(
            chat_dir, chats(conversation), tmp_path / f"{generation is None}", generation=generation,
            max_tokens_per_document=64,
        )  # fmt: skip
        (record,) = by_name(out).values()
        prompt = record.token_ids[record.phase == int(Phase.PREFILL)].tolist()
        assert prompt == [own.bos_token_id, *own(text, add_special_tokens=False)["input_ids"]]
        assert len(record) == len(prompt) + (3 if generation else 0)


def test_a_model_without_a_template_reads_plain_lines(olmoe_dir: Path, tmp_path: Path, tokenizer: Any) -> None:  # noqa: F811
    notes: list[str] = []
    out = collect(
        olmoe_dir, chats(ANSWERED, QUESTION), tmp_path / "read", max_tokens_per_document=64, on_note=notes.append
    )
    records = by_name(out)
    for name, text in [("chat0", "user: the router\nassistant: a few experts"), ("chat1", "user: the router")]:
        expected = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert records[name].token_ids.tolist() == expected
    (note,) = notes
    assert note.startswith(
        "tiny-olmoe has no chat template; conversations read as plain lines, such as `user: ...`: 2 (first: chat"
    )
    assert Trace.open(out).manifest.source.settings["chat_template"] == "none: plain lines"
    reader = ChatReader(tokenizer, "it", continued=True)
    assert reader.read(chats(QUESTION)[0]) == ("user: the router\nassistant:", False)
    assert reader.read(chats(ANSWERED)[0]) == ("user: the router\nassistant: a few experts", False)


def test_what_a_template_refuses_is_left_out_and_counted(tmp_path: Path) -> None:
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('the user must begin\\nby rule') }}{% endif %}"
        + TEMPLATE
    )
    directory = saved(olmoe(), with_template(strict), tmp_path / "model")
    answer = ANSWERED[1:]
    notes: list[str] = []
    out = collect(
        directory, chats(answer, QUESTION, answer), tmp_path / "trace", max_tokens_per_document=64, on_note=notes.append
    )
    assert [document.doc_id for document in Trace.open(out).documents] == ["chat1"]
    (note,) = notes
    assert note.startswith("conversations that the chat template of model refuses, left out: 2 (first: chat")
    assert note.endswith(": the user must begin)")
    with pytest.raises(SpecmoeError, match=r"no document has enough text.*the user must begin"):
        collect(directory, chats(answer), tmp_path / "none", max_tokens_per_document=64)


def test_a_template_that_knows_parts_only() -> None:
    parts = (
        "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    assert ChatReader(with_template(parts), "it").read(chats(ANSWERED)[0]) == (
        "[user]the router[assistant]a few experts",
        True,
    )


def test_a_template_that_prints_the_date_prints_the_same_every_day() -> None:
    dated = "{{ strftime_now('%d %B %Y') }}" + TEMPLATE
    read = ChatReader(with_template(dated), "it").read(chats(QUESTION)[0])
    assert read is not None
    assert read[0].startswith("01 January 2026")


def test_tools_reach_the_template() -> None:
    content = json.dumps({"messages": QUESTION, "tools": [{"type": "function", "function": {"name": "weather"}}]})
    own = with_template("{{ tools[0].function.name }}" + TEMPLATE)
    read = ChatReader(own, "it").read(Document("c", "d", content, is_chat=True))
    assert read is not None
    assert read[0].startswith("weather")


def test_the_verb_and_its_groups(chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    growing = [QUESTION, ANSWERED, [*ANSWERED, {"role": "user", "content": "and the rest"}]]
    rows = [{"conversation_id": 1, "messages": each, "category": ["talk", "x"]} for each in growing]
    rows += [{"conversation_id": 2, "messages": QUESTION}, {"messages": []}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["collect", "--model", str(chat_dir), "--text", str(folder), "--out", str(tmp_path / "trace")]
    arguments += ["--tokens-per-document", "64", "--json"]
    for _ in range(2):  # The second call finds everything done.
        assert run_verb(arguments) == 0
        error = capsys.readouterr().err
        assert "note: rows without text, left out: 1 (first: " in error
    trace = Trace.open(tmp_path / "trace")
    by_id = {document.doc_id: document for document in trace.documents}
    assert {name: (each.group, each.domain) for name, each in by_id.items()} == {
        "chats/rows.jsonl:1": ("chats:1", "talk"),
        "chats/rows.jsonl:2": ("chats:1", "talk"),
        "chats/rows.jsonl:3": ("chats:1", "talk"),
        "chats/rows.jsonl:4": ("", "rows"),
    }
    # Equal conversations are known to be equal.
    assert by_id["chats/rows.jsonl:1"].text_sha256 == by_id["chats/rows.jsonl:4"].text_sha256
    assert len({each.text_sha256 for each in by_id.values()}) == 3
