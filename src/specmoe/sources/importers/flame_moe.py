"""Import FLAME-MoE's routing traces from the hub (``CMU-FLAME/FLAME-MoE-Traces``): Parquet, one file per MoE layer.

The dataset card describes a folder per model with ``samples/*.parquet`` (``token_id``) and
``actives/iter_N/layer_NN.parquet`` (``scores`` and ``indices``, six each), row i of both being the same token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.files import regular_file
from specmoe.sources.importers.arrays import IdSurvey, float_rows, id_rows, opened, token_rows
from specmoe.sources.importers.base import ForeignTrace, ImportedDocument, Importer, ImportOptions, topology_of
from specmoe.sources.importers.parquet import column_maximum, list_rows, number_rows, open_parquet
from specmoe.trace import RoutingRecord
from specmoe.trace.writer import fields_of

__all__ = ["IMPORTER", "ROWS_PER_DOCUMENT"]

# The card does not mark documents. The models' training scripts read sequences of this length.
ROWS_PER_DOCUMENT = 2048
_LAYER_FILE = re.compile(r"layer_(\d+)\.parquet")


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open one checkpoint: a folder ``actives/iter_N``, or a model's folder that holds a single one.

    Every :data:`ROWS_PER_DOCUMENT` rows are a document. Files are read row group by row group, all layers abreast.

    Raises:
        SpecmoeError: the folder has another layout, or its files have different numbers of rows; pyarrow is missing.
    """
    with opened(path):
        folder = _checkpoint(path)
        layers = _layer_files(folder)
        files = {number: open_parquet(file) for number, file in layers.items()}
        rows = {number: file.metadata.num_rows for number, file in files.items()}
        count = next(iter(rows.values()))
        if len(set(rows.values())) > 1:
            raise SpecmoeError(f"its layers have different numbers of rows: {sorted(set(rows.values()))[:5]}")
        if not count:
            raise SpecmoeError("there is no token in it")
        samples = sorted((folder.parent.parent / "samples").glob("*.parquet"))
        top_k, largest = 0, -1
        for number, file in files.items():
            first = next(list_rows(file, "indices", 1))
            if top_k not in (0, first.shape[1]):
                raise SpecmoeError(f"layer {number} chooses {first.shape[1]} experts, the layers before it {top_k}")
            top_k = first.shape[1]
            largest = max(largest, _largest_id(file))
        topology = topology_of(options, layers=len(layers), experts=largest + 1, top_k=top_k)
        if samples and sum(open_parquet(file).metadata.num_rows for file in samples) < count:
            raise SpecmoeError(f"samples have fewer rows than the {count:,} of the layers")
    return ForeignTrace(
        topology=topology,
        fields=fields_of(["gate_weights"]),
        documents=_documents(path, folder.name, layers, samples, count, topology.experts),
        count=-(-count // ROWS_PER_DOCUMENT),
        settings={"checkpoint": folder.name, "layers": list(layers), "rows_per_document": ROWS_PER_DOCUMENT},
        warnings=[
            f"the data mark no documents; every {ROWS_PER_DOCUMENT} rows were taken for one",
            *([] if samples else ["there are no samples beside it, so the tokens are unknown"]),
        ],
    )


def _checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise SpecmoeError("it is a file; name the folder of a checkpoint, actives/iter_N")
    if any(_LAYER_FILE.fullmatch(file.name) for file in path.iterdir()):
        return path
    found = sorted(folder for folder in path.glob("actives/iter_*") if folder.is_dir())
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found[:12]) or "none"
        raise SpecmoeError(f"name one checkpoint's folder, actives/iter_N (there is: {names})")
    return found[0]


def _layer_files(folder: Path) -> dict[int, Path]:
    found = {
        int(match[1]): regular_file(file) for file in folder.iterdir() if (match := _LAYER_FILE.fullmatch(file.name))
    }
    if not found:
        raise SpecmoeError(f"{folder} holds no layer_NN.parquet")
    return dict(sorted(found.items()))


def _largest_id(file: Any) -> int:
    told = column_maximum(file, "indices")
    if told is not None:
        return told
    survey = IdSurvey()
    for block in list_rows(file, "indices", ROWS_PER_DOCUMENT):
        survey.add(block[:, None, :], "indices")
    return survey.experts - 1


def _documents(
    path: Path, checkpoint: str, layers: dict[int, Path], samples: list[Path], rows: int, experts: int
) -> Iterator[ImportedDocument]:
    with opened(path):
        files = [open_parquet(file) for file in layers.values()]
        ids = [list_rows(file, "indices", ROWS_PER_DOCUMENT) for file in files]
        gates = [list_rows(file, "scores", ROWS_PER_DOCUMENT) for file in files]
        tokens = number_rows(samples, "token_id", ROWS_PER_DOCUMENT) if samples else None
    for number in range(-(-rows // ROWS_PER_DOCUMENT)):
        with opened(path):
            ids_TLK = np.stack([next(column) for column in ids], 1)
            if int(ids_TLK.max()) >= experts:
                raise SpecmoeError(f"expert id {int(ids_TLK.max())} occurs, beyond the files' own statistics")
            gates_TLK = torch.stack([float_rows(next(column), "scores") for column in gates], 1)
            length = len(ids_TLK)
            record = RoutingRecord(
                token_ids=token_rows(None if tokens is None else next(tokens)[:length], length, "token_id"),
                phase=torch.zeros(length, dtype=torch.uint8),
                expert_ids=id_rows(ids_TLK, "indices"),
                gate_weights=gates_TLK,
            )
        yield ImportedDocument(f"{checkpoint}/rows-{number * ROWS_PER_DOCUMENT:09d}", record)


def _recognises(path: Path, head: bytes) -> bool:
    if not path.is_dir():
        return False
    return any(_LAYER_FILE.fullmatch(file.name) for file in path.iterdir()) or any(path.glob("actives/iter_*"))


IMPORTER = Importer(
    name="flame-moe",
    about="a checkpoint of CMU-FLAME/FLAME-MoE-Traces (Parquet per layer; needs specmoe[parquet])",
    read=read,
    recognises=_recognises,
)
