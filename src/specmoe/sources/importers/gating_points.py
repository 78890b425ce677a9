"""Gating data points: checked one by one, then joined to texts that have every MoE layer.

Arrays stay views of the bytes they were read from and are widened only while they are used, so that a file
whose points share arrays cannot make its reader take more memory than a text needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.restricted_pickle import Array, Record

__all__ = ["RECORD_CLASS", "Point", "Text", "join_texts", "read_points", "strip_padding"]

RECORD_CLASS = "GatingDataPoint"
_LARGEST_FLOAT32 = 3.4e38

Stored = Array | list[Any]


@dataclass(frozen=True)
class Point:
    """One data point: S positions of one text, at one layer.

    Attributes:
        layer: ``layer_id``. sample: ``sample_id`` as text, None without one. domain: ``dataset_name``.
        token_ids, routing, top_k, hidden: as found, checked; see the properties.
        experts: E. length: positions that ``sequence_length`` counts as text.
        has_gates: whether ``prev_layer_gates`` holds anything; None where there is no such field.
    """

    layer: int
    sample: str | None
    domain: str
    token_ids: Stored
    routing: Stored
    top_k: Stored
    hidden: Stored | None
    experts: int
    length: int
    has_gates: bool | None

    @property
    def token_ids_S(self) -> np.ndarray:
        """Token ids [S], whole numbers."""
        return _array(self.token_ids)

    @property
    def routing_SE(self) -> np.ndarray:
        """``target_routing`` [S, E]."""
        return _array(self.routing)

    @property
    def top_k_SK(self) -> np.ndarray:
        """``target_top_k`` [S, K] int64."""
        return _columns(_array(self.top_k)).astype(np.int64)

    @property
    def hidden_SD(self) -> np.ndarray | None:
        """``hidden_states`` [S, D]."""
        return None if self.hidden is None else _array(self.hidden)


@dataclass
class Text:
    """One text: its points by layer, in rising order once joined; the first ``length`` positions count."""

    sample: str | None
    domain: str
    points: dict[int, Point] = field(default_factory=dict)
    doc_id: str = ""
    length: int = 0

    @property
    def token_ids_T(self) -> np.ndarray:
        """Token ids [T]."""
        return next(iter(self.points.values())).token_ids_S[: self.length]


def read_points(content: object) -> list[Point]:
    """Check the unpickled content of a file, a list of dicts or records.

    Raises:
        SpecmoeError: it is none, or a point lacks a field, has a wrong shape, or holds NaN or Inf; the message
            names point and field.
    """
    if not isinstance(content, list):
        raise SpecmoeError(f"it holds a value of type {type(content).__name__}, not a list of data points")
    if not content:
        raise SpecmoeError("its list of data points is empty")
    points: list[Point] = []
    sizes = (0, 0)
    for number, item in enumerate(content):
        fields = item.fields if isinstance(item, Record) else item
        if not isinstance(fields, dict):
            raise SpecmoeError(f"point {number} is of type {type(item).__name__}, not a dict or a {RECORD_CLASS}")
        try:
            point = _point(fields)
        except SpecmoeError as error:
            raise SpecmoeError(f"point {number}: {error}") from error
        found = (point.experts, point.top_k_SK.shape[1])
        sizes = sizes if points else found
        if found != sizes:
            raise SpecmoeError(
                f"point {number} has {found[0]} experts, top-{found[1]}; point 0 {sizes[0]}, top-{sizes[1]}"
            )
        points.append(point)
    return points


def _point(fields: dict[Any, Any]) -> Point:
    layer = _whole_number(fields, "layer_id")
    if layer is None or not 0 <= layer < 1 << 31:
        raise SpecmoeError(f"layer_id is {layer}, expected a layer's number")
    tokens_name = "token_ids" if fields.get("token_ids") is not None else "input_embeddings"
    for name in ("target_routing", "target_top_k", tokens_name):
        if fields.get(name) is None:
            wanted = "token_ids or input_embeddings (token ids [S])" if name == tokens_name else name
            raise SpecmoeError(f"the field {wanted} is missing")
    size, experts = _numbers(fields, "target_routing", 2).shape
    top_k = _columns(_numbers(fields, "target_top_k"))
    if top_k.ndim != 2 or len(top_k) != size or not 1 <= top_k.shape[1] <= experts:
        raise SpecmoeError(f"target_top_k has shape {top_k.shape} beside target_routing ({size}, {experts})")
    _check_whole(top_k, "target_top_k", experts)
    tokens = _numbers(fields, tokens_name, 1)
    if len(tokens) != size:
        raise SpecmoeError(f"{tokens_name} has {len(tokens)} entries, target_routing {size}")
    _check_whole(tokens, tokens_name, 1 << 31)
    hidden = fields.get("hidden_states")
    if hidden is not None:
        shape = _numbers(fields, "hidden_states", 2).shape
        if shape[0] != size or not shape[1]:
            raise SpecmoeError(f"hidden_states has shape {shape}, expected {size} rows")
    length = _whole_number(fields, "sequence_length")
    if length is not None and length < 0:
        raise SpecmoeError(f"sequence_length is {length}")
    gates = fields.get("prev_layer_gates")
    has_gates = bool(gates.stored.size if isinstance(gates, Array) else gates) if "prev_layer_gates" in fields else None
    return Point(
        layer=layer,
        sample=_label(fields, "sample_id"),
        domain=_label(fields, "dataset_name") or "unknown",
        token_ids=fields[tokens_name],
        routing=fields["target_routing"],
        top_k=fields["target_top_k"],
        hidden=hidden,
        experts=experts,
        length=size if length is None else min(length, size),
        has_gates=has_gates,
    )


def _array(value: Stored) -> np.ndarray:
    return value.numpy() if isinstance(value, Array) else np.asarray(value)


def _columns(top_k: np.ndarray) -> np.ndarray:
    # A top-1 router's ids may come without their last axis.
    return top_k[:, None] if top_k.ndim == 1 else top_k


def _numbers(fields: dict[Any, Any], name: str, dimensions: int | None = None) -> np.ndarray:
    """A field as an array of finite numbers."""
    value = fields[name]
    # A list of lists can stand for far more numbers than the file holds.
    if not isinstance(value, Array) and not (isinstance(value, list) and all(type(n) in (int, float) for n in value)):
        raise SpecmoeError(f"{name} is a {type(value).__name__}, expected a numpy array or a torch tensor")
    array = _array(value)
    if array.dtype.kind not in "iuf" and array.size:
        raise SpecmoeError(f"{name} holds something other than numbers")
    if dimensions is not None and array.ndim != dimensions:
        raise SpecmoeError(f"{name} has shape {array.shape}, expected {dimensions} dimension(s)")
    if array.dtype.kind == "f" and array.size and not float(np.abs(array).max()) <= _LARGEST_FLOAT32:
        raise SpecmoeError(f"{name} holds NaN or Inf")
    return array


def _check_whole(values: np.ndarray, name: str, below: int) -> None:
    broken = values.dtype.kind == "f" and bool((values != np.floor(values)).any())
    if values.size and (broken or float(values.min()) < 0 or float(values.max()) >= below):
        raise SpecmoeError(f"{name} holds something other than whole numbers from 0 to {below - 1}")


def _plain(value: object) -> object:
    """A number or text that may have come as an array of one."""
    return value.numpy().reshape(-1)[0].item() if isinstance(value, Array) and value.stored.size == 1 else value


def _whole_number(fields: dict[Any, Any], name: str) -> int | None:
    value = _plain(fields.get(name))
    if value is not None and type(value) is not int:
        raise SpecmoeError(f"{name} is no whole number")
    return value


def _label(fields: dict[Any, Any], name: str) -> str | None:
    value = _plain(fields.get(name))
    if value is not None and not isinstance(value, str | int | float):
        raise SpecmoeError(f"{name} is neither a text nor a number")
    try:
        label = None if value is None else str(value)
        (label or "").encode()
    except ValueError as error:  # half a surrogate pair, or a number of thousands of digits
        raise SpecmoeError(f"{name} cannot be written as text") from error
    return label


def join_texts(points: Sequence[Point]) -> tuple[list[Text], list[str]]:
    """Put the layers of each text together.

    Points with the same dataset name and sample id are one text. Points without sample id join the text
    before them as long as their token ids are the same and their layer is new to it. The MoE layers are
    those that more than half of the texts have.

    Returns:
        The texts that have them all, and warnings about what was left out.

    Raises:
        SpecmoeError: no text is left.
    """
    texts, repeated = _gather(points)
    counts = Counter(layer for text in texts for layer in text.points)
    layers = sorted(layer for layer, count in counts.items() if 2 * count > len(texts))
    complete = [text for text in texts if layers and all(layer in text.points for layer in layers)]
    if not complete:
        raise SpecmoeError(
            f"no text has all MoE layers ({len(texts)} texts, layers {sorted(counts)[:20]}); "
            "the layers of a text must share one sample_id"
        )
    agreeing = [text for text in complete if _layers_agree(text, layers)]
    if not agreeing:
        raise SpecmoeError("the layers of every text disagree on its tokens; points of one sample_id must be one text")
    warnings: list[str] = []
    if repeated:
        warnings.append(f"{repeated} data points repeat a layer of their text and were left out")
    if ignored := sorted(set(counts) - set(layers)):
        warnings.append(f"layers {ignored[:20]} occur in half of the texts at most and were left out")
    if dropped := len(texts) - len(complete):
        warnings.append(f"{dropped} of {len(texts)} texts lack a layer and were dropped")
    if dropped := len(complete) - len(agreeing):
        warnings.append(f"{dropped} of {len(texts)} texts were dropped: their layers disagree on the tokens")
    names = Counter(text.sample for text in agreeing)
    for number, text in enumerate(agreeing):
        text.points = {layer: text.points[layer] for layer in layers}
        text.length = min(point.length for point in text.points.values())
        if text.sample is None:
            text.doc_id = f"text-{number:05d}"
        else:
            text.doc_id = text.sample if names[text.sample] == 1 else f"{text.domain}/{text.sample}"
    if len({text.doc_id for text in agreeing}) < len(agreeing):
        raise SpecmoeError("different texts have the same name; give every text a sample_id of its own")
    return agreeing, warnings


def _gather(points: Sequence[Point]) -> tuple[list[Text], int]:
    texts: list[Text] = []
    by_sample: dict[tuple[str, str], Text] = {}
    repeated = 0
    for point in points:
        if point.sample is not None:
            text = by_sample.get((point.domain, point.sample))
        else:
            text = texts[-1] if texts and _continues(texts[-1], point) else None
        if text is None:
            text = Text(point.sample, point.domain)
            texts.append(text)
            if point.sample is not None:
                by_sample[point.domain, point.sample] = text
        repeated += point.layer in text.points
        text.points.setdefault(point.layer, point)
    return texts, repeated


def _continues(text: Text, point: Point) -> bool:
    first = next(iter(text.points.values()))
    return (
        text.sample is None and point.layer not in text.points and np.array_equal(first.token_ids_S, point.token_ids_S)
    )


def _layers_agree(text: Text, layers: Sequence[int]) -> bool:
    first = text.points[layers[0]].token_ids_S
    return all(np.array_equal(text.points[layer].token_ids_S, first) for layer in layers)


def strip_padding(texts: Sequence[Text]) -> list[str]:
    """Shorten texts by the trailing run of a token id that most of them end with, twice or more.

    Returns:
        A warning naming the token and its share of all tokens, if there is such a token.
    """
    runs = [_trailing_run(text.token_ids_T) for text in texts]
    repeated = Counter(token for token, run in runs if run >= 2)
    token, count = repeated.most_common(1)[0] if repeated else (0, 0)
    if 2 * count <= len(texts):
        return []
    total = sum(text.length for text in texts)
    stripped = 0
    for text, (last, run) in zip(texts, runs, strict=True):
        if last == token:
            text.length -= run
            stripped += run
    found = f"padding counted as text: {count} of {len(texts)} texts end in a run of token {token}"
    return [f"{found}, {stripped / total:.1%} of all tokens; sequence_length does not exclude it, the import does"]


def _trailing_run(token_ids_T: np.ndarray) -> tuple[int, int]:
    if not len(token_ids_T):
        return -1, 0
    other = np.flatnonzero(token_ids_T != token_ids_T[-1])
    return int(token_ids_T[-1]), len(token_ids_T) - (int(other[-1]) + 1 if len(other) else 0)
