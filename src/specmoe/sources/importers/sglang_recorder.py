"""Import dumps of SGLang's expert distribution recorder, ``expert_distribution_recorder_*.pt``, of mode per_token.

The other modes (stat, stat_approx, per_pass) keep counts per expert and no token's route; they are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import IdSurvey, id_rows, opened, token_rows
from specmoe.sources.importers.base import (
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.sources.importers.grouping import Grouping, place_of
from specmoe.sources.importers.restricted_pickle import Array
from specmoe.sources.importers.sglang_passes import DECODE, EXTEND, MIXED, Pass, Stream, tell_apart
from specmoe.sources.importers.torch_archive import is_torch_archive, load_torch
from specmoe.trace import RoutingRecord
from specmoe.trace.writer import fields_of

__all__ = ["IMPORTER"]

_PREFIX = "expert_distribution_recorder_"
_LARGEST_TOKEN = (1 << 31) - 1


@dataclass(frozen=True)
class _Dump:
    """One dump file: its usable passes, with the tokens [N] and expert ids [L, N, K] of each."""

    passes: list[Pass]
    tokens: list[np.ndarray]
    ids: list[np.ndarray]
    logical_LP: np.ndarray | None
    dropped: int

    @property
    def digest(self) -> bytes:
        """Equal for ranks that saw the same tokens."""
        digest = hashlib.sha256()
        for one, tokens in zip(self.passes, self.tokens, strict=True):
            digest.update(f"{one.mode} {len(tokens)} ".encode() + tokens.tobytes() + one.positions.tobytes())
        return digest.digest()


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a dump, or a folder of the dumps of all ranks.

    A document is one request, as far as :mod:`specmoe.sources.importers.sglang_passes` can tell requests apart. Ids
    of physical experts become logical ones by ``last_physical_to_logical_map``. Ranks that saw the same tokens
    (tensor parallelism) are read once. Passes other than prefill and decode (speculative ones) are left out.

    Raises:
        SpecmoeError: the file is damaged, of a mode that keeps counts only, or contradicts itself.
    """
    files = files_of(path, ".pt")
    warnings: list[str] = []
    survey = IdSurvey()
    experts = physical = dropped = 0
    slots: np.ndarray = np.zeros(0, bool)
    distinct: dict[bytes, Path] = {}
    grouping = Grouping(options.group_by)
    remapped = False
    for file in files:
        with opened(file):
            dump = _load(file)
            if distinct.setdefault(dump.digest, file) is not file:
                continue
            dropped += dump.dropped
            for stream in tell_apart(dump.passes):
                _group(grouping, dump, stream, place_of(path, file))
            for ids_LNK in dump.ids:
                used: np.ndarray = np.asarray((ids_LNK >= 0).any((0, 1)))
                if len(slots) not in (0, len(used)):
                    raise SpecmoeError(f"its tokens have {len(used)} slots for experts, those before it {len(slots)}")
                slots = used if not len(slots) else np.logical_or(slots, used)
                survey.add(_logical(dump, ids_LNK).transpose(1, 0, 2), "topk_ids_of_layer")
            if dump.logical_LP is not None:
                experts = max(experts, int(dump.logical_LP.max()) + 1)
                physical = max(physical, dump.logical_LP.shape[1])
                remapped |= bool((dump.logical_LP != np.arange(dump.logical_LP.shape[1])).any())
    with opened(path):
        layers = survey.moe_layers(warnings)
        if not slots.any():
            raise SpecmoeError("no token has an expert")
        chosen = np.flatnonzero(slots)
        fused = survey.fused_slots(warnings)
        if fused is not None:
            chosen = np.setdiff1d(chosen, fused.slots)
        if physical > 0 and survey.experts > experts:
            raise SpecmoeError(f"topk_ids_of_layer holds an id beyond the {physical} physical experts")
        topology = topology_of(
            options, layers=len(layers), experts=max(experts, survey.experts), top_k=len(chosen), hidden_size=0
        )
    kept = list(distinct.values())
    if len(kept) < len(files):
        warnings.append(
            f"{len(files) - len(kept)} of {len(files)} files repeat another rank's tokens and were left out"
        )
    if remapped:
        warnings.append(
            "experts had been moved: ids were mapped back by the last map, which earlier passes may precede"
        )
    if dropped:
        warnings.append(f"{dropped} passes were left out: idle, speculative, or of a kind that is not known")
    named = kept if path.is_dir() else None
    with opened(path):
        groups = grouping.groups(warnings)
    return ForeignTrace(
        topology=topology,
        fields=fields_of([]),
        documents=_documents(kept, named, layers, chosen, iter(groups)),
        experts_known=experts > 0,
        settings={"layers": layers.tolist()},
        warnings=warnings,
    )


