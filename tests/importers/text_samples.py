"""Small traces in every text format, written from the formats' descriptions, and the routing that they hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace
from specmoe.trace import Trace

LAYERS = (1, 2, 5)
EXPERTS, TOP_K = 16, 3


@dataclass(frozen=True)
class Routing:
    """What a sample was made from."""

    ids_TLK: np.ndarray
    weights_TLK: np.ndarray

    def __len__(self) -> int:
        return len(self.ids_TLK)


def routing(tokens: int, seed: int = 0, layers: int = len(LAYERS)) -> Routing:
    """Distinct experts in each place; the largest id occurs; weights have few digits and survive any text."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, EXPERTS)), -1)[..., :TOP_K]
    ids[0, 0] = [EXPERTS - 1, 0, 1]
    return Routing(ids, rng.integers(1, 9999, ids.shape) / 10_000)


def run(path: Path, out: Path, *, format: str | None = None, **options: Any) -> tuple[Trace, list[str]]:
    """Import, read back and verify."""
    warnings = import_trace(path, out, format=format, options=ImportOptions(**options))
    assert all("\n" not in warning for warning in warnings)
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def refused(path: Path, out: Path, words: str, *, format: str | None = None) -> None:
    """The import fails with one clear line and leaves no trace that could be taken for a whole one."""
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, out, format=format)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(SpecmoeError):
        Trace.open(out)


def bigmoeonedge(routing: Routing, *, prompt: int, turn: int = 0, weights: bool = True) -> str:
    """One turn; in the prompt only the last token goes through the last layer."""
    lines = []
    for token, layers in enumerate(routing.ids_TLK):
        for layer, ids in enumerate(layers):
            if layer == len(layers) - 1 and token < prompt - 1:
                continue
            for slot, expert in enumerate(ids):
                weight = f"{routing.weights_TLK[token, layer, slot]:.6g}" if weights else "nan"
                phase = int(token >= prompt)
                lines.append(f"{turn},{phase},{token},{LAYERS[layer]},{slot},{expert},{weight},0,4096,0\n")
    return "".join(lines)


BIGMOEONEDGE_HEAD = (
    "# route_trace v1\n"
    f"# model=/some where/qwen3.gguf arch=qwen3moe n_layer=6 n_expert=32 n_expert_used={TOP_K}\n"
    + "".join(f"# layer={n} expert_bytes={1000 + n if n in LAYERS else 0} dense_bytes={50 + n}\n" for n in range(6))
    + "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped\n"
)


def llama_ranks(routing: Routing, *, prompt: int) -> str:
    """A prompt in one batch, then one token at a time."""
    rows = []
    for batch in [range(prompt), *([token] for token in range(prompt, len(routing)))]:
        for layer, name in enumerate(LAYERS):
            for token in batch:
                phase = "prefill" if token < prompt else "decode"
                rows += [f"{phase},{token},{name},{k},{e}\n" for k, e in enumerate(routing.ids_TLK[token, layer])]
    return "phase,token,layer,rank,expert\n" + "".join(rows)


def megatron(routing: Routing, *, step: int = 0, rank: int = 0, **extra: Any) -> str:
    """One step, all layers."""
    return "".join(
        json.dumps(
            {
                "step": step,
                "stage": "pre_dispatch",
                "block": "decoder",
                "layer": name,
                "rank": rank,
                "num_tokens": len(routing),
                "topk": TOP_K,
                **extra,
                "top_indices": routing.ids_TLK[:, layer].tolist(),
            }
        )
        + "\n"
        for layer, name in enumerate(LAYERS)
    )


def colibri(routing: Routing, *, prompt: int, call: int = 0) -> str:
    """A prompt in one pass, then one token at a time."""
    lines = []
    for batch in [range(prompt), *([token] for token in range(prompt, len(routing)))]:
        for layer, name in enumerate(LAYERS):
            for row, token in enumerate(batch):
                pairs = zip(routing.ids_TLK[token, layer], routing.weights_TLK[token, layer], strict=True)
                lines.append(f"{call} {row} {name} " + " ".join(f"{e}:{w:.4f}" for e, w in pairs) + "\n")
            call += 1
    return "".join(lines)


