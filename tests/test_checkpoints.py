"""From a checkpoint on disk to a trace: every family, as its text part and as the whole model that is published."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.sources import capture
from specmoe.sources.capture import collect, load_model, recorded_routes, run_model
from specmoe.sources.families import FAMILIES, NOT_TEXT, Family, family_of, router_sites
from specmoe.sources.generation import Generation, join, run_generation
from specmoe.sources.loading import LoadedModel, _auto_class, untrained_like
from specmoe.sources.model_shape import topology_of_model
from specmoe.sources.recording import ForwardRoutes, LayerRoute
from specmoe.trace import Phase, RoutingRecord, Trace
from test_capture import by_name, documents, saved, tokenizer  # noqa: F401
from test_families import Calls, assert_replayed
from tiny_models import TINY, tiny_config, tiny_model
from tiny_multimodal import WHOLE, whole_model

TEXT = documents(6)[::2]
TOKENS = 320
# Published as a part of a whole model only; transformers loads no checkpoint of such a part alone.
ONLY_WHOLE = {
    "deepseek_ocr2",
    "diffusion_gemma",
    "ernie4_5_vl_moe",
    "qwen3_omni_moe",
    "step3p7",
    "unlimited_ocr",
}
# Routers that normalise their input (Gemma), or are small networks with a memory (Zaya).
NOT_LINEAR = {"gemma4", "diffusion_gemma", "zaya"}
ZERO_EXPERTS = {"longcat_flash": 4, "zaya": 1}
TOP_K = {"phimoe": 2, "zaya": 1}
LOOPED = {"inkling2_loop": (0, 1, 2, 1, 2, 3)}


@pytest.fixture(autouse=True)
def collected(monkeypatch: pytest.MonkeyPatch) -> list[LoadedModel]:
    """The models that ``collect`` loads; how long their layers take is measured by two steps here, not by fifty."""
    loads: list[LoadedModel] = []

    def remembered(*arguments: Any, **named: Any) -> LoadedModel:
        loads.append(load_model(*arguments, **named))
        return loads[-1]

    monkeypatch.setattr(capture, "load_model", remembered)
    monkeypatch.setattr(capture, "measure_layer_us", functools.partial(capture.measure_layer_us, steps=2))
    return loads


def sizes(name: str) -> dict[str, int]:
    """A vocabulary for the tokenizer; and where keys are picked by an index, enough heads that scores do not tie.

    An index sums a ReLU over its heads. With two of them, keys tie at zero, and which is picked depends on padding.
    """
    config = tiny_config(name)
    names = ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")
    wanted = {**dict.fromkeys(names, TOKENS), "index_n_heads": 16}
    return {key: value for key, value in wanted.items() if hasattr(config, key)}


def forward_of(model: Any, family: Family, ids: Tensor) -> ForwardRoutes:
    """What a model in memory does with one document."""
    with torch.inference_mode(), recorded_routes(model, family) as recorder:
        run_model(model, family, [ids.tolist()])
    return recorder.take()[0]


def routes(model: Any, family: Family, ids: Tensor) -> list[LayerRoute]:
    """The same, layer by layer."""
    return forward_of(model, family, ids).layers


def assert_captured(records: dict[str, RoutingRecord], model: Any, family: Family) -> None:
    """The records hold what the model in memory does with the same token ids, one document at a time."""
    assert len(records) == len(TEXT)
    for record in records.values():
        layers = routes(model, family, record.token_ids)
        assert record.router_logits is not None
        assert record.gate_weights is not None
        assert record.hidden is not None
        assert torch.equal(record.expert_ids.long(), torch.stack([layer.ids for layer in layers], 1))
        kept = {"weights": record.gate_weights, "logits": record.router_logits, "hidden": record.hidden}
        for name, tensor in kept.items():
            seen = torch.stack([getattr(layer, name) for layer in layers], 1).float()
            torch.testing.assert_close(tensor, seen, rtol=1e-4, atol=1e-4)


def assert_routers_route_so(model: Any, family: Family, ids: Tensor) -> None:
    """The routers of a live model, called with what was recorded as their input, give the recorded routes."""
    calls = Calls(model, family)
    with torch.inference_mode():
        assert_replayed(family, calls, forward_of(model, family, ids))


def assert_routers_give_logits(trace: Trace) -> None:
    routers = trace.routers()
    assert routers is not None
    weight, bias = routers
    record = trace.read(0)
    assert record.hidden is not None
    assert record.router_logits is not None
    logits = torch.einsum("tld,led->tle", record.hidden, weight)
    torch.testing.assert_close(logits + bias, record.router_logits, rtol=1e-4, atol=1e-4)


def test_which_text_parts_are_loaded_alone() -> None:
    alone = set()
    for name in TINY:
        try:
            _auto_class(tiny_config(name))
        except SpecmoeError as error:
            assert "has no model class" in str(error)
        else:
            alone.add(name)
    assert set(TINY) - alone == ONLY_WHOLE
    assert {whole.text for whole in WHOLE.values()} >= ONLY_WHOLE


@pytest.mark.parametrize("name", sorted(set(TINY) - ONLY_WHOLE))
def test_a_trace_from_a_checkpoint_is_that_of_the_model(name: str, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    model, family = tiny_model(name, **sizes(name)), FAMILIES[name]
    directory = saved(model, tokenizer, tmp_path / "model")
    trace = Trace.open(collect(directory, TEXT, tmp_path / "trace", hidden_dtype="float32"))
    order = LOOPED.get(name, tuple(range(len(router_sites(model, family)))))
    assert trace.topology.layers == len(order)
    assert trace.manifest.source.settings.get("layer_order") == (list(order) if name in LOOPED else None)
    assert trace.topology.experts == 8
    assert trace.topology.top_k == TOP_K.get(name, 3)
    assert trace.topology.zero_experts == ZERO_EXPERTS.get(name, 0)
    assert_captured(by_name(tmp_path / "trace"), model, family)
    assert (tmp_path / "trace" / "routers.safetensors").exists() == (name not in NOT_LINEAR)
    if name not in NOT_LINEAR:
        assert_routers_give_logits(trace)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_trace_from_a_whole_model_is_that_of_its_text(
    name: str,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    collected: list[LoadedModel],
) -> None:
    whole = WHOLE[name]
    model, family = whole_model(name, **sizes(whole.text)), FAMILIES[whole.text]
    directory = saved(model, tokenizer, tmp_path / "model")
    records = by_name(collect(directory, TEXT, tmp_path / "trace", hidden_dtype="float32"))
    (loaded,) = collected
    assert type(loaded.model).__name__ == (whole.loaded or whole.model)
    assert loaded.family is family
    # The whole of Qwen3-Omni has no forward pass; its thinker has.
    # In transformers 5.24 the whole of Llama-4 fails after its text part has run: it asks that for image outputs.
    reading = model.language_model if name == "llama4" else getattr(model, "thinker", model)
    sites = router_sites(loaded.model, family)
    assert len(sites) == len(router_sites(tiny_model(whole.text), family))
    assert not [site.path for site in sites if NOT_TEXT & set(site.path.split("."))]
    assert_captured(records, reading, family)
    assert_routers_route_so(loaded.model, family, records["doc4"].token_ids)
    assert (tmp_path / "trace" / "routers.safetensors").exists() == (whole.text not in NOT_LINEAR)


WRITING = [name for name in ("qwen3_omni_moe", "gemma4", "mistral4", "ernie4_5_vl_moe", "dots3_note") if name in WHOLE]


@pytest.mark.parametrize("name", WRITING)
def test_a_whole_model_writes_as_it_reads(
    name: str,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    collected: list[LoadedModel],
) -> None:
    model = whole_model(name, **sizes(WHOLE[name].text))
    for part in (model, getattr(model, "thinker", model)):
        part.generation_config.eos_token_id = None
    directory = saved(model, tokenizer, tmp_path / "model")
    records = by_name(collect(directory, TEXT, tmp_path / "trace", generation=Generation(4)))
    (loaded,) = collected
    for record in records.values():
        assert record.phase.tolist()[-5:] == [Phase.PREFILL] + 4 * [Phase.DECODE]
        layers = routes(loaded.model, loaded.family, record.token_ids)
        assert torch.equal(record.expert_ids.long(), torch.stack([layer.ids for layer in layers], 1))


def test_a_whole_that_has_no_row_is_known_by_its_text() -> None:
    assert family_of("kimi_k25", "deepseek_v3") is FAMILIES["deepseek_v3"]
    assert family_of("mistral3", "mistral4") is FAMILIES["mistral4"]
    assert family_of("qwen3_vl_moe", "mixtral") is FAMILIES["qwen3_vl_moe"]
    assert not family_of("mistral3", "ministral").listed
    with pytest.raises(SpecmoeError, match="unknown model family 'mistral33'"):
        family_of("mistral33", "ministral")


def test_the_bias_of_a_skip_expert_is_loaded(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    """transformers 5.23 writes -1 over it after loading."""
    model = tiny_model("zaya", **sizes("zaya"))
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[:] = torch.arange(9) / 8
    loaded = load_model(saved(model, tokenizer, tmp_path / "model"))
    for site in router_sites(loaded.model, loaded.family):
        assert torch.equal(site.router.get_buffer("balancing_biases"), torch.arange(9) / 8)


# --- half precision --------------------------------------------------------------------------------


HALF = [(name, dtype) for name in ("mixtral", "deepseek_v3", "gpt_oss") for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_in_half_precision_the_kept_input_gives_the_kept_route(
    name: str,
    dtype: str,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    collected: list[LoadedModel],
) -> None:
    directory = saved(tiny_model(name, **sizes(name)), tokenizer, tmp_path / "model")
    # Alone, because a product of as many rows is rounded in the same way.
    out = collect(directory, TEXT, tmp_path / "trace", dtype=dtype, hidden_dtype=dtype, batch_tokens=1)
    (loaded,) = collected
    assert Trace.open(out).manifest.source.settings["dtype"] == dtype
    for record in by_name(out).values():
        assert record.hidden is not None
        assert record.hidden.dtype == loaded.model.dtype
        for site in router_sites(loaded.model, loaded.family):
            with torch.inference_mode():
                logits, _, ids = site.router(record.hidden[:, site.layer])
            assert record.router_logits is not None
            assert torch.equal(logits.float().flatten(0, -2), record.router_logits[:, site.layer])
            assert torch.equal(ids.flatten(0, -2), record.expert_ids[:, site.layer].long())


@pytest.mark.parametrize(("name", "dtype"), [(name, "float32") for name, _ in HALF[::2]] + HALF)
def test_padding_on_either_side_changes_no_more_than_rounding(
    name: str,
    dtype: str,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    loaded = load_model(saved(tiny_model(name, **sizes(name)), tokenizer, tmp_path / "model"), dtype=dtype)
    loaded.model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, TOKENS, (length,), generator=generator).tolist() for length in (23, 5, 14, 1)]
    alone = [routes(loaded.model, loaded.family, torch.tensor(prompt)) for prompt in prompts]
    with torch.inference_mode(), recorded_routes(loaded.model, loaded.family) as recorder:
        run_model(loaded.model, loaded.family, prompts)
        right = join(recorder.take(), len(prompts))
        # Prompts that are to be continued are padded on the left.
        written = run_generation(loaded.model, loaded.family, prompts, Generation(1), 0)
        left = join(recorder.take()[:1], len(prompts), [0] * len(written))
    for together in (right, left):
        assert together.token_ids.tolist() == [token for prompt in prompts for token in prompt]
        for layer, routed in enumerate(together.layers):
            ids = torch.cat([each[layer].ids for each in alone]).sort(-1).values
            same = (routed.ids.sort(-1).values == ids).all(-1).float().mean()
            assert float(same) >= (1.0 if dtype == "float32" else 0.9)
            logits = torch.cat([each[layer].logits for each in alone]).float()
            typical = (routed.logits.float() - logits).abs().median()
            assert float(typical) <= 8 * torch.finfo(loaded.model.dtype).eps * float(logits.abs().max())


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma4"])
def test_an_untrained_control_in_half_precision_keeps_its_buffers(
    name: str,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    directory = saved(tiny_model(name, **sizes(name)), tokenizer, tmp_path / "model")
    control, trained = untrained_like(directory, dtype="bfloat16"), load_model(directory, dtype="bfloat16")
    assert control.settings["dtype"] == "bfloat16"
    dtypes = {path: tensor.dtype for path, tensor in trained.model.named_parameters()}
    assert {path: tensor.dtype for path, tensor in control.model.named_parameters()} == dtypes
    frequencies = {path: t for path, t in trained.model.named_buffers() if path.endswith("inv_freq")}
    assert frequencies
    for path, tensor in frequencies.items():
        assert torch.equal(control.model.get_buffer(path), tensor)


# --- quantised checkpoints -------------------------------------------------------------------------


def rewritten(
    directory: Path, quantisation: dict[str, Any], change: Callable[[str, Tensor], dict[str, Tensor]]
) -> Path:
    """A checkpoint whose tensors are changed one by one, and whose configuration says that it is quantised."""
    path, config = directory / "model.safetensors", json.loads((directory / "config.json").read_text())
    tensors = {key: value for name, tensor in load_file(path).items() for key, value in change(name, tensor).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return directory


def in_float8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Projections in float8 with one scale, as DeepSeek publishes them by blocks of 128 × 128."""
    if "proj" not in name:
        return {name: tensor}
    scale = tensor.abs().amax() / 448
    return {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}