def _load(file: Path) -> _Dump:
    content = load_torch(file)
    if not isinstance(content, dict):
        raise SpecmoeError(f"it holds a {type(content).__name__}, expected the dict that the recorder dumps")
    records = content.get("records")
    if "logical_count" in content or (isinstance(records, list) and records and _counts_only(records[0])):
        raise SpecmoeError(
            "it holds counts per expert and no token's experts; record again with "
            "--expert-distribution-recorder-mode per_token"
        )
    if not isinstance(records, list):
        raise SpecmoeError("it has no list of records, as the recorder dumps it")
    dump = _Dump([], [], [], _map(content), 0)
    dropped = 0
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise SpecmoeError(f"record {number} is a {type(record).__name__}, expected a dict")
        try:
            dropped += not _add(dump, record)
        except SpecmoeError as error:
            raise SpecmoeError(f"record {number}: {error}") from error
    return _Dump(dump.passes, dump.tokens, dump.ids, dump.logical_LP, dropped)


def _counts_only(record: Any) -> bool:
    return isinstance(record, dict) and "global_physical_count" in record and "topk_ids_of_layer" not in record


def _map(content: dict[Any, Any]) -> np.ndarray | None:
    found = content.get("last_physical_to_logical_map")
    if found is None:
        return None
    if not isinstance(found, Array) or found.stored.ndim != 2 or found.stored.dtype.kind not in "iu":
        raise SpecmoeError("last_physical_to_logical_map is no matrix [layers, physical experts]")
    if not found.stored.size or int(found.stored.min()) < 0 or int(found.stored.max()) >= 1 << 15:
        raise SpecmoeError("last_physical_to_logical_map holds an impossible expert")
    return found.stored.astype(np.int64)


def _add(dump: _Dump, record: dict[Any, Any]) -> bool:
    """Take over one record; False if it is a pass of a kind that is left out."""
    mode = record.get("forward_mode")
    tokens = _numbers(record, "input_ids", _LARGEST_TOKEN)
    if mode not in (EXTEND, DECODE, MIXED) or record.get("gatherer_key", "primary") != "primary" or not len(tokens):
        return False
    positions = _numbers(record, "positions", _LARGEST_TOKEN)
    ids = record.get("topk_ids_of_layer")
    if not isinstance(ids, Array) or ids.stored.ndim != 3 or ids.stored.dtype.kind not in "iu":
        raise SpecmoeError("topk_ids_of_layer is no array [layers, tokens, k] of ids")
    shape = tuple(ids.stored.shape)
    if len(positions) != len(tokens) or shape[1:2] != (len(tokens),):
        raise SpecmoeError(
            f"{len(tokens)} input_ids, {len(positions)} positions and topk_ids_of_layer {shape} do not fit"
        )
    lengths = [1] * len(tokens)
    if mode != DECODE:
        lengths = _numbers(record, "extend_seq_lens", len(tokens)).tolist()
        if sum(lengths) != len(tokens):
            raise SpecmoeError(f"extend_seq_lens adds up to {sum(lengths)}, there are {len(tokens)} tokens")
    dump.passes.append(Pass(mode, positions, lengths))
    dump.tokens.append(tokens)
    dump.ids.append(ids.stored)
    return True


