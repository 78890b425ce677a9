"""Import the CSV files of ``llama-moe-trace``, a tool that exists in several forms around llama.cpp.

Three forms are known by their sources, and told apart by their first line:

- ``phase,token,layer,rank,expert``, with this header: ``examples/moe-trace`` of github.com/Cartaz/llama.cpp-vulkan-moe;
- ``pos,layer,id0,id1,...``, without a header: ``tools/moe-trace`` of github.com/thecodacus/llama.cpp and forks of it;
- ``layer,expert``, without a header: pull request 28544 of github.com/ggml-org/llama.cpp. It does not say which token
  a row is of; generated tokens can be told apart by the order of layers, tokens of the prompt cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers._rows import Entries, Oddities, Placed, Survey, document_name, in_range
from specmoe.sources.importers._streams import first_bytes, open_text
from specmoe.sources.importers._text import Lines, bad_line, blocks, csv_table, head_of, numbers, refuse_cut
from specmoe.sources.importers.base import (
    ForeignTrace,
    ImportedDocument,
    Importer,
    ImportOptions,
    files_of,
    topology_of,
)
from specmoe.trace import Phase

__all__ = ["IMPORTER"]

_HEADER = b"phase,token,layer,rank,expert"
_TOKENS_HEADER = b"phase,token,id"
_PHASES = {"prefill": int(Phase.PREFILL), "decode": int(Phase.DECODE)}
_POSITIONS = re.compile(rb"-?\d+(,\d+){2,}")
_BARE = re.compile(rb"\d+,\d+")


@dataclass(frozen=True)
class _Run:
    """One file's routing.

    Attributes:
        entries: with tokens numbered from 0 in the order of the run. phase_T: of each of these tokens.
        token_ids_T: of each of these tokens, -1 where not known; None if there is no file of them.
        warnings: what was left out.
    """

    entries: Entries
    phase_T: np.ndarray
    token_ids_T: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a trace, or a folder of traces of one model. A file is a document.

    Raises:
        SpecmoeError: a file is of none of the three forms or damaged, or claims a place twice.
    """
    files = [file for file in files_of(path, ".csv") if not (path.is_dir() and _is_token_file(file))]
    if not files:
        raise SpecmoeError(f"{path} holds files of token ids, but no trace that they belong to")
    survey = Survey()
    for file in files:
        refuse_cut(file)
        survey.add(_read_run(file).entries)
    layers_L = survey.layers_L(path)
    topology = topology_of(options, layers=len(layers_L), experts=survey.experts, top_k=survey.top_k)
    warnings: list[str] = []
    return ForeignTrace(
        topology=topology,
        fields=("token_ids", "phase", "expert_ids"),
        documents=_documents(path, files, layers_L, topology.top_k, warnings),
        count=len(files),
        settings={"layers": layers_L.tolist()},
        warnings=warnings,
    )


def _documents(
    path: Path, files: list[Path], layers_L: np.ndarray, top_k: int, warnings: list[str]
) -> Iterator[ImportedDocument]:
    oddities = Oddities()
    for file in files:
        run = _read_run(file)
        placed = run.entries.place(layers_L, top_k)
        oddities.count(placed)
        warnings += run.warnings
        token_ids_T = None if run.token_ids_T is None else run.token_ids_T[placed.token_T]
        record = placed.record(run.phase_T[placed.token_T], token_ids_T)
        if _shows_misread_prompt(placed, record.phase.numpy(), int(layers_L.size)):
            warnings.append(
                f"{file}: neighbouring tokens of the prompt share no expert in any layer; known versions of the tool "
                "write wrong ids for all but the first token of a batch"
            )
        yield ImportedDocument(document_name(path, file), record)
    warnings += oddities.warnings()


def _read_run(file: Path) -> _Run:
    return _form_of(file)(file)


def _form_of(file: Path) -> Callable[[Path], _Run]:
    with open_text(file) as stream:
        first = stream.readline(1 << 16).strip()
    if first == _HEADER:
        return _with_ranks
    if _POSITIONS.fullmatch(first):
        return _with_positions
    if _BARE.fullmatch(first):
        return _without_tokens
    raise bad_line(file, 1, "neither phase,token,layer,rank,expert nor pos,layer,id0,... nor layer,expert")


