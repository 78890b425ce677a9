"""What is printed: control characters are shown instead of sent, and a full disk behind the output is one line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from specmoe.errors import SpecmoeError

__all__ = ["SafeConsole", "guarded_output", "shown"]

# C0 but tab, newline and carriage return; delete; C1; and what turns the direction of writing round.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    r"""Text with control characters as people write them: ``\x1b`` for an escape.

    Names come from files that anybody made, and a terminal obeys what it is sent: it renames windows, hides lines and,
    some of them, types.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class _Output:
    """A text stream that shows control characters, and whose failures are the user's to put right."""

    def __init__(self, stream: TextIO, *, safe: bool = True) -> None:
        self._stream, self._safe = stream, safe

    def __getattr__(self, name: str) -> Any:
        # Without a buffer: click would write past this object where the stream's encoding is ASCII.
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(shown(text) if self._safe else text)
        except OSError as error:
            raise _failed(error) from error
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise _failed(error) from error

    @property
    def rich_proxied_file(self) -> Any:
        """Where rich's consoles look for the stream to write to: they send control characters on purpose."""
        return _Output(self._stream, safe=False)


def _failed(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):  # Whoever read it has gone; that is no fault.
        return error
    return SpecmoeError(f"cannot write the output: {error.strerror or error}")


class SafeConsole(Console):
    """rich's console, which sends control characters of its own and shows those that stand in what it is given."""

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text; here already, so that what is shown is measured."""
        return super().render_str(shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of something to print."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Both streams as they are to be while a verb runs; what an encoding lacks is written as an escape."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    guarded: Any = tuple(_Output(stream) for stream in before)
    sys.stdout, sys.stderr = guarded
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before
