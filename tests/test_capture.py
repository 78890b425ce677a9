"""Capturing from live models: the route that was really taken, and a model that does not notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.sources import bundled
from specmoe.sources.capture import (
    CaptureProgress,
    collect,
    load_model,
    measure_layer_us,
    recorded_routes,
    run_model,
    untrained_like,
)
from specmoe.sources.corpus import Document
from specmoe.sources.families import family_of, router_sites
from specmoe.sources.pretraining import train_tokenizer
from specmoe.trace import RoutingRecord, Trace

VOCABULARY = 300
WORDS = [
    "the",
    "router",
    "sends",
    "every",
    "token",
    "to",
    "a",
    "few",
    "of",
    "its",
    "experts",
    "and",
    "the",
    "rest",
    "stay",
    "asleep",
    "def",
    "class",
    "return",
    "None",
]


def documents(count: int = 12) -> list[Document]:
    texts = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(3 + i * 3)) for i in range(count)]
    return [Document(f"doc{i}", f"domain{i % 3}", text) for i, text in enumerate(texts)]


def olmoe(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**config)).eval()


def switch(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 16,
        "num_heads": 2,
        "d_ff": 16,
        "num_layers": 2,
        "num_decoder_layers": 4,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 2,
        "num_experts": 4,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
        "initializer_factor": 3.0,
        "pad_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**config)
    ).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(documents(), VOCABULARY)


def saved(model: Any, tokenizer: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def olmoe_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(olmoe(), tokenizer, tmp_path_factory.mktemp("models") / "tiny-olmoe")


@pytest.fixture(scope="session")
def switch_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(switch(), tokenizer, tmp_path_factory.mktemp("models") / "tiny-switch")


def by_name(directory: Path) -> dict[str, RoutingRecord]:
    trace = Trace.open(directory)
    return {document.doc_id: trace.read(index) for index, document in enumerate(trace.documents)}


def identical(left: RoutingRecord, right: RoutingRecord) -> bool:
    a, b = dict(left.tensors()), dict(right.tensors())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def recall_of_true_router(directory: Path) -> float:
    """Share of the executed experts that the kept routers choose from the kept inputs."""
    trace = Trace.open(directory)
    routers = trace.routers()
    assert routers is not None
    weight, bias = routers
    found = total = 0
    for index in range(len(trace)):
        record = trace.read(index)
        assert record.hidden is not None
        logits = torch.einsum("tld,led->tle", record.hidden.float(), weight) + bias
        chosen = logits.topk(trace.topology.top_k, -1).indices
        found += int((chosen[..., None] == record.expert_ids.long()[..., None, :]).any(-1).sum())
        total += record.expert_ids.numel()
    return found / total


# --- hooks -----------------------------------------------------------------------------------------


def test_what_is_recorded_is_the_models_own_routing() -> None:
    model = olmoe()
    ids = torch.randint(0, VOCABULARY, (2, 20))
    with torch.inference_mode(), recorded_routes(model, family_of("olmoe")) as recorder:
        output = model(input_ids=ids, output_router_logits=True)
    (routes,) = recorder.take()
    assert torch.equal(routes.token_ids, ids.flatten())
    assert len(routes.layers) == 3
    for layer, logits in zip(routes.layers, output.router_logits, strict=True):
        assert torch.equal(layer.logits, logits)
        weights, chosen = logits.softmax(-1).topk(2, -1)
        assert torch.equal(layer.ids, chosen)
        assert torch.equal(layer.weights, weights)
        assert layer.hidden.shape == (40, 32)
    assert recorder.take() == []


def test_the_experts_that_ran_are_the_recorded_ones() -> None:
    """Silencing the recorded experts' weights silences the layer; silencing all others changes nothing."""
    model = olmoe()
    ids = torch.randint(0, VOCABULARY, (1, 1))
    site = router_sites(model, family_of("olmoe"))[0]
    experts: Any = site.experts
    seen: list[Any] = []
    experts.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode(), recorded_routes(model, family_of("olmoe")) as recorder:
        model(input_ids=ids)
        chosen = recorder.take()[0].layers[0].ids[0]
        others = [expert for expert in range(8) if expert not in chosen.tolist()]
        experts.down_proj[others] = 0
        model(input_ids=ids)
        experts.down_proj[chosen] = 0
        model(input_ids=ids)
    assert torch.equal(seen[0], seen[1])
    assert bool((seen[0] != 0).any())
    assert bool((seen[2] == 0).all())