def _numbers(record: dict[Any, Any], name: str, largest: int) -> np.ndarray:
    value = record.get(name)
    if isinstance(value, list) and all(type(number) is int for number in value):
        if any(not 0 <= number <= largest for number in value):
            raise SpecmoeError(f"{name} holds a number outside of 0 to {largest}")
        return np.asarray(value, np.int64)
    if isinstance(value, Array) and value.stored.ndim == 1 and value.stored.dtype.kind in "iu":
        return _numbers({name: value.stored.tolist()}, name, largest)
    raise SpecmoeError(f"{name} is no list of whole numbers")


def _logical(dump: _Dump, ids_LNK: np.ndarray) -> np.ndarray:
    """Ids of logical experts. A shared expert fused into the top-k is in no map; its id stays above all others."""
    table = dump.logical_LP
    if table is None:
        return ids_LNK
    if len(table) != len(ids_LNK):
        raise SpecmoeError(f"the map of experts has {len(table)} layers, the records {len(ids_LNK)}")
    physical = table.shape[1]
    if int(ids_LNK.min(initial=0)) < -1:
        raise SpecmoeError(f"topk_ids_of_layer holds an id beyond the {physical} physical experts")
    layer = np.arange(len(table))[:, None, None]
    logical = np.where(ids_LNK >= 0, table[layer, np.minimum(ids_LNK, physical - 1)], -1)
    beyond = ids_LNK >= physical
    return (
        np.where(beyond, ids_LNK.astype(np.int64) - physical + int(table.max()) + 1, logical)
        if beyond.any()
        else logical
    )


def _documents(
    files: list[Path], named: list[Path] | None, layers: np.ndarray, chosen: np.ndarray, groups: Iterator[str]
) -> Iterator[ImportedDocument]:
    for number, file in enumerate(files):
        prefix = f"{named[number].stem.removeprefix(_PREFIX)}-{number}/" if named else ""
        with opened(file):
            dump = _load(file)
            streams = tell_apart(dump.passes)
        for place, stream in enumerate(streams):
            with opened(file):
                record = _record(dump, stream, layers, chosen)
            yield ImportedDocument(f"{prefix}request-{place:06d}", record, group=next(groups, ""))


def _group(grouping: Grouping, dump: _Dump, stream: Stream, facts: dict[str, str]) -> None:
    """Take a request in by its token ids; one whose first tokens were cached begins with none that are known."""
    first = stream.segments[0]
    cached = first.decoded or int(dump.passes[first.index].positions[first.start]) > 0
    tokens = [dump.tokens[part.index][part.start : part.stop] for part in stream.segments]
    prompt = sum(part.stop - part.start for part in stream.segments if not part.decoded)
    grouping.add(np.concatenate(tokens)[: 0 if cached else None], None, prompt, facts=facts)


def _record(dump: _Dump, stream: Stream, layers: np.ndarray, chosen: np.ndarray) -> RoutingRecord:
    tokens, ids, phase = [], [], []
    for part in stream.segments:
        tokens.append(dump.tokens[part.index][part.start : part.stop])
        part_LNK = _logical(dump, dump.ids[part.index][:, part.start : part.stop])
        ids.append(part_LNK[layers][:, :, chosen].transpose(1, 0, 2))
        phase.append(np.full(part.stop - part.start, part.decoded, np.uint8))
    joined = np.concatenate(tokens)
    return RoutingRecord(
        token_ids=token_rows(joined, len(joined)),
        phase=torch.from_numpy(np.concatenate(phase)),
        expert_ids=id_rows(np.ascontiguousarray(np.concatenate(ids)), "topk_ids_of_layer"),
    )


def _recognises(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return any(file.name.startswith(_PREFIX) and file.suffix == ".pt" for file in path.iterdir())
    return is_torch_archive(path, head) and path.name.startswith(_PREFIX)


IMPORTER = Importer(
    name="sglang-recorder",
    about="dumps of SGLang's expert distribution recorder, mode per_token",
    read=read,
    recognises=_recognises,
    group_by="file; folder",
)
