"""Which requests belong together, so that a split does not train on what it is judged by.

Two requests belong together where the prompt of one stands, whole, at the beginning of the other: samples of one
prompt, the turns of a conversation that grows, the calls of an agent that resends all it has. A text that requests only
share the beginning of, such as a system prompt, binds none of them.

Beginnings that say little are the exception. A prompt of fewer than 16 tokens binds only equal prompts and what goes
on with all of its request, the answer included. And a prompt may begin nearly everything: a system prompt sent on its
own to warm a cache, or the mark of a beginning and no more. So where a prompt (with its answer) has fewer than 4
tokens, or others begin with it but do not go on with an answer to it, it binds nothing if what it begins would else be
three families or more, and more than half of all.

Texts are compared by token ids. Where a prompt's ids are unknown, equal routing in all layers stands in for an equal
token, from the first token on: routing follows from the text so far. Chance must be out of the question then: what the
rows in common would tell at random, given how often each row occurs, must exceed 20 bits and what it takes to name a
pair of requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.base import UNKNOWN_TOKEN

__all__ = ["Grouping", "facts_of", "place_of", "routing_words"]

_WORD = 4  # bytes of one token in a text
_FEWEST, _SHORT = 4, 16  # tokens
_CHANCE_BITS = 20
_ROWS_AT_ONCE = 4096
_LONGEST_FACT = 200
_DEEPEST_FACT = 3
_MOST_FACTS = 256


@dataclass(frozen=True)
class _Text:
    """What is kept of a request: its place among all, its prompt and all of it, four bytes a token."""

    index: int
    prompt: bytes
    whole: bytes

    @property
    def answered(self) -> bool:
        return len(self.whole) > len(self.prompt)


class Grouping:
    """Takes in requests one after the other, then says which belong together. Memory: four bytes a token.

    Attributes:
        by: the field to group by, None to go by the texts.
    """

    def __init__(self, by: str | None = None) -> None:
        self.by = by
        self._count = 0
        self._known: list[_Text] = []
        self._routed: list[_Text] = []
        self._families = _Families()
        self._first_of: dict[str, int] = {}
        self._values: dict[int, str] = {}
        self._fields: dict[str, None] = {}

    def add(
        self,
        tokens_T: np.ndarray,
        words_T: np.ndarray | None,
        prompt: int | None,
        *,
        facts: Mapping[str, str] | None = None,
        answer_of: str = "",
    ) -> None:
        """Take in a request.

        Args:
            tokens_T: its token ids from the first token on, -1 where unknown; none where the first are unknown.
            words_T: uint32, of each token's routing (:func:`routing_words`); None where rows are missing at the front.
            prompt: tokens of the prompt, None if that is not known.
            facts: its fields. answer_of: equal for requests that are known to answer one; empty if unknown.
        """
        index = self._count
        self._count += 1
        self._families.add()
        if self.by is not None:
            if self.by in (facts or {}):
                self._values[index] = (facts or {})[self.by]
            self._fields |= dict.fromkeys(list(facts or {})[:_MOST_FACTS])
            return
        if answer_of:
            self._families.unite([index, self._first_of.setdefault(answer_of, index)])
        unknown = np.flatnonzero(tokens_T == UNKNOWN_TOKEN)
        known = int(unknown[0]) if len(unknown) else len(tokens_T)
        length = len(tokens_T) if prompt is None else min(prompt, len(tokens_T))
        if known >= length > 0:
            self._known.append(_text(index, tokens_T[:known].astype("<i4"), length))
        elif words_T is not None and len(words_T):
            self._routed.append(_text(index, words_T.astype("<u4"), length))

    def groups(self, warnings: list[str]) -> list[str]:
        """The group of each request, in their order; empty for one that stands alone.

        Raises:
            SpecmoeError: no request has the field to group by.
        """
        if self.by is not None:
            return self._by_field(warnings)
        _unite(self._families, self._known, None)
        _unite(self._families, self._routed, _Chance([text.whole for text in self._routed]))
        members: dict[int, list[int]] = {}
        for index in range(self._count):
            members.setdefault(self._families.of(index), []).append(index)
        groups = [""] * self._count
        for family in members.values():
            if len(family) > 1:
                for index in family:
                    groups[index] = f"requests-{family[0]:06d}"
        if len(members) < 3 <= self._count:
            warnings.append(
                f"the {self._count} requests answer or continue only {len(members)} distinct prompt(s), too few for a "
                "split that keeps copies together; --group-by groups them otherwise"
            )
        return groups

    def _by_field(self, warnings: list[str]) -> list[str]:
        if self._count and not self._values:
            fields = ", ".join(sorted(self._fields)) or "none"
            raise SpecmoeError(f"there is no field {self.by!r} to group by; there are: {fields}")
        if lacking := self._count - len(self._values):
            warnings.append(
                f"{lacking} of {self._count} requests have no field {self.by!r}; each is a group of its own"
            )
        return [f"{self.by}={self._values[index]}" if index in self._values else "" for index in range(self._count)]


def _text(index: int, words_T: np.ndarray, prompt: int) -> _Text:
    whole = words_T.tobytes()
    return _Text(index, whole[: _WORD * prompt], whole)


def routing_words(ids_TLK: np.ndarray) -> np.ndarray:
    """A number for each row's routing in all layers, [T] uint32; equal for equal rows."""
    size = int(np.prod(ids_TLK.shape[1:]))
    factor_N = np.random.default_rng(0).integers(1 << 63, size=size, dtype=np.int64).view(np.uint64) | np.uint64(1)
    words = np.empty(len(ids_TLK), np.uint32)
    for start in range(0, len(ids_TLK), _ROWS_AT_ONCE):
        block = ids_TLK[start : start + _ROWS_AT_ONCE]
        rows = block.reshape(len(block), size).astype(np.int64).view(np.uint64)
        words[start : start + len(block)] = ((rows + np.uint64(2)) @ factor_N) >> np.uint64(32)
    return words


