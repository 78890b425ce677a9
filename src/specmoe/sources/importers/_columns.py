"""Which of a table's columns holds what: the usual names, and what the user says with ``--map``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from specmoe.errors import SpecmoeError, unknown_name

__all__ = ["AmbiguousColumns", "Columns", "column_map", "plain"]

# Written as plain() leaves them: small letters and digits alone.
_SYNONYMS: dict[str, frozenset[str]] = {
    field: frozenset(names.split())
    for field, names in {
        "document": """document documentid documentidx docid docidx doc request requestid requestidx reqid reqidx req
            rid sample sampleid sampleidx sampleindex promptid promptidx promptindex sequence sequenceid sequenceidx
            sequenceindex seqid seqidx problem problemid exampleid exampleidx textid queryid""",
        "token": """token tokenidx tokenindex tokenpos tokenposition tokennumber tokennum tokenno pos position
            positionid positionidx seqpos step stepidx stepindex""",
        "layer": """layer layeridx layerid layerindex layernumber layernum layerno moelayer moelayeridx moelayerid
            moelayerindex blockidx blockid""",
        "experts": """experts expert expertid expertids expertidx expertidxs expertindex expertindices topkid topkids
            topkidx topkindex topkindices topkexpert topkexperts topkexpertid topkexpertids topexperts topindices
            selectedexpert selectedexperts selectedexpertid selectedexpertids routedexpert routedexperts routedexpertid
            routedexpertids activatedexpert activatedexperts activatedexpertids activeexperts chosenexpert chosenexperts
            chosenexpertids""",
        "weights": """weights weight topkweight topkweights topkscores topkprobs topkvalues score scores gate gates
            gateweight gateweights gatescore gatescores gateprob gateprobs gatingweight gatingweights gatingprob
            gatingprobs gatingscores routingweight routingweights routingprobs routingscores routerweight routerweights
            routerscores expertweight expertweights expertscores expertprobs prob probs probability probabilities""",
        "slot": "slot slotid slotidx slotindex rank expertrank topkrank expertslot kidx choice",
        "token_id": "tokenid tokid inputid inputtokenid tokenids inputids vocabid",
        "phase": "phase stage",
        "domain": "domain dataset datasetname category task",
        "group": "group groupid groupidx groupindex conversation conversationid chatid session sessionid threadid",
    }.items()
}
# A token's whole routing, layers within.
_NESTED = frozenset(
    [
        "layers",
        "moelayers",
        "routing",
        "routings",
        "routes",
        "perlayer",
        "expertsperlayer",
        "expertsbylayer",
        "layerexperts",
    ]
)
# One column per slot, numbered from 0 or 1.
_NUMBERED = {
    "experts": re.compile(r"(e|expert|experts|expertid|expertidx|topkid|topkidx|selectedexpert)(\d+)"),
    "weights": re.compile(r"(w|g|p|weight|weights|gate|gateweight|prob|score|topkweight)(\d+)"),
}
_ALIASES = {"expert": "experts", "weight": "weights", "position": "token", "rank": "slot"}


def plain(name: str) -> str:
    """A name in small letters and digits alone: ``layer_idx``, ``Layer-Idx`` and ``layerIdx`` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def column_map(pairs: Iterable[str]) -> dict[str, str]:
    """What ``--map`` says: field → their column, from texts like ``layer=layer_idx,experts=topk_ids``.

    Raises:
        SpecmoeError: a part is no such pair, or names a field that there is not, or that was named before.
    """
    found: dict[str, str] = {}
    for pair in (part.strip() for text in pairs for part in text.split(",")):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not equals:
            raise SpecmoeError(f"--map takes pairs like layer=layer_idx, separated by commas; found {pair!a}")
        field = _ALIASES.get(name, name)
        if field not in _SYNONYMS:
            raise unknown_name("field in --map", name, [*_SYNONYMS, *_ALIASES])
        if field in found:
            raise SpecmoeError(f"--map names {field} twice")
        found[field] = column
    return found


