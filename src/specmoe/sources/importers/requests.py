"""One request's routing, as serving engines give it, and its way into a document.

An engine forwards the prompt and every generated token but the last, so P prompt and G generated tokens make
P + G - 1 rows. Rows of a prefix that was computed earlier may be missing at the front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources.importers.arrays import IdSurvey, UniqueNames, id_rows, opened, token_rows
from specmoe.sources.importers.axes import LAYERS_FIRST, arranged, axes_doubt, layers_first
from specmoe.sources.importers.base import UNKNOWN_TOKEN, ForeignTrace, ImportedDocument, ImportOptions, topology_of
from specmoe.sources.importers.grouping import Grouping, routing_words
from specmoe.trace import Phase, RoutingRecord
from specmoe.trace.writer import fields_of

__all__ = ["REQUEST_FIELDS", "Request", "import_requests", "request_of"]

# vLLM's names; SGLang calls the generated tokens output_ids.
REQUEST_FIELDS = ("routed_experts", "prompt_routed_experts", "prompt_token_ids", "token_ids", "output_ids")


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        name: of the request. ids_TLK: expert ids of the rows that were forwarded.
        prompt: length of the prompt, None if it is not known which rows are its.
        tokens_T: token ids of the rows, -1 where unknown. skipped: rows missing at the front.
        turned: whether the array was layers first, by its number of tokens.
        before_S: token ids of the missing rows, empty if unknown.
        facts: its fields, by which it may be grouped. answer_of: equal for answers to one request; empty if unknown.
    """

    name: str
    ids_TLK: np.ndarray
    prompt: int | None
    tokens_T: np.ndarray
    skipped: int = 0
    turned: bool = False
    before_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    facts: Mapping[str, str] = field(default_factory=dict)
    answer_of: str = ""

    def record(self, layers: np.ndarray) -> RoutingRecord:
        """The request as a record of the given layers."""
        rows = len(self.ids_TLK)
        phase = torch.zeros(rows, dtype=torch.uint8)
        if self.prompt is not None:
            phase[max(0, self.prompt - self.skipped) :] = Phase.DECODE
        return RoutingRecord(
            token_ids=token_rows(self.tokens_T, rows),
            phase=phase,
            expert_ids=id_rows(self.ids_TLK[:, layers], "the expert ids"),
        )


def request_of(
    name: str,
    fields: Mapping[str, np.ndarray],
    prompt: int | None = None,
    generated: int | None = None,
    axes: tuple[str, ...] | None = None,
) -> Request:
    """Put together what an engine says of one request.

    Args:
        name: of the request. fields: arrays by the names of :data:`REQUEST_FIELDS`.
        prompt, generated: numbers of tokens, where they are told without the tokens.
        axes: of the arrays of experts; None for tokens, layers, k, or layers, tokens, k where only that has the
            number of tokens.

    Raises:
        SpecmoeError: the arrays contradict each other.
    """
    ids = _ids(fields, "routed_experts", axes)
    output = fields.get("token_ids", fields.get("output_ids"))
    given, written = _tokens(fields.get("prompt_token_ids")), _tokens(output)
    if "prompt_routed_experts" in fields:
        of_prompt = _ids(fields, "prompt_routed_experts", axes)
        if of_prompt.shape[1:] != ids.shape[1:]:
            raise SpecmoeError(f"{name}: prompt_routed_experts {of_prompt.shape} does not fit {ids.shape}")
        prompt, ids = len(of_prompt), np.concatenate([of_prompt, ids])
        generated = len(ids) - prompt if written is None else len(written)
    elif given is not None:
        prompt = len(given)
    generated = generated if written is None else len(written)
    if prompt is None:
        return Request(name, ids, None, np.full(len(ids), UNKNOWN_TOKEN))
    skipped = 0
    # The last generated token is forwarded by some versions only.
    forwarded = (prompt,) if generated is None else (prompt + max(0, generated - 1), prompt + generated)
    turned = axes is None and "prompt_routed_experts" not in fields and layers_first(ids.shape, forwarded)
    ids = arranged(ids, name, LAYERS_FIRST) if turned else ids
    if generated is not None:
        if len(ids) > prompt + generated:
            raise SpecmoeError(
                f"{name} has {len(ids)} rows for {prompt} prompt and {generated} generated tokens, with axes read as "
                f"tokens, layers, k = {', '.join(map(str, ids.shape))}; name others with --axes"
            )
        skipped = max(0, prompt + max(0, generated - 1) - len(ids))
    tokens_T = _tokens_of_rows(len(ids), skipped, prompt, given, written)
    before_S = given[:skipped] if given is not None and skipped <= prompt else np.zeros(0, np.int64)
    return Request(name, ids, prompt, tokens_T, skipped, turned, before_S)


