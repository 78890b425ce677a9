"""One row per model family of transformers: how it routes, and what it does differently from the others.

A Mixture-of-Experts block holds a router (``gate`` or ``router``) and, beside it, its ``experts``. Calling the router
gives its logits first; the experts are called with the hidden states, the ids and the weights that are really
executed. :mod:`specmoe.sources.recording` reads both by hooks. A family that departs from this says so in its row, so
that a new one is a new row here and no change elsewhere. The ids are never taken from the top-k of the logits: with
capacity limits, group limits, correction biases or hashed layers the two differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from specmoe.errors import SpecmoeError, unknown_name

__all__ = [
    "EXCLUDED",
    "FAMILIES",
    "NOT_TEXT",
    "ROWS_UP_TO",
    "Family",
    "RouterSite",
    "family_of",
    "not_certain",
    "router_sites",
]

Route = tuple[Tensor, Tensor]
# The newest release of transformers whose families all have a row.
ROWS_UP_TO = "5.24"
# Parts of a multimodal model that text does not pass through.
NOT_TEXT = {"vision", "visual", "vision_tower", "vision_model", "vision_moe", "audio", "audio_tower", "talker"}


def _first_output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _ids_then_weights(_block: Any, arguments: tuple[Any, ...]) -> Route:
    _, ids, weights = arguments
    return ids, weights


@dataclass(frozen=True)
class Family:
    """How one model family routes.

    Attributes:
        name: its folder in ``transformers.models``, and its ``config.model_type`` (with or without ``_text``).
        scoring: what makes weights of logits: ``softmax``, ``sigmoid``, ``sqrt-softplus`` or ``sparsemixer``; whether
            over all experts or over the chosen ones makes a factor of difference only.
        bias: a correction bias is added to the scores for choosing only (Wang et al., 2024, auxiliary-loss-free).
        groups: only the experts of the best groups can be chosen (DeepSeek-V2, 2024).
        shared: there are shared experts that every token passes through.
        dense: some layers have no experts, by default or by configuration.
        zero: ids from E on are zero or skip experts, which compute nothing.
        note: what else a reader of its traces should know.
        listed: False for one without a row, see :mod:`specmoe.sources.unlisted`.
        since: the first version of transformers that has it, of those that can be installed beside us.
        stacks: name of each stack and the part of a block's path that marks it; the first is captured unless
            another one is asked for.
        reader: where a whole model's text is read by one part of its base model only, that part's name.
        is_encoder_decoder: the model needs an encoder input beside the decoder's.
        read_logits: router's output → logits [..., E].
        read_executed: the block and the arguments of the experts' forward → ids [N, K] int64 and gate weights [N, K];
            id -1 with weight 0 marks a slot that no expert serves. None where the experts are not told.
        read_chosen: the router and its output → the same, for families whose experts are not told.
    """

    name: str
    scoring: str = "softmax"
    bias: bool = False
    groups: bool = False
    shared: bool = False
    dense: bool = False
    zero: bool = False
    note: str = ""
    listed: bool = True
    since: str = "5.21"
    stacks: dict[str, str] = field(default_factory=lambda: {"decoder": ""})
    reader: str = ""
    is_encoder_decoder: bool = False
    read_logits: Callable[[Any], Tensor] = _first_output
    read_executed: Callable[[Any, tuple[Any, ...]], Route] | None = _ids_then_weights
    read_chosen: Callable[[Any, Any], Route] | None = None


@dataclass(frozen=True)
class RouterSite:
    """One MoE layer of a live model.

    Attributes:
        layer: its number among the MoE layers. path: of the MoE block. block: it. whole: the transformer layer
            around it. router, experts: its parts (``experts`` is the block itself where there is no such part).
    """

    layer: int
    path: str
    block: nn.Module
    whole: nn.Module
    router: nn.Module
    experts: nn.Module


def _switch_dispatch(_block: Any, arguments: tuple[Any, ...]) -> Route:
    # Switch hands its experts a one-hot dispatch mask [N, 1, E]; a token over an expert's capacity has
    # an all-zero row and passes the layer by (Fedus et al., 2021, section 2.2).
    _, mask, probability = arguments
    mask = mask.flatten(0, -2)
    served = mask.any(-1, keepdim=True)
    ids = torch.where(served, mask.long().argmax(-1, keepdim=True), -1)
    return ids, torch.where(served, probability.reshape(-1, 1), 0)


def _logarithm(output: Any) -> Tensor:
    # The floor is below every float32 probability that is not zero.
    return output[0].clamp_min(1e-38).log()


def _llama4_scores(router: Any, output: Any) -> Route:
    # The scores beside the chosen are sigmoid(-inf) = 0; every expert runs, on inputs scaled by its score.
    scores, logits = output
    ids = logits.topk(router.top_k, -1).indices
    return ids, scores.gather(-1, ids)


def _jetmoe_groups(_router: Any, output: Any) -> Route:
    # Slots sorted by expert, and how many each expert has: undone, they are the ids.
    slots, _, weights, sizes, logits = output
    expert_of_slot = torch.arange(len(sizes), device=slots.device).repeat_interleave(
        torch.tensor(sizes, device=slots.device)
    )
    ids = torch.empty_like(slots).index_copy_(0, slots, expert_of_slot)
    by_token = torch.empty_like(weights).index_copy_(0, slots, weights)
    return ids.view(len(logits), -1), by_token.view(len(logits), -1)


def _zaya_skips(block: Any, arguments: tuple[Any, ...]) -> Route:
    # A skipped token is sent to expert 0 with weight 0; a softmax probability itself is never 0.
    _, ids, weights = arguments
    return torch.where(weights == 0, block.gate.num_experts, ids), weights


def _biased(name: str, **facts: Any) -> Family:
    """DeepSeek-V3's router (2024) and its many descendants: sigmoid scores, a bias for choosing only."""
    return Family(name, "sigmoid", bias=True, **facts)


