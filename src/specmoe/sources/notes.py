"""What was left out of a source, counted: one line for each kind, with the first place where it was met."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Notes"]


class Notes:
    """Counts by kind, with an example of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Count something: ``kind`` says what it is and what became of it, ``where`` the place it was met at."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        self._first.setdefault(kind, where)

    def lines(self) -> Iterator[str]:
        """One line a kind, in the order in which they were first met."""
        for kind, count in self._counts.items():
            yield f"{kind}: {count:,} (first: {self._first[kind]})"
