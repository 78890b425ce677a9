"""One row per model family: where its routers are, and how to read what they say.

A Mixture-of-Experts block holds a router and its experts. The router is a module whose output holds
the logits; the experts' arguments hold the ids and weights that are really executed. Both are read by
hooks, so a new family is a new row here and no change elsewhere. The ids are never taken from the top-k
of the logits: with capacity limits, group limits or correction biases the two differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specmoe.errors import SpecmoeError, unknown_name

__all__ = ["FAMILIES", "Family", "RouterSite", "family_of", "router_sites"]

Route = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Family:
    """How one model family routes.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        model_class: name of the transformers class that is loaded.
        stacks: name of each stack of layers and the path of its layer list; the first is captured
            unless another one is asked for.
        block: path of the MoE block within a layer, as candidates (layers without it are dense).
        router: name of the router within the block.
        read_logits: router output → logits [..., E].
        read_route: positional arguments of the experts' forward → ids [N, K] int64 and gate weights
            [N, K]; id -1 with weight 0 marks a slot that no expert serves.
        read_weights: router module → its weight [E, D] and its bias [E] or None.
        scoring: how logits become gate weights.
        is_encoder_decoder: the model needs an encoder input beside the decoder's.
    """

    model_type: str
    model_class: str
    stacks: dict[str, str]
    block: tuple[str, ...]
    router: str
    read_logits: Callable[[Any], Tensor]
    read_route: Callable[[tuple[Any, ...]], Route]
    read_weights: Callable[[Any], tuple[Tensor, Tensor | None]]
    scoring: str = "softmax"
    is_encoder_decoder: bool = False


@dataclass(frozen=True)
class RouterSite:
    """One MoE layer of a live model: the whole transformer layer, its router and its experts."""

    layer: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module


def _first_output(output: Any) -> Tensor:
    return output[0]


def _last_output(output: Any) -> Tensor:
    return output[2]


def _ids_then_weights(arguments: tuple[Any, ...]) -> Route:
    _, ids, weights = arguments
    return ids, weights


def _own_weight(router: Any) -> tuple[Tensor, Tensor | None]:
    return router.weight, getattr(router, "bias", None)


def _classifier_weight(router: Any) -> tuple[Tensor, Tensor | None]:
    return _own_weight(router.classifier)


def _switch_dispatch(arguments: tuple[Any, ...]) -> Route:
    # Switch hands its experts a one-hot dispatch mask [N, 1, E]; a token over an expert's capacity has
    # an all-zero row and passes the layer by (Fedus et al., 2021, section 2.2).
    _, mask, probability = arguments
    mask = mask.flatten(0, -2)
    served = mask.any(-1, keepdim=True)
    ids = torch.where(served, mask.long().argmax(-1, keepdim=True), -1)
    return ids, torch.where(served, probability.reshape(-1, 1), 0)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="olmoe",
            model_class="OlmoeForCausalLM",
            stacks={"decoder": "model.layers"},
            block=("mlp",),
            router="gate",
            read_logits=_first_output,
            read_route=_ids_then_weights,
            read_weights=_own_weight,
        ),
        Family(
            model_type="switch_transformers",
            model_class="SwitchTransformersForConditionalGeneration",
            stacks={"decoder": "decoder.block", "encoder": "encoder.block"},
            block=("layer.1.mlp", "layer.2.mlp"),
            router="router",
            read_logits=_last_output,
            read_route=_switch_dispatch,
            read_weights=_classifier_weight,
            is_encoder_decoder=True,
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The row of a model type.

    Raises:
        SpecmoeError: there is no row for it.
    """
    if model_type not in FAMILIES:
        raise unknown_name("model family", model_type, FAMILIES)
    return FAMILIES[model_type]


def router_sites(model: nn.Module, family: Family, stack: str | None = None) -> list[RouterSite]:
    """The MoE layers of one stack of ``model``, in execution order.

    Raises:
        SpecmoeError: no such stack, or it has no MoE layer.
    """
    stack = stack or next(iter(family.stacks))
    if stack not in family.stacks:
        raise unknown_name("stack", stack, family.stacks)
    sites = []
    for block in model.get_submodule(family.stacks[stack]).children():
        for path in family.block:
            router = _submodule(block, f"{path}.{family.router}")
            experts = _submodule(block, f"{path}.experts")
            if router is not None and experts is not None:
                sites.append(RouterSite(len(sites), block, router, experts))
    if not sites:
        raise SpecmoeError(f"the {stack} of this {family.model_type} model has no MoE layer")
    return sites


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
