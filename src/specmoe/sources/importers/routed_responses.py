"""Import vLLM's or SGLang's responses that carry their routed experts: JSONL, JSON, streams, batch output.

vLLM's choices hold a base64 ``.npy`` (older versions: nested lists, the prompt's apart); SGLang gives base64 of int32
without a shape.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import opened
from specmoe.sources.importers.base import ForeignTrace, Importer, ImportOptions, files_of
from specmoe.sources.importers.grouping import facts_of, place_of
from specmoe.sources.importers.npy import parse_npy
from specmoe.sources.importers.requests import Request, import_requests, request_of
from specmoe.sources.importers.response_chunks import EXPERTS_OF, joined
from specmoe.sources.importers.response_files import Found, found_in, mentions

__all__ = ["IMPORTER"]

_ENDINGS = (".jsonl", ".ndjson", ".json", ".sse")
_SUFFIXES = (*_ENDINGS, *(f"{ending}.gz" for ending in _ENDINGS))
_MOST_LOOKED_INTO = 8  # files of a folder, until one is recognised
# So many rows make it all but certain that ids repeat where two layers are taken for one.
_ROWS_TO_TELL = 64
_MOST_NUMBERS = 1 << 16


@dataclass(frozen=True)
class _Response:
    """One answer of an engine: the experts as they came, and how many tokens there were.

    ``facts`` are its fields by name; ``answer_of`` says which response it is a choice of, empty for the only one.
    """

    name: str
    fields: dict[str, np.ndarray]
    prompt: int | None
    generated: int | None
    facts: Mapping[str, str] = field(default_factory=dict)
    answer_of: str = ""

    @property
    def flat(self) -> np.ndarray | None:
        """The experts without their shape, if that is how they came."""
        experts = self.fields["routed_experts"]
        return experts if experts.ndim == 1 else None

    @property
    def forwarded(self) -> int | None:
        """Tokens that the engine forwarded, None if it does not say."""
        lengths = {name: len(array) for name, array in self.fields.items()}
        prompt = lengths.get("prompt_token_ids", self.prompt)
        generated = lengths.get("token_ids", lengths.get("output_ids", self.generated))
        return None if prompt is None or generated is None else prompt + max(0, generated - 1)


@dataclass
class _LeftOut:
    """Answers (choices, failed requests) that cannot be imported: how many of how many, and the first one's fault."""

    seen: int = 0
    count: int = 0
    first: str = ""

    def note(self, place: str, reason: str) -> None:
        """Count one."""
        self.count += 1
        self.first = self.first or f"{place}: {reason}"


class _NoExpertsError(SpecmoeError):
    """A response that failed, or came without experts; it is left out."""


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a file of responses, or a folder of them.

    A file is JSONL (a response in each line, or a list of them), JSON over many lines (one response, several, or a
    list), a stream of events (``data: ...``) or the output of an OpenAI batch; it may be gzip-compressed. Requests that
    failed and responses without experts are left out and counted in a warning.

    Where the experts come without shape, the numbers per token follow from the numbers of tokens, and k is the
    largest length of blocks in which no id repeats, in any row.

    Raises:
        SpecmoeError: something is no JSON object, no response has routed experts, or their shape cannot be told.
    """
    files = files_of(path, *_SUFFIXES)
    left_out = _LeftOut()
    shape = _told_apart(path, files, left_out)

    def requests() -> Iterator[Request]:
        for response in _responses(path, files, _LeftOut()):
            fields = response.fields
            if response.flat is not None:
                if shape is None:
                    raise SpecmoeError("there is no token in it")
                fields = {**fields, "routed_experts": response.flat.reshape(-1, *shape)}
            axes = options.axes if response.flat is None else None
            request = request_of(response.name, fields, response.prompt, response.generated, axes)
            yield replace(request, facts=response.facts, answer_of=response.answer_of)

    foreign = import_requests(path, requests, options)
    if left_out.count:
        foreign.warnings.append(
            f"{left_out.count:,} of {left_out.seen:,} responses were left out, the first in {left_out.first}"
        )
    if shape is not None:
        foreign.warnings.append(f"the experts come without shape; {shape[0]} layers, top-{shape[1]}, were inferred")
    return foreign


# --- responses ---------------------------------------------------------------------------------------


def _responses(path: Path, files: list[Path], left_out: _LeftOut) -> Iterator[_Response]:
    for file in files:
        facts = place_of(path, file)
        with opened(file):
            for number, found in enumerate(joined(found_in(file))):
                where = f"line {found.line}" if len(files) == 1 else f"{facts['file']}, line {found.line}"
                yield from _responses_of(found, where, f"{facts['file']} {number}", facts, left_out)


def _responses_of(found: Found, where: str, key: str, facts: dict[str, str], left_out: _LeftOut) -> Iterator[_Response]:
    """The answers in one value; ``key`` is no other value's."""
    try:
        if not isinstance(found.value, dict):
            raise SpecmoeError("it is no response (a JSON object)")
        name = f"line-{found.line:06d}" + ("" if found.place is None else f"/{found.place}")
        facts = {**facts_of(found.value), **facts}
        response, custom = _unwrapped(found.value)
        parts = list(_choices(response, _name(custom, name)))
        for part, answer in parts:
            left_out.seen += 1
            if isinstance(answer, str):
                left_out.note(where if len(parts) == 1 else f"{where}, choice {part}", answer)
            else:
                yield replace(answer, facts=facts, answer_of=key if len(parts) > 1 else "")
    except _NoExpertsError as error:
        left_out.seen += 1
        left_out.note(where, str(error))
    except SpecmoeError as error:
        raise SpecmoeError(f"line {found.line}: {error}") from error
    except (ValueError, RecursionError) as error:  # no base64, a ragged list
        raise SpecmoeError(f"line {found.line} cannot be read: {' '.join(str(error).split())[:120]}") from error