def problems(routing: Routing, *, dataset: str = "humaneval", problem: int = 0) -> list[dict[str, Any]]:
    """Rows by layer, then token."""
    return [
        {
            "dataset": dataset,
            "problem_id": problem,
            "layer": name,
            "experts": routing.ids_TLK[token, layer].tolist(),
            "gating_probs": routing.weights_TLK[token, layer].tolist(),
            "token_idx": token,
        }
        for layer, name in enumerate(LAYERS)
        for token in range(len(routing))
    ]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


MOE_BEYOND_HEAD = ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"]


def moe_beyond(tokens: list[str], routing: Routing, *, hidden_TLD: np.ndarray | None = None, batch: int = 0) -> str:
    """Rows by layer, then token."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(MOE_BEYOND_HEAD + (["Token Embedding Vector"] if hidden_TLD is not None else []))
    for layer, name in enumerate(LAYERS):
        for token, string in enumerate(tokens):
            row: list[Any] = [name, batch, string, routing.ids_TLK[token, layer].tolist()]
            writer.writerow(row if hidden_TLD is None else [*row, hidden_TLD[token, layer].tolist()])
    return text.getvalue()


def foreign_rows(routing: Routing, *, request: str = "r0", prompt: int = 5) -> list[dict[str, Any]]:
    """One row for a layer of a token, under names of nobody in particular."""
    return [
        {
            "req_id": request,
            "pos": token,
            "layerIdx": name,
            "topk_ids": routing.ids_TLK[token, layer].tolist(),
            "topk_weights": routing.weights_TLK[token, layer].tolist(),
            "input_id": 100 + token,
            "phase": "prefill" if token < prompt else "decode",
        }
        for token in range(len(routing))
        for layer, name in enumerate(LAYERS)
    ]


def activations(rows: list[dict[str, Any]], first: int = 0) -> list[dict[str, Any]]:
    """One row per expert, with its slot."""
    return [
        {
            "request": row["req_id"],
            "tokenIndex": row["pos"],
            "Layer": row["layerIdx"],
            "rank": first + slot,
            "expert-id": expert,
            "gate_weight": weight,
            "token_id": row["input_id"],
            "stage": int(row["phase"] == "decode"),
        }
        for row in rows
        for slot, (expert, weight) in enumerate(zip(row["topk_ids"], row["topk_weights"], strict=True))
    ]


def table(rows: list[dict[str, Any]], *, delimiter: str = ",", head: str = "") -> str:
    """CSV with a header; lists as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return head + text.getvalue()


# By importer: the name of a file and its whole text.
SAMPLES: dict[str, tuple[str, Callable[[], str]]] = {
    "bigmoeonedge-csv": ("trace.csv", lambda: BIGMOEONEDGE_HEAD + bigmoeonedge(routing(8), prompt=5)),
    "moe-beyond-csv": ("prompt_7_data.csv", lambda: moe_beyond(list("abcdefgh"), routing(8))),
    "megatron-jsonl": ("router_trace_rank0.jsonl", lambda: megatron(routing(8)) + megatron(routing(5, 1), step=1)),
    "problem-jsonl": ("routing.jsonl", lambda: jsonl(problems(routing(8)) + problems(routing(5, 1), problem=1))),
    "colibri-route-trace": ("route.txt", lambda: colibri(routing(8), prompt=5)),
    "llama-moe-trace": ("moe-trace.csv", lambda: llama_ranks(routing(8), prompt=5)),
    "rows": ("log.jsonl", lambda: jsonl(foreign_rows(routing(8)) + foreign_rows(routing(5, 1), request="r1"))),
}