@pytest.mark.parametrize("build", [olmoe, switch])
def test_hooks_change_no_bit(build: Any) -> None:
    model = build()
    family = family_of(model.config.model_type)
    ids = torch.randint(0, VOCABULARY, (3, 17))
    mask = (torch.arange(17) < torch.tensor([17, 9, 1])[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if family.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.inference_mode():
        before = model(**inputs).logits
        with recorded_routes(model, family):
            during = model(**inputs).logits
        after = model(**inputs).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


@pytest.mark.parametrize("build", [olmoe, switch])
def test_hooks_are_gone_afterwards_also_after_an_error(build: Any) -> None:
    model = build()
    family = family_of(model.config.model_type)
    assert hooks(model) == 0

    def broken_off() -> None:
        with recorded_routes(model, family):
            assert hooks(model) > 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    assert hooks(model) == 0
    with recorded_routes(model, family) as recorder, pytest.raises(IndexError):
        run_model(model, family, [[VOCABULARY + 5, 1]])
    assert hooks(model) == 0
    assert recorder.take() == []
    with pytest.raises(SpecmoeError, match="unknown stack 'decodr'; did you mean"):
        recorded_routes(model, family, "decodr").__enter__()
    assert hooks(model) == 0


def test_a_forward_that_broke_off_leaves_nothing_behind() -> None:
    model, family = olmoe(), family_of("olmoe")
    last = router_sites(model, family)[-1].experts
    with torch.inference_mode(), recorded_routes(model, family) as recorder:
        handle = last.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_model(model, family, [[1, 2, 3]])
        handle.remove()
        run_model(model, family, [[4, 5]])
        (routes,) = recorder.take()
    assert routes.token_ids.tolist() == [4, 5]
    assert all(len(layer.ids) == 2 for layer in routes.layers)


def test_decode_steps_come_out_singly() -> None:
    model = olmoe()
    with recorded_routes(model, family_of("olmoe")) as recorder:
        # Padding in front, as for generating: the mask also covers what is in the cache.
        prompt = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        written = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=3, min_new_tokens=3)
    steps = recorder.take()
    assert [step.token_ids.tolist() for step in steps] == [[5, 6, 1, 2, 3, 4], *written[:, 4:6].T.tolist()]
    assert all(len(layer.hidden) == len(step.token_ids) for step in steps for layer in step.layers)


def test_switch_drops_tokens_over_capacity() -> None:
    model = switch(expert_capacity=1)
    family = family_of("switch_transformers")
    ids = torch.randint(0, VOCABULARY, (1, 24))
    routers = [site.router for site in router_sites(model, family, "decoder")]
    outputs: list[Any] = []
    for router in routers:
        router.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.inference_mode(), recorded_routes(model, family, "decoder") as recorder:
        model(input_ids=ids, decoder_input_ids=ids)
    (routes,) = recorder.take()
    assert len(routes.layers) == 2
    for layer, (mask, probability, logits) in zip(routes.layers, outputs, strict=True):
        assert layer.ids.shape == (24, 1)
        # With room for one token an expert, its first token is served and every later one is dropped.
        wanted, first = logits[0].argmax(-1).tolist(), set()
        for token, expert in enumerate(wanted):
            assert int(layer.ids[token]) == (-1 if expert in first else expert)
            assert float(layer.weights[token]) == (0.0 if expert in first else float(probability[0, token]))
            first.add(expert)
        assert int((layer.ids >= 0).sum()) == int(mask.sum()) <= 4


# --- collect ---------------------------------------------------------------------------------------


def test_a_trace_holds_what_the_model_did(olmoe_dir: Path, tmp_path: Path) -> None:
    progress: list[CaptureProgress] = []
    out = collect(olmoe_dir, documents(), tmp_path / "trace", max_tokens_per_document=40, hidden_dtype="float32",
                  batch_tokens=100, on_progress=progress.append)  # fmt: skip
    trace = Trace.open(out)
    loaded = load_model(olmoe_dir)
    assert trace.topology == loaded.topology
    assert trace.topology.model_id == "tiny-olmoe"
    shape = (trace.topology.layers, trace.topology.experts, trace.topology.top_k, trace.topology.hidden_size)
    assert shape == (3, 8, 2, 32)
    assert trace.topology.bytes_per_expert == 3 * 32 * 16 * 4
    assert len(trace.topology.revision) == 16
    assert trace.manifest.timing is not None
    assert trace.manifest.timing.layer_us_p50 > 1
    assert "cores" in trace.manifest.timing.machine
    settings = trace.manifest.source.settings
    assert settings["dtype"] == "float32"
    assert settings["experts"] == "grouped_mm"
    assert settings["attention"] == "sdpa"
    assert settings["max_tokens_per_document"] == 40
    assert settings["transformers"] == transformers.__version__
    assert {d.doc_id: d.domain for d in trace.documents} == {d.doc_id: d.domain for d in documents()}
    tokenizer = loaded.tokenizer
    texts = {document.doc_id: document.text for document in documents()}
    for name, record in by_name(out).items():
        expected = [tokenizer.bos_token_id, *tokenizer(texts[name], add_special_tokens=False)["input_ids"]][:40]
        assert record.token_ids.tolist() == expected
        assert record.phase.sum() == 0
    assert progress[-1].documents == progress[-1].documents_total == 12
    assert progress[-1].tokens == progress[-1].tokens_total == trace.tokens
    assert [p.tokens for p in progress] == sorted(p.tokens for p in progress)
    assert hooks(loaded.model) == 0


@pytest.mark.parametrize("family", ["olmoe", "switch"])
def test_the_true_router_on_its_true_input_gives_the_route(
    family: str, olmoe_dir: Path, switch_dir: Path, tmp_path: Path
) -> None:
    model = olmoe_dir if family == "olmoe" else switch_dir
    exact = collect(model, documents(), tmp_path / "exact", hidden_dtype="float32", max_tokens_per_document=64)
    assert recall_of_true_router(exact) == 1.0
    rounded = collect(model, documents(), tmp_path / "rounded", hidden_dtype="float16", max_tokens_per_document=64)
    assert recall_of_true_router(rounded) > 0.99


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_an_encoder_decoder_reads_the_first_half_and_continues(switch_dir: Path, tmp_path: Path, stack: str) -> None:
    out = collect(switch_dir, documents(), tmp_path / "trace", stack=stack, max_tokens_per_document=31)
    trace = Trace.open(out)
    assert trace.topology.layers == 2
    assert trace.manifest.source.settings["stack"] == stack
    assert trace.topology.bytes_per_expert == 2 * 32 * 16 * 4
    tokenizer = load_model(switch_dir).tokenizer
    texts = {document.doc_id: document.text for document in documents()}
    for name, record in by_name(out).items():
        ids = [tokenizer.bos_token_id, *tokenizer(texts[name], add_special_tokens=False)["input_ids"]][:31]
        half = len(ids) // 2
        assert record.token_ids.tolist() == (ids[:half] if stack == "encoder" else ids[half:])


@pytest.mark.parametrize("family", ["olmoe", "switch"])
def test_padding_leaves_no_trace(family: str, olmoe_dir: Path, switch_dir: Path, tmp_path: Path) -> None:
    """Documents captured in padded batches have the routes that they have alone."""
    model = olmoe_dir if family == "olmoe" else switch_dir
    options: dict[str, Any] = {"max_tokens_per_document": 48, "hidden_dtype": "float32"}
    together = by_name(collect(model, documents(), tmp_path / "together", batch_tokens=10_000, **options))
    alone = by_name(collect(model, documents(), tmp_path / "alone", batch_tokens=1, **options))
    assert together.keys() == alone.keys()
    assert len({len(record) for record in alone.values()}) > 3
    for name, record in together.items():
        assert torch.equal(record.token_ids, alone[name].token_ids)
        assert torch.equal(record.expert_ids, alone[name].expert_ids)
        for field in ("gate_weights", "router_logits", "hidden"):
            single: Tensor = getattr(alone[name], field)
            difference = (getattr(record, field) - single).abs().max()
            assert float(difference) < 1e-4 * float(single.abs().max())


def test_overflow_reaches_the_trace(tokenizer: Any, tmp_path: Path) -> None:
    model = saved(switch(expert_capacity=2), tokenizer, tmp_path / "model")
    records = by_name(collect(model, documents(), tmp_path / "trace"))
    dropped = torch.cat([(record.expert_ids == -1).flatten() for record in records.values()])
    assert 0 < int(dropped.sum()) < len(dropped)
    for record in records.values():
        assert record.gate_weights is not None
        assert torch.equal(record.gate_weights == 0, record.expert_ids == -1)


def test_hidden_states_of_a_sample_and_no_logits(olmoe_dir: Path, tmp_path: Path) -> None:
    out = collect(olmoe_dir, documents(), tmp_path / "some", keep_hidden="sample:0.4", keep_logits=False,
                  max_tokens_per_document=64)  # fmt: skip
    everything = by_name(
        collect(olmoe_dir, documents(), tmp_path / "all", keep_hidden="all", max_tokens_per_document=64)
    )
    records = by_name(out)
    kept = {name for name, record in records.items() if record.hidden is not None}
    assert 0 < len(kept) < len(records)
    for name, record in records.items():
        assert record.router_logits is None
        hidden, whole = record.hidden, everything[name].hidden
        if hidden is not None:
            assert whole is not None
            assert torch.equal(hidden, whole)
    out = collect(olmoe_dir, documents(), tmp_path / "none", keep_hidden="none", max_tokens_per_document=64)
    assert "hidden" not in Trace.open(out).manifest.fields


def test_a_budget_of_tokens(olmoe_dir: Path, tmp_path: Path) -> None:
    out = collect(olmoe_dir, documents(), tmp_path / "trace", max_tokens=150, max_tokens_per_document=64)
    trace = Trace.open(out)
    assert trace.tokens == 150
    # Not the first of the list: documents are taken in a drawn order.
    assert {d.doc_id for d in trace.documents} != {f"doc{index}" for index in range(len(trace))}


def test_an_untrained_control(olmoe_dir: Path, tmp_path: Path) -> None:
    trained = load_model(olmoe_dir)
    control = untrained_like(olmoe_dir, 3)
    assert control.topology.model_id == "tiny-olmoe-untrained"
    assert control.topology.revision == "seed-3"
    assert not torch.equal(control.model.lm_head.weight, trained.model.lm_head.weight)
    assert torch.equal(control.model.lm_head.weight, untrained_like(olmoe_dir, 3).model.lm_head.weight)
    out = collect(olmoe_dir, documents(), tmp_path / "trace", untrained=True, seed=3, max_tokens_per_document=64)
    trace = Trace.open(out)
    assert trace.topology == control.topology
    assert trace.manifest.source.settings["untrained"] is True


def test_continuing_adds_only_what_lacks(olmoe_dir: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: CaptureProgress) -> None:
        if progress.documents >= 5:
            raise Stop

    options: dict[str, Any] = {"max_tokens_per_document": 48, "batch_tokens": 100}
    whole = collect(olmoe_dir, documents(), tmp_path / "whole", **options)
    with pytest.raises(Stop):
        collect(olmoe_dir, documents(), tmp_path / "parts", on_progress=stop, **options)
    first = [d.doc_id for d in Trace.open(tmp_path / "parts", allow_incomplete=True).documents]
    assert 5 <= len(first) < 12
    parts = collect(olmoe_dir, documents(), tmp_path / "parts", **options)
    assert [d.doc_id for d in Trace.open(parts).documents] == [d.doc_id for d in Trace.open(whole).documents]
    a, b = by_name(whole), by_name(parts)
    assert all(identical(a[name], b[name]) for name in a)
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("shard-*")}
    collect(olmoe_dir, documents(), tmp_path / "parts", **options)
    assert before == {path.name: path.stat().st_mtime_ns for path in parts.glob("shard-*")}
    with pytest.raises(SpecmoeError, match=r"holds another trace \(source differs\); choose another --out"):
        collect(olmoe_dir, documents(5), tmp_path / "parts", **options)


