"""The recipe of the bundled models: small Mixture-of-Experts language models, really trained.

A predictor can only be judged on routing that training has shaped, and a demonstration must not need a
download. So the recipe trains on the standard library's own files: a byte-level BPE, then a language
model in one of three shapes. It is seeded, counts its budget in steps (so that the result does not
depend on how busy the machine is), and continues after a kill from its last checkpoint with the same
result as an uninterrupted run.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmoe.checkpoint import load_checkpoint, save_checkpoint
from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import write_json, write_text
from specmoe.locks import writes
from specmoe.sources.corpus import Document, standard_library, text_hash
from specmoe.sources.families import Family, family_of, router_sites
from specmoe.sources.model_card import model_card
from specmoe.sources.muon import Muon

__all__ = ["SHAPES", "PretrainConfig", "Progress", "bits_per_character", "pretrain"]

END_OF_TEXT = "<|endoftext|>"
_SCORED_TOKENS = 4096
SHAPES = ("olmoe", "olmoe-32x4", "switch")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything the result depends on.

    Attributes:
        shape: one of :data:`SHAPES`.
        steps: optimizer steps; the learning rate's schedule ends there.
        batch: sequences a step. context: tokens a sequence.
        learning_rate: peak, for AdamW and (matched in update size) for Muon.
        load_balancing: weight of the load-balancing loss, computed per layer (Fedus et al., 2021).
        z_loss: weight of the router z-loss (Zoph et al., 2022).
        checkpoint_every: steps between checkpoints; it does not change the result.
    """

    shape: str = "olmoe"
    steps: int = 4400
    batch: int = 4
    context: int = 512
    vocabulary: int = 2048
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    load_balancing: float = 0.02
    z_loss: float = 1e-4
    seed: int = 0
    checkpoint_every: int = 250


@dataclass(frozen=True)
class Progress:
    """What one optimizer step reports: loss in nats a token, and the share of unused experts."""

    step: int
    steps: int
    loss: float
    dead_experts: float


@writes("pretrain")
def pretrain(
    out: Path,
    config: PretrainConfig,
    *,
    device: str = "cpu",
    on_step: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a model and save it with its tokenizer and a card.

    Args:
        out: directory of the result: ``model.safetensors`` (bf16), ``config.json``, the tokenizer, a
            model card ``README.md`` and ``pretraining.json``. The running state lies in
            ``out/checkpoint.safetensors`` and is removed at the end.

    Returns:
        The content of ``pretraining.json``.

    Raises:
        SpecmoeError: unknown shape, the loss is no longer finite, a full disk, or ``out`` holds the
            checkpoint of another configuration.
    """
    if config.shape not in SHAPES:
        raise unknown_name("shape", config.shape, SHAPES)
    documents = standard_library("train")
    fingerprint = json.dumps({**asdict(config), "checkpoint_every": None, "text": text_hash(documents)})
    checkpoint_path = out / "checkpoint.safetensors"
    previous = load_checkpoint(checkpoint_path) if checkpoint_path.exists() else None
    if previous is not None and (not isinstance(previous, dict) or previous.get("fingerprint") != fingerprint):
        raise SpecmoeError(f"{out} holds a checkpoint of another configuration; choose another --out or delete it")

    tokenizer = train_tokenizer(documents, config.vocabulary)
    tokens = encode_stream(tokenizer, documents)
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    family = family_of(model.config.model_type)
    muon, adamw = build_optimizers(model, config, fused=device == "cpu" or device.startswith("cuda"))
    first_step, curve = 0, []
    if previous is not None:
        model.load_state_dict(previous["model"])
        muon.load_state_dict(previous["muon"])
        adamw.load_state_dict(previous["adamw"])
        first_step, curve = previous["step"], previous["curve"]

    model.train()
    with recorded_router_logits(model, family) as router_logits:
        for step in range(first_step, config.steps):
            rate = config.learning_rate * schedule(step, config.steps)
            for group in (*muon.param_groups, *adamw.param_groups):
                group["lr"] = rate
            batch = batch_at(tokens, step, config).to(device)
            router_logits.clear()
            loss = next_token_loss(model, batch, family)
            balance, z_loss, dead = router_losses(router_logits, top_k_of(model))
            (loss + config.load_balancing * balance + config.z_loss * z_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step()
            adamw.step()
            model.zero_grad(set_to_none=True)

            value = loss.item()
            if not math.isfinite(value):
                raise SpecmoeError(f"the loss became {value} at step {step}; lower --learning-rate")
            curve.append(round(value, 4))
            on_step(Progress(step + 1, config.steps, value, dead))
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                state = {"fingerprint": fingerprint, "step": step + 1, "curve": curve}
                optimizers = {"muon": muon.state_dict(), "adamw": adamw.state_dict()}
                save_checkpoint(checkpoint_path, {**state, **optimizers, "model": model.state_dict()})

    facts = {
        "config": asdict(config),
        "text": {"source": "Python standard library", "sha256": text_hash(documents), "documents": len(documents)},
        "tokens": {"distinct": len(tokens), "seen": config.steps * config.batch * config.context},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss_curve": curve[:: max(1, len(curve) // 200)],
        "held_out": measure(model, tokenizer, family, config, device),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU, one thread",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_json(out / "pretraining.json", facts)
    write_text(out / "README.md", model_card(facts))
    checkpoint_path.unlink(missing_ok=True)
    return facts


def train_tokenizer(documents: list[Document], vocabulary: int) -> Any:
    """A byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2) as a transformers tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (document.text for document in documents)
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    marks = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **marks)


