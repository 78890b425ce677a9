"""How well the next token's experts can be known from a token id: the last one, the one expected, the next itself.

Past the last layer a prediction is about a token that has not been chosen yet. Three tables show where the limit lies:
the routing that is typical of the last token, of the next token weighted by the model's exact distribution over it, and
of the next token itself. What a token's context adds to its id is in none of them. The tables are counted on the
training part of a trace of the bundled model, the recall is that on its validation part.

    python benchmarks/next_token_ceiling.py TRACE [--save docs/runs/next_token_ceiling.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from specmoe.dataset import routed_of, split_documents
from specmoe.files import write_json
from specmoe.sources.bundled import bundled_model
from specmoe.suite.assemble import made_now
from specmoe.trace import Trace

# As many tokens' worth of the average are mixed into each id's routing.
SHRINKAGE = 2.0


def token_table(trace: Trace, documents: tuple[int, ...], vocabulary: int) -> Tensor:
    """How often each id was routed to each expert, as a share: [V, L, E]."""
    topology = trace.topology
    counts = torch.zeros(vocabulary, 1, 1)
    routed = torch.zeros(vocabulary, topology.layers, topology.experts)
    for index in documents:
        record = trace.read(index)
        ids = record.token_ids.long()
        routed.index_add_(0, ids, routed_of(record.expert_ids, topology.experts))
        counts.index_add_(0, ids, torch.ones(len(ids), 1, 1))
    average = routed.sum(0) / counts.sum()
    return (routed + SHRINKAGE * average) / (counts + SHRINKAGE)


@torch.inference_mode()
def recalls(trace: Trace) -> dict[str, Any]:
    """recall@K by layer of the next token for each of the three tables."""
    split = split_documents(trace.documents)
    model: Any = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()
    table = token_table(trace, split.parts["train"], model.config.vocab_size)
    top_k, hits, tokens, right = trace.topology.top_k, {}, 0, 0
    for index in split.parts["validation"]:
        record = trace.read(index)
        ids = record.token_ids.long()
        chances = model(ids[None]).logits[0].softmax(-1)[:-1]
        routed = routed_of(record.expert_ids, trace.topology.experts)[1:]
        guesses = {
            "typical of the last token": table[ids[:-1]],
            "the model's distribution over the next token": torch.einsum("tv,vle->tle", chances, table),
            "the next token known": table[ids[1:]],
        }
        for name, shares in guesses.items():
            found = routed.gather(-1, shares.topk(top_k, -1).indices).sum((0, 2))
            hits[name] = hits.get(name, 0) + found
        tokens += len(ids) - 1
        right += int((chances.argmax(-1) == ids[1:]).sum())
    shares = {name: (found / tokens / top_k).tolist() for name, found in hits.items()}
    return {"tokens": tokens, "next_token_right": right / tokens, "recall_by_layer": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--save", type=Path, default=Path("docs/runs/next_token_ceiling.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = recalls(Trace.open(options.trace))
    write_json(options.save, content | {"made": made_now(0.0).model_dump(mode="json")})
    print(f"{content['tokens']} tokens; the model's first guess is right for {100 * content['next_token_right']:.1f} %")
    for name, by_layer in content["recall_by_layer"].items():
        mean = sum(by_layer) / len(by_layer)
        print(f"{name:46s} {' '.join(f'{100 * r:5.1f}' for r in by_layer)}   mean {100 * mean:.1f}")


if __name__ == "__main__":
    main()