def _unwrapped(response: dict[str, Any]) -> tuple[dict[str, Any], object]:
    """A response out of a line of batch output, with the name that the line gives it.

    Raises:
        _NoExpertsError: the request failed.
    """
    if (error := response.get("error")) is not None or response.get("object") == "error":
        message = error.get("message") if isinstance(error, dict) else error or response.get("message")
        raise _NoExpertsError(f"the request failed ({' '.join(str(message).split())[:80]})")
    inner = response.get("response")
    if not isinstance(inner, dict) or "custom_id" not in response:
        return response, None
    status = inner.get("status_code")
    if isinstance(status, int) and status >= 400:
        raise _NoExpertsError(f"the request failed (status {status})")
    if not isinstance(body := inner.get("body"), dict):
        raise _NoExpertsError("it has no body")
    return _unwrapped({name: value for name, value in body.items() if name != "response"})[0], response["custom_id"]


def _choices(response: dict[str, Any], fallback: str) -> Iterator[tuple[int, _Response | str]]:
    """Each choice of a response with its number, or what it lacks."""
    meta, choices = response.get("meta_info"), response.get("choices")
    if not isinstance(choices, list):
        if not isinstance(meta, dict):
            raise _NoExpertsError("it has neither meta_info (SGLang) nor choices (vLLM, SGLang)")
        fields = _fields(meta, {"output_ids": response.get("output_ids")})
        name = _name(meta.get("id"), fallback) if fallback.startswith("line-") else fallback
        counts = _count(meta, "prompt_tokens"), _count(meta, "completion_tokens")
        yield 0, fields if isinstance(fields, str) else _Response(name, fields, *counts)
        return
    name = _name(response.get("id"), _name(response.get("request_id"), fallback))
    name = name if fallback.startswith("line-") else fallback
    usage = response["usage"] if isinstance(response.get("usage"), dict) else {}
    if not choices:
        raise _NoExpertsError("it has no choice")
    for place, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise SpecmoeError("a choice is no JSON object")
        # What stands beside the choices is the first one's.
        holders = [choice, *(h.get(k) for h in ([choice, response] if place == 0 else [choice]) for k in EXPERTS_OF)]
        holder = next((h for h in holders if isinstance(h, dict) and h.get("routed_experts") is not None), {})
        prompt = {key: response.get(key) for key in ("prompt_routed_experts", "prompt_token_ids")}
        if prompt["prompt_token_ids"] is None:
            prompt["prompt_token_ids"] = choice.get("prompt_token_ids")
        fields = _fields(holder, {**prompt, "token_ids": choice.get("token_ids")})
        # With several choices, usage counts the tokens of all of them.
        generated = _count(usage, "completion_tokens") if len(choices) == 1 else None
        label = name if len(choices) == 1 else f"{name}/{place}"
        counts = _count(usage, "prompt_tokens"), generated
        yield place, fields if isinstance(fields, str) else _Response(label, fields, *counts)


