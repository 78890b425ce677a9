"""Import ``robust_traces.pkl``: a pickled list of gating data points, one text through one MoE layer each.

The file is read by :mod:`specmoe.sources.importers.restricted_pickle`, which runs nothing that it brings along. Such
files are known to hold things that spoil what is learned from them; the importer looks for them and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources.hidden_probe import MINIMUM_TEXTS, probe_hidden
from specmoe.sources.importers.base import ForeignTrace, ImportedDocument, Importer, ImportOptions, topology_of
from specmoe.sources.importers.gating_points import RECORD_CLASS, Point, Text, join_texts, read_points, strip_padding
from specmoe.sources.importers.restricted_pickle import load_restricted
from specmoe.topology import Topology
from specmoe.trace import RoutingRecord

__all__ = ["IMPORTER"]

_ROW_SUM_TOLERANCE = 1e-2  # half precision, many experts
_LARGEST_FLOAT16 = 65504.0
# A text whose layers share arrays can unfold to more than the file holds; honest ones by a small factor.
_MOST_UNFOLDING = 64


def read(path: Path, options: ImportOptions) -> ForeignTrace:
    """Open a pickled list of dicts or ``GatingDataPoint`` objects.

    Points with the same ``dataset_name`` and ``sample_id`` are the layers of one text. Points without
    ``sample_id`` join the text before them as long as their token ids are the same and their ``layer_id`` is
    new to it. The trace's MoE layers are the ``layer_id`` values that more than half of the texts have, in
    rising order; a text that lacks one is dropped.

    ``target_top_k`` gives the expert ids. ``target_routing`` is taken for the router's distribution p if
    all its rows are non-negative and sum to 1, and kept as logits log(p + 1e-9); otherwise it is taken for the
    logits. Gate weights are that distribution at the chosen experts. ``hidden_states`` become ``hidden`` (float16;
    float32 where float16 overflows) if all points have them; without them the topology's hidden size is 0.
    Positions from ``sequence_length`` on, and trailing runs of one token id that most texts end with, are
    padding and left out. All tokens count as prefill.

    Raises:
        SpecmoeError: the file is no such pickle or asks for code to be run, a required field is missing or has
            the wrong shape, a number is NaN or Inf, or no text is complete. The whole file is checked here.
    """
    content = load_restricted(path, RECORD_CLASS)
    try:
        points = read_points(content)
        texts, warnings = join_texts(points)
        warnings += strip_padding(texts)
        texts = _not_empty(texts, warnings)
        topology = _topology(texts, options)
        _check_unfolding(texts, topology, path.stat().st_size)
        is_distribution = _survey_routing(texts, warnings)
        hidden_dtype = _survey_hidden(points, texts, topology, warnings)
        _survey_gates(points, warnings)
    except SpecmoeError as error:
        raise SpecmoeError(f"{path}: {error}") from error
    fields = ("token_ids", "phase", "expert_ids", "gate_weights", "router_logits")
    if hidden_dtype is not None:
        fields = (*fields, "hidden")
    else:
        topology = topology.model_copy(update={"hidden_size": 0})
    return ForeignTrace(
        topology=topology,
        fields=fields,
        documents=(
            ImportedDocument(text.doc_id, _record(text, is_distribution, hidden_dtype), text.domain) for text in texts
        ),
        count=len(texts),
        settings={"routing": "distribution" if is_distribution else "logits"},
        warnings=warnings,
    )


def _not_empty(texts: list[Text], warnings: list[str]) -> list[Text]:
    kept = [text for text in texts if text.length]
    if not kept:
        raise SpecmoeError("no text has a token that is not padding")
    if len(kept) < len(texts):
        warnings.append(f"{len(texts) - len(kept)} texts hold nothing but padding and were dropped")
    return kept


def _topology(texts: Sequence[Text], options: ImportOptions) -> Topology:
    layers = len(texts[0].points)
    point = next(iter(texts[0].points.values()))
    experts, top_k = point.experts, point.top_k_SK.shape[1]
    width = 1 if point.hidden_SD is None else point.hidden_SD.shape[1]
    return topology_of(options, layers=layers, experts=experts, top_k=top_k, hidden_size=width)


def _check_unfolding(texts: Sequence[Text], topology: Topology, file_bytes: int) -> None:
    longest = max(text.length for text in texts)
    size = 4 * longest * topology.layers * (topology.experts + topology.hidden_size)
    if size > _MOST_UNFOLDING * file_bytes + (1 << 30):
        raise SpecmoeError(f"one text unfolds to {size:,} bytes, far more than the file holds")


def _survey_routing(texts: Sequence[Text], warnings: list[str]) -> bool:
    """Whether ``target_routing`` holds distributions; warns where it contradicts ``target_top_k``."""
    rows = normal = mismatched = 0
    for point, length in _each_point(texts):
        routing, top_k = point.routing_SE[:length].astype(np.float64), point.top_k_SK[:length]
        rows += length
        normal += int(((routing >= 0).all(1) & (np.abs(routing.sum(1) - 1) <= _ROW_SUM_TOLERANCE)).sum())
        chosen = np.sort(np.take_along_axis(routing, top_k, 1), 1)
        best = np.sort(routing, 1)[:, -top_k.shape[1] :]
        repeats = (np.diff(np.sort(top_k, 1), axis=1) == 0).any(1)
        # Values are compared, not ids, so that ties do not count.
        mismatched += int(((chosen < best).any(1) | repeats).sum())
    if mismatched:
        warnings.append(f"target_top_k is not the top-k of target_routing at {mismatched:,} of {rows:,} places")
    if 0 < normal < rows and 2 * normal > rows:
        warnings.append(f"target_routing sums to 1 at {normal:,} of {rows:,} places only and is taken for logits")
    return normal == rows


def _survey_hidden(
    points: Sequence[Point], texts: Sequence[Text], topology: Topology, warnings: list[str]
) -> torch.dtype | None:
    """The dtype to keep hidden states in, None if they cannot be; warns where they do not explain the routing."""
    widths = {None if point.hidden_SD is None else point.hidden_SD.shape[1] for point in points}
    if widths == {None}:
        return None
    if len(widths) > 1:
        what = "some points have no hidden_states" if None in widths else "hidden_states differ in width"
        warnings.append(f"{what}; none were imported")
        return None
    largest = 0.0
    for point, length in _each_point(texts):
        largest = max(largest, float(np.abs(_hidden(point)[:length]).max()))
    layers = list(texts[0].points)

    def read(text: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        point = texts[text].points[layers[layer]]
        return _hidden(point), point.top_k_SK

    lengths = [text.length for text in texts]
    result = probe_hidden(lengths, len(layers), topology.experts, topology.top_k, read)
    if result is None:
        warnings.append(f"hidden states were not probed: that takes {MINIMUM_TEXTS} texts, here are {len(texts)}")
    elif result.at_chance:
        warnings.append(
            f"hidden states look like noise: on unseen texts a linear probe from them finds {result.recall:.1%} of "
            f"the experts, layer frequency alone {result.frequency:.1%}; they were imported all the same"
        )
    return torch.float32 if largest > _LARGEST_FLOAT16 else torch.float16


def _hidden(point: Point) -> np.ndarray:
    hidden_SD = point.hidden_SD
    assert hidden_SD is not None
    return hidden_SD


def _survey_gates(points: Sequence[Point], warnings: list[str]) -> None:
    given = [point.has_gates for point in points if point.has_gates is not None]
    if given and not any(given):
        warnings.append(
            "prev_layer_gates is empty in every point; earlier routing is taken from the layers' own points"
        )


def _each_point(texts: Sequence[Text]) -> Iterator[tuple[Point, int]]:
    for text in texts:
        for point in text.points.values():
            yield point, text.length


def _record(text: Text, is_distribution: bool, hidden_dtype: torch.dtype | None) -> RoutingRecord:
    points, length = list(text.points.values()), text.length
    routing = torch.from_numpy(np.stack([point.routing_SE[:length] for point in points], 1).astype(np.float32))
    ids = torch.from_numpy(np.stack([point.top_k_SK[:length] for point in points], 1))
    hidden = None
    if hidden_dtype is not None:
        stacked = np.stack([_hidden(point)[:length] for point in points], 1)
        hidden = torch.from_numpy(stacked.astype(np.float32)).to(hidden_dtype)
    distribution = routing if is_distribution else routing.softmax(-1)
    return RoutingRecord(
        token_ids=torch.from_numpy(text.token_ids_T.astype(np.int32)),
        phase=torch.zeros(length, dtype=torch.uint8),
        expert_ids=ids.to(torch.int16),
        gate_weights=distribution.gather(-1, ids),
        router_logits=(routing + 1e-9).log() if is_distribution else routing,
        hidden=hidden,
    )


def _recognises(path: Path, head: bytes) -> bool:
    # By name alone: a damaged pickle gets a better error from here than from no importer.
    return path.suffix in {".pkl", ".pickle"}


IMPORTER = Importer(
    name="gating-pickle",
    about="pickled gating data points of the original research script (read without running anything)",
    read=read,
    recognises=_recognises,
)