def in_mxfp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Experts in blocks of 32 four-bit numbers with a scale, as GPT-OSS is published."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    experts, width, outputs = tensor.shape
    blocks = torch.randint(0, 256, (experts, outputs, width // 32, 16), generator=torch.Generator().manual_seed(0))
    scales = torch.full((experts, outputs, width // 32), 124, dtype=torch.uint8)
    return {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": scales}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4"}
# Bytes of an expert: 3 · 32 · 16 of one byte; 3 · 32 · 32 / 2 and a scale for each 32, and biases of 4 · 96.
QUANTISED = [("qwen3_moe", FP8, in_float8, 3 * 32 * 16), ("gpt_oss", MXFP4, in_mxfp4, 3 * 32 * 17 + 4 * 96)]


def quantised(name: str, method: dict[str, Any], change: Any, directory: Path, tokenizer: Any) -> Path:  # noqa: F811
    changes = {"intermediate_size": 32} if name == "gpt_oss" else {}
    return rewritten(saved(tiny_model(name, **sizes(name), **changes), tokenizer, directory), method, change)


@pytest.mark.parametrize(("name", "method", "change", "expert_bytes"), QUANTISED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_checkpoint(
    name: str,
    method: dict[str, Any],
    change: Any,
    expert_bytes: int,
    dtype: str,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    collected: list[LoadedModel],
) -> None:
    if method is not MXFP4:
        pytest.importorskip("accelerate")
    directory = quantised(name, method, change, tmp_path / "model", tokenizer)
    records = by_name(collect(directory, TEXT, tmp_path / "trace", dtype=dtype, hidden_dtype=dtype, batch_tokens=1))
    (loaded,) = collected
    settings = Trace.open(tmp_path / "trace").manifest.source.settings
    assert (settings["quantization"], settings["dequantized"], settings["dtype"]) == (
        method["quant_method"],
        True,
        dtype,
    )
    assert loaded.topology.bytes_per_expert == expert_bytes
    for record in records.values():
        layers = routes(loaded.model, loaded.family, record.token_ids)
        assert torch.equal(record.expert_ids.long(), torch.stack([layer.ids for layer in layers], 1))
    assert_routers_route_so(loaded.model, loaded.family, records["doc4"].token_ids)


def test_mxfp4_runs_the_modules_that_are_watched_whatever_kernels_there_are(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine with a GPU and the package kernels, transformers would put a block of its own in their place."""
    from transformers.quantizers import quantizer_mxfp4

    for name in ("is_kernels_available", "is_triton_available", "is_accelerate_available"):
        monkeypatch.setattr(quantizer_mxfp4, name, lambda *_: True)
    monkeypatch.setattr(quantizer_mxfp4, "get_current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    directory = quantised("gpt_oss", MXFP4, in_mxfp4, tmp_path / "model", tokenizer)
    loaded = load_model(directory)
    assert (loaded.settings["quantization"], loaded.settings["dequantized"]) == ("mxfp4", True)
    stored = load_file(directory / "model.safetensors")
    for site in router_sites(loaded.model, loaded.family):
        assert type(site.block).__name__ == "GptOssMLP"
        for name in ("gate_up_proj", "down_proj"):
            path = f"{site.path}.experts.{name}"
            expected = decoded(stored[f"{path}_blocks"], stored[f"{path}_scales"])
            assert torch.equal(getattr(site.experts, name), expected)
    record = routes(loaded.model, loaded.family, torch.arange(5))
    assert [layer.ids.shape for layer in record] == [(5, 3)] * 3


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, out, blocks, 16] bytes of two E2M1 numbers each, low half first, and their powers of two, as [E, in, out]."""
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor(positive + [-value for value in positive])
    numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
    return (numbers * 2.0 ** (scales[..., None].float() - 127)).flatten(-2).transpose(1, 2)


@pytest.mark.skipif(
    find_spec("accelerate") is not None, reason="with accelerate the checkpoint loads, which another test holds"
)
def test_a_quantised_checkpoint_without_accelerate_says_what_to_install(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    directory = quantised("qwen3_moe", FP8, in_float8, tmp_path / "model", tokenizer)
    with pytest.raises(SpecmoeError, match=r"cannot load .*accelerate") as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)


def test_the_bytes_of_an_expert_are_those_of_the_checkpoint(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    model = tiny_model("gpt_oss", **sizes("gpt_oss"), intermediate_size=32)
    site = router_sites(model, FAMILIES["gpt_oss"])[0]
    numbers = 8 * (3 * 32 * 32 + 96)
    whole = saved(model, tokenizer, tmp_path / "whole")
    assert topology_of_model(model, FAMILIES["gpt_oss"], "decoder", whole).bytes_per_expert == 4 * numbers // 8
    assert sum(parameter.numel() for parameter in site.experts.parameters()) == numbers
    packed = rewritten(whole, MXFP4, in_mxfp4)
    assert topology_of_model(model, FAMILIES["gpt_oss"], "decoder", packed).bytes_per_expert == QUANTISED[1][3]


def test_layers_that_are_stored_otherwise_have_a_size_of_their_own(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    """Mixed quantisation; twelve layers, so that the tenth comes before the second in the order of names."""
    model = tiny_model("qwen3_moe", **sizes("qwen3_moe"), num_hidden_layers=12)

    def some_in_float8(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return in_float8(name, tensor) if ".layers.2." in f".{name}" or ".layers.10." in f".{name}" else {name: tensor}

    mixed = rewritten(saved(model, tokenizer, tmp_path / "model"), FP8, some_in_float8)
    topology = topology_of_model(model, FAMILIES["qwen3_moe"], "decoder", mixed)
    whole = 4 * 3 * 32 * 16
    expected = tuple(whole // 4 if layer in {2, 10} else whole for layer in range(12))
    assert topology.bytes_per_expert_by_layer == expected
    assert topology.bytes_per_expert is None


@pytest.mark.parametrize(
    ("name", "expected"), [("llama4", 3 * 32 * 48), ("jetmoe", 3 * 32 * 48), ("longcat_flash", 3 * 32 * 16)]
)
def test_only_what_is_an_experts_own_counts_as_its_size(name: str, expected: int) -> None:
    """Not a shared expert, a router, or a stack's rows for zero experts."""
    family = FAMILIES[name]
    assert topology_of_model(tiny_model(name), family, next(iter(family.stacks)), None).bytes_per_expert == 4 * expected
