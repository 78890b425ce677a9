"""How a trace is cut for a study: with less to learn from, or without a domain."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specmoe.dataset import Split, split_documents, split_hash
from specmoe.errors import SpecmoeError
from specmoe.trace import DocumentRecord

__all__ = ["Cut", "cut_documents"]


@dataclass(frozen=True)
class Cut:
    """The split of the protocol, or one derived from it. The parts that are judged stay those of the seed's split.

    Attributes:
        seed: of the split.
        train_share: of the training documents, the first ones of a fixed random order, so that smaller shares lie
            within larger ones.
        held_out: domains to keep out of training and validation, and to judge as a part of their own; empty for none,
            None for the one that the protocol draws.
    """

    seed: int = 0
    train_share: float = 1.0
    held_out: tuple[str, ...] | None = None


def cut_documents(documents: Sequence[DocumentRecord], cut: Cut) -> Split:
    """The parts under ``cut``; its hash tells them from those of other cuts.

    Raises:
        SpecmoeError: nothing is left to train on or to validate with, or the share lies outside 0 to 1.
    """
    split = split_documents(documents, cut.seed, hold_out=cut.held_out is None)
    parts, domain = dict(split.parts), split.domain
    if cut.held_out:
        parts = _without(documents, parts, set(cut.held_out))
        domain = ", ".join(cut.held_out)
    if cut.train_share != 1.0:
        parts["train"] = _share(documents, parts["train"], cut)
    for part in ("train", "validation"):
        if not parts[part]:
            raise SpecmoeError(f"no {part} document is left without {domain}; collect more text of other domains")
    return replace(split, parts=parts, domain=domain, hash=split_hash(documents, parts))


def _without(
    documents: Sequence[DocumentRecord], parts: dict[str, tuple[int, ...]], domains: set[str]
) -> dict[str, tuple[int, ...]]:
    """Move the domains' documents into a part of their own; what shares a text or a group with them leaves."""
    everything = [index for part in parts.values() for index in part]
    moved = [index for index in everything if documents[index].domain in domains]
    bound = {documents[index].text_sha256 for index in moved} | {documents[index].group for index in moved}
    bound.discard("")
    kept = {
        name: tuple(
            i for i in part if i not in set(moved) and not bound & {documents[i].text_sha256, documents[i].group}
        )
        for name, part in parts.items()
    }
    return kept | {"held_out_domain": tuple(sorted(moved))}


def _share(documents: Sequence[DocumentRecord], train: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The share's documents; those of one group or with one text come together."""
    if not 0 < cut.train_share <= 1:
        raise SpecmoeError(f"a share of the training documents must lie between 0 and 1, got {cut.train_share:g}")
    together: dict[str, list[int]] = {}
    for index in train:
        together.setdefault(documents[index].group or documents[index].text_sha256 or str(index), []).append(index)
    order = sorted(together)
    random.Random(f"share {cut.seed}").shuffle(order)
    wanted, chosen = max(1, round(cut.train_share * len(train))), []
    for key in order:
        if len(chosen) >= wanted:
            break
        chosen += together[key]
    return tuple(sorted(chosen))
