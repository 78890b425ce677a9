"""Import rollouts of reinforcement learning that keep their routing so that training can replay it.

``.pt`` (slime's dumps of rollouts, or a dict of tensors), ``.npz`` and ``.safetensors``: arrays [batch, tokens, layers,
k] with masks, or one [tokens, layers, k] per sample.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._rollout_files import SUFFIXES, holds_rollouts, samples_of
from specmoe.sources.importers._streams import first_bytes
from specmoe.sources.importers.arrays import opened
from specmoe.sources.importers.base import (
    UNKNOWN_TOKEN,
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
)
from specmoe.sources.importers.requests import Request, import_requests
from specmoe.trace import Phase, RoutingRecord

__all__ = ["IMPORTER"]

_EMPTY = "samples hold no routed experts, as those that were aborted do; left out"


@dataclass(frozen=True)
class _Rollout(Request):
    """A request whose tokens are of the model or not one by one, as those of tools are between its own.

    Attributes:
        phase_T: of the rows, uint8.
    """

    phase_T: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    def record(self, layers: np.ndarray) -> RoutingRecord:
        """The rollout as a record of the given layers."""
        return replace(super().record(layers), phase=torch.from_numpy(self.phase_T))


@dataclass
class _Pass:
    """What one pass over all samples finds.

    Attributes:
        odd: what was dropped or guessed, by how often. keys: of each sample, what it shares with those of its prompt.
    """

    odd: Counter[str] = field(default_factory=Counter)
    keys: list[list[str]] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """One line each."""
        return [f"{count:,} {what}" for what, count in self.odd.items()]

    def groups(self) -> list[str]:
        """Each sample's group: samples that share anything, directly or by way of others, are in one."""
        parent: dict[str, str] = {}

        def root(key: str) -> str:
            while parent.setdefault(key, key) != key:
                parent[key] = key = parent[parent[key]]
            return key

        for keys in self.keys:
            for key in keys:
                parent[root(key)] = root(keys[0])
        numbers: dict[str, int] = {}
        return [f"prompt-{numbers.setdefault(root(keys[0]), len(numbers))}" if keys else "" for keys in self.keys]


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a file of rollouts, or a folder of them. A sample is a document; samples of one prompt are a group.

    Raises:
        SpecmoeError: a file is damaged or holds no such arrays, masks do not fit them, or samples differ in shape.
    """
    files = files_of(path, *SUFFIXES)
    found = _Pass()

    def requests() -> Iterator[Request]:
        found.odd.clear()
        found.keys.clear()
        for file in files:
            stem = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
            with opened(file):
                yield from _rollouts(file, stem, found)

    foreign = import_requests(path, requests, options)
    foreign.warnings.extend(found.warnings())
    return replace(foreign, documents=_grouped(foreign.documents, found.groups()))


def _grouped(documents: Iterable[ImportedDocument], groups: list[str]) -> Iterator[ImportedDocument]:
    for document, group in zip(documents, groups, strict=True):
        yield replace(document, group=group or document.group)


# --- from files to samples -----------------------------------------------------------------------------------


def _rollouts(file: Path, stem: str, found: _Pass) -> Iterator[Request]:
    seen: Counter[str] = Counter()
    for number, sample in enumerate(samples_of(file, stem)):
        index = sample.get("index")
        # An index that repeats is that of the prompt.
        label = f"{number:06d}" if index is None or isinstance(index, np.ndarray) or seen[str(index)] else f"{index}"
        seen[str(index)] += 1
        rollout = _rollout(f"{stem}/{label}", sample, found)
        if rollout is not None:
            yield rollout


# --- one sample ------------------------------------------------------------------------------------------------


def _rollout(name: str, sample: dict[str, Any], found: _Pass) -> _Rollout | None:
    ids_TLK = sample.get("experts")
    if ids_TLK is None:
        found.odd[_EMPTY] += 1
        return None
    if not isinstance(ids_TLK, np.ndarray) or ids_TLK.ndim != 3:
        what = ids_TLK.shape if isinstance(ids_TLK, np.ndarray) else type(ids_TLK).__name__
        raise SpecmoeError(f"{name}: the routed experts are {what}, expected [tokens, layers, k]")
    tokens_N = _row(sample, "tokens", name)
    if tokens_N is None and sample.get("prompts") is not None and sample.get("responses") is not None:
        tokens_N = np.concatenate([sample["prompts"], sample["responses"]])
    known = (len(row) for row in (tokens_N, sample.get("attention")) if isinstance(row, np.ndarray))
    places = next(known, len(ids_TLK))
    valid_N = _valid(sample, places, name)
    # The last token of a text is never forwarded: there is no row for it, or, in padded arrays, one without experts.
    if len(ids_TLK) > places or valid_N[len(ids_TLK) :].sum() > 1:
        raise SpecmoeError(f"{name} has {len(ids_TLK)} rows of experts for {places} tokens")
    written_N = _written(sample, valid_N, name, found)
    rows_T = np.flatnonzero(valid_N[: len(ids_TLK)])
    rows_T = _without_filler(ids_TLK, rows_T, bool(valid_N.all()), found)
    if rows_T is None:
        found.odd[_EMPTY] += 1
        return None
    prompt = None
    if written_N is not None:
        prompt = int(np.argmax(written_N[rows_T])) if written_N[rows_T].any() else len(rows_T)
    found.keys.append(_keys(sample, tokens_N, valid_N, written_N))
    decode_T = np.zeros(len(rows_T), bool) if written_N is None else written_N[rows_T]
    phase_T = np.where(decode_T, Phase.DECODE, Phase.PREFILL).astype(np.uint8)
    tokens_T = np.full(len(rows_T), UNKNOWN_TOKEN) if tokens_N is None else tokens_N[rows_T]
    return _Rollout(name, ids_TLK[rows_T], prompt, tokens_T, phase_T=phase_T)


def _row(sample: dict[str, Any], word: str, name: str) -> np.ndarray | None:
    value = sample.get(word)
    if value is not None and (not isinstance(value, np.ndarray) or value.ndim != 1):
        what = value.shape if isinstance(value, np.ndarray) else type(value).__name__
        raise SpecmoeError(f"{name}: {word} is {what}, expected a row of numbers")
    return value


def _number(sample: dict[str, Any], word: str, most: int, name: str) -> int | None:
    value = sample.get(word)
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, np.ndarray) or value != int(value) or not 0 <= value <= most:
        raise SpecmoeError(f"{name}: {word} is {str(value)[:40]}, expected a number from 0 to {most}")
    return int(value)


def _mask(sample: dict[str, Any], word: str, name: str) -> np.ndarray | None:
    row = _row(sample, word, name)
    if row is not None and not np.isin(row, (0, 1)).all():
        raise SpecmoeError(f"{name}: the mask ({word}) holds other numbers than 0 and 1")
    return None if row is None else row.astype(bool)


def _valid(sample: dict[str, Any], places: int, name: str) -> np.ndarray:
    """Which places hold a token rather than padding."""
    attention_N = _mask(sample, "attention", name)
    if attention_N is not None:
        if len(attention_N) != places:
            raise SpecmoeError(f"{name}: a mask of {len(attention_N)} places for {places}")
        return attention_N
    length = _number(sample, "length", places, name)
    return np.arange(places) < (places if length is None else length)


def _written(sample: dict[str, Any], valid_N: np.ndarray, name: str, found: _Pass) -> np.ndarray | None:
    """Which places hold tokens that the model wrote, None if nothing says so."""
    places, tokens = len(valid_N), int(valid_N.sum())
    ordinal_N = np.cumsum(valid_N) - 1
    mask = _mask(sample, "written", name)
    written_N = None
    length, given = _number(sample, "response_length", tokens, name), _number(sample, "prompt_length", tokens, name)
    if length is not None:
        written_N = valid_N & (ordinal_N >= tokens - length)
    elif given is not None:
        written_N = valid_N & (ordinal_N >= given)
    elif mask is None and sample.get("responses") is not None:
        written_N = valid_N & (np.arange(places) >= places - len(sample["responses"]))
    if mask is None:
        return written_N
    if len(mask) > places:
        raise SpecmoeError(f"{name}: a mask of {len(mask)} places for {places}")
    mask_N = np.concatenate([np.zeros(places - len(mask), bool), mask]) & valid_N
    if written_N is None:
        return mask_N
    if not (mask_N & written_N).any():
        return written_N  # a sample that is not to be learned from has an empty mask
    if (written_N & ~mask_N).any():
        found.odd["responses hold tokens that the mask leaves out, such as a tool's; they count as prefill"] += 1
    return written_N & mask_N


def _without_filler(ids_TLK: np.ndarray, rows_T: np.ndarray, unmasked: bool, found: _Pass) -> np.ndarray | None:
    """Rows without those at both ends that hold one number, 0 or -1, in every slot of every layer; None if all do."""
    flat = ids_TLK[rows_T].reshape(len(rows_T), -1)
    if not flat.size:
        return rows_T
    # A top-1 router may really choose expert 0 in every layer.
    filler_T = (flat == flat[:, :1]).all(1) & np.isin(flat[:, 0], (0, -1) if ids_TLK.shape[2] > 1 else (-1,))
    if filler_T.all():
        return None
    start, stop = int(filler_T.argmin()), len(rows_T) - int(filler_T[::-1].argmin())
    # One at the end is the last token, which was never forwarded.
    if lost := start + max(0, len(rows_T) - stop - 1):
        found.odd["rows at the ends of samples hold 0 or -1 throughout, as padding does; left out"] += lost
    if unmasked and lost > 1:
        found.odd["samples have no mask that says which rows are padding"] += 1
    return rows_T[start:stop]


def _keys(
    sample: dict[str, Any], tokens_N: np.ndarray | None, valid_N: np.ndarray, written_N: np.ndarray | None
) -> list[str]:
    """What a sample has in common with others of its prompt."""
    keys = []
    for word in ("group", "index"):
        if sample.get(word) is not None and not isinstance(sample[word], np.ndarray):
            keys.append(f"{'group' if word == 'group' else 'index'}:{sample[word]}")
            break
    if sample.get("prompt"):
        keys.append(f"text:{_digest(json.dumps(sample['prompt'], sort_keys=True, default=str).encode())}")
    if tokens_N is not None and written_N is not None:
        first = int(written_N.argmax()) if written_N.any() else len(written_N)
        prompt = tokens_N[:first][valid_N[:first]].astype(np.int64)
        if len(prompt):
            keys.append(f"tokens:{_digest(prompt.tobytes())}")
    return keys


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- recognition -----------------------------------------------------------------------------------------------


def _recognises(path: Path, head: bytes) -> bool:
    try:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            return bool(inside) and holds_rollouts(inside[0], first_bytes(inside[0], 8))
        return holds_rollouts(path, head)
    except Exception:  # a damaged archive can raise anything
        return False


IMPORTER = Importer(
    name="rl-rollouts",
    about="rollouts of RL with routing replay (slime, verl): [batch, tokens, layers, k] and masks, or one per sample",
    read=read,
    recognises=_recognises,
)
