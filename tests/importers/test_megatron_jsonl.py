"""Megatron-LM's router trace: passes become documents, logits and hidden states come from the files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_samples import EXPERTS, LAYERS, TOP_K, Routing, megatron, refused, routing, run

from specmoe.trace import Phase

WIDTH = 4


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def one(source: Routing, token: int) -> Routing:
    return Routing(source.ids_TLK[token : token + 1], source.weights_TLK[token : token + 1])


def with_sidecars(folder: Path, sources: list[Routing], rank: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Write a trace with logits and hidden states; returns both, [T, L, ...] for each source."""
    generator = torch.Generator().manual_seed(rank)
    files = {"logit": (f"logits_rank{rank}.bin", EXPERTS, []), "hs": (f"hidden_states_rank{rank}.bin", WIDTH, [])}
    text, sizes = "", dict.fromkeys(files, 0)
    folder.mkdir(parents=True, exist_ok=True)
    for step, source in enumerate(sources):
        values = {
            key: torch.randn(len(source), len(LAYERS), width, generator=generator).bfloat16()
            for key, (_, width, _) in files.items()
        }
        for layer, line in enumerate(megatron(source, step=step, rank=rank).splitlines()):
            record = json.loads(line)
            for key, (name, width, _) in files.items():
                data = values[key][:, layer].contiguous().view(torch.int16).numpy().tobytes()
                with (folder / name).open("ab") as stream:
                    stream.write(data)
                record |= {f"{key}_offset": sizes[key], f"{key}_bytes": len(data)}
                record[f"{key}_shape"] = [len(source), width]
                sizes[key] += len(data)
            text += json.dumps(record) + "\n"
        for key, (_, _, kept) in files.items():
            kept.append(values[key])
    write(folder / f"router_trace_rank{rank}.jsonl", text)
    return files["logit"][2], files["hs"][2]


def test_inference_becomes_one_document_for_each_prompt(tmp_path: Path) -> None:
    source, other = routing(9), routing(4, 1)
    prompt = Routing(source.ids_TLK[:6], source.weights_TLK[:6])
    text = megatron(prompt) + "".join(megatron(one(source, n), step=n - 5) for n in (6, 7, 8)) + megatron(other, step=4)
    trace, warnings = run(write(tmp_path / "router_trace_rank0.jsonl", text), tmp_path / "trace")
    assert warnings == []
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (3, 16, TOP_K)
    assert trace.manifest.fields == ("token_ids", "phase", "expert_ids")
    names = ["router_trace_rank0.jsonl:step-0", "router_trace_rank0.jsonl:step-4"]
    assert [document.doc_id for document in trace.documents] == names
    assert np.array_equal(trace.read(0).expert_ids.numpy(), source.ids_TLK)
    assert np.array_equal(trace.read(1).expert_ids.numpy(), other.ids_TLK)
    assert trace.read(0).phase.tolist() == [Phase.PREFILL] * 6 + [Phase.DECODE] * 3
    assert (trace.read(0).token_ids == -1).all()


def test_micro_batches_and_ranks_are_documents(tmp_path: Path) -> None:
    sources = {(rank, turn): routing(5, 10 * rank + turn) for rank in (0, 1) for turn in (0, 1)}
    for rank in (0, 1):
        records = [megatron(sources[rank, turn], rank=rank).splitlines(keepends=True) for turn in (0, 1)]
        # Interleaved, as a pipeline schedule would.
        text = "".join(line for pair in zip(*records, strict=True) for line in pair)
        write(tmp_path / f"in/router_trace_rank{rank}.jsonl", text)
    trace, _ = run(tmp_path / "in", tmp_path / "trace")
    assert [document.doc_id.rpartition("rank")[2] for document in trace.documents] == [
        "0.jsonl:step-0",
        "0.jsonl:step-0.1",
        "1.jsonl:step-0",
        "1.jsonl:step-0.1",
    ]
    for number, source in enumerate(sources.values()):
        assert np.array_equal(trace.read(number).expert_ids.numpy(), source.ids_TLK)


