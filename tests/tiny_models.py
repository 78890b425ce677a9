"""A tiny randomly initialised model of every Mixture-of-Experts family that transformers offers."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
# What a configuration calls its sizes; each family takes the names that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        ),
        16,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 3),
    **dict.fromkeys(("n_group", "num_expert_group"), 4),
    "topk_group": 2,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 256),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "sliding_window"), 16),
    **{"index_topk": 8, "n_groups": 1, "mamba_expand": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_LARGEST = 8_000_000


@dataclass(frozen=True)
class Tiny:
    """Which classes to build a family from, and what its configuration needs beside :data:`SIZES`."""

    config: str
    model: str
    sizes: dict[str, Any] = field(default_factory=dict)


_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many key as query heads
_GROUPED = {"topk_method": "group_limited_greedy"}
_KIMI = {"num_hidden_layers": 5, "linear_num_heads": 4, "linear_head_dim": 8}  # the reference code is cubic
_HYBRID = {"num_hidden_layers": 4}  # every fourth layer has full attention
_WINDOWED = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    **{"d_rel": 4, "rel_extent": 32},
}
# Layers 1 and 2 run twice: 0, 1, 2, 1, 2, 3.
_LOOPED = {
    "num_hidden_layers": 4,
    "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid_sliding"],
    **{"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2, "loop_gate_rank": 8},
    "n_layers_per_attn_res_block": 1,
}

_TINY: dict[str, Tiny] = {
    "afmoe": Tiny("afmoe", "AfmoeForCausalLM"),
    "aria": Tiny("aria_text", "AriaTextForCausalLM"),
    "axk1": Tiny("axk1", "AXK1ForCausalLM", _LATENT),
    "axk2": Tiny("axk2", "AXK2ForCausalLM", _LATENT),
    "bailing_hybrid": Tiny("bailing_hybrid", "BailingHybridForCausalLM", {**_LATENT, **_HYBRID, "layer_group_size": 2}),
    "beam": Tiny("beam", "BeamForCausalLM", _HYBRID),
    "cohere2_moe": Tiny("cohere2_moe", "Cohere2MoeForCausalLM"),
    "dbrx": Tiny(
        "dbrx",
        "DbrxForCausalLM",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 3},
        },
    ),
    "deepseek_ocr2": Tiny(
        "deepseek_ocr2_text", "DeepseekOcr2TextModel", {"mlp_layer_types": ["dense", "sparse", "sparse"], **_GROUPED}
    ),
    "deepseek_v2": Tiny("deepseek_v2", "DeepseekV2ForCausalLM", {**_LATENT, **_GROUPED}),
    "deepseek_v3": Tiny("deepseek_v3", "DeepseekV3ForCausalLM", _LATENT),
    "deepseek_v32": Tiny("deepseek_v32", "DeepseekV32ForCausalLM", _LATENT),
    "deepseek_v4": Tiny("deepseek_v4", "DeepseekV4ForCausalLM", {"mlp_layer_types": ["hash_moe", "moe", "moe"]}),
    "diffusion_gemma": Tiny("diffusion_gemma_text", "DiffusionGemmaEncoderTextModel"),
    "dots1": Tiny("dots1", "Dots1ForCausalLM"),
    "dots3_note": Tiny("dots3_note_text", "Dots3NoteForCausalLM", {**_LATENT, "use_sliding_window": False}),
    "ernie4_5_moe": Tiny("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Tiny(
        "ernie4_5_vl_moe_text",
        "Ernie4_5_VLMoeTextModel",
        {
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
    ),
    "exaone_moe": Tiny("exaone_moe", "ExaoneMoeForCausalLM"),
    "flex_olmo": Tiny("flex_olmo", "FlexOlmoForCausalLM"),
    "flint": Tiny("flint", "FlintForCausalLM"),
    "gemma4": Tiny("gemma4_text", "Gemma4ForCausalLM", {"enable_moe_block": True}),
    "glm4_moe": Tiny("glm4_moe", "Glm4MoeForCausalLM"),
    "glm4_moe_lite": Tiny("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _LATENT),
    "glm4v_moe": Tiny(
        "glm4v_moe_text",
        "Glm4vMoeTextModel",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 1.0,
            }
        },
    ),
    "glm5_next": Tiny(
        "glm5_next_text",
        "Glm5NextTextModel",
        {
            **_LATENT,
            "num_hidden_layers": 4,
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            **{"linear_head_dim": 8, "linear_num_heads": 4},
        },
    ),
    "glm_moe_dsa": Tiny("glm_moe_dsa", "GlmMoeDsaForCausalLM", _LATENT),
    "gpt_oss": Tiny("gpt_oss", "GptOssForCausalLM"),
    "granitemoe": Tiny("granitemoe", "GraniteMoeForCausalLM"),
    "granitemoe_swa": Tiny("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Tiny(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention", "mamba"]}
    ),
    "granitemoeshared": Tiny("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Tiny("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    "hy_v3": Tiny("hy_v3", "HYV3ForCausalLM"),
    "hy_v4": Tiny("hy_v4", "HYV4ForCausalLM"),
    "hy_v4_vl": Tiny(
        "hy_v4_vl_text",
        "HYV4VLTextModel",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    ),
    "inkling": Tiny("inkling_text", "InklingForCausalLM"),
    "inkling2": Tiny("inkling2_text", "Inkling2ForCausalLM", _WINDOWED),
    "inkling2_loop": Tiny("inkling2_loop_text", "Inkling2LoopForCausalLM", {**_WINDOWED, **_LOOPED}),
    "jamba": Tiny("jamba", "JambaForCausalLM", {**_HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "jetmoe": Tiny("jetmoe", "JetMoeForCausalLM"),
    "kimi_linear": Tiny("kimi_linear", "KimiLinearForCausalLM", {**_LATENT, **_KIMI}),
    "kolibri1": Tiny("kolibri1", "Kolibri1ForCausalLM"),
    "laguna": Tiny("laguna", "LagunaForCausalLM"),
    "lfm2_moe": Tiny("lfm2_moe", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "lara_mini": Tiny("lara_mini", "LaraMiniForCausalLM", _HYBRID),
    "llama4": Tiny("llama4_text", "Llama4ForCausalLM"),
    "longcat_flash": Tiny("longcat_flash", "LongcatFlashForCausalLM", {**_LATENT, "zero_expert_num": 4}),
    "mellum": Tiny("mellum", "MellumForCausalLM"),
    "mimo_v2_flash": Tiny("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    "minimax": Tiny("minimax", "MiniMaxForCausalLM"),
    "minimax_m2": Tiny("minimax_m2", "MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Tiny("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM"),
    "mistral4": Tiny("mistral4", "Mistral4ForCausalLM", _LATENT),
    "mistral_large4": Tiny("mistral_large4_text", "MistralLarge4TextModel", _LATENT),
    "mixtral": Tiny("mixtral", "MixtralForCausalLM"),
    "muse_spark": Tiny("muse_spark_text", "MuseSparkTextModel", {"moe_hidden_size": 24}),
    "nemotron_h": Tiny("nemotron_h", "NemotronHForCausalLM"),
    "olmoe": Tiny("olmoe", "OlmoeForCausalLM"),
    "openai_privacy_filter": Tiny("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": Tiny("phimoe", "PhimoeForCausalLM"),
    "qwen2_moe": Tiny("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Tiny("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _HYBRID),
    "qwen3_moe": Tiny("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3_next": Tiny("qwen3_next", "Qwen3NextForCausalLM", _HYBRID),
    "qwen3_omni_moe": Tiny(
        "qwen3_omni_moe_text",
        "Qwen3OmniMoeThinkerTextModel",
        {"sliding_window": None},  # the cache would keep a window, the model attends to all
    ),
    "qwen3_vl_moe": Tiny("qwen3_vl_moe_text", "Qwen3VLMoeTextModel"),
    "qwen4_exp": Tiny(
        "qwen4_exp_text",
        "Qwen4ExpForCausalLM",
        {
            **_HYBRID,
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
            **{"indexer_budget": 8, "indexer_compress_ratio": 4},
        },
    ),
    "solar_open": Tiny("solar_open", "SolarOpenForCausalLM"),
    "step3p7": Tiny("step3p5", "Step3p7TextModel", {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "unlimited_ocr": Tiny("unlimited_ocr_text", "UnlimitedOcrTextModel", _GROUPED),
    "zaya": Tiny("zaya", "ZayaForCausalLM", {"num_experts_per_tok": 1}),
}


# Those that the installed transformers has.
TINY = {name: tiny for name, tiny in _TINY.items() if tiny.config in CONFIG_MAPPING}


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a family's tiny model."""
    tiny = TINY[name]
    kind = CONFIG_MAPPING[tiny.config]
    known = {parameter for base in kind.__mro__ for parameter in getattr(base, "__annotations__", {})}
    known |= set(getattr(kind, "attribute_map", {}))
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return kind(**{**sizes, **tiny.sizes, **changes})


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A family's tiny model in evaluation mode, with random weights, routers and correction biases."""
    return randomised(model_class(TINY[name].model, name), tiny_config(name, **changes), seed)


