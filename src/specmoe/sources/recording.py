"""Hooks that watch the routers of a live model and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from specmoe.errors import SpecmoeError
from specmoe.sources.families import Family, RouterSite, router_sites

__all__ = [
    "ForwardRoutes",
    "LayerRoute",
    "Recorder",
    "TokenIds",
    "cache_name",
    "padded",
    "recorded_routes",
    "run_model",
]

# One document's token ids.
TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class LayerRoute:
    """What one MoE layer did in one forward pass, for the N tokens that are no padding.

    Attributes:
        hidden: [N, D], the router's input. logits: [N, E], its output.
        ids: [N, K] int64, the experts that were really executed, -1 for a slot without one.
        weights: [N, K], the weight of each expert's output.
    """

    FIELDS: ClassVar = ("hidden", "logits", "ids", "weights")

    hidden: Tensor
    logits: Tensor
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ForwardRoutes:
    """One forward pass of a stack, documents of a batch one behind the other, padding left out.

    Attributes:
        token_ids: [N]; -1 where the model was given embeddings. rows: [N] int64, each token's row in the batch.
        layers: one entry per MoE layer, in execution order; a layer that a model runs several times (a looped
            transformer) has an entry for each.
        order: for each entry the number of its :class:`RouterSite`.
    """

    token_ids: Tensor
    rows: Tensor
    layers: list[LayerRoute]
    order: tuple[int, ...]


@dataclass
class _Visit:
    """One run of a MoE layer while its forward pass lasts."""

    layer: int
    router: tuple[Tensor, Tensor]
    route: tuple[Tensor, Tensor] | None = None


class Recorder:
    """Gathers what the hooks of :func:`recorded_routes` see. One entry per forward pass of the stack."""

    def __init__(self, blocks: Sequence[str]) -> None:
        self._blocks, self._layers = blocks, len(blocks)
        self._finished: list[ForwardRoutes] = []
        self._inputs: dict[str, Any] = {}
        self._visits: list[_Visit] = []
        self._order: tuple[int, ...] = ()

    def take(self) -> list[ForwardRoutes]:
        """The forward passes since the last call; the recorder forgets them."""
        finished, self._finished = self._finished, []
        return finished

    def _open(self, inputs: dict[str, Any]) -> None:
        # A forward pass that raised left its layers here.
        self._visits, self._inputs = [], inputs

    def _routed(self, layer: int, route: tuple[Tensor, Tensor]) -> None:
        visit = next((visit for visit in reversed(self._visits) if visit.layer == layer), None)
        if visit is not None:
            visit.route = route

    def _close(self) -> None:
        ran = {visit.layer for visit in self._visits}
        routed = ran - {visit.layer for visit in self._visits if visit.route is None}
        for layer, block in enumerate(self._blocks):
            if layer not in routed:
                raise SpecmoeError(
                    f"MoE layer {layer} ({block}) never called its {'experts' if layer in ran else 'router'}, so its "
                    "route is unknown: some other code does the work of transformers' modules (the package kernels? a "
                    "compiled or patched model?); run it without that"
                )
        order = tuple(visit.layer for visit in self._visits)
        self._order = self._order or order
        if order != self._order:
            raise SpecmoeError("the model runs its MoE layers in another order from one pass to the next")
        token_ids = _token_ids(self._inputs)
        batch, length = token_ids.shape
        rows = torch.arange(batch, device=token_ids.device).repeat_interleave(length)
        token_ids = token_ids.flatten()
        layers = [(*visit.router, *(visit.route or ())) for visit in self._visits]
        for layer, (hidden, *_) in enumerate(layers):
            if len(hidden) != batch * length:
                raise SpecmoeError(f"MoE layer {layer} saw {len(hidden)} of {batch * length} tokens; is that all text?")
        kept = _kept(self._inputs.get("attention_mask"), length)
        if kept is not None:
            token_ids, rows = token_ids[kept], rows[kept]
            layers = [tuple(tensor[kept.to(tensor.device)] for tensor in layer) for layer in layers]
        self._finished.append(ForwardRoutes(token_ids, rows, [LayerRoute(*layer) for layer in layers], order))
        self._open({})


def _token_ids(inputs: dict[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    if ids is not None:
        return ids
    embeddings: Tensor = inputs["inputs_embeds"]
    return torch.full(embeddings.shape[:2], -1, device=embeddings.device)


def _kept(mask: Any, length: int) -> Tensor | None:
    """Which tokens are no padding, None if all."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    # While decoding, the mask also covers the tokens that are already in the cache.
    kept = mask[:, -length:].flatten().bool()
    return None if bool(kept.all()) else kept


