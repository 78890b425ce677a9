"""The model's own writing: prompts are read in one forward pass, what follows is decoded with a KV cache.

Predictors that are trained on given text are known to do worse on what a model writes itself, so the two are kept
apart (:class:`specmoe.trace.Phase`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.sources.families import Family
from specmoe.sources.recording import ForwardRoutes, LayerRoute, TokenIds, cache_name, padded
from specmoe.trace import Phase

__all__ = ["BatchRoutes", "Generation", "join", "run_generation"]


@dataclass(frozen=True)
class Generation:
    """How a model continues its prompts.

    Attributes:
        tokens: at most so many are written after each prompt; fewer where the model ends its text.
        temperature: of sampling; 0 takes the likeliest token (greedy). seed: of sampling.
    """

    tokens: int
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise SpecmoeError(f"--generate must be at least 1, not {self.tokens}")
        if not 0 <= self.temperature < 100:
            raise SpecmoeError(f"--temperature must lie between 0 and 100, not {self.temperature}")


@dataclass(frozen=True)
class BatchRoutes:
    """What a batch of documents did in all its forward passes, documents one behind the other.

    Attributes:
        token_ids: [N]. phase: [N] uint8. lengths: tokens of each document. layers: one entry per MoE layer.
    """

    token_ids: Tensor
    phase: Tensor
    lengths: list[int]
    layers: list[LayerRoute]


def run_generation(
    model: Any, family: Family, prompts: Sequence[TokenIds], generation: Generation, batch_seed: int
) -> list[int]:
    """Let a model continue a batch of prompts. What it computes is read by the hooks.

    The token that is written last is never read by the model, so one more is asked for than is wanted. An
    encoder-decoder reads the prompt with its encoder and writes all of its own.

    Args:
        model: with a language-model head. family: its row. prompts: token ids, of any lengths.
        batch_seed: together with ``generation.seed``, what sampling is drawn from.

    Returns:
        How many of the tokens that each row wrote count: those before the end of its text.

    Raises:
        SpecmoeError: the model has no language-model head.
    """
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

    if not (hasattr(model, "generate") and model.can_generate()):
        raise SpecmoeError(
            f"a {family.name} model of class {type(model).__name__} writes no text; leave --generate out"
        )
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [end for end in ends if end is not None]
    # The whole distribution, whatever the checkpoint's own settings cut from it.
    sampling = {"temperature": generation.temperature, "top_k": 0, "top_p": 1.0} if generation.temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=generation.tokens + 1,
        do_sample=generation.temperature > 0,
        **sampling,
        eos_token_id=ends or None,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else (ends or [0])[0],
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        use_cache=True,
    )
    # Prompts end together, so that what is written starts in one column.
    ids, mask = padded(prompts, model.device, side="left")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generation.seed * 1_000_003 + batch_seed)
        # Made from the configuration, an encoder-decoder's cache has as many layers as its encoder.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if family.is_encoder_decoder else None
        options: dict[str, Any] = {} if cache is None else {cache_name(): cache}
        sequences: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    written = sequences[:, 1 if family.is_encoder_decoder else ids.shape[1] :][:, : generation.tokens]
    ended = torch.isin(written, torch.tensor(ends, device=written.device, dtype=written.dtype))
    return [int(row.nonzero()[0]) if bool(row.any()) else len(row) for row in ended]


def join(forwards: Sequence[ForwardRoutes], rows: int, written: Sequence[int] | None = None) -> BatchRoutes:
    """Put the forward passes of a batch together, document by document.

    Args:
        forwards: the first read the prompts, each of the others one token a row. rows: documents in the batch.
        written: how many tokens of its own each row may have, None if it only read.
    """
    first, *steps = forwards
    allowed = torch.tensor(written if written is not None else [0] * rows)
    kept: list[tuple[ForwardRoutes, Tensor]] = [(first, torch.ones(len(first.rows), dtype=torch.bool))]
    kept += [(step, allowed[step.rows.cpu()] > number) for number, step in enumerate(steps)]
    row = torch.cat([step.rows.cpu()[mask] for step, mask in kept])
    phase = torch.cat(
        [
            torch.full((int(mask.sum()),), Phase.PREFILL if number == 0 else Phase.DECODE, dtype=torch.uint8)
            for number, (_, mask) in enumerate(kept)
        ]
    )
    order = row.argsort(stable=True)

    def gather(parts: Sequence[Tensor]) -> Tensor:
        # A single pass is in order already: nothing is copied.
        if not steps:
            return parts[0]
        device = parts[0].device
        return torch.cat([part[mask.to(device)] for part, (_, mask) in zip(parts, kept, strict=True)])[order.to(device)]

    layers = [
        LayerRoute(*(gather([getattr(f.layers[i], name) for f in forwards]) for name in LayerRoute.FIELDS))
        for i in range(len(first.layers))
    ]
    token_ids = gather([forward.token_ids for forward in forwards])
    return BatchRoutes(token_ids, phase[order], torch.bincount(row, minlength=rows).tolist(), layers)
