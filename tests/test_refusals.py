"""Checkpoints that cannot be captured, and the one line that says why and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.sources.capture import load_model, recorded_routes, run_model
from specmoe.sources.families import FAMILIES, family_of
from specmoe.sources.refusals import other_shapes, refuse_without_experts
from test_capture import olmoe, saved, tokenizer  # noqa: F401
from tiny_models import TINY, tiny_config, tiny_model


@pytest.fixture(scope="module")
def qwen_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return saved(tiny_model("qwen3_moe", vocab_size=320), tokenizer, tmp_path_factory.mktemp("models") / "qwen")


def changed(
    model: Path, out: Path, config: dict[str, Any], change: Callable[[str, Tensor], Tensor | None] = lambda _, t: t
) -> Path:
    """A checkpoint with other fields in its configuration, and tensors changed or (None) left out."""
    shutil.copytree(model, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, **config}))
    tensors = {name: change(name, tensor) for name, tensor in load_file(out / "model.safetensors").items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def refusal(directory: Path) -> str:
    with pytest.raises(SpecmoeError) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- no experts --------------------------------------------------------------------------------------


def test_a_dense_model(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    directory = saved(transformers.LlamaForCausalLM(config), tokenizer, tmp_path / "llama")
    message = refusal(directory)
    assert f"{directory} (llama) is a dense model: it has no experts to route" in message
    assert "OLMoE" in message
    assert "specmoe families" in message
    assert run_verb(["collect", "--model", str(directory), "--out", str(tmp_path / "trace")]) == 2
    assert capsys.readouterr().err.strip().endswith(message)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3", "mistral3", "bert", "t5", "granite", "qwen3_vl"])
def test_dense_types(model_type: str) -> None:
    with pytest.raises(SpecmoeError, match="is a dense model"):
        refuse_without_experts("it", {"model_type": model_type})


@pytest.mark.parametrize("name", sorted(TINY))
def test_no_family_is_called_dense(name: str) -> None:
    refuse_without_experts("it", tiny_config(name).to_dict())
    refuse_without_experts("it", {"model_type": tiny_config(name).model_type})


def test_a_type_that_nobody_knows_is_not_called_dense() -> None:
    refuse_without_experts("it", {"model_type": "from the future"})


def test_a_dense_member_of_a_family_with_experts(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    model = tiny_model("qwen3_moe", vocab_size=320, mlp_only_layers=[0, 1, 2])
    assert "has no MoE layer" in refusal(saved(model, tokenizer, tmp_path / "model"))


# --- code of its own -----------------------------------------------------------------------------------


def test_code_of_a_checkpoint_is_never_run(qwen_dir: Path, tmp_path: Path) -> None:
    code = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}}
    directory = changed(qwen_dir, tmp_path / "own", {**code, "model_type": "own_moe"})
    for name in ("configuration_own.py", "modeling_own.py"):
        (directory / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    message = refusal(directory)
    assert "(own_moe) needs code of its own (auto_map in its config.json), and no code of a checkpoint" in message
    assert "specmoe families" in message
    assert not (tmp_path / "ran").exists()
    # What transformers knows itself needs none of the code that is published with it.
    assert load_model(changed(qwen_dir, tmp_path / "known", code)).family is FAMILIES["qwen3_moe"]


# --- pruned --------------------------------------------------------------------------------------------


def without(layer: int, experts: int) -> Callable[[str, Tensor], Tensor | None]:
    """Take the last experts out of one of the layers with 8, as published pruned checkpoints do."""

    def change(name: str, tensor: Tensor) -> Tensor | None:
        if f"layers.{layer}.mlp.gate." in name:
            return tensor[: 8 - experts]
        gone = any(f"layers.{layer}.mlp.experts.{8 - i}." in name for i in range(1, experts + 1))
        return None if gone else tensor

    return change


def test_a_pruned_layer(qwen_dir: Path, tmp_path: Path) -> None:
    message = refusal(changed(qwen_dir, tmp_path / "pruned", {}, without(1, 2)))
    assert "its layer 1 has 6 experts in the checkpoint, config.json says 8; " in message
    assert "import a trace of the engine" in message


def test_a_configuration_that_disagrees(qwen_dir: Path, tmp_path: Path) -> None:
    message = refusal(changed(qwen_dir, tmp_path / "six", {"num_local_experts": 6}))
    assert "its layer 0 has 8 experts in the checkpoint, config.json says 6, and layers 1, 2 differ too" in message


def test_a_number_of_experts_for_each_layer(qwen_dir: Path, tmp_path: Path) -> None:
    message = refusal(changed(qwen_dir, tmp_path / "list", {"num_local_experts": [8, 6, 8]}))
    assert "gives each layer a number of experts (num_local_experts 8, 6, 8)" in message


def test_weights_of_another_model(qwen_dir: Path, tmp_path: Path) -> None:
    message = refusal(changed(qwen_dir, tmp_path / "wide", {"hidden_size": 64}))
    assert "has shape [320, 32] in the checkpoint and [320, 64] by its config.json" in message
    assert "belong to different models" in message


def test_an_expert_without_one_of_its_matrices(qwen_dir: Path, tmp_path: Path) -> None:
    directory = changed(
        qwen_dir, tmp_path / "cut", {}, lambda name, t: None if "layers.1.mlp.experts.7.up_proj" in name else t
    )
    assert "experts lack some of their weights" in refusal(directory)


def test_which_mismatches_are_of_experts() -> None:
    experts = ("model.layers.4.mlp.experts.gate_up_proj", (6, 32, 16), (8, 32, 16))
    router = ("model.layers.2.mlp.gate.weight", (5, 32), (8, 32))
    assert "its layer 2 has 5 experts in the checkpoint, config.json says 8, and layers 4 differ too" in str(
        other_shapes("it", [experts, router])
    )
    embedding = ("model.embed_tokens.weight", (6, 32), (8, 32))
    assert "model.embed_tokens.weight has shape [6, 32]" in str(other_shapes("it", [experts, embedding]))
    wide = ("model.layers.2.mlp.gate.weight", (8, 16), (8, 32))
    assert "mlp.gate.weight has shape [8, 16]" in str(other_shapes("it", [wide]))
    assert other_shapes("it", []) is None


# --- modules that are passed by ----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["router", "experts"])
def test_a_block_that_does_not_call_its_parts(part: str) -> None:
    """As a kernel that takes a block's place does."""
    model, family = olmoe(), family_of("olmoe")
    block = model.model.layers[1].mlp
    router, experts = block.gate, block.experts

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        _, weights, ids = router.forward(flat) if part == "router" else router(flat)
        called = experts.forward if part == "experts" else experts
        return called(flat, ids, weights).view(hidden.shape)

    block.forward = forward
    with torch.inference_mode(), recorded_routes(model, family), pytest.raises(SpecmoeError) as caught:
        run_model(model, family, [[1, 2, 3]])
    assert f"MoE layer 1 (model.layers.1.mlp) never called its {part}, so its route is unknown" in str(caught.value)
    assert "kernels" in str(caught.value)