def test_logits_and_hidden_states(tmp_path: Path) -> None:
    source = routing(7)
    parts = [Routing(source.ids_TLK[:6], source.weights_TLK[:6]), one(source, 6), routing(4, 3)]
    logits, hidden = with_sidecars(tmp_path / "in", parts)
    trace, warnings = run(tmp_path / "in", tmp_path / "trace")
    assert warnings == []
    assert trace.topology.hidden_size == WIDTH
    assert trace.manifest.fields == ("token_ids", "phase", "expert_ids", "router_logits", "hidden")
    for number, chosen in enumerate(([0, 1], [2])):
        record = trace.read(number)
        assert record.router_logits is not None
        assert record.hidden is not None
        assert torch.equal(record.router_logits, torch.cat([logits[n] for n in chosen]).float())
        assert torch.equal(record.hidden, torch.cat([hidden[n] for n in chosen]))


def test_files_beside_that_are_missing_or_short(tmp_path: Path) -> None:
    with_sidecars(tmp_path / "in", [routing(7)])
    (tmp_path / "in/logits_rank0.bin").unlink()
    trace, warnings = run(tmp_path / "in", tmp_path / "trace")
    assert warnings == ["router_logits were not imported: logits_rank*.bin is not beside the trace"]
    assert "hidden" in trace.manifest.fields
    hidden = tmp_path / "in/hidden_states_rank0.bin"
    hidden.write_bytes(hidden.read_bytes()[:-1])
    refused(tmp_path / "in", tmp_path / "other", "line 3: hidden_states_rank0.bin does not hold")


def test_layers_that_draft_and_passes_with_holes_are_left_out(tmp_path: Path) -> None:
    text = megatron(routing(4)) + megatron(routing(4), step=1, block="mtp", mtp_idx=0)
    lacking = megatron(routing(4, 1), step=2).splitlines(keepends=True)[:-1]
    uneven = [*megatron(routing(4), step=3).splitlines(keepends=True)[:-1]]
    uneven += megatron(routing(5), step=3).splitlines(keepends=True)[-1:]
    path = write(tmp_path / "t.jsonl", text + "".join([*lacking, *uneven]) + megatron(routing(4, 2), step=4))
    trace, warnings = run(path, tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["t.jsonl:step-0", "t.jsonl:step-4"]
    assert [warning.split()[:2] for warning in warnings] == [["3", "records"], ["2", "passes"]]


def test_ranks_of_a_pipeline_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in/r0.jsonl", megatron(routing(4)))
    write(tmp_path / "in/r1.jsonl", megatron(routing(4)).replace('"layer": 5', '"layer": 9'))
    refused(tmp_path / "in", tmp_path / "trace", "pipeline")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": -1}, "line 4: expected step"),
        ({"num_tokens": 3}, "line 4: expected step"),
        ({"topk": 2}, "line 4: expected step"),
        ({"topk": None}, "line 4: expected step"),
        ({"top_indices": [[1, 2, 3]] * 3 + [[1, 2]]}, "line 4: expected step"),
        ({"top_indices": [[1, 2, 0.5]] * 4}, "line 4: expected step"),
        ({"top_indices": "abcd"}, "line 4: expected step"),
        ({"top_indices": [[1, 2, 40000]] * 4}, "line 4: expert id 40000"),
        ({"layer": 1 << 40}, "line 4: layer"),
    ],
)
def test_bad_records_are_described(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    lines = megatron(routing(4)).splitlines()
    bad = json.dumps({**json.loads(lines[0]), "step": 1, **change})
    refused(write(tmp_path / "t.jsonl", "\n".join([*lines, bad]) + "\n"), tmp_path / "trace", words)


def test_steps_that_begin_anew_are_refused(tmp_path: Path) -> None:
    text = megatron(routing(4), step=5) + megatron(routing(4), step=2)
    refused(write(tmp_path / "t.jsonl", text), tmp_path / "trace", "line 4: step 2 after 5")