def encode_stream(tokenizer: Any, documents: list[Document]) -> Tensor:
    """All documents as one stream of token ids [N] int64, each behind an end-of-text mark."""
    mark = tokenizer.bos_token_id
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)
    return torch.tensor([token for ids in encoded["input_ids"] for token in (mark, *ids)])


def build_model(config: PretrainConfig) -> Any:
    """A freshly initialised model of ``config.shape``."""
    import transformers

    marks: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if config.shape == "switch":
        start: dict[str, Any] = {"decoder_start_token_id": 0}
        return transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(
                vocab_size=config.vocabulary,
                d_model=128,
                d_kv=32,
                num_heads=4,
                d_ff=256,
                num_layers=4,
                num_decoder_layers=8,
                num_sparse_encoder_layers=4,
                num_sparse_decoder_layers=8,
                num_experts=16,
                expert_capacity=config.context,
                router_jitter_noise=0.0,
                dropout_rate=0.0,
                **start,
                pad_token_id=0,
                eos_token_id=0,
            )
        )
    experts, top_k, width = (32, 4, 64) if config.shape == "olmoe-32x4" else (16, 2, 128)
    model = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            vocab_size=config.vocabulary,
            hidden_size=128,
            intermediate_size=width,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_experts=experts,
            num_experts_per_tok=top_k,
            max_position_embeddings=2048,
            **marks,
        )
    )
    model.set_experts_implementation("grouped_mm")
    return model


