"""The card of a bundled model: how it was made, written from what was measured."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["model_card"]


def model_card(facts: dict[str, Any]) -> str:
    """The README of a model made by ``specmoe pretrain``.

    Args:
        facts: the content of its ``pretraining.json``.
    """
    config, held_out, text = facts["config"], facts["held_out"], facts["text"]
    loads = held_out["expert_load"]
    dead = sum(share == 0 for layer in loads for share in layer)
    recent = facts["loss_curve"][-max(1, len(facts["loss_curve"]) // 20) :]
    last_loss, bits, seen = sum(recent) / len(recent), held_out["bits_per_character"], facts["tokens"]["seen"]
    rows = "\n".join(
        f"| {layer} | {_normalised_entropy(load):.3f} | {100 * min(load):.1f} % | {100 * max(load):.1f} % |"
        for layer, load in enumerate(loads)
    )
    return f"""---
license: apache-2.0
---
# A small Mixture-of-Experts language model, for demonstrations of expert speculation

Shape `{config["shape"]}`, {facts["parameters"]:,} parameters, byte-level BPE of {config["vocabulary"]:,} tokens. It
exists so that real routing can be captured without a download. It writes no useful text.

- **Made by** `specmoe pretrain --shape {config["shape"]} --steps {config["steps"]} --seed {config["seed"]}` on
  {facts["date"]} ({facts["device"]}, torch {facts["torch"]}).
- **Data:** {text["documents"]} source files of the {text["source"]}, {facts["tokens"]["distinct"]:,} tokens
  (SHA-256 of names and texts: `{text["sha256"]}`). A fifth of the modules, chosen by a hash of the file name,
  was kept out, and the library's tests are not in it.
- **Training:** {config["steps"]:,} steps of {config["batch"]} × {config["context"]} tokens ({seen:,} in all).
  Muon on attention matrices, AdamW on the rest; peak rate {config["learning_rate"]}, cosine; load-balancing loss
  {config["load_balancing"]} (per layer), z-loss {config["z_loss"]}; fp32. Last training
  loss {last_loss:.3f} nats a token (mean of the last twentieth).
- **Held-out:** {bits:.3f} bits a character on {held_out["documents"]} files (the first 4,096 tokens of each, in
  pieces of {config["context"]}).
- **Expert load on the held-out files:** {dead} dead experts.

| MoE layer | normalised entropy | least used | most used |
|---|---|---|---|
{rows}

- **Licence:** weights Apache-2.0. The text is part of Python (PSF licence) and is not contained here.
"""


def _normalised_entropy(shares: list[float]) -> float:
    """1 for an even load, 0 for a single expert."""
    return -sum(share * math.log(share) for share in shares if share) / math.log(len(shares))