class _Families:
    """Sets of requests that belong together (Tarjan's disjoint sets, with path halving)."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def add(self) -> None:
        self._parent.append(len(self._parent))

    def of(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def unite(self, members: Iterable[int]) -> None:
        roots = sorted({self.of(index) for index in members})
        for root in roots[1:]:
            self._parent[root] = roots[0]


class _Chance:
    """How unlikely it is that some rows are equal by chance, in bits."""

    def __init__(self, texts: list[bytes]) -> None:
        words = np.frombuffer(b"".join(texts), "<u4")
        self._word, count = np.unique(words, return_counts=True)
        self._bits = np.log2(max(1, len(words)) / np.maximum(count, 1))
        self._least = _CHANCE_BITS + 2 * math.log2(max(1, len(texts)))

    def excluded(self, text: bytes) -> bool:
        place = np.searchsorted(self._word, np.frombuffer(text, "<u4"))
        return float(self._bits[place].sum()) >= self._least


def _unite(families: _Families, texts: list[_Text], chance: _Chance | None) -> None:
    """Put requests into one family by the rule that the module states."""
    nodes = sorted({text.prompt for text in texts} | {text.whole for text in texts})
    number = {node: place for place, node in enumerate(nodes)}
    prompts: list[list[int]] = [[] for _ in nodes]
    wholes: list[list[int]] = [[] for _ in nodes]
    answered = [False] * len(nodes)
    for text in texts:
        prompts[number[text.prompt]].append(text.index)
        wholes[number[text.whole]].append(text.index)
        answered[number[text.whole]] |= text.answered
    binds = [bool(node) and (chance is None or chance.excluded(node)) for node in nodes]
    tokens = [len(node) // _WORD for node in nodes]
    parents = _parents(nodes)

    def upwards(judge: bool) -> None:
        # In sorted order whatever begins with a text follows it, so backwards all of it comes first.
        below: list[set[int]] = [set() for _ in nodes]
        for place in range(len(nodes) - 1, -1, -1):
            found = {families.of(index) for index in (*below[place], *wholes[place])}
            below[place] = set()
            if binds[place]:
                same = found if answered[place] else prompts[place]
                if tokens[place] >= _FEWEST:
                    families.unite(same)
                if judge:
                    said = found if tokens[place] >= _SHORT or wholes[place] else same
                    some = {families.of(index) for index in said}
                    if len(some) < 3 or 2 * len(some) <= total:
                        families.unite(some)
                found = {families.of(index) for index in found}
            if (parent := parents[place]) >= 0:
                # The larger set goes on, so that a preamble of many costs no more than its members.
                if len(found) > len(below[parent]):
                    below[parent], found = found, below[parent]
                below[parent] |= found

    total = 0
    upwards(judge=False)
    total = len({families.of(text.index) for text in texts})
    upwards(judge=True)


def _parents(nodes: list[bytes]) -> list[int]:
    """Of each text, in sorted order, the longest other one that it begins with; -1 where there is none."""
    parents, open_nodes = [], list[int]()
    for place, node in enumerate(nodes):
        while open_nodes and not node.startswith(nodes[open_nodes[-1]]):
            open_nodes.pop()
        parents.append(open_nodes[-1] if open_nodes else -1)
        open_nodes.append(place)
    return parents


def place_of(root: Path, file: Path) -> dict[str, str]:
    """The fields ``file`` and ``folder``: where a request was found, as seen from what was imported."""
    inside = file.relative_to(root) if root.is_dir() else Path(file.name)
    return {"file": inside.as_posix(), "folder": inside.parent.as_posix()}


def facts_of(content: Mapping[str, Any], prefix: str = "", depth: int = 1) -> dict[str, str]:
    """Names, numbers and truths of a JSON object by their names, with dots where objects lie within it."""
    facts: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and depth < _DEEPEST_FACT:
            facts |= facts_of(value, f"{prefix}{name}.", depth + 1)
        elif isinstance(value, str | int) and len(text := str(value)) <= _LONGEST_FACT:
            facts[_printable(f"{prefix}{name}")] = _printable(text)
        if len(facts) >= _MOST_FACTS:
            break
    return facts


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
