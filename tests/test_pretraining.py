"""The recipe of the bundled models: its optimizer, its saved form, and that it can be interrupted."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from specmoe.checkpoint import load_checkpoint
from specmoe.errors import SpecmoeError
from specmoe.sources import pretraining
from specmoe.sources.corpus import Document, text_hash
from specmoe.sources.families import family_of
from specmoe.sources.muon import Muon, orthogonalise
from specmoe.sources.pretraining import (
    SHAPES,
    PretrainConfig,
    Progress,
    batch_at,
    build_model,
    build_optimizers,
    next_token_loss,
    pretrain,
    recorded_router_logits,
    router_losses,
    schedule,
    top_k_of,
)

TINY = PretrainConfig(steps=6, batch=2, context=32, vocabulary=300, checkpoint_every=2)
FILES = {"train": ("textwrap.py", "bisect.py"), "held-out": ("heapq.py", "json/encoder.py")}


# Muon


def spectrum(rows: int, columns: int, values: Tensor, seed: int) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0][:, : len(values)]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0][:, : len(values)]
    return left * values @ right.T


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (128, 128), (1, 5), (5, 1)])
def test_orthogonalise_brings_singular_values_near_one_and_keeps_directions(shape: tuple[int, int]) -> None:
    least = min(shape)
    matrices = torch.stack([spectrum(*shape, torch.logspace(-1.3, 1, least), seed) for seed in range(3)]) / least**0.5
    result = orthogonalise(matrices)
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert ((values > 0.6) & (values < 1.3)).all()
    for matrix, own in zip(matrices, result, strict=True):
        # What is left after the directions are divided out is the singular values: symmetric and positive.
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        middle = left.T @ own @ right.T
        off = middle - torch.diag(middle.diagonal())
        assert (middle.diagonal() > 0.6).all()
        assert off.abs().max() < 0.02


def test_orthogonalise_does_each_matrix_by_itself_at_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 6, 9, generator=generator)
    scaled = matrices * torch.tensor([1e-4, 1.0, 50.0, 1e4])[:, None, None]
    torch.testing.assert_close(orthogonalise(scaled), orthogonalise(matrices), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(orthogonalise(matrices)[2:3], orthogonalise(matrices[2:3]))
    torch.testing.assert_close(orthogonalise(matrices.mT), orthogonalise(matrices).mT)
    assert not orthogonalise(torch.zeros(1, 3, 4)).any()


def slow_muon(
    parameters: list[Tensor], gradients: list[list[Tensor]], lr: float, momentum: float, decay: float
) -> None:
    """Jordan et al., 2024, one matrix at a time, as its text has it; update size as in Liu et al., 2025."""
    averages = [torch.zeros_like(p) for p in parameters]
    for step in gradients:
        for parameter, gradient, average in zip(parameters, step, averages, strict=True):
            average.mul_(momentum).add_((1 - momentum) * gradient)
            x = (1 - momentum) * gradient + momentum * average
            transposed = x.shape[0] > x.shape[1]
            x = x.T if transposed else x
            x = x / (x.square().sum().sqrt() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if transposed else x
            parameter.sub_(lr * decay * parameter + lr * 0.2 * math.sqrt(max(parameter.shape)) * x)


def test_muon_is_the_slow_one_of_single_matrices() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 8), (12, 4), (8, 8), (4, 12), (12, 4)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    expected = [parameter.detach().clone() for parameter in parameters]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    muon = Muon(parameters, lr=0.05, momentum=0.9, weight_decay=0.3)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        muon.step()
        for parameter, gradient in zip(parameters, step, strict=True):
            assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    slow_muon(expected, gradients, 0.05, 0.9, 0.3)
    for parameter, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), other, rtol=1e-4, atol=1e-5)


def test_muon_passes_over_what_has_no_gradient_and_continues_from_its_state() -> None:
    def made() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(3, 3) + i * torch.eye(3)) for i in range(3)]

    def run(muon: Muon, parameters: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for i, parameter in enumerate(parameters):
                parameter.grad = None if i == 1 else torch.randn(3, 3, generator=generator)
            muon.step()

    whole = made()
    run(Muon(whole), whole, range(4))
    assert torch.equal(whole[1].detach(), torch.ones(3, 3) + torch.eye(3))
    half = made()
    first = Muon(half)
    run(first, half, range(2))
    second = Muon(half)
    second.load_state_dict(first.state_dict())
    run(second, half, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


# Parts of the recipe


def test_every_parameter_is_optimized_once_by_the_right_one() -> None:
    for shape in SHAPES:
        config = PretrainConfig(shape=shape, vocabulary=300, context=32)
        model = build_model(config)
        muon, adamw = build_optimizers(model, config, fused=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        of_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
        of_adamw = {group["weight_decay"]: [names[id(p)] for p in group["params"]] for group in adamw.param_groups}
        everything = [*of_muon, *of_adamw[0.1], *of_adamw[0.0]]
        assert sorted(everything) == sorted(names.values())
        assert all(
            name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")) or "Attention" in name
            for name in of_muon
        )
        assert len(of_muon) == (4 * 8 if shape != "switch" else 4 * (4 + 8 + 8))
        assert not any("norm" in name or "embed" in name or "shared" in name for name in of_adamw[0.1])
        assert all(
            "experts" in name or "gate" in name or "router" in name or "relative" in name for name in of_adamw[0.1]
        )


def test_the_learning_rate_rises_then_falls_to_a_fiftieth() -> None:
    for steps in (1, 2, 6, 50, 4400):
        factors = [schedule(step, steps) for step in range(steps)]
        assert all(0 < factor <= 1 for factor in factors)
        assert max(factors) == 1.0
        peak = factors.index(1.0)
        assert factors[: peak + 1] == sorted(factors[: peak + 1])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert schedule(4399, 4400) == pytest.approx(0.02, abs=1e-3)


def test_batches_cover_the_text_once_an_epoch_and_depend_on_the_step_alone() -> None:
    config = PretrainConfig(batch=3, context=8, seed=5)
    tokens = torch.arange(250)
    per_epoch = (250 - 16) // 8 // 3
    for epoch in range(3):
        batches = [batch_at(tokens, epoch * per_epoch + position, config) for position in range(per_epoch)]
        assert all(batch.shape == (3, 9) for batch in batches)
        starts = torch.cat(batches)[:, 0]
        assert len(starts.unique()) == len(starts)
        assert set((starts - starts.min()).remainder(8).tolist()) == {0}
        assert (torch.cat(batches).diff(dim=1) == 1).all()
    assert torch.equal(batch_at(tokens, 7, config), batch_at(tokens, 7, config))
    assert not torch.equal(batch_at(tokens, 0, config), batch_at(tokens, per_epoch, config))
    assert not torch.equal(batch_at(tokens, 0, config), batch_at(tokens, 0, PretrainConfig(batch=3, context=8, seed=6)))
    # No piece reaches past the end, however long the text is.
    for length in range(40, 120):
        assert batch_at(torch.arange(length), 0, config).max() < length
    with pytest.raises(SpecmoeError, match="too few"):
        batch_at(torch.arange(39), 0, config)


def test_router_losses_are_least_for_an_even_load() -> None:
    generator = torch.Generator().manual_seed(0)
    even = 0.01 * torch.randn(4000, 8, generator=generator)
    balance, z_loss, dead = router_losses([even], 2)
    assert float(balance) == pytest.approx(1.0, abs=0.01)
    assert float(z_loss) == pytest.approx(math.log(8) ** 2, abs=0.01)
    assert dead == 0
    lopsided = torch.zeros(100, 8)
    lopsided[:, :2] = 20
    balance, _, dead = router_losses([lopsided], 2)
    assert float(balance) == pytest.approx(4.0, rel=1e-3)
    assert dead == 6 / 8
    mean, _, _ = router_losses([even, lopsided], 2)
    assert float(mean) == pytest.approx(2.5, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_router_is_heard_and_gets_a_gradient(shape: str) -> None:
    config = PretrainConfig(shape=shape, vocabulary=300, context=32)
    torch.manual_seed(0)
    model = build_model(config)
    family = family_of(model.config.model_type)
    batch = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    with recorded_router_logits(model, family) as heard:
        next_token_loss(model, batch, family).backward()
    layers, experts = {"olmoe": (8, 16), "olmoe-32x4": (8, 32), "switch": (12, 16)}[shape]
    assert [tuple(logits.shape[1:]) for logits in heard] == [(experts,)] * layers
    assert top_k_of(model) == {"olmoe": 2, "olmoe-32x4": 4, "switch": 1}[shape]
    routers = {name: p for name, p in model.named_parameters() if name.endswith(("gate.weight", "classifier.weight"))}
    assert len(routers) == layers
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers.values())
    heard.clear()
    model(input_ids=batch, **({"decoder_input_ids": batch} if family.is_encoder_decoder else {}))
    assert heard == []


def test_an_encoder_decoder_is_asked_for_the_second_half_only() -> None:
    model = build_model(PretrainConfig(shape="switch", vocabulary=300, context=32)).eval()
    batch = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    family = family_of(model.config.model_type)
    with torch.no_grad():
        logits = model(input_ids=batch[:, :16], decoder_input_ids=batch[:, 16:32]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 17:].flatten())
        torch.testing.assert_close(next_token_loss(model, batch, family), expected)


# The whole


@functools.cache
def documents_of(part: str) -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    # Of the held-out files the beginning: measuring on them would take longer than all the training here.
    texts = {name: (root / name).read_text(encoding="utf-8") for name in FILES[part]}
    return [Document(name, "library", text[:700] if part == "held-out" else text) for name, text in texts.items()]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of the library's files, as encoding all takes longer than training here; no waiting for disks."""
    monkeypatch.setattr(pretraining, "standard_library", documents_of)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, its facts, its reports, and the weights as they were trained."""

    out: Path
    facts: dict[str, Any]
    steps: list[Progress]
    weights: dict[str, Tensor]


Finished = Callable[[str], Run]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    @functools.cache
    def run(shape: str) -> Run:
        out = tmp_path_factory.mktemp("model") / shape
        steps: list[Progress] = []
        weights: dict[str, Tensor] = {}
        measure = pretraining.measure

        def watched(model: nn.Module, *arguments: Any) -> dict[str, Any]:
            weights.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return measure(model, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretraining, "measure", watched)
            facts = pretrain(out, replace(TINY, shape=shape), on_step=steps.append)
        return Run(out, facts, steps, weights)

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_the_saved_model_is_the_trained_one_in_bf16(finished: Finished, shape: str) -> None:
    import transformers

    run = finished(shape)
    weights = load_file(str(run.out / "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    auto = transformers.AutoModelForSeq2SeqLM if shape == "switch" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(run.out, dtype=torch.float32).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == run.facts["parameters"]
    assert model.state_dict().keys() == run.weights.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, run.weights[name].bfloat16().float()), name

    tokenizer = transformers.AutoTokenizer.from_pretrained(run.out)
    ids = torch.tensor([tokenizer(documents_of("held-out")[0].text, add_special_tokens=False)["input_ids"][:32]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if shape == "switch" else {})
    trained = build_model(replace(TINY, shape=shape)).eval()
    with torch.no_grad():
        ours = model(**inputs).logits
        trained.load_state_dict(run.weights)
        # Rounding sends a token to another expert now and then, so only most logits stay close.
        assert (ours - trained(**inputs).logits).abs().median() < 0.08
        trained.load_state_dict({name: tensor.bfloat16().float() for name, tensor in run.weights.items()})
        torch.testing.assert_close(ours, trained(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_bundled_shape_fits_its_limit(finished: Finished) -> None:
    grown = build_model(PretrainConfig()).num_parameters() * 2
    assert grown < 16 << 20
    assert (finished("olmoe").out / "model.safetensors").stat().st_size < grown


@pytest.mark.parametrize("shape", SHAPES)
def test_card_and_facts_say_what_was_done(finished: Finished, shape: str) -> None:
    run = finished(shape)
    out, facts, steps = run.out, run.facts, run.steps
    assert json.loads((out / "pretraining.json").read_text()) == facts
    assert facts["config"]["shape"] == shape
    assert facts["text"]["sha256"] == text_hash(documents_of("train"))
    assert facts["held_out"]["sha256"] == text_hash(documents_of("held-out"))
    assert facts["tokens"]["seen"] == 6 * 2 * 32
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert facts["loss_curve"] == pytest.approx([step.loss for step in steps], abs=1e-3)
    assert facts["loss_curve"][0] == pytest.approx(math.log(300), rel=0.35)
    layers, experts = {"olmoe": (8, 16), "olmoe-32x4": (8, 32), "switch": (12, 16)}[shape]
    loads = facts["held_out"]["expert_load"]
    assert [len(layer) for layer in loads] == [experts] * layers
    assert all(sum(layer) == pytest.approx(1, abs=0.01) for layer in loads)
    assert 0 < facts["held_out"]["bits_per_character"] < 8.5
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n")
    assert f"--shape {shape}" in card
    assert text_hash(documents_of("train")) in card
    assert not (out / "checkpoint.safetensors").exists()
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]


def test_the_tokenizer_gives_every_text_back(finished: Finished) -> None:
    import transformers

    out = finished("olmoe").out
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 300
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    for text in (
        "def f(x):\n\treturn x . y  ,  'ä ☃ 🙂'\r\n",
        " leading and trailing ",
        documents_of("held-out")[0].text,
    ):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert 0 not in ids


def test_bits_per_character_by_hand(finished: Finished) -> None:
    import transformers

    out, facts = finished("olmoe").out, finished("olmoe").facts
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    family = family_of("olmoe")
    texts = [Document("a", "d", documents_of("held-out")[0].text[:700]), Document("b", "d", "short text, still scored")]
    bits, loads = pretraining.bits_per_character(model, tokenizer, family, texts, 32)
    nats, characters = 0.0, 0
    for document in texts:
        ids = torch.tensor([0, *tokenizer(document.text, add_special_tokens=False)["input_ids"]])
        for start in range(0, len(ids) - 8, 32):
            piece = ids[start : start + 33]
            with torch.no_grad():
                log = model(input_ids=piece[None, :-1]).logits.log_softmax(-1)[0]
            nats -= float(log.gather(-1, piece[1:, None]).sum())
            characters += len(tokenizer.decode(piece[1:]))
    assert bits == pytest.approx(nats / characters / math.log(2), rel=1e-4)
    assert len(loads) == 8
    assert abs(facts["held_out"]["bits_per_character"] - bits) < 2


# Interruption


class Interrupted(Exception):
    pass


def interrupt_at(step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Interrupted

    return on_step


@pytest.mark.parametrize("shape", ["olmoe", "switch"])
def test_an_interrupted_run_ends_as_one_that_ran_through(finished: Finished, tmp_path: Path, shape: str) -> None:
    whole, facts = finished(shape).out, finished(shape).facts
    config = replace(TINY, shape=shape)
    with pytest.raises(Interrupted):
        pretrain(tmp_path, config, on_step=interrupt_at(3))
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 2
    torch.rand(5)
    steps: list[Progress] = []
    again = pretrain(tmp_path, config, on_step=steps.append)
    assert [step.step for step in steps] == [3, 4, 5, 6]
    assert {**again, "date": ""} == {**facts, "date": ""}
    ours, theirs = load_file(str(tmp_path / "model.safetensors")), load_file(str(whole / "model.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_how_often_it_is_saved_does_not_matter(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        pretrain(tmp_path, TINY, on_step=interrupt_at(6))
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 4
    facts = pretrain(tmp_path, replace(TINY, checkpoint_every=5))
    assert facts["loss_curve"] == finished("olmoe").facts["loss_curve"]


def test_a_checkpoint_of_something_else_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        pretrain(tmp_path, TINY, on_step=interrupt_at(3))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for change in ({"shape": "switch"}, {"steps": 7}, {"seed": 1}, {"learning_rate": 1e-3}, {"batch": 3}):
        with pytest.raises(SpecmoeError, match="another configuration"):
            pretrain(tmp_path, replace(TINY, **change))
    monkeypatch.setattr(pretraining, "standard_library", lambda part: documents_of(part)[:1])
    with pytest.raises(SpecmoeError, match="another configuration"):
        pretrain(tmp_path, TINY)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_damaged_or_foreign_checkpoint_is_an_error_for_the_user(tmp_path: Path) -> None:
    from specmoe.checkpoint import save_checkpoint

    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"half")
    with pytest.raises(SpecmoeError, match="damaged"):
        pretrain(tmp_path, TINY)
    for state in ({"step": 3}, [1, 2], 5):
        save_checkpoint(path, state)
        with pytest.raises(SpecmoeError):
            pretrain(tmp_path, TINY)


@pytest.mark.filterwarnings("default")
def test_a_loss_that_is_not_a_number_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    config = replace(TINY, learning_rate=1e30)
    with pytest.raises(SpecmoeError, match=r"lower --learning-rate"):
        pretrain(tmp_path, config)
    assert not (tmp_path / "model.safetensors").exists()
    # What was saved on the way must not be of no use.
    path = tmp_path / "checkpoint.safetensors"
    if path.exists():
        assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(path)["model"].values())


def test_a_last_step_that_goes_astray_is_noticed(tmp_path: Path) -> None:
    config = replace(TINY, steps=1, learning_rate=1e30)
    with pytest.raises(SpecmoeError, match=r"lower --learning-rate"):
        pretrain(tmp_path, config)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_unknown_shape_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="did you mean olmoe"):
        pretrain(tmp_path / "out", PretrainConfig(shape="olmo"))
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_is_an_error_for_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "standard_library", lambda part: documents_of(part)[:1])
    with pytest.raises(SpecmoeError, match="too few"):
        pretrain(tmp_path, replace(TINY, context=4096, batch=8))
