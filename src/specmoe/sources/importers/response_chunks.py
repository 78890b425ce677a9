"""Chunks of a streamed response, put together by their id and the number of the choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any

from specmoe.sources.importers.response_files import Found

__all__ = ["EXPERTS_OF", "joined"]

# Where a choice or a response may hold its experts: beside the rest, or in one of these objects (SGLang).
EXPERTS_OF = ("sgl_ext", "sglext", "meta_info")
_MOST_OPEN = 1024


def joined(values: Iterable[Found]) -> Iterator[Found]:
    """The same values, with chunks replaced by the responses that they make.

    A response ends where its stream says so (``[DONE]``), where its choices have finished and another response begins,
    or with the file. Streams may be interleaved.
    """
    waiting: dict[str, _Stream] = {}
    for found in values:
        if not (found.event or _is_chunk(found.value)) or not isinstance(found.value, dict | None):
            yield found
            continue
        name = ""
        if found.value is None:
            ready = [other for other, stream in waiting.items() if stream.finished or len(waiting) == 1]
        else:
            name = _name(found.value)
            if not name and len(waiting) == 1:  # such as an error that breaks the stream off
                name = next(iter(waiting))
            ready = [] if name in waiting else [other for other, stream in waiting.items() if stream.finished]
            if name not in waiting and len(waiting) - len(ready) >= _MOST_OPEN:
                ready.append(next(other for other in waiting if other not in ready))
        for other in ready:
            yield waiting.pop(other).response()
        if found.value is not None:
            waiting.setdefault(name, _Stream(found.line)).add(found.value)
    for stream in waiting.values():
        yield stream.response()


def _is_chunk(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("object", "")).endswith(".chunk")


def _name(chunk: dict[str, Any]) -> str:
    meta = chunk.get("meta_info")
    for holder, key in ((meta, "id"), (chunk, "id"), (chunk, "request_id")):
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            return holder[key]
    return ""


class _Stream:
    """A response of which chunks arrive.

    Attributes:
        finished: whether every choice that was begun has a reason to be finished.
    """

    def __init__(self, line: int) -> None:
        self._line = line
        self._whole: dict[str, Any] = {}
        self._choices: dict[Any, dict[str, Any]] = {}
        self._in_pieces = False

    @property
    def finished(self) -> bool:
        choices = self._choices.values()
        return bool(choices) and all(choice.get("finish_reason") is not None for choice in choices)

    def add(self, chunk: dict[str, Any]) -> None:
        """Take in the next chunk: what says something replaces what was said; token ids are appended."""
        choices = chunk.get("choices")
        listed = isinstance(choices, list)
        for number, choice in enumerate(choices if isinstance(choices, list) else []):
            if isinstance(choice, dict):
                index = choice.get("index", number)
                self._merge(self._choices.setdefault(index if isinstance(index, int) else number, {}), choice)
        self._merge(self._whole, {name: value for name, value in chunk.items() if name != "choices" or not listed})

    def _merge(self, whole: dict[str, Any], part: dict[str, Any]) -> None:
        for name, value in part.items():
            before = whole.get(name)
            if value is None:
                continue
            if name in EXPERTS_OF and isinstance(value, dict) and isinstance(before, dict):
                self._merge(before, value)
            elif name == "token_ids" and isinstance(value, list) and isinstance(before, list):
                before.extend(value)
            elif name == "output_ids" and isinstance(value, list) and isinstance(before, list):
                # SGLang repeats what it has said, or says what is new only.
                whole[name] = value if value[: len(before)] == before else before + value
            elif name == "routed_experts" and before is not None:
                self._in_pieces |= not _goes_on(before, value)
                whole[name] = value
            elif name == "prompt_token_ids" and before is not None:
                continue
            else:
                whole[name] = copy(value)  # it may grow

    def response(self) -> Found:
        """What the chunks make; without choices it is SGLang's own form, or an error."""
        whole = dict(self._whole)
        if self._choices:
            whole["choices"] = [self._choices[index] for index in sorted(self._choices)]
        if self._in_pieces:
            whole["error"] = "its chunks hold its experts in pieces, and nothing says how they fit"
        return Found(self._line, whole)


def _goes_on(before: Any, after: Any) -> bool:
    """Whether the experts that a later chunk has begin with those of an earlier one."""
    if isinstance(before, str) and isinstance(after, str):
        # The end of base64, four characters of it, changes when more bytes follow.
        return len(after) >= len(before) and after.startswith(before.rstrip("=")[:-3])
    if isinstance(before, list) and isinstance(after, list):
        return after[: len(before)] == before
    return False
