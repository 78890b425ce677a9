"""Files of JSON objects as clients of an engine keep them: JSONL, indented JSON, or a stream of events.

Any of them may be gzip-compressed and begin with a byte order mark.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._streams import open_text

__all__ = ["Found", "found_in", "mentions"]

_LONGEST = 512 << 20
_CHUNK = 1 << 20
_MOST_SEARCHED = 64 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_BLANK_OR_COMMA = re.compile(r"[ \t\r\n,]*")
# Fields of an event stream (WHATWG HTML, "Server-sent events"); a line that begins with a colon is a comment.
_EVENT = re.compile(rb"(?:data|event|id|retry)?:")
_STARTS = re.compile(rb"\s*(?:[{\[]|(?:data|event|id|retry)?:)")


@dataclass(frozen=True)
class Found:
    """One JSON value of a file.

    Attributes:
        line: where it begins, from 1. value: it; None for the mark that ends a stream of events.
        place: its place in the list that the line holds, None if the line holds it alone.
        event: whether it came as an event, so that several of them may make one response.
    """

    line: int
    value: Any
    place: int | None = None
    event: bool = False


def found_in(file: Path) -> Iterator[Found]:
    """All JSON values of a file, in order. A list of responses counts as so many values.

    Raises:
        SpecmoeError: something is no JSON, or too long; the error names the line.
    """
    with open_text(file) as stream:
        line, number = b"", 0
        while not line.strip():
            number += 1
            line = _line(stream, number)
            if not line:
                return
        if _EVENT.match(line):
            yield from _events(stream, line, number)
            return
        try:
            first = json.loads(line)
        except (ValueError, RecursionError):
            pass  # not one value a line
        else:
            while line:
                if line.strip():
                    yield from _values_of(_parsed(line, number) if first is None else first, number)
                    first = None
                number += 1
                line = _line(stream, number)
            return
    with open_text(file) as stream:
        yield from _indented(stream)


def _values_of(value: Any, line: int) -> Iterator[Found]:
    if isinstance(value, list):
        yield from (Found(line, part, place) for place, part in enumerate(value))
    else:
        yield Found(line, value)


def _line(stream: IO[bytes], number: int) -> bytes:
    line = stream.readline(_LONGEST)
    if len(line) == _LONGEST:
        raise SpecmoeError(f"line {number} is longer than {_LONGEST:,} bytes")
    return line


def _parsed(text: bytes | str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(number, error) from error


def _unreadable(number: int, error: Exception) -> SpecmoeError:
    return SpecmoeError(f"line {number} cannot be read: {' '.join(str(error).split())[:120]}")


# --- events ------------------------------------------------------------------------------------------


def _events(stream: IO[bytes], line: bytes, number: int) -> Iterator[Found]:
    """Values of ``data`` fields. Logs may lack the blank lines between events, so most lines stand for themselves."""
    waiting: list[bytes] = []
    begun = size = 0
    while line:
        text = line.strip()
        if text.startswith(b"data:"):
            waiting.append(text.removeprefix(b"data:").strip())
            begun, size = (begun, size + len(text)) if len(waiting) > 1 else (number, len(text))
            if size > _LONGEST:
                raise SpecmoeError(f"the event in line {begun} is longer than {_LONGEST:,} bytes")
            if len(waiting) == 1 and (found := _event(waiting[0], begun)) is not None:
                yield from found
                waiting = []
        elif not text and waiting:
            yield from _whole_event(waiting, begun)
            waiting = []
        elif text.startswith(b"{") and not waiting:  # what an engine answers in place of a stream
            yield Found(number, _parsed(text, number))
        number += 1
        line = _line(stream, number)
    if waiting:
        yield from _whole_event(waiting, begun)


def _event(text: bytes, number: int) -> list[Found] | None:
    """An event that is one line; None if it goes on."""
    if text == b"[DONE]":
        return [Found(number, None, event=True)]
    if not text:
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [Found(number, part, event=True) for part in (value if isinstance(value, list) else [value])]


def _whole_event(waiting: list[bytes], number: int) -> Iterator[Found]:
    value = _parsed(b"\n".join(waiting), number)
    yield from (Found(number, part, event=True) for part in (value if isinstance(value, list) else [value]))


# --- values over many lines --------------------------------------------------------------------------


def _indented(stream: IO[bytes]) -> Iterator[Found]:
    """Values one after the other, or those of one list, however they are broken into lines."""
    text = _Growing(stream)
    text.skip(_BLANK)
    listed = text.begins("[")
    while True:
        text.skip(_BLANK_OR_COMMA if listed else _BLANK)
        if text.ended or (listed and text.begins("]")):
            break
        yield text.value()
    text.skip(_BLANK)
    if not text.ended:
        raise SpecmoeError(f"line {text.line} cannot be read: something follows the list")


class _Growing:
    """Text of a file, of which so much is held as the value that is being read needs."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._decoder = json.JSONDecoder()
        self._text, self._place = "", 0
        self._whole = False
        self.line = 1

    @property
    def ended(self) -> bool:
        """Whether nothing is left."""
        return self._place == len(self._text) and not self._more()

    def _more(self) -> bool:
        """Read on, each time as much again; whether there was something."""
        if self._whole:
            return False
        raw = self._stream.read(max(_CHUNK, len(self._text) - self._place))
        self._whole = not raw
        try:
            added = self._decode(raw, final=self._whole)
        except UnicodeDecodeError as error:
            raise _unreadable(self.line, error) from error
        self._text, self._place = self._text[self._place :] + added, 0
        if len(self._text) > _LONGEST:
            raise SpecmoeError(f"the value in line {self.line} is longer than {_LONGEST:,} characters")
        return not self._whole

    def _forward(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def skip(self, filler: re.Pattern[str]) -> None:
        """Pass over what separates values."""
        while not self.ended:
            match = filler.match(self._text, self._place)
            assert match is not None
            self._forward(match.end())
            if self._place < len(self._text):
                return

    def begins(self, mark: str) -> bool:
        """Take ``mark`` if it comes next."""
        if self.ended or not self._text.startswith(mark, self._place):
            return False
        self._forward(self._place + len(mark))
        return True

    def value(self) -> Found:
        """The value that comes next."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
                break
            except json.JSONDecodeError as error:
                # A fault far from the end of what was read is one; at the end, the value may go on.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if not cut or not self._more():
                    line = self.line + self._text.count("\n", self._place, error.pos)
                    raise _unreadable(line, error) from error
            except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
                raise _unreadable(self.line, error) from error
        found = Found(self.line, value)
        self._forward(end)
        return found


# --- recognising -------------------------------------------------------------------------------------


def mentions(file: Path, *alternatives: tuple[bytes, ...]) -> bool:
    """Whether a file looks like JSON or events and mentions, within its first 64 MiB, one word of each alternative."""
    overlap = max(len(word) for words in alternatives for word in words) - 1
    missing, rest = list(alternatives), b""
    try:
        with open_text(file) as stream:
            for searched in range(0, _MOST_SEARCHED, _CHUNK):
                chunk = stream.read(_CHUNK)
                if not chunk or (searched == 0 and not _STARTS.match(chunk)):
                    return False
                window = rest + chunk
                missing = [words for words in missing if not any(word in window for word in words)]
                if not missing:
                    return True
                rest = window[-overlap:]
    except (OSError, SpecmoeError):
        pass
    return False