_ROWS = (
    _biased("afmoe", shared=True, dense=True),
    Family("aria", shared=True, note="text part of a vision-language model"),
    _biased("axk1", groups=True, shared=True, dense=True),
    _biased("axk2", groups=True, shared=True, dense=True),
    _biased("bailing_hybrid", groups=True, shared=True, dense=True, note="linear and latent attention"),
    _biased("beam", groups=True, dense=True),
    Family("cohere2_moe", shared=True),
    Family("dbrx", note="the router returns its logits alone"),
    Family("deepseek_ocr2", groups=True, shared=True, dense=True, note="text part of a vision-language model"),
    Family("deepseek_v2", groups=True, shared=True, dense=True),
    _biased("deepseek_v3", groups=True, shared=True, dense=True, note="also Kimi-K2 and others of its shape"),
    _biased("deepseek_v32", groups=True, shared=True, dense=True),
    Family(
        "deepseek_v4",
        "sqrt-softplus",
        bias=True,
        shared=True,
        note="the first layers look their experts up by token id (hash routing); their logits only weigh them",
    ),
    Family(
        "diffusion_gemma",
        stacks={"encoder": r"^(?!.*\bdecoder\.)"},
        reader="encoder",
        read_logits=_logarithm,
        note="the causal encoder, whose weights its diffusion decoder shares; logits are log-probabilities; "
        "router and experts see different inputs",
    ),
    _biased("dots1", groups=True, shared=True, dense=True),
    _biased("dots3_note", groups=True, shared=True, dense=True, note="text part of a multimodal model", since="5.23"),
    Family("ernie4_5_moe", bias=True, shared=True, dense=True),
    Family("ernie4_5_vl_moe", bias=True, dense=True, note="text experts of a vision-language model"),
    _biased("exaone_moe", groups=True, shared=True, dense=True),
    Family("flex_olmo"),
    Family("flint", "sigmoid", shared=True, dense=True),
    Family(
        "gemma4",
        read_logits=_logarithm,
        note="logits are log-probabilities; router and experts see different inputs; a dense MLP runs beside them",
    ),
    _biased("glm4_moe", groups=True, shared=True, dense=True),
    _biased("glm4_moe_lite", groups=True, shared=True, dense=True),
    _biased("glm4v_moe", groups=True, shared=True, dense=True, note="text part of a vision-language model"),
    _biased("glm5_next", groups=True, shared=True, dense=True, note="text part of a vision-language model"),
    _biased("glm_moe_dsa", groups=True, shared=True, dense=True),
    Family("gpt_oss"),
    Family("granitemoe"),
    Family("granitemoe_swa", shared=True),
    Family("granitemoehybrid", shared=True, note="state-space and attention layers"),
    Family("granitemoeshared", shared=True),
    Family("hunyuan_v1_moe", shared=True),
    _biased("hy_v3", shared=True, dense=True),
    _biased("hy_v4", groups=True, shared=True, dense=True),
    _biased(
        "hy_v4_vl", groups=True, shared=True, dense=True, note="text part of a vision-language model", since="5.24"
    ),
    _biased("inkling", shared=True, note="shared experts are weighed by the same router"),
    _biased("inkling2", note="text part of a multimodal model", since="5.23"),
    _biased("inkling2_loop", note="its middle layers run several times; each run is recorded as a layer", since="5.24"),
    Family("jamba", dense=True, note="state-space and attention layers"),
    Family(
        "jetmoe",
        stacks={"mlp": r"\.mlp$", "attention": r"\.self_attention\.experts$"},
        read_logits=lambda output: output[4],
        read_executed=None,
        read_chosen=_jetmoe_groups,
        note="attention has experts too (Mixture of Attention heads): a stack of its own",
    ),
    _biased("kimi_linear", groups=True, shared=True, dense=True, note="linear and latent attention"),
    _biased("kolibri1", shared=True),
    _biased("laguna", shared=True, dense=True),
    _biased("lfm2_moe", dense=True, note="convolution and attention layers"),
    Family("lara_mini", shared=True, note="linear and softmax attention", since="5.24"),
    Family(
        "llama4",
        "sigmoid",
        shared=True,
        dense=True,
        read_logits=lambda output: output[1],
        read_executed=None,
        read_chosen=_llama4_scores,
        note="transformers computes every expert, on inputs scaled by its score",
    ),
    Family("longcat_flash", bias=True, zero=True, note="ids from E on are zero-computation experts"),
    Family("mellum"),
    _biased("mimo_v2_flash", groups=True, dense=True),
    Family("minimax", note="linear and softmax attention"),
    _biased("minimax_m2"),
    _biased("minimax_m3_vl", shared=True, dense=True, note="text part of a vision-language model"),
    Family("mistral4", groups=True, shared=True, dense=True),
    Family(
        "mistral_large4",
        groups=True,
        shared=True,
        dense=True,
        note="text part of a vision-language model",
        since="5.22",
    ),
    Family("mixtral"),
    _biased("muse_spark", note="experts see a projection of the router's input"),
    _biased("nemotron_h", groups=True, shared=True, dense=True, note="state-space, attention and MoE layers"),
    Family("olmoe"),
    Family("openai_privacy_filter", note="a bidirectional encoder for token classification"),
    Family("phimoe", "sparsemixer", note="two experts, each weighed against those close to it (SparseMixer, 2023)"),
    Family("qwen2_moe", shared=True, dense=True),
    Family("qwen3_5_moe", shared=True, note="linear and softmax attention"),
    Family("qwen3_moe", dense=True),
    Family("qwen3_next", shared=True, dense=True, note="linear and softmax attention"),
    Family("qwen3_omni_moe", dense=True, note="the thinker's text part of a multimodal model"),
    Family("qwen3_vl_moe", dense=True, note="text part of a vision-language model"),
    Family("qwen4_exp", shared=True, note="linear and indexed attention"),
    _biased("solar_open", groups=True, shared=True),
    _biased("step3p7", shared=True, dense=True, note="text part of a vision-language model"),
    Family(
        "switch_transformers",
        dense=True,
        stacks={"decoder": r"^decoder\.", "encoder": r"^encoder\."},
        is_encoder_decoder=True,
        read_logits=lambda output: output[2],
        read_executed=_switch_dispatch,
        note="a token over an expert's capacity has no expert and is recorded as -1",
    ),
    Family("unlimited_ocr", groups=True, shared=True, dense=True, note="text part of a vision-language model"),
    Family(
        "zaya",
        bias=True,
        zero=True,
        read_executed=_zaya_skips,
        note="id E is the skip expert, whose bias transformers 5.23 loses on loading and we restore; "
        "the router carries a state from layer to layer",
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}

# What transformers offers and we leave out, with the reason.
EXCLUDED: dict[str, str] = {
    "doge": "its retrieval of experts mixes tokens in a full forward pass, so there is no causal routing to record",
    "nllb_moe": "transformers 5.23 reads its router's mask as expert ids, so only experts 0 and 1 ever run",
    "vitpose_backbone": "its experts are picked by the data set's number; there is no router and no text",
}
_OTHER_NAMES = {"inkling_mm_model": "inkling", "step3p5": "step3p7", "nllb-moe": "nllb_moe"}


def family_of(model_type: str, text_type: str | None = None) -> Family:
    """The row of a ``config.model_type``; a text part (``..._text``) has its whole model's.

    What the installed transformers knows and no row is about is taken to route as most do; whether it does must be
    checked (:mod:`specmoe.sources.unlisted`).

    Args:
        model_type: of the model. text_type: of its text part, which tells how a model routes that has no row of
            its own, such as Mistral-3 around Mistral-4 or Kimi-K2.5 around DeepSeek-V3.

    Raises:
        SpecmoeError: it is left out, or neither we nor the installed transformers know it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = [name for each in (model_type, text_type) if each is not None for name in _names(each)]
    name = next((name for name in names if name in FAMILIES or name in EXCLUDED), None)
    if name in EXCLUDED:
        raise SpecmoeError(f"{model_type} models cannot be captured: {EXCLUDED[name]}")
    if name is not None:
        return FAMILIES[name]
    if model_type not in CONFIG_MAPPING_NAMES:
        raise unknown_name("model family", model_type, FAMILIES)
    return Family(model_type, "unknown", listed=False)


def not_certain(family: Family, reason: str) -> SpecmoeError:
    """The error for a model of a family without a row whose routes cannot be told for certain."""
    return SpecmoeError(
        f"{family.name} models are not known to specmoe (specmoe families lists those that are), and the common way "
        f"of capturing does not fit: {reason}"
    )


def _names(model_type: str) -> list[str]:
    stem = re.sub(r"_(text|thinker|talker)$", "", model_type)
    return [_OTHER_NAMES.get(model_type, model_type), model_type, stem]


def router_sites(model: nn.Module, family: Family, stack: str | None = None) -> list[RouterSite]:
    """The MoE layers of one stack of ``model``, in execution order.

    Raises:
        SpecmoeError: no such stack, or it has no MoE layer.
    """
    stack = stack or next(iter(family.stacks))
    if stack not in family.stacks:
        raise unknown_name("stack", stack, family.stacks)
    sites = []
    for path, block in model.named_modules():
        router = _child(block, "gate") or _child(block, "router")
        experts = _child(block, "experts") if family.read_executed is not None else block
        if router is None or experts is None or NOT_TEXT & set(path.split(".")):
            continue
        if re.search(family.stacks[stack], path):
            whole = model.get_submodule(_layer_path(path))
            sites.append(RouterSite(len(sites), path, block, whole, router, experts))
    if not sites:
        raise SpecmoeError(f"the {stack} of this {family.name} model has no MoE layer")
    return sites


def _child(block: nn.Module, name: str) -> nn.Module | None:
    child = getattr(block, name, None)
    return child if isinstance(child, nn.Module) else None


def _layer_path(path: str) -> str:
    """Path of the transformer layer that a block is part of: up to its number in the list of layers."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])
