"""A shared expert fused into the top-k: left out of every array where it is certain, kept where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_samples import dump, npy_text, recall_of, texts, with_slot
from safetensors.torch import save_file

from specmoe.diagnostics import validate_trace
from specmoe.sources.fused_slots import SlotUse, fused_slots
from specmoe.sources.importers import ImportOptions, import_trace
from specmoe.sources.synthetic import synthetic_trace
from specmoe.topology import Topology
from specmoe.trace import Trace

EXPERTS, TOP_K = 16, 3
TEXTS = texts()
TOKENS = len(TEXTS["token_ids"])
SHARED = np.full(TOKENS, EXPERTS)
REPLICAS = EXPERTS + np.random.default_rng(1).integers(0, 4, TOKENS)
SAYS = "as where an engine fuses a shared expert into the top-k; it was left out"


def imported(path: Path, out: Path, **options: Any) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out, options=ImportOptions(**options))
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def of_arrays(folder: Path, arrays: dict[str, Any], **options: Any) -> tuple[Trace, list[str]]:
    folder.mkdir()
    np.savez(folder / "a.npz", **arrays)
    return imported(folder / "a.npz", folder / "trace", **options)


def documents_of(ids_TLK: np.ndarray) -> list[np.ndarray]:
    return np.split(ids_TLK, TEXTS["seq_offsets"][1:-1])


def same_ids(trace: Trace, ids_TLK: np.ndarray = TEXTS["experts"]) -> None:
    found = torch.cat([trace.read(index).expert_ids for index in range(len(trace))])
    assert found.tolist() == ids_TLK.tolist()


@pytest.mark.parametrize("slot", ["shared", "replicas"])
@pytest.mark.parametrize("at", [-1, 0])
def test_recall_is_that_of_the_model_without_the_slot(tmp_path: Path, slot: str, at: int) -> None:
    whole, none = of_arrays(tmp_path / "plain", TEXTS)
    assert none == []
    arrays = with_slot(TEXTS, SHARED if slot == "shared" else REPLICAS, at=at)
    trace, warnings = of_arrays(tmp_path / "fused", arrays)
    assert len(warnings) == 1
    assert warnings[0].endswith(SAYS)
    assert warnings[0].startswith(f"slot {3 if at else 0} of 0 to 3 holds ")
    assert ("expert 16 " if slot == "shared" else "one of 4 experts (16, 17, 18, 19)") in warnings[0]
    assert (trace.topology.top_k, trace.topology.experts) == (TOP_K, EXPERTS)
    same_ids(trace)
    for name in ("TokenTable", "LayerFrequency"):
        assert recall_of(trace, name) == recall_of(whole, name)
    assert recall_of(whole, "TokenTable") > recall_of(whole, "LayerFrequency") + 0.1


def test_recall_would_be_another_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recall_of(of_arrays(tmp_path / "plain", TEXTS)[0], "TokenTable")
    monkeypatch.setattr(SlotUse, "fused", lambda *_: None)
    shared = recall_of(of_arrays(tmp_path / "shared", with_slot(TEXTS, SHARED))[0], "TokenTable")
    replicas = recall_of(of_arrays(tmp_path / "replicas", with_slot(TEXTS, REPLICAS))[0], "TokenTable")
    assert shared > plain + 0.05
    assert replicas < plain - 0.03


def test_a_replica_in_every_ranks_block_of_ids(tmp_path: Path) -> None:
    # Four ranks hold four experts and a replica each: ids 4, 9, 14 and 19 are the shared expert's.
    spread = TEXTS["experts"] + TEXTS["experts"] // 4
    replica = np.random.default_rng(2).integers(0, 4, TOKENS) * 5 + 4
    trace, warnings = of_arrays(tmp_path / "a", with_slot({**TEXTS, "experts": spread}, replica))
    assert "one of 4 experts (4, 9, 14, 19)" in warnings[0]
    assert trace.topology.top_k == TOP_K
    same_ids(trace, spread)


def test_gate_weights_and_logits_of_the_slot_go_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = with_slot(TEXTS, SHARED)
    arrays["gate_weights"] = rng.random(arrays["experts"].shape).astype(np.float32)
    arrays["router_logits"] = rng.random((TOKENS, 5, EXPERTS + 1)).astype(np.float32)
    arrays["num_experts"] = np.array(EXPERTS + 1)
    trace, _ = of_arrays(tmp_path / "a", arrays)
    assert trace.topology.experts == EXPERTS
    record = trace.read(1)
    assert record.gate_weights is not None
    assert record.router_logits is not None
    assert record.gate_weights.tolist() == arrays["gate_weights"][60:120, :, :TOP_K].tolist()
    assert record.router_logits.tolist() == arrays["router_logits"][60:120, :, :EXPERTS].tolist()


def test_what_the_user_says_of_the_experts_holds(tmp_path: Path) -> None:
    # True of the model, and too few for the ids as they are.
    assert of_arrays(tmp_path / "a", with_slot(TEXTS, SHARED), experts=EXPERTS)[0].topology.experts == EXPERTS
    assert of_arrays(tmp_path / "b", with_slot(TEXTS, SHARED), experts=20)[0].topology.experts == 20


def test_a_dense_layer_and_rows_that_are_no_routing_do_not_hide_it(tmp_path: Path) -> None:
    ids = with_slot(TEXTS, SHARED)["experts"].copy()
    ids[:, 2] = 0
    ids[7:9] = 0
    ids[20:40] = np.arange(4)
    np.save(tmp_path / "a.npy", ids)
    trace, warnings = imported(tmp_path / "a.npy", tmp_path / "trace")
    assert sum(warning.endswith(SAYS) for warning in warnings) == 1
    assert trace.manifest.source.settings["layers"] == [0, 1, 3, 4]
    kept = np.delete(np.arange(TOKENS), [*range(7, 9), *range(20, 40)])
    same_ids(trace, TEXTS["experts"][kept][:, [0, 1, 3, 4]])


@pytest.mark.parametrize("filler", [0, -1])
def test_formats_that_keep_dense_layers_see_it_too(tmp_path: Path, filler: int) -> None:
    ids = with_slot(TEXTS, SHARED)["experts"].astype(np.int16)
    ids[:, 2] = filler
    trace, warnings = of_arrays(tmp_path / "a", {**TEXTS, "experts": ids})
    assert len(warnings) == 1
    assert warnings[0].endswith(SAYS)
    same_ids(trace, ids[..., :TOP_K])
    path = tmp_path / "b.safetensors"
    save_file({"topk_ids": torch.from_numpy(ids)}, path)
    same_ids(imported(path, tmp_path / "b")[0], ids[..., :TOP_K])


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint16, np.int16])
def test_ids_of_any_whole_numbers(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "a.npy", with_slot(TEXTS, SHARED)["experts"].astype(dtype))
    trace, _ = imported(tmp_path / "a.npy", tmp_path / "trace")
    same_ids(trace)


@pytest.mark.parametrize(
    "form", ["npy", "pt", "responses", "safetensors", "by-layer", "recorder", "problems", "megatron"]
)
def test_every_importer_of_arrays_leaves_it_out(tmp_path: Path, form: str) -> None:
    ids = with_slot(TEXTS, SHARED)["experts"]
    path = tmp_path / form
    parts = documents_of(ids)
    if form == "npy":
        path.mkdir()
        for number, part in enumerate(parts):
            np.save(path / f"{number:03d}.npy", part)
    elif form == "pt":
        path = tmp_path / "a.pt"
        torch.save([torch.from_numpy(part) for part in parts], path)
    elif form == "responses":
        path = tmp_path / "a.jsonl"
        lines = [{"id": f"{n}", "choices": [{"routed_experts": npy_text(part)}]} for n, part in enumerate(parts)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif form in ("safetensors", "by-layer"):
        path = tmp_path / "a.safetensors"
        tensors = {"seq_offsets": torch.from_numpy(TEXTS["seq_offsets"])}
        whole = torch.from_numpy(ids).int()
        if form == "safetensors":
            tensors["topk_ids"] = whole
            tensors["routing_weights"] = torch.rand(whole.shape)
        else:
            tensors |= {f"layers.{layer}.topk_ids": whole[:, layer].contiguous() for layer in range(5)}
        save_file(tensors, path)
    elif form == "recorder":
        path = tmp_path / "expert_distribution_recorder_1_0.pt"
        records = [
            {
                "forward_mode": 1,
                "input_ids": TEXTS["token_ids"][60 * n : 60 * n + 60].tolist(),
                "positions": list(range(60)),
                "extend_seq_lens": [60],
                "topk_ids_of_layer": torch.from_numpy(
                    np.concatenate([part, np.full((60, 5, 4), -1)], 2).transpose(1, 0, 2).astype(np.int32)
                ),
            }
            for n, part in enumerate(parts)
        ]
        dump(path, records, torch.arange(EXPERTS).repeat(5, 1))
    else:
        path = tmp_path / "a.jsonl"
        lines = []
        for number, part in enumerate(parts):
            for layer in range(5):
                if form == "megatron":
                    record = {"step": number, "layer": layer, "num_tokens": 60, "topk": 4, "block": "decoder"}
                    lines.append({**record, "top_indices": part[:, layer].tolist()})
                    continue
                for token, experts in enumerate(part[:, layer].tolist()):
                    row = {"dataset": "d", "problem_id": f"{number:03d}", "layer": layer, "token_idx": token}
                    lines.append({**row, "experts": experts})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace, warnings = imported(path, tmp_path / "trace")
    assert sum(warning.endswith(SAYS) for warning in warnings) == 1
    assert (trace.topology.layers, trace.topology.top_k, trace.topology.experts) == (5, TOP_K, EXPERTS)
    same_ids(trace)


def test_ids_beyond_the_recorders_map_are_refused_where_they_are_no_shared_expert(tmp_path: Path) -> None:
    from specmoe.errors import SpecmoeError

    ids = torch.from_numpy(TEXTS["experts"][:60].transpose(1, 0, 2).astype(np.int32))
    record = {"forward_mode": 1, "input_ids": list(range(60)), "positions": list(range(60)), "extend_seq_lens": [60]}
    path = dump(
        tmp_path / "expert_distribution_recorder_1_0.pt",
        [{**record, "topk_ids_of_layer": ids}],
        torch.arange(EXPERTS - 1).repeat(5, 1),
    )
    with pytest.raises(SpecmoeError, match="beyond the 15 physical experts"):
        import_trace(path, tmp_path / "trace")


# --- what looks like it and is not certain --------------------------------------------------------------


def seen(ids_TLK: np.ndarray, experts: int = 40) -> tuple[np.ndarray, np.ndarray]:
    found = np.zeros((*ids_TLK.shape[1:], experts), bool)
    layer, slot = np.indices(ids_TLK.shape[1:])
    for row in ids_TLK:
        found[layer[row >= 0], slot[row >= 0], row[row >= 0]] = True
    return found, (ids_TLK >= 0).sum(0)


def verdict(ids_TLK: np.ndarray) -> str:
    found = fused_slots(*seen(ids_TLK))
    return "none" if found is None else "certain" if found.certain else "suspect"


def test_a_few_rows_are_not_enough(tmp_path: Path) -> None:
    few = with_slot(TEXTS, SHARED)["experts"]
    assert [verdict(few[:rows]) for rows in (1, 7, 8, 63, 64)] == ["none", "none", "suspect", "suspect", "certain"]
    many = with_slot(TEXTS, REPLICAS)["experts"]
    assert [verdict(many[:rows]) for rows in (200, 255, 256)] == ["suspect", "suspect", "certain"]
    np.save(tmp_path / "a.npy", few[:30])
    trace, warnings = imported(tmp_path / "a.npy", tmp_path / "trace")
    assert trace.topology.top_k == TOP_K + 1
    assert sum("too few to be sure, so it was kept" in warning for warning in warnings) == 1
    same_ids(trace, few[:30])


def test_the_only_slot_is_never_one() -> None:
    assert verdict(TEXTS["experts"][:, :, :1]) == "none"
    assert verdict(np.full((500, 5, 1), 7)) == "none"
    # Beside a slot that is a router's own, it is: top-1 and a shared expert.
    assert verdict(with_slot({**TEXTS, "experts": TEXTS["experts"][:, :, :1]}, SHARED)["experts"]) == "certain"


def test_collapsed_routing_is_no_shared_expert() -> None:
    favourites = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (5, 1)), axis=1)[:, :TOP_K]
    assert verdict(np.broadcast_to(favourites, (500, 5, TOP_K))) == "none"
    # All tokens alike, in every layer alike.
    assert verdict(np.broadcast_to(np.array([5, 1, 3]), (500, 5, TOP_K))) == "none"
    # In one slot alike, in the others not, but there is no choice in any layer.
    assert verdict(np.insert(np.broadcast_to(np.arange(5)[:, None], (500, 5, 1)), 1, 15, axis=2)) == "none"
    swapped = np.arange(10).reshape(5, 2)[None, :, ::-1] * np.ones((500, 1, 1), int)
    swapped[::2] = swapped[::2, :, ::-1]
    assert verdict(np.insert(swapped, 2, 15, axis=2)) == "none"
    # A favourite of its own in every layer, always first, before others that vary.
    ids = TEXTS["experts"][:, :, :2] % 8
    assert verdict(np.insert(ids, 0, np.arange(8, 13)[None], axis=2)) == "none"
    # Two favourites.
    two = np.random.default_rng(0).integers(0, 2, (TOKENS, 1)) + 2 * np.arange(4, 9)
    assert verdict(np.insert(ids, 0, two, axis=2)) == "none"
    # One layer may have collapsed on its last expert.
    one = with_slot(TEXTS, SHARED)["experts"][:, :1]
    assert verdict(one) == "suspect"
    # One layer may as well have collapsed on any other; five have not on the same.
    middle = np.insert(TEXTS["experts"][:, :, :2] % 8 * 2, 2, 3, axis=2)
    assert (verdict(middle[:, :1]), verdict(middle)) == ("none", "certain")
    # Not in every layer.
    some = with_slot(TEXTS, SHARED)["experts"].copy()
    some[:, 3, 3] = TEXTS["experts"][:, 3, 0] ^ 1
    assert verdict(some) == "none"


def test_a_slot_that_is_empty_now_and_then_is_a_routers(tmp_path: Path) -> None:
    ids = with_slot(TEXTS, SHARED)["experts"].astype(np.int16)
    ids[5, 2, 3] = -1
    assert verdict(ids) == "none"


def test_one_use_in_another_slot_is_enough_against_it() -> None:
    for slot in (SHARED, REPLICAS):
        ids = with_slot(TEXTS, slot)["experts"].copy()
        ids[100, 4, 0] = EXPERTS
        assert verdict(ids) == "none"


def test_a_group_of_experts_for_each_slot_is_a_choice(tmp_path: Path) -> None:
    # As in models that choose one expert of every group, and as the synthetic source of this project does.
    groups = np.random.default_rng(0).integers(0, 8, (600, 5, 4)) + 8 * np.arange(4)
    assert verdict(groups) == "none"
    assert verdict(groups[..., :2]) == "none"
    # Two of a group, two of the next, one of the last.
    twice = np.random.default_rng(1).integers(0, 8, (600, 5, 5)) + 8 * np.array([0, 0, 1, 1, 2])
    assert verdict(twice) == "none"
    assert verdict(twice[:, :, [0, 1, 4]]) == "certain"
    # One of a group, whichever it is in a layer, and one of the last: top-1 and replicas cannot be told from it.
    assert verdict(groups[..., [0, 3]] % 8 + np.arange(5)[:, None] * np.array([2, 0]) + np.array([0, 24])) == "none"
    shape = Topology(model_id="s", layers=4, experts=8, top_k=2, hidden_size=16)
    synthetic_trace(tmp_path / "t", topology=shape, documents=20, tokens=60, determinism=0.5, seed=1)
    assert "shared-slot" not in {finding.code for finding in validate_trace(tmp_path / "t").findings}


def test_gathering_by_rows_and_by_entries_agree() -> None:
    ids = with_slot(TEXTS, SHARED)["experts"].astype(np.int16)
    by_rows, by_entries = SlotUse(), SlotUse()
    for block in np.array_split(ids, 7):
        by_rows.add_rows(block)
        _, layer, slot = np.indices(block.shape)
        order = np.random.default_rng(0).permutation(block.size)
        by_entries.add_entries(3 * layer.reshape(-1)[order], slot.reshape(-1)[order], block.reshape(-1)[order])
    assert by_rows.fused() == by_entries.fused() == fused_slots(*seen(ids))
    assert by_rows.fused(np.array([1, 2, 4])) == by_entries.fused(np.array([3, 6, 12]))
    by_entries.add_entries(np.array([1 << 20]), np.array([32766]), np.array([32766]))
    assert by_entries.fused() is None
