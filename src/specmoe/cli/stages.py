"""What a long verb does now, without importing anything heavy until there is something to show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import typer

if TYPE_CHECKING:
    from specmoe.cli.progress import ProgressLine

__all__ = ["StageLine"]


class StageLine:
    """Stages as lines on standard error, and how far the last of them is as a progress line."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None

    def stage(self, text: str) -> None:
        """Say what happens now."""
        self.__exit__()
        typer.echo(text, err=True)

    def show(self, title: str, done: int, total: int, note: str) -> None:
        """Say how far it is; ``title`` counts where no line is shown yet."""
        from specmoe.cli.progress import ProgressLine

        if self._line is None:
            self._line = ProgressLine(title).__enter__()
        self._line.update(done, total, note)