# One process that starts captures and kills them: they inherit its imports, which take seconds.
KILLS = r"""
import os, pathlib, random, signal, sys
sys.path.insert(0, sys.argv[3])
from test_capture import Trace, documents
from specmoe.sources import capture
capture.SHARD_BYTES = 6000
model, out, draw = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), random.Random(0)

def started():
    listen, report = os.pipe()
    process = os.fork()
    if process == 0:
        tell = lambda progress: os.write(report, b"%d\n" % progress.documents)
        capture.collect(model, documents(30), out, max_tokens_per_document=48, batch_tokens=60, on_progress=tell)
        os._exit(0)
    os.close(report)
    return process, os.fdopen(listen)

done = []
for _ in range(3):
    process, lines = started()
    for _ in range(draw.randint(2, 5)):
        lines.readline()
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    done.append(len(Trace.open(out, allow_incomplete=True)))
assert done == sorted(set(done)) and 0 < done[-1] < 30, done
process, lines = started()
lines.read()
assert os.waitpid(process, 0)[1] == 0
"""


def test_killed_while_collecting(olmoe_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLS, str(olmoe_dir), str(tmp_path / "killed"), str(Path(__file__).parent)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    whole = collect(olmoe_dir, documents(30), tmp_path / "whole", max_tokens_per_document=48, batch_tokens=60)
    killed = Trace.open(tmp_path / "killed")
    killed.verify()
    assert [d.doc_id for d in killed.documents] == [d.doc_id for d in Trace.open(whole).documents]
    a, b = by_name(whole), by_name(tmp_path / "killed")
    assert all(identical(a[name], b[name]) for name in a)


# --- bad input -------------------------------------------------------------------------------------


def test_texts_of_no_length(olmoe_dir: Path, switch_dir: Path, tmp_path: Path) -> None:
    texts = [Document("empty", "d", ""), Document("one", "d", "a"), Document("two", "d", "ab cd")]
    seen: list[CaptureProgress] = []
    records = by_name(
        collect(olmoe_dir, texts, tmp_path / "olmoe", on_progress=seen.append, max_tokens_per_document=64)
    )
    # One token behind the mark of a beginning.
    assert {name: len(record) for name, record in records.items()} == {"one": 2, "two": 6}
    assert seen[-1].skipped == 1
    assert seen[-1].documents_total == 2
    records = by_name(collect(switch_dir, texts, tmp_path / "switch", max_tokens_per_document=2))
    assert {name: len(record) for name, record in records.items()} == {"one": 1, "two": 1}
    for nothing in ([], texts[:1]):
        with pytest.raises(SpecmoeError, match="no document has enough text"):
            collect(olmoe_dir, nothing, tmp_path / "nothing", max_tokens_per_document=64)


def test_a_tokenizer_without_a_mark(tmp_path: Path) -> None:
    plain = train_tokenizer(documents(), VOCABULARY)
    plain.bos_token = None
    model = saved(olmoe(), plain, tmp_path / "model")
    records = by_name(collect(model, [Document("one", "d", "a")], tmp_path / "trace", max_tokens_per_document=64))
    assert records["one"].token_ids.tolist() == plain("a")["input_ids"]


def test_models_that_are_none(olmoe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    with pytest.raises(SpecmoeError, match="is not a directory; name a directory"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecmoeError, match=r"is not a model directory: it has no config.json"):
        load_model(tmp_path / "empty")
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SpecmoeError, match=r"gpt2 \(gpt2\) is a dense model: it has no experts to route; take .*OLMoE"):
        load_model(tmp_path / "gpt2")
    for content in ("{", "[]", "{}", '{"model_type": 7}', '{"model_type": "from the future"}'):
        (tmp_path / "empty" / "config.json").write_text(content)
        with pytest.raises(SpecmoeError) as caught:
            load_model(tmp_path / "empty")
        assert "\n" not in str(caught.value)
    with pytest.raises(SpecmoeError, match="unknown dtype 'float8'"):
        load_model(olmoe_dir, dtype="float8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SpecmoeError, match=r"cannot get someone/some-model from the hub; check name and network"):
        load_model("someone/some-model")


def test_damaged_models(tokenizer: Any, tmp_path: Path) -> None:
    directory = saved(olmoe(), tokenizer, tmp_path / "model")
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(SpecmoeError, match="cannot load"):
        load_model(directory)
    weights.write_bytes(whole)
    tensors = load_file(str(weights))
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, str(weights), metadata={"format": "pt"})
    with pytest.raises(SpecmoeError, match=r"lacks 1 weights, model.layers.1.mlp.gate.weight"):
        load_model(directory)
    weights.unlink()
    with pytest.raises(SpecmoeError, match="cannot load"):
        load_model(directory)
    weights.write_bytes(whole)
    for path in directory.glob("token*"):
        path.unlink()
    with pytest.raises(SpecmoeError, match="has no tokenizer, or one without a vocabulary"):
        load_model(directory)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    bigger = train_tokenizer(documents(), VOCABULARY + 40)
    directory = saved(olmoe(vocab_size=260), bigger, tmp_path / "model")
    with pytest.raises(SpecmoeError, match=r"document 'doc.*' has token .*; the model knows 260 tokens"):
        collect(directory, documents(), tmp_path / "trace", max_tokens_per_document=64)


@pytest.mark.parametrize("options", [{}, {"keep_logits": False, "keep_hidden": "none"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_document_and_layer(tokenizer: Any, tmp_path: Path, value: float, options: dict[str, Any]) -> None:
    model = olmoe()
    (token,) = tokenizer("~")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    directory = saved(model, tokenizer, tmp_path / "model")
    texts = [*documents(3), Document("broken", "d", "the ~ router")]
    with pytest.raises(SpecmoeError, match=r"document 'broken': .* holds NaN or Inf at token . in MoE layer 0"):
        collect(directory, texts, tmp_path / "trace", max_tokens_per_document=64, batch_tokens=1, **options)


def test_a_hidden_dtype_that_overflows(tokenizer: Any, tmp_path: Path) -> None:
    model = olmoe()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(1e6)
        model.model.layers[1].mlp.gate.weight.mul_(1e-6)
    directory = saved(model, tokenizer, tmp_path / "model")
    with pytest.raises(SpecmoeError, match=r"hidden holds NaN or Inf at token \d in MoE layer 1.*bfloat16"):
        collect(directory, documents(2), tmp_path / "trace", max_tokens_per_document=64)
    out = collect(directory, documents(2), tmp_path / "b", max_tokens_per_document=64, hidden_dtype="bfloat16")
    assert Trace.open(out).read(0).hidden is not None


def test_options_that_make_no_sense(olmoe_dir: Path, tmp_path: Path) -> None:
    texts = [*documents(), Document("long", "domain0", "the router sends every token " * 100)]
    for options, message in [
        ({"max_tokens_per_document": 0}, "--max-tokens-per-document must be at least 1"),
        ({"max_tokens": -1}, "--max-tokens must be at least 1"),
        ({"max_tokens_per_document": 4096}, "the model reads at most 128 tokens"),
        ({"keep_hidden": "some"}, "--keep-hidden 'some' is not known"),
        ({"hidden_dtype": "int8"}, "unknown hidden dtype 'int8'"),
        ({"stack": "encoder"}, "unknown stack 'encoder'"),
    ]:
        with pytest.raises(SpecmoeError, match=message):
            collect(olmoe_dir, texts, tmp_path / "trace", **{"max_tokens_per_document": 64, **options})
    with pytest.raises(SpecmoeError, match="two documents are named 'doc1'"):
        collect(olmoe_dir, [*documents(), documents()[1]], tmp_path / "trace", max_tokens_per_document=64)


def test_the_checkpoints_dtype_counts_for_the_size_of_an_expert(tokenizer: Any, tmp_path: Path) -> None:
    directory = saved(olmoe().to(torch.bfloat16), tokenizer, tmp_path / "model")
    loaded = load_model(directory)
    assert loaded.model.dtype == torch.float32
    assert loaded.topology.bytes_per_expert == 3 * 32 * 16 * 2
    revision = loaded.topology.revision
    other = saved(olmoe(seed=1).to(torch.bfloat16), tokenizer, tmp_path / "other")
    assert load_model(other).topology.revision != revision


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_the_time_of_a_layer(switch_dir: Path, olmoe_dir: Path, stack: str) -> None:
    threads = torch.get_num_threads()
    model = load_model(switch_dir).model
    assert measure_layer_us(model, family_of("switch_transformers"), stack, steps=3) > 1
    assert hooks(model) == 0
    assert torch.get_num_threads() == threads
    model = load_model(olmoe_dir).model
    assert measure_layer_us(model, family_of("olmoe"), steps=3) > 1


def test_the_bundled_model_has_weights_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_NAME", "no-such-model")
    with pytest.raises(SpecmoeError, match=r"the bundled model is missing .*specmoe pretrain"):
        bundled.bundled_model()