def randomised(kind: Any, config: Any, seed: int = 0) -> Any:
    """A model of a class in evaluation mode, with random weights, routers and correction biases; refused if large."""
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in kind(config).parameters())
    assert numbers < _LARGEST, f"{kind.__name__} is no tiny model: {numbers:,} parameters"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for path, tensor in (*model.named_buffers(), *model.named_parameters()):
            # Biases start at zero and routers near it, where a mistake with them would not show. Group limits set
            # the scores of other groups to 0, which only works with biases that are not negative.
            if re.search(r"correction_bias$|expert_bias$", path):
                tensor.data = torch.rand(tensor.shape).to(tensor.dtype)
            elif re.search(r"\.(gate|router)\.", path) and tensor.ndim == 2 and tensor.is_floating_point():
                tensor.data = torch.randn(tensor.shape).to(tensor.dtype) * 0.5
            elif path.endswith("balancing_biases"):
                tensor.data[-1] = 0.0  # the skip expert
            elif path.endswith("tid2eid"):
                tensor.data = torch.rand(len(tensor), 8).argsort(-1)[:, : tensor.shape[1]]
    return model


def model_class(name: str, family: str) -> Any:
    """A class of transformers, exported or found in its family's modelling code."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def offered_families() -> set[str]:
    """Folders of transformers whose modelling code has experts or records router logits."""
    folder = Path(transformers.__file__).parent / "models"
    return {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if re.search(r'class \w*(Experts|MoE|Moe)\(|"router_logits": ', path.read_text(encoding="utf-8"))
    }
