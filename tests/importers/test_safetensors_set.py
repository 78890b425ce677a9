"""Safetensors under common names: stacked or by layer, cut or whole; nothing is derived from logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from array_samples import EXPERTS, LAYERS, TOP_K, WIDTH, by_layer, safetensors_set, tensors_of
from safetensors.torch import save_file

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import import_trace, recognise
from specmoe.trace import RoutingRecord, Trace


def imported(path: Path, out: Path) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out)
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def refused(tmp_path: Path, words: str, **tensors: torch.Tensor) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, tmp_path / "trace")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(path)) <= 1


def assert_holds(record: RoutingRecord, tensors: dict[str, torch.Tensor]) -> None:
    assert record.gate_weights is not None
    assert record.router_logits is not None
    assert record.hidden is not None
    assert torch.equal(record.token_ids.long(), tensors["input_ids"])
    assert torch.equal(record.expert_ids.long(), tensors["topk_ids"])
    assert torch.equal(record.gate_weights, tensors["routing_weights"].float())
    assert torch.equal(record.router_logits, tensors["router_logits"].float())
    assert record.hidden.dtype == torch.bfloat16
    assert torch.equal(record.hidden, tensors["hidden_states"])


def test_a_folder_of_both_layouts(tmp_path: Path) -> None:
    path = safetensors_set(tmp_path)
    assert recognise(path).name == "safetensors"
    trace, warnings = imported(path, tmp_path / "trace")
    assert warnings == []
    shape = trace.topology
    assert (shape.layers, shape.experts, shape.top_k, shape.hidden_size) == (LAYERS, EXPERTS, TOP_K, WIDTH)
    assert [document.doc_id for document in trace.documents] == ["a", "b"]
    assert_holds(trace.read(0), tensors_of(9))
    assert_holds(trace.read(1), tensors_of(7, 1))
    with pytest.raises(SpecmoeError, match="no known format"):
        recognise(tmp_path / "trace")  # ours is no foreign format


@pytest.mark.parametrize(
    "form",
    [
        "layer.{layer}.{name}",
        "layers.{layer}.{name}",
        "model.layers.{layer}.mlp.gate.{name}",
        "layer_{layer:02d}_{name}",
        "block{layer}/{name}",
        "{name}_layer_{layer}",
        "{name}.{layer}",
    ],
)
def test_names_with_the_layer_in_them(tmp_path: Path, form: str) -> None:
    tensors = tensors_of(6)
    layered = by_layer(tensors, form)
    for name in [name for name in layered if "router_logits" in name]:
        layered[name] = layered[name][None]  # a batch of one
    save_file(layered, tmp_path / "a.safetensors")
    trace, warnings = imported(tmp_path / "a.safetensors", tmp_path / "trace")
    assert warnings == []
    assert_holds(trace.read(0), tensors)


def test_documents_by_offsets_and_other_tensors(tmp_path: Path) -> None:
    tensors = tensors_of(9)
    offsets = torch.tensor([0, 4, 4, 9])
    phase = torch.tensor([0] * 6 + [1] * 3)
    save_file({**tensors, "seq_offsets": offsets, "phase": phase, "weight": torch.ones(3)}, tmp_path / "a.safetensors")
    trace, warnings = imported(tmp_path / "a.safetensors", tmp_path / "trace")
    assert warnings == ["tensors under unknown names were left out: weight"]
    assert [(document.doc_id, document.tokens) for document in trace.documents] == [
        ("a/000000", 4),
        ("a/000001", 0),
        ("a/000002", 5),
    ]
    assert_holds(trace.read(2), {name: tensor[4:] for name, tensor in tensors.items()})
    assert trace.read(2).phase.tolist() == [0, 0, 1, 1, 1]


def test_ids_alone(tmp_path: Path) -> None:
    ids = torch.tensor([[[1, 0]], [[3, -1]]], dtype=torch.int8)
    save_file({"selected_experts": ids}, tmp_path / "a.safetensors")
    trace, _ = imported(tmp_path / "a.safetensors", tmp_path / "trace")
    assert trace.manifest.fields == ("token_ids", "phase", "expert_ids")
    assert trace.topology.experts == 4
    assert trace.read(0).expert_ids.tolist() == ids.tolist()
    assert trace.read(0).token_ids.tolist() == [-1, -1]


def without(*names: str, **changes: Any) -> dict[str, torch.Tensor]:
    return {**{name: tensor for name, tensor in tensors_of(6).items() if name not in names}, **changes}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without("topk_ids"), "holds no expert ids.*cannot be told from logits"),
        ({"weight": torch.ones(3)}, "holds no expert ids"),
        (without(topk_ids=torch.zeros(6, 4)), r"topk_ids has shape \(6, 4\)"),
        (without(topk_ids=torch.zeros(6, 4, 3)), "topk_ids has dtype"),
        (without(topk_ids=torch.full((6, 4, 3), 40000)), "ids from 40000"),
        (without(topk_ids=torch.full((6, 4, 3), -2)), "ids from -2"),
        (without(topk_ids=torch.zeros(5, 4, 3).long()), "different numbers of tokens"),
        (without(router_logits=torch.zeros(6, 5, 16)), "different layers"),
        (without(router_logits=torch.zeros(6, 4, 0)), "has shape"),
        (without(router_logits=torch.full((6, 4, 16), float("nan"))), "NaN"),
        (without(router_logits=torch.zeros(6, 4, 16).int()), "router_logits has dtype"),
        (without(expert_ids=torch.zeros(6, 4, 3).long()), "expert_ids twice"),
        (without(**{"layer.0.topk_ids": torch.zeros(6, 3).long()}), "expert_ids twice"),
        (without("topk_ids", **{"layer.0.topk_ids": torch.zeros(6, 3).long()}), "different layers"),
        (without("topk_ids", **{"layer.0.topk_ids": torch.zeros(6).long()}), "must all have one shape"),
        (without(input_ids=torch.full((6,), -5)), "token id lies outside"),
        (without(input_ids=torch.zeros(6)), "token ids have dtype"),
        (without(phase=torch.full((6,), 3)), "phase must hold"),
        (without(seq_offsets=torch.tensor([0, 7])), "must rise from 0 to 6"),
        (without(seq_offsets=torch.tensor([0.0, 6.0])), "seq_offsets has shape"),
        ({"topk_ids": torch.zeros(0, 4, 3).long()}, "no token"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    refused(tmp_path, words, **tensors)


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    path = safetensors_set(tmp_path)
    save_file({"topk_ids": torch.zeros(6, 4, 3).long()}, path / "c.safetensors")
    with pytest.raises(SpecmoeError, match=r"c\.safetensors holds other tensors"):
        import_trace(path, tmp_path / "trace")
    (path / "c.safetensors").write_bytes(b"nothing at all")
    with pytest.raises(SpecmoeError, match="damaged"):
        import_trace(path, tmp_path / "trace")