# --- phase,token,layer,rank,expert ---------------------------------------------------------------------


def _with_ranks(file: Path) -> _Run:
    parts, phases = [], []
    for lines, columns in csv_table(file, ("phase", "token", "layer", "rank", "expert"), words=_PHASES):
        phases.append(in_range(lines, columns["phase"], "phase", least=0, most=max(Phase)))
        token_N = in_range(lines, columns["token"], "token", least=0)
        parts.append(Entries(file, token_N, columns["layer"], columns["rank"], columns["expert"], None, lines.number_N))
    entries, phase_N = Entries.joined(parts), np.concatenate(phases)
    # Positions may be huge in a damaged file; from here on they are small.
    token_T, first_T, index_N = np.unique(entries.token_N, return_index=True, return_inverse=True)
    token_ids_T = _token_ids(file, token_T)
    entries, warnings = _without_misplaced_layer(
        Entries(file, index_N, entries.layer_N, entries.slot_N, entries.expert_N, None, entries.line_N), phase_N
    )
    return _Run(entries, phase_N[first_T], token_ids_T, warnings)


def _without_misplaced_layer(entries: Entries, phase_N: np.ndarray) -> tuple[Entries, tuple[str, ...]]:
    """Leave out the last layer's routing of the prompt where only one token of each batch passed through it.

    llama.cpp computes the last layer only for tokens whose output is asked for: the last one of a batch. The tool
    counts from the batch's first token, so it names the wrong one.
    """
    prompt_N = phase_N == Phase.PREFILL
    layers, counts = np.unique(entries.layer_N[prompt_N], return_counts=True)
    if len(layers) < 2 or counts[-1] >= counts[:-1].max():
        return entries, ()
    wrong_N = prompt_N & (entries.layer_N == layers[-1])
    return entries[~wrong_N], (
        f"{entries.path}: the last layer has fewer tokens of the prompt than the others, under wrong numbers; "
        f"its {int(wrong_N.sum()):,} rows were left out",
    )


def _token_ids(file: Path, token_T: np.ndarray) -> np.ndarray | None:
    """Token ids from the file that the same run wrote them to, if it lies beside this one."""
    beside = file.with_name(re.sub(r"rout(es|ing)", "tokens", file.name))
    if len(token_T) == 0 or beside == file or not beside.is_file() or not _is_token_file(beside):
        return None
    token_ids_T = np.full(len(token_T), -1)
    for lines, columns in csv_table(beside, ("token", "id"), words=_PHASES):
        position_N = in_range(lines, columns["token"], "token", least=0)
        id_N = in_range(lines, columns["id"], "id", least=0, most=(1 << 31) - 1)
        at_N = np.searchsorted(token_T, position_N)
        known_N = token_T[np.minimum(at_N, len(token_T) - 1)] == position_N
        token_ids_T[at_N[known_N]] = id_N[known_N]
    return token_ids_T


def _is_token_file(file: Path) -> bool:
    return first_bytes(file, 1 << 10).split(b"\n", 1)[0].strip() == _TOKENS_HEADER


# --- pos,layer,id0,id1,... -----------------------------------------------------------------------------


def _with_positions(file: Path) -> _Run:
    rows: list[Entries] = []
    for lines in blocks(file):
        # Rows of one length at a time; nearly always that is all of them.
        widths = [row.count(b",") + 1 for row in lines.text]
        start = 0
        for width, group in groupby(widths):
            part = lines.part(start, start := start + sum(1 for _ in group))
            rows.append(_position_entries(part, width))
    entries = Entries.joined(rows)
    # The prompt's batches are numbered up to -1 each from behind: only their order in the file is the tokens' order.
    position_P, first_P, index_N = np.unique(entries.token_N, return_index=True, return_inverse=True)
    rank_P = np.argsort(np.argsort(first_P))
    phase_T = np.empty(len(position_P), np.int64)
    phase_T[rank_P] = np.where(position_P < 0, Phase.PREFILL, Phase.DECODE)
    ordered = Entries(file, rank_P[index_N], entries.layer_N, entries.slot_N, entries.expert_N, None, entries.line_N)
    return _Run(ordered, phase_T)