def build_optimizers(model: nn.Module, config: PretrainConfig, *, fused: bool) -> tuple[Any, Any]:
    """Muon (Jordan et al., 2024) for the attention matrices, AdamW for everything else."""
    attention, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        is_attention = parameter.ndim == 2 and ("attn" in name or "Attention" in name) and "bias" not in name
        is_embedding = "embed" in name or "shared" in name or "lm_head" in name
        (attention if is_attention else plain if parameter.ndim < 2 or is_embedding else decayed).append(parameter)
    muon = Muon(attention, lr=config.learning_rate, weight_decay=config.weight_decay)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return muon, torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear rise, then a cosine down to a fiftieth."""
    warmup = min(100, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batch_at(tokens: Tensor, step: int, config: PretrainConfig) -> Tensor:
    """The batch of a step [batch, context + 1]: a function of seed and step alone, so resuming is exact.

    Each epoch cuts the stream at another offset and shuffles the pieces.
    """
    per_epoch = (len(tokens) - 2 * config.context) // config.context // config.batch
    if per_epoch < 1:
        raise SpecmoeError(f"{len(tokens)} tokens are too few for batches of {config.batch} × {config.context}")
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    offset = int(torch.randint(config.context, (1,), generator=generator))
    order = torch.randperm(per_epoch * config.batch, generator=generator)
    rows = order[position * config.batch : (position + 1) * config.batch]
    starts = offset + rows * config.context
    return tokens[starts[:, None] + torch.arange(config.context + 1)]


def next_token_loss(model: nn.Module, batch: Tensor, family: Family) -> Tensor:
    """Mean cross-entropy in nats a token of ``batch`` [B, T+1].

    An encoder-decoder reads the first half and continues with the second (prefix language modelling,
    Raffel et al., 2020).
    """
    if family.is_encoder_decoder:
        half = batch.shape[1] // 2
        logits = model(input_ids=batch[:, :half], decoder_input_ids=batch[:, half:-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, half + 1 :].flatten())
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@contextmanager
def recorded_router_logits(model: nn.Module, family: Family) -> Iterator[list[Tensor]]:
    """Collect the router logits [N, E] of every MoE layer, with their gradients, while the context lasts."""
    logits: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits.append(family.read_logits(output).flatten(0, -2))

    sites = [site for stack in family.stacks for site in router_sites(model, family, stack)]
    hooks = [site.router.register_forward_hook(record) for site in sites]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def router_losses(router_logits: list[Tensor], top_k: int) -> tuple[Tensor, Tensor, float]:
    """Load-balancing loss and z-loss, averaged over layers, and the share of experts without a token."""
    balance, z_loss, dead = [], [], []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        load = F.one_hot(logits.topk(top_k, -1).indices, logits.shape[-1]).float().sum(1).mean(0) / top_k
        balance.append(logits.shape[-1] * (load * probabilities.mean(0)).sum())
        z_loss.append(logits.float().logsumexp(-1).square().mean())
        dead.append((load == 0).float().mean())
    return torch.stack(balance).mean(), torch.stack(z_loss).mean(), float(torch.stack(dead).mean())


def top_k_of(model: Any) -> int:
    """Experts a token is routed to."""
    return getattr(model.config, "num_experts_per_tok", 1)


def measure(model: Any, tokenizer: Any, family: Family, config: PretrainConfig, device: str) -> dict[str, Any]:
    """Bits a character and expert load on the held-out files."""
    documents = standard_library("held-out")
    bits, loads = bits_per_character(model, tokenizer, family, documents, config.context, device)
    if not math.isfinite(bits):
        raise SpecmoeError(f"the last step left weights that give {bits} bits a character; lower --learning-rate")
    return {
        "documents": len(documents),
        "sha256": text_hash(documents),
        "bits_per_character": round(bits, 4),
        "expert_load": [[round(share, 4) for share in layer] for layer in loads],
    }


@torch.no_grad()
def bits_per_character(
    model: Any, tokenizer: Any, family: Family, documents: list[Document], context: int, device: str = "cpu"
) -> tuple[float, list[list[float]]]:
    """Score the first 4,096 tokens of each document in pieces of ``context``.

    Returns:
        Bits a character (for an encoder-decoder: of the part that the decoder writes), and the share of
        tokens per MoE layer and expert.
    """
    model.eval()
    nats, characters = 0.0, 0
    loads: dict[int, Tensor] = {}
    with recorded_router_logits(model, family) as router_logits:
        for document in documents:
            ids = [
                tokenizer.bos_token_id,
                *tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"],
            ]
            for start in range(0, min(len(ids), _SCORED_TOKENS) - 8, context):
                batch = torch.tensor([ids[start : start + context + 1]], device=device)
                scored = batch[0, batch.shape[1] // 2 + 1 :] if family.is_encoder_decoder else batch[0, 1:]
                router_logits.clear()
                nats += next_token_loss(model, batch, family).item() * len(scored)
                characters += len(tokenizer.decode(scored))
                for layer, logits in enumerate(router_logits):
                    chosen = F.one_hot(logits.topk(top_k_of(model), -1).indices, logits.shape[-1]).sum((0, 1))
                    loads[layer] = loads.get(layer, torch.zeros_like(chosen)) + chosen
    model.train()
    return nats / math.log(2) / characters, [(load / load.sum()).tolist() for load in loads.values()]