def _fields(holder: dict[str, Any], others: dict[str, Any]) -> dict[str, np.ndarray] | str:
    """The arrays, or what is missing."""
    if holder.get("routed_experts") is None:
        return "it has no routed_experts; the engine returns them only where it was asked to"
    values = {"routed_experts": holder["routed_experts"], **others}
    return {name: _decoded(value, name) for name, value in values.items() if value is not None}


def _decoded(value: Any, name: str) -> np.ndarray:
    """Nested lists, or base64 of a ``.npy`` or of bare int32."""
    if isinstance(value, list):
        array = np.asarray(value)
        return array.astype(np.int64) if not array.size else array
    if not isinstance(value, str):
        raise SpecmoeError(f"{name} is neither a list nor base64 text")
    raw = base64.b64decode(value, validate=True)
    if raw.startswith(b"\x93NUMPY"):
        return parse_npy(raw, name)
    if len(raw) % 4:
        raise SpecmoeError(f"{name} is neither a numpy array nor a row of 32-bit numbers")
    return np.frombuffer(raw, "<i4")


def _name(value: object, fallback: str) -> str:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else fallback


def _count(holder: dict[str, Any], name: str) -> int | None:
    value = holder.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
        raise SpecmoeError(f"{name} is no number of tokens")
    return value


# --- the shape of experts that come without one ----------------------------------------------------------


def _told_apart(path: Path, files: list[Path], left_out: _LeftOut) -> tuple[int, int] | None:
    """Layers and k, None if no response needs them."""
    with opened(path):
        width, rows = _numbers_per_token(_responses(path, files, left_out))
        if left_out.count and left_out.count == left_out.seen:
            raise SpecmoeError(f"none of its {left_out.seen:,} responses can be used; the first, {left_out.first}")
        if width is None:
            return None
        if rows < _ROWS_TO_TELL:
            raise SpecmoeError(f"{rows} tokens are too few to tell layers and top-k apart; {_ROWS_TO_TELL} are needed")
        if width > _MOST_NUMBERS:
            raise SpecmoeError(f"{width:,} experts per token are no possible routing")
        candidates = [size for size in range(width, 0, -1) if width % size == 0]
        for response in _responses(path, files, _LeftOut()):
            if response.flat is not None:
                rows_TW = response.flat.reshape(-1, width)
                candidates = [size for size in candidates if _never_repeats(rows_TW, size)]
        return width // candidates[0], candidates[0]


def _numbers_per_token(responses: Iterator[_Response]) -> tuple[int | None, int]:
    """L · K, and the tokens there are."""
    sizes: list[int] = []
    per_token = Fraction(0)
    for response in responses:
        if response.flat is not None and len(response.flat):
            sizes.append(len(response.flat))
            if response.forwarded is not None:
                per_token = max(per_token, Fraction(len(response.flat), max(1, response.forwarded)))
    if sizes and not per_token:
        raise SpecmoeError("no response says how many tokens it has, and their routed_experts have no shape")
    # Whoever lacks rows at the front has fewer numbers per token than are due, so the most is the truth.
    width = int(per_token)
    if width != per_token or any(size % width for size in sizes):
        raise SpecmoeError(
            "the numbers of experts and tokens do not fit; ask for at least one response from its first token on "
            "(routed_experts_start_len 0)"
        )
    return width or None, sum(sizes) // max(1, width)


def _never_repeats(rows_TW: np.ndarray, size: int) -> bool:
    """Whether blocks of ``size`` numbers hold different ids, or one number throughout (a dense layer)."""
    if size == 1:
        return True
    blocks = np.sort(rows_TW.reshape(-1, size), axis=1)
    repeats = (np.diff(blocks, axis=1) == 0).any(1)
    return not (repeats & ((blocks[:, 0] != blocks[:, -1]) | (blocks[:, 0] > 0))).any()


def _recognises(path: Path, head: bytes) -> bool:
    words = ((b'"routed_experts"',), (b'"choices"', b'"meta_info"'))
    if not path.is_dir():
        return mentions(path, *words)
    try:
        files = files_of(path, *_SUFFIXES)[:_MOST_LOOKED_INTO]
    except (SpecmoeError, OSError):
        return False
    return any(mentions(file, *words) for file in files)


IMPORTER = Importer(
    name="routed-responses",
    about="vLLM's or SGLang's responses with routed_experts: JSONL, JSON, streams of events, batch output",
    read=read,
    recognises=_recognises,
    takes_axes=True,
    group_by="any field of a response, such as user or metadata.session; file; folder",
)