def _position_entries(lines: Lines, width: int) -> Entries:
    values = numbers(lines, "pos,layer,id0,...", delimiter=",", width=max(width, 3), use=range(max(width, 3)))
    position_R = in_range(lines, values[0], "pos", least=-1 << 40)
    expert_N = np.stack(values[2:], 1).reshape(-1)
    count_R = np.full(len(lines), width - 2)
    return Entries.from_rows(lines.path, position_R, values[1], count_R, expert_N, None, lines.number_N)


# --- layer,expert --------------------------------------------------------------------------------------


def _without_tokens(file: Path) -> _Run:
    """Tokens by the order of rows: a layer's rows lie together, and a pass ends where the layer does not rise.

    The shortest run of rows of one layer is one token's experts. Passes of one token are kept.
    """
    parts = []
    for lines in blocks(file):
        layer_N, expert_N = numbers(lines, "layer,expert", delimiter=",", width=2, use=(0, 1))
        parts.append((in_range(lines, layer_N, "layer", least=0), expert_N, lines.number_N))
    layer_N, expert_N, line_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    start_R = np.flatnonzero(np.diff(layer_N, prepend=-1))
    size_R = np.diff(start_R, append=len(layer_N))
    top_k = int(size_R.min())
    if (size_R % top_k).any():
        at = int(line_N[start_R[(size_R % top_k != 0).argmax()]])
        raise bad_line(file, at, f"the rows of a layer do not come in multiples of {top_k}, its shortest run")
    pass_R = np.cumsum(np.diff(layer_N[start_R], prepend=-1) <= 0)
    longest_P = np.zeros(int(pass_R[-1]) + 1, np.int64)
    np.maximum.at(longest_P, pass_R, size_R)
    single_P = longest_P == top_k
    if not single_P.any():
        raise SpecmoeError(f"{file} holds no token by itself, and does not say which rows of a prompt are one token's")
    token_P = np.cumsum(single_P) - 1
    kept_N = np.repeat(single_P[pass_R], size_R)
    token_N = np.repeat(token_P[pass_R], size_R)[kept_N]
    slot_N = (np.arange(len(layer_N)) - np.repeat(start_R, size_R))[kept_N]
    entries = Entries(file, token_N, layer_N[kept_N], slot_N, expert_N[kept_N], None, line_N[kept_N])
    lost = int(np.count_nonzero(~kept_N))
    warnings = (
        (f"{file}: {lost:,} rows are of prompts, whose tokens this form does not tell apart; left out",) if lost else ()
    )
    return _Run(entries, np.full(int(single_P.sum()), Phase.DECODE), None, warnings)


def _shows_misread_prompt(placed: Placed, phase_T: np.ndarray, layers: int) -> bool:
    """Whether the prompt's first two tokens share no expert in any layer.

    Versions that read the strided tensor of expert ids as a dense one give the second token the ranks K..2K of the
    first, and so on. With 8 layers or more that does not happen by chance in a trained model.
    """
    if layers < 8 or len(phase_T) < 2 or (phase_T[:2] != Phase.PREFILL).any():
        return False
    first_LK, second_LK = placed.ids_TLK[0], placed.ids_TLK[1]
    both_L = placed.present_TL[0] & placed.present_TL[1]
    shared_L = (first_LK[:, :, None] == second_LK[:, None, :]).any((1, 2))
    return bool(both_L.any()) and not shared_L[both_L].any()


def _recognises(path: Path, head: bytes) -> bool:
    rows = [row.strip() for row in head_of(path, head, ".csv").split(b"\n")[:20]]
    if rows[0] in {_HEADER, _TOKENS_HEADER}:
        return rows[0] == _HEADER or path.is_dir()
    whole = [row for row in rows[:-1] if row]
    return bool(whole) and any(all(form.fullmatch(row) for row in whole) for form in (_POSITIONS, _BARE))


IMPORTER = Importer(
    name="llama-moe-trace",
    about="llama.cpp's llama-moe-trace and forks of it: experts of prompt and generated tokens",
    read=read,
    recognises=_recognises,
)