class AmbiguousColumns(SpecmoeError):
    """Several columns may hold one thing."""


@dataclass(frozen=True)
class Columns:
    """The columns of one table.

    Attributes:
        names: all of them. given: field → column, by the user; an empty column says that there is none. where: named in
            errors.
    """

    names: Sequence[str]
    given: Mapping[str, str]
    where: str

    def candidates(self, field: str) -> list[str]:
        """All columns that may hold ``field``; one column per slot counts once, by its first.

        Raises:
            SpecmoeError: the user names a column that there is not.
        """
        if field in self.given:
            return self._named(field)
        taken = {plain(column) for other, column in self.given.items() if other != field}
        names = _SYNONYMS[field]
        return [name for name in self.names if plain(name) in names and plain(name) not in taken]

    def get(self, field: str) -> str | None:
        """The column that holds ``field``, None if there is none.

        Raises:
            AmbiguousColumns: more than one may.
        """
        found = self.candidates(field)
        if len(found) > 1:
            raise AmbiguousColumns(
                f"{self.where}: the columns {' and '.join(found)} may each be the {field}; "
                f"say which is with {' or '.join(f'--map {field}={name}' for name in found)}"
            )
        return found[0] if found else None

    def need(self, field: str) -> str:
        """The column that holds ``field``.

        Raises:
            SpecmoeError: there is none, or more than one.
        """
        found = self.get(field)
        if found is None:
            raise SpecmoeError(
                f"{self.where}: no column is known to hold the {field}; name one with --map {field}=COLUMN; "
                f"there are: {', '.join(self.names)[:300]}"
            )
        return found

    def numbered(self, field: str) -> tuple[str, ...]:
        """Columns of the slots one by one, in their order; empty if there are none.

        Raises:
            SpecmoeError: a number is missing.
        """
        form = _NUMBERED[field]
        if field in self.given:
            form = re.compile(f"({re.escape(plain(self.given[field]))})" + r"(\d+)")
            if not self.given[field] or self._exact(self.given[field]):
                return ()
        matches = [(name, match) for name in self.names if (match := form.fullmatch(plain(name)))]
        if not matches or (field not in self.given and self.candidates(field)):
            return ()
        ordered = sorted(matches, key=lambda pair: int(pair[1][2]))
        numbers = [int(match[2]) for _, match in ordered]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
            raise SpecmoeError(
                f"{self.where}: the columns {', '.join(name for name, _ in ordered)[:200]} are not numbered from 0 or "
                f"1 on without a gap; name the {field} with --map {field}=COLUMN"
            )
        return tuple(name for name, _ in ordered)

    def has(self, field: str) -> bool:
        """Whether the column that the user names for ``field``, if any, is one of these."""
        column = self.given.get(field)
        return not column or bool(self._exact(column) or (field in _NUMBERED and self.numbered(field)))

    def refuse(self, what: str) -> NoReturn:
        """Raise an error about these columns."""
        raise SpecmoeError(f"{self.where}: {what}")

    def nested(self) -> list[str]:
        """Columns that may hold a token's whole routing, layers within."""
        found = self.candidates("experts") if self.has("experts") else []
        return found or [name for name in self.names if plain(name) in _NESTED]

    def _exact(self, column: str) -> list[str]:
        """``column`` as the table spells it."""
        return [name for name in self.names if name == column] or [
            name for name in self.names if plain(name) == plain(column)
        ]

    def _named(self, field: str) -> list[str]:
        column = self.given[field]
        if not column:
            return []
        if not self.has(field):
            near = difflib.get_close_matches(column, self.names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise SpecmoeError(
                f"{self.where}: --map {field}={column}: there is no such column; {hint}"
                f"there are: {', '.join(self.names)[:300]}"
            )
        return self._exact(column)
