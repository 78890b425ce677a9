"""Import JSONL of vLLM's or SGLang's responses that carry their routed experts.

vLLM's choices hold a base64 ``.npy`` (older versions: nested lists, the prompt's apart); SGLang gives base64 of int32
without a shape.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._streams import bare_name, open_text
from specmoe.sources.importers.arrays import opened
from specmoe.sources.importers.base import ForeignTrace, Importer, ImportOptions, files_of
from specmoe.sources.importers.npy import parse_npy
from specmoe.sources.importers.requests import Request, import_requests, request_of

__all__ = ["IMPORTER"]

_LONGEST_LINE = 512 << 20
# So many rows make it all but certain that ids repeat where two layers are taken for one.
_ROWS_TO_TELL = 64
_MOST_NUMBERS = 1 << 16


@dataclass(frozen=True)
class _Response:
    """One answer of an engine: the experts as they came, and how many tokens there were."""

    name: str
    fields: dict[str, np.ndarray]
    prompt: int | None
    generated: int | None

    @property
    def flat(self) -> np.ndarray | None:
        """The experts without their shape, if that is how they came."""
        experts = self.fields["routed_experts"]
        return experts if experts.ndim == 1 else None

    @property
    def forwarded(self) -> int:
        """Tokens that the engine forwarded."""
        if self.prompt is None or self.generated is None:
            raise SpecmoeError(f"{self.name} does not say how many tokens it has, and its routed_experts has no shape")
        return self.prompt + max(0, self.generated - 1)


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a JSONL file, or a folder of them: a response in each line, or a list of responses.

    Where the experts come without shape, the numbers per token follow from the numbers of tokens, and k is the
    largest length of blocks in which no id repeats, in any row.

    Raises:
        SpecmoeError: a line is no response with routed experts, or the shape cannot be told.
    """
    files = files_of(path, ".jsonl", ".ndjson")
    shape = _told_apart(path, files)

    def requests() -> Iterator[Request]:
        for response in _responses(files):
            fields = response.fields
            if response.flat is not None:
                if shape is None:
                    raise SpecmoeError("there is no token in it")
                fields = {**fields, "routed_experts": response.flat.reshape(-1, *shape)}
            yield request_of(response.name, fields, response.prompt, response.generated)

    foreign = import_requests(path, requests, options)
    if shape is not None:
        foreign.warnings.append(f"the experts come without shape; {shape[0]} layers, top-{shape[1]}, were inferred")
    return foreign


# --- responses ---------------------------------------------------------------------------------------


def _responses(files: list[Path]) -> Iterator[_Response]:
    for file in files:
        with opened(file), open_text(file) as stream:
            number = 0
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise SpecmoeError(f"line {number} is longer than {_LONGEST_LINE:,} bytes")
                if line.strip():
                    yield from _responses_of_line(line, number)


def _responses_of_line(line: bytes, number: int) -> Iterator[_Response]:
    try:
        content = json.loads(line)
        for place, response in enumerate(content if isinstance(content, list) else [content]):
            if not isinstance(response, dict):
                raise SpecmoeError("it is no response (a JSON object)")
            name = f"line-{number:06d}" + (f"/{place}" if isinstance(content, list) else "")
            yield from _response(response, name)
    except SpecmoeError as error:
        raise SpecmoeError(f"line {number}: {error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no base64, a ragged list
        raise SpecmoeError(f"line {number} cannot be read: {' '.join(str(error).split())[:120]}") from error


def _response(response: dict[str, Any], name: str) -> Iterator[_Response]:
    meta = response.get("meta_info")
    if isinstance(meta, dict):
        name = _name(meta.get("id"), name)
        fields = _fields(meta, {"output_ids": response.get("output_ids")})
        yield _Response(name, fields, _count(meta, "prompt_tokens"), _count(meta, "completion_tokens"))
        return
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices:
        raise SpecmoeError("it has neither meta_info (SGLang) nor choices (vLLM, SGLang)")
    name = _name(response.get("id"), name)
    usage = response.get("usage") if isinstance(response.get("usage"), dict) else {}
    for place, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise SpecmoeError("a choice is no JSON object")
        beside = choice.get("sgl_ext") if isinstance(choice.get("sgl_ext"), dict) else choice
        prompt = {key: response.get(key) for key in ("prompt_routed_experts", "prompt_token_ids")}
        if prompt["prompt_token_ids"] is None:
            prompt["prompt_token_ids"] = choice.get("prompt_token_ids")
        fields = _fields(beside or {}, {**prompt, "token_ids": choice.get("token_ids")})
        # With several choices, usage counts the tokens of all of them.
        generated = _count(usage or {}, "completion_tokens") if len(choices) == 1 else None
        yield _Response(
            name if len(choices) == 1 else f"{name}/{place}", fields, _count(usage or {}, "prompt_tokens"), generated
        )


def _fields(holder: dict[str, Any], others: dict[str, Any]) -> dict[str, np.ndarray]:
    if holder.get("routed_experts") is None:
        raise SpecmoeError("it has no routed_experts; the engine returns them only where it was asked to")
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


def _told_apart(path: Path, files: list[Path]) -> tuple[int, int] | None:
    """Layers and k, None if no response needs them."""
    with opened(path):
        width, rows = _numbers_per_token(files)
        if width is None:
            return None
        if rows < _ROWS_TO_TELL:
            raise SpecmoeError(f"{rows} tokens are too few to tell layers and top-k apart; {_ROWS_TO_TELL} are needed")
        if width > _MOST_NUMBERS:
            raise SpecmoeError(f"{width:,} experts per token are no possible routing")
        candidates = [size for size in range(width, 0, -1) if width % size == 0]
        for response in _responses(files):
            if response.flat is not None:
                rows_TW = response.flat.reshape(-1, width)
                candidates = [size for size in candidates if _never_repeats(rows_TW, size)]
        return width // candidates[0], candidates[0]


def _numbers_per_token(files: list[Path]) -> tuple[int | None, int]:
    """L · K, and the tokens there are."""
    sizes: list[int] = []
    per_token = Fraction(0)
    for response in _responses(files):
        if response.flat is not None and len(response.flat):
            sizes.append(len(response.flat))
            per_token = max(per_token, Fraction(len(response.flat), max(1, response.forwarded)))
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
    return bare_name(path).lower().endswith((".jsonl", ".ndjson")) and b'"routed_experts"' in head


IMPORTER = Importer(
    name="routed-responses",
    about="JSONL of vLLM or SGLang responses with routed_experts",
    read=read,
    recognises=_recognises,
)