@contextmanager
def recorded_routes(model: nn.Module, family: Family, stack: str | None = None) -> Iterator[Recorder]:
    """Record every forward pass of one stack of ``model`` while the context lasts.

    Each MoE layer's router is watched for its input and logits, its experts for the ids and weights that
    they are called with, the stack for its token ids and attention mask (a batch is padded where that is
    0; without a mask nothing is). The hooks return nothing, so the model computes what it would without.

    Raises:
        SpecmoeError: no such stack, or it has no MoE layer.
    """
    sites = router_sites(model, family, stack)
    owner = _reader(model, family, stack)
    recorder = Recorder([site.path for site in sites])

    def opened(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        recorder._open({"input_ids": arguments[0], **named} if arguments else named)

    def closed(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        recorder._close()

    def router_ran(site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            hidden = arguments[0] if arguments else named["hidden_states"]
            logits = family.read_logits(output)
            visit = _Visit(site.layer, (hidden.detach().flatten(0, -2), logits.detach().flatten(0, -2)))
            recorder._visits.append(visit)
            if family.read_chosen is not None:
                visit.route = _detached(family.read_chosen(site.router, output))

        return hook

    def experts_run(site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            assert family.read_executed is not None
            recorder._routed(site.layer, _detached(family.read_executed(site.block, (*arguments, *named.values()))))

        return hook

    handles = []
    try:
        handles.append(owner.register_forward_pre_hook(opened, with_kwargs=True))
        handles.append(owner.register_forward_hook(closed))
        for site in sites:
            handles.append(site.router.register_forward_hook(router_ran(site), with_kwargs=True))
            if family.read_executed is not None:
                handles.append(site.experts.register_forward_pre_hook(experts_run(site), with_kwargs=True))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _reader(model: Any, family: Family, stack: str | None) -> nn.Module:
    """The module that is given the token ids of a stack."""
    if family.is_encoder_decoder:
        return model.get_submodule(stack or next(iter(family.stacks)))
    return _text_reader(model, family)


def _text_reader(model: Any, family: Family) -> Any:
    """The model without its language-model head; of a whole that has a part for reading text, that part."""
    # A checkpoint of the text part alone has no such part: it is the reader.
    return getattr(model.base_model, family.reader, model.base_model) if family.reader else model.base_model


def _detached(route: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    ids, weights = route
    return ids.detach(), weights.detach()


def run_model(model: Any, family: Family, documents: Sequence[TokenIds]) -> None:
    """One forward pass over token ids, padded on the right. What it computes is read by the hooks.

    A decoder reads each document from its start. An encoder-decoder reads the first half and continues
    with the second, as its pretraining does (prefix language modelling, Raffel et al., 2020).
    """
    if family.is_encoder_decoder:
        first, first_mask = padded([ids[: len(ids) // 2] for ids in documents], model.device)
        second, second_mask = padded([ids[len(ids) // 2 :] for ids in documents], model.device)
        model(
            input_ids=first,
            attention_mask=first_mask,
            decoder_input_ids=second,
            decoder_attention_mask=second_mask,
            use_cache=False,
        )
        return
    ids, mask = padded(documents, model.device)
    # Without the language-model head: nobody reads next-token logits here.
    _text_reader(model, family)(input_ids=ids, attention_mask=mask, use_cache=False)


def cache_name() -> str:
    """What the installed transformers calls a model's cache of keys and values, as argument and in its output.

    Up to 5.23 it is ``past_key_values``; 5.24 calls it ``cache`` and warns of the older name.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def padded(
    documents: Sequence[TokenIds], device: Any, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] of documents, filled up with 0 on one side, and the mask [B, T] of what is theirs."""
    longest = max(len(ids) for ids in documents)
    rows, mask = torch.zeros(len(documents), longest, dtype=torch.long), torch.zeros(len(documents), longest).long()
    for row, ids in enumerate(documents):
        own = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        rows[row, own], mask[row, own] = torch.as_tensor(ids), 1
    return rows.to(device), mask.to(device)