def _tokens_of_rows(
    rows: int, skipped: int, prompt: int, given: np.ndarray | None, written: np.ndarray | None
) -> np.ndarray:
    """Which token each row belongs to: rows begin at token ``skipped`` of prompt and generated text."""
    tokens = np.full(rows, UNKNOWN_TOKEN, np.int64)
    for text, begin, end in ((given, 0, prompt), (written, prompt, skipped + rows)):
        if text is not None:
            first, last = max(begin, skipped), min(begin + len(text), end, skipped + rows)
            if first < last:
                tokens[first - skipped : last - skipped] = text[first - begin : last - begin]
    return tokens


def _ids(fields: Mapping[str, np.ndarray], name: str, axes: tuple[str, ...] | None) -> np.ndarray:
    ids = fields.get(name)
    if ids is None:
        raise SpecmoeError(f"{name} is missing")
    ids = ids if axes is None else arranged(ids, name, axes)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise SpecmoeError(f"{name} has shape {ids.shape} and dtype {ids.dtype}, expected [tokens, layers, k] of ids")
    return ids


def _tokens(array: np.ndarray | None) -> np.ndarray | None:
    if array is None:
        return None
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise SpecmoeError(f"token ids have shape {array.shape} and dtype {array.dtype}, expected a row of numbers")
    return array.astype(np.int64)


def import_requests(path: Path, requests: Callable[[], Iterable[Request]], options: ImportOptions) -> ForeignTrace:
    """A trace of requests, one document each.

    Args:
        path: named in errors. requests: reads them, one after the other; called twice, as the number of experts and
            the layers that route are known only when all ids were seen.

    Raises:
        SpecmoeError: the requests have different shapes or impossible ids, or there is no token.
    """
    warnings: list[str] = []
    survey, grouping = IdSurvey(), Grouping(options.group_by)
    count = unknown = skipped = turned = longest = 0
    with opened(path):
        for request in requests():
            survey.add(request.ids_TLK, request.name)
            _group(grouping, request)
            count += 1
            unknown += request.prompt is None
            skipped += request.skipped > 0
            turned += request.turned
            longest = max(longest, len(request.ids_TLK))
        layers = survey.moe_layers(warnings)
        assert survey.shape is not None
        fused = survey.fused_slots(warnings)
        topology = topology_of(options, layers=len(layers), experts=survey.experts, top_k=survey.top_k)
    if turned:
        warnings.append(f"{turned} of {count} requests are [layers, tokens, k] by their numbers of tokens; turned")
    if options.axes is None:
        warnings += axes_doubt(longest, *survey.shape)
    if unknown:
        warnings.append(f"{unknown} of {count} requests do not say where the prompt ends; all of it counts as prefill")
    if skipped:
        warnings.append(f"{skipped} of {count} requests lack their first tokens (a prefix that was computed earlier)")
    with opened(path):
        groups = grouping.groups(warnings)

    def documents() -> Iterator[ImportedDocument]:
        unique = UniqueNames()
        iterator = iter(requests())
        for group in groups:
            with opened(path):
                request = next(iterator, None)
                if request is None:
                    return
                document = ImportedDocument(unique(request.name), request.record(layers), group=group)
            yield document

    return ForeignTrace(
        topology=topology,
        fields=fields_of([]),
        documents=documents(),
        count=count,
        settings={} if survey.shape[0] == len(layers) else {"layers": layers.tolist()},
        warnings=warnings,
        fused=fused,
    )


def _group(grouping: Grouping, request: Request) -> None:
    whole = len(request.before_S) == request.skipped
    grouping.add(
        np.concatenate([request.before_S, request.tokens_T]) if whole else request.tokens_T[:0],
        routing_words(request.ids_TLK) if not request.skipped else None,
        request.prompt,
        facts=request.facts,
        answer_of=request.answer_of,
    )
