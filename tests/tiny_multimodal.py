"""Tiny whole models: a family's text part with the vision and audio parts that it is published with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny_models import SIZES, model_class, randomised, tiny_config

# Sizes of parts that are not text, beside those that they share with it.
_PART_SIZES: dict[str, Any] = {
    **dict.fromkeys(("depth", "encoder_layers", "num_hidden_layers"), 1),
    **dict.fromkeys(("num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("image_size", "patch_size"), 8),
    **dict.fromkeys(("encoder_ffn_dim", "mlp_dim"), 48),
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size", "posemb_grid_size"), 16),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width", "pos_emb_time", "num_mel_bins", "n_mel_bins"), 8),
    **dict.fromkeys(
        (
            *("out_hidden_size", "text_hidden_size", "output_dim", "output_proj_dims", "adapter_out_dim"),
            *("projection_hidden_size", "projector_hidden_size", "projection_hidden_dim", "thinker_hidden_size"),
            *("projection_intermediate_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"),
            *("adapter_in_dim", "adapter_input_size", "downsample_hidden_size", "output_channels"),
        ),
        32,
    ),
    "max_source_positions": 16,
}


@dataclass(frozen=True)
class Whole:
    """A whole model.

    Attributes:
        config: ``config.model_type``. model: class that it is saved from. text: name of its text part in
            :data:`tiny_models.TINY`. changes: of its configuration and its parts', beside the sizes above.
        loaded: class that a checkpoint of it is loaded as, where that is another one.
    """

    config: str
    model: str
    text: str
    changes: dict[str, Any] = field(default_factory=dict)
    loaded: str = ""


_PIXTRAL = {"vision_config": {"model_type": "pixtral"}}
_DEEPSTACK = {"vision_config": {"deepstack_visual_indexes": [0]}}
_OCR: dict[str, Any] = {"vision_config": {"sam_config": {"global_attn_indexes": [0], "downsample_channels": [32, 32]}}}

_WHOLE: dict[str, Whole] = {
    "aria": Whole("aria", "AriaForConditionalGeneration", "aria", {"vision_config": {"model_type": "idefics3_vision"}}),
    "deepseek_ocr2": Whole("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", "deepseek_ocr2", _OCR),
    "diffusion_gemma": Whole(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        "diffusion_gemma",
        {"vision_config": {"model_type": "gemma4_vision"}},
    ),
    "dots3_note": Whole(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        "dots3_note",
        # Its vision part has experts of its own.
        {"vision_config": {"mlp_layer_types": ["sparse"], "num_experts_per_tok": 2, "router_scaling_factor": 1.0}},
        "Dots3NoteForCausalLM",
    ),
    "ernie4_5_vl_moe": Whole("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_vl_moe"),
    "gemma4": Whole("gemma4", "Gemma4ForConditionalGeneration", "gemma4"),
    "glm4v_moe": Whole("glm4v_moe", "Glm4vMoeForConditionalGeneration", "glm4v_moe"),
    "glm5_next": Whole("glm5_next", "Glm5NextForConditionalGeneration", "glm5_next"),
    "hy_v4_vl": Whole("hy_v4_vl", "HYV4VLForConditionalGeneration", "hy_v4_vl"),
    "inkling": Whole(
        "inkling_mm_model",
        "InklingForConditionalGeneration",
        "inkling",
        {"vision_config": {"num_hidden_layers": 3, "patch_size": 2}},  # fewer layers than factors of a patch need scipy
    ),
    "inkling2": Whole("inkling2", "Inkling2ForConditionalGeneration", "inkling2"),
    "inkling2_loop": Whole(
        "inkling2_loop",
        "Inkling2LoopForConditionalGeneration",
        "inkling2_loop",
        {"vision_config": {"model_type": "inkling2_vision"}},
    ),
    "kimi_k25": Whole("kimi_k25", "Kimi_K25ForConditionalGeneration", "deepseek_v3"),
    "llama4": Whole("llama4", "Llama4ForConditionalGeneration", "llama4", {}, "Llama4ForCausalLM"),
    "minimax_m3_vl": Whole("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl"),
    "mistral4": Whole("mistral3", "Mistral3ForConditionalGeneration", "mistral4", _PIXTRAL),
    "mistral_large4": Whole("mistral_large4", "MistralLarge4ForConditionalGeneration", "mistral_large4", _PIXTRAL),
    "muse_spark": Whole(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        "muse_spark",
        {"audio_config": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_hidden_layers": 4}},
    ),
    "qwen3_5_moe": Whole(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", {}, "Qwen3_5MoeForCausalLM"
    ),
    "qwen3_omni_moe": Whole(
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        "qwen3_omni_moe",
        {
            "code2wav_config": {"decoder_dim": 64},
            "thinker_config": {**_DEEPSTACK, "vision_start_token_id": 151652},
            "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 16}},
        },
        "Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "qwen3_vl_moe": Whole("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", _DEEPSTACK),
    "qwen4_exp": Whole("qwen4_exp", "Qwen4ExpForConditionalGeneration", "qwen4_exp", {}, "Qwen4ExpForCausalLM"),
    "step3p7": Whole("step3p7", "Step3p7ForConditionalGeneration", "step3p7"),
    "unlimited_ocr": Whole("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", "unlimited_ocr", _OCR),
}


# Those that the installed transformers has.
WHOLE = {name: whole for name, whole in _WHOLE.items() if whole.config in CONFIG_MAPPING}


def whole_config(name: str, **text: Any) -> Any:
    """The configuration of a tiny whole model; ``text`` changes that of its text part."""
    whole = WHOLE[name]
    kind = CONFIG_MAPPING[whole.config]
    return kind(**_sizes(kind, tiny_config(whole.text, **text).to_dict(), whole.changes))


def whole_model(name: str, seed: int = 0, **text: Any) -> Any:
    """A tiny whole model in evaluation mode, see :func:`tiny_models.randomised`."""
    config = whole_config(name, **text)
    return randomised(model_class(WHOLE[name].model, WHOLE[name].config), config, seed)


def _sizes(kind: Any, text: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a configuration: sizes that it knows, and those of its parts."""
    known = {parameter for base in kind.__mro__ for parameter in getattr(base, "__annotations__", {})}
    known |= set(getattr(kind, "attribute_map", {}))
    sizes = {key: value for key, value in {**SIZES, **_PART_SIZES}.items() if key in known}
    for part, spec in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        if part == "text_config" and "Talker" not in kind.__name__:
            sizes[part] = text
            continue
        own = dict(changes.get(part, {}))
        model_type = own.pop("model_type", None)
        of_part = CONFIG_MAPPING[model_type] if model_type else getattr(spec, "config_class", spec)
        assert of_part is not AutoConfig, f"{kind.__name__}.{part} needs a model_type"
        sizes[part] = {**_sizes(of_part, text, own), **({"model_type": model_type} if model_type else {})}
    return {**sizes, **{key: value for key, value in changes.items() if key not in sizes or "config" not in key}}
