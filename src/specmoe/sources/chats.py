"""Conversations: how files write them down, and how a model's own chat template turns them into text.

Which template there is shows only when a model is loaded, so a document carries its messages until it is encoded.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from specmoe.errors import SpecmoeError
from specmoe.sources.corpus import Document
from specmoe.sources.notes import Notes

__all__ = ["CHAT_FIELDS", "ChatReader", "chat_of", "is_chat"]

# Fields of a row that may hold a list of messages.
CHAT_FIELDS = ("messages", "conversations", "conversation", "prompt")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function": "tool",
}
# What a template may read of a message besides role and content.
_OTHERS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
# Some templates print today's date; a trace must not depend on the day it was captured.
_DATE = datetime.datetime(2026, 1, 1)
_NO_TEMPLATE = "none: plain lines"


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, ``{role, content}`` or ``{from, value}``."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, dict) and _is_message(each) for each in value)
    )


def _is_message(entry: dict[str, Any]) -> bool:
    return ("role" in entry and ("content" in entry or "tool_calls" in entry)) or entry.keys() >= {"from", "value"}


def chat_of(row: Any, where: str, notes: Notes) -> str | None:
    """The messages of a row, or of a bare list of them, as a document of a conversation keeps them.

    Args:
        row: an object or a list. where: its place, for errors. notes: counts parts that are no text.

    Returns:
        JSON with the messages and, where the row has them, the tools; empty if no message has text; None if the row
        is no conversation.

    Raises:
        SpecmoeError: a message has no role, or a content that is no text.
    """
    fields: dict[str, Any] = {"messages": row} if isinstance(row, list) else row
    name = next((name for name in CHAT_FIELDS if is_chat(fields.get(name))), None)
    if name is None:
        return "" if any(fields.get(name) == [] for name in CHAT_FIELDS) else None
    messages = [_message(entry, f"{where}, message {i}", notes) for i, entry in enumerate(fields[name], 1)]
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["content"].strip() for message in messages):
        return ""
    tools = fields.get("tools")
    content = {"messages": messages, **({"tools": tools} if isinstance(tools, list) and tools else {})}
    return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def _message(entry: dict[str, Any], where: str, notes: Notes) -> dict[str, Any]:
    role = entry.get("role", entry.get("from"))
    if not isinstance(role, str) or not role:
        raise SpecmoeError(f"{where}: its role is no text")
    content = entry.get("content", entry.get("value"))
    others = {name: entry[name] for name in _OTHERS if entry.get(name)}
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": _text(content, where, notes), **others}


def _text(content: Any, where: str, notes: Notes) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise SpecmoeError(f"{where}: its content is neither text nor a list of parts")
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    kept = [text for text in texts if isinstance(text, str)]
    if len(kept) < len(texts):
        notes.add("parts of messages that are no text, left out", where, len(texts) - len(kept))
    return "\n".join(kept)


@contextmanager
def _fixed_date() -> Iterator[None]:
    """Let templates that ask for the day always be told the same one."""
    from transformers.utils import chat_template_utils

    # What strftime_now of transformers looks at; variables of a template cannot be functions.
    given: Any = chat_template_utils
    before = given.datetime
    given.datetime = SimpleNamespace(now=lambda: _DATE)
    try:
        yield
    finally:
        given.datetime = before


class ChatReader:
    """Turns documents into the text that a model reads of them.

    Conversations go through the model's chat template, which writes every special token itself. A model without one
    reads plain lines, ``user: ...``. Whatever a template refuses is left out and counted.

    Args:
        tokenizer: of the model. model: its name, for notes.
        continued: the model is to write; a conversation that ends with the user's message, or a tool's, then ends with
            the beginning of an answer. One that ends with an answer is read whole either way.
    """

    def __init__(self, tokenizer: Any, model: str, *, continued: bool = False) -> None:
        self._tokenizer, self._model, self._continued = tokenizer, model, continued
        self._template = getattr(tokenizer, "chat_template", None)
        self._notes = Notes()
        self.conversations = 0

    def read(self, document: Document) -> tuple[str, bool] | None:
        """Text of a document, and whether its special tokens are in it already; None if it is refused."""
        if not document.is_chat:
            return document.text, False
        self.conversations += 1
        content = json.loads(document.text)
        messages, tools = content["messages"], content.get("tools")
        begins = self._continued and messages[-1]["role"] in {"user", "tool"}
        if not self._template:
            kind = f"{self._model} has no chat template; conversations read as plain lines, such as `user: ...`"
            self._notes.add(kind, document.doc_id)
            lines = [f"{message['role']}: {message['content']}" for message in messages]
            return "\n".join([*lines, *["assistant:"] * begins]), False
        try:
            with _fixed_date():
                return self._rendered(messages, tools, begins), True
        except Exception as error:  # A template is a program of the model's; it may fail in any way.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            kind = f"conversations that the chat template of {self._model} refuses, left out"
            self._notes.add(kind, f"{document.doc_id}: {reason}")
            return None

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, begins: bool) -> str:
        def render(given: list[dict[str, Any]]) -> str:
            return str(
                self._tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=begins)
            )

        text = render(messages)
        said = [message["content"].strip() for message in messages if message["role"] == "user"]
        if said and said[-1] not in text:
            # Templates of models that also see images may know content as a list of parts only.
            parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
            other = render(parts)
            return other if said[-1] in other else text
        return text

    def lines(self) -> list[str]:
        """What there is to tell the user, one line each."""
        return list(self._notes.lines())

    def settings(self) -> dict[str, Any]:
        """How conversations were read, for the trace's manifest; empty where there were none."""
        if not self.conversations:
            return {}
        if not self._template:
            return {"chat_template": _NO_TEMPLATE}
        template = self._template if isinstance(self._template, str) else json.dumps(self._template, sort_keys=True)
        return {
            "chat_template": hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()[:16],
            "chat_date": _DATE.date().isoformat(),
        }
