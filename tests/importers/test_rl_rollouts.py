"""Rollouts: prompt and response told apart, padding dropped, samples of one prompt in one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_samples import LAYERS, TOP_K, ids_of, padded, per_request, recorder, rollout_sample, rollouts
from safetensors.numpy import save_file

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace, recognise
from specmoe.trace import Trace


def imported(path: Path, out: Path, **options: Any) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out, options=ImportOptions(**options))
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def refused(path: Path, words: str) -> None:
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, path.parent / "trace", format="rl-rollouts")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(path)) == 1


def few_prompts(requests: int) -> str:
    return (
        f"the {requests} requests answer or continue only 2 distinct prompt(s), too few for a split that keeps copies "
        "together; --group-by groups them otherwise"
    )


def test_a_dump_of_samples(tmp_path: Path) -> None:
    path = rollouts(tmp_path)
    assert recognise(path).name == "rl-rollouts"
    trace, warnings = imported(path, tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == [f"rollout_0/{index}" for index in range(4)]
    assert [document.group for document in trace.documents] == ["prompt-0", "prompt-0", "prompt-1", "prompt-1"]
    assert warnings == ["layers [0] hold one id throughout, as dense layers do, and were left out", few_prompts(4)]
    assert trace.manifest.source.settings["layers"] == list(range(1, LAYERS + 1))
    for index in range(4):
        prompt, response = 4 + index // 2, 3 + index
        sample, record = rollout_sample(index, index // 2, prompt, response, index), trace.read(index)
        assert record.expert_ids.tolist() == sample["rollout_routed_experts"][:, 1:].tolist()
        assert record.token_ids.tolist() == sample["tokens"][:-1]
        assert record.phase.tolist() == [0] * prompt + [1] * (response - 1)


def columns_of(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {
        "tokens": [sample["tokens"] for sample in samples],
        "response_lengths": [sample["response_length"] for sample in samples],
        "loss_masks": [sample["loss_mask"] for sample in samples],
        "sample_indices": [sample["index"] for sample in samples],
        "rollout_routed_experts": [torch.from_numpy(sample["rollout_routed_experts"]) for sample in samples],
    }


def test_the_same_samples_in_columns_and_in_groups(tmp_path: Path) -> None:
    plain, _ = imported(rollouts(tmp_path), tmp_path / "trace")
    samples = [rollout_sample(index, index // 2, 4 + index // 2, 3 + index, index) for index in range(4)]
    bare = [{key: value for key, value in sample.items() if key not in {"group_index", "prompt"}} for sample in samples]
    for number, content in enumerate(
        (
            {"rollout_id": 1, "rank": 0, "rollout_data": columns_of(samples)},
            columns_of(samples),
            [samples[:2], samples[2:]],
            [bare[:2], bare[2:]],
        )
    ):
        torch.save(content, tmp_path / f"{number}.pt")
        assert recognise(tmp_path / f"{number}.pt").name == "rl-rollouts"
        trace, _ = imported(tmp_path / f"{number}.pt", tmp_path / str(number))
        # Where nothing else says so, equal tokens of the prompt tell what belongs together.
        assert [document.group for document in trace.documents] == ["prompt-0", "prompt-0", "prompt-1", "prompt-1"]
        for index in range(4):
            tensors = dict(trace.read(index).tensors())
            assert all(torch.equal(tensors[key], value) for key, value in plain.read(index).tensors())


PROMPTS, RESPONSES = [4, 6, 4], [3, 5, 2]


def saved(folder: Path, suffix: str, batch: dict[str, np.ndarray]) -> Path:
    path = folder / f"batch{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, **batch)  # pyright: ignore[reportArgumentType]
    elif suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(array) for name, array in batch.items()}, path)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in batch.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_padded_batch(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path, suffix, padded(PROMPTS, RESPONSES))
    assert recognise(path).name == "rl-rollouts"
    trace, warnings = imported(path, tmp_path / "trace")
    assert warnings == [few_prompts(3)]
    assert trace.topology.top_k == TOP_K
    # The first and the third sample have the same prompt.
    assert [document.group for document in trace.documents] == ["prompt-0", "prompt-1", "prompt-0"]
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        record = trace.read(row)
        assert record.expert_ids.tolist() == ids_of(prompt + response - 1, row).tolist()
        assert record.phase.tolist() == [0] * prompt + [1] * (response - 1)
        written = range(900 + 10 * row, 900 + 10 * row + response - 1)
        assert record.token_ids.tolist() == [*range(500, 500 + prompt), *written]


@pytest.mark.parametrize("how", ["response_lengths", "prompt_lengths", "prompts and responses", "full mask", "nothing"])
def test_what_says_where_the_prompt_ends(tmp_path: Path, how: str) -> None:
    batch = padded(PROMPTS, RESPONSES)
    mask = batch.pop("response_mask")
    if how == "response_lengths":
        batch["response_lengths"] = np.array(RESPONSES)
    elif how == "prompt_lengths":
        batch["prompt_lengths"] = np.array(PROMPTS)
    elif how == "prompts and responses":
        tokens = batch.pop("input_ids")
        batch |= {"prompts": tokens[:, :6], "responses": tokens[:, 6:]}
    elif how == "full mask":
        batch["loss_mask"] = np.concatenate([np.zeros((3, 6), np.float32), mask.astype(np.float32)], 1)
    trace, warnings = imported(saved(tmp_path, ".npz", batch), tmp_path / "trace")
    if how == "nothing":
        assert warnings == ["3 of 3 requests do not say where the prompt ends; all of it counts as prefill"]
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        decoded = 0 if how == "nothing" else response - 1
        record = trace.read(row)
        assert record.phase.tolist() == [0] * (prompt + response - 1 - decoded) + [1] * decoded
        assert record.expert_ids.tolist() == ids_of(prompt + response - 1, row).tolist()
        assert int(record.token_ids[0]) == 500


def test_without_a_mask_rows_of_one_number_at_the_ends_are_padding(tmp_path: Path) -> None:
    batch = padded(PROMPTS, RESPONSES)
    trace, warnings = imported(saved(tmp_path, ".npz", {"routed_experts": batch["routed_experts"]}), tmp_path / "trace")
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        assert trace.read(row).expert_ids.tolist() == ids_of(prompt + response - 1, row).tolist()
        assert trace.read(row).token_ids.eq(-1).all()
    # 11 places each; a place at every end may be the last token's.
    lost = sum(11 - prompt - response for prompt, response in zip(PROMPTS, RESPONSES, strict=True))
    assert f"{lost} rows at the ends of samples hold 0 or -1 throughout, as padding does; left out" in warnings
    assert "2 samples have no mask that says which rows are padding" in warnings


def test_routing_of_real_rows_is_not_taken_for_padding(tmp_path: Path) -> None:
    ids = ids_of(9, layers=2, k=1)[None].copy()
    ids[0, 0] = ids[0, -1] = 0  # a top-1 router may choose expert 0
    trace, _ = imported(saved(tmp_path, ".npz", {"routed_experts": ids}), tmp_path / "trace")
    assert len(trace.read(0)) == 9
    ids = ids_of(9)[None].copy()
    ids[0, 4] = 0  # not at an end, but expert 0 in three slots is no router's choice
    trace, warnings = imported(saved(tmp_path, ".npz", {"routed_experts": ids}), tmp_path / "inner")
    assert len(trace.read(0)) == 8
    assert any("expert 0 in every slot" in warning for warning in warnings)


def test_a_tools_tokens_within_a_response_are_read_by_the_model(tmp_path: Path) -> None:
    mask = [1, 1, 0, 0, 1, 1]
    samples = [rollout_sample(0, 0, 4, 6, 0, loss_mask=mask), rollout_sample(1, 0, 4, 6, 1, loss_mask=[0] * 6)]
    torch.save({"samples": samples}, tmp_path / "a.pt")
    trace, warnings = imported(tmp_path / "a.pt", tmp_path / "trace")
    assert trace.read(0).phase.tolist() == [0] * 4 + mask[:-1]
    # A sample that is not to be learned from has an empty mask, and a response all the same.
    assert trace.read(1).phase.tolist() == [0] * 4 + [1] * 5
    assert "1 responses hold tokens that the mask leaves out, such as a tool's; they count as prefill" in warnings


def test_samples_without_routing_are_left_out(tmp_path: Path) -> None:
    samples = [rollout_sample(index, index, 4, 6, index) for index in range(4)]
    samples[1]["rollout_routed_experts"] = None
    samples[2]["rollout_routed_experts"] = np.zeros_like(samples[2]["rollout_routed_experts"])
    torch.save({"samples": samples}, tmp_path / "a.pt")
    trace, warnings = imported(tmp_path / "a.pt", tmp_path / "trace")
    assert [(document.doc_id, document.group) for document in trace.documents] == [
        ("a/0", "prompt-0"),
        ("a/3", "prompt-1"),
    ]
    assert "2 samples hold no routed experts, as those that were aborted do; left out" in warnings


def test_groups_join_what_has_anything_in_common(tmp_path: Path) -> None:
    samples = [rollout_sample(index, group, 4, 6, index) for index, group in enumerate((0, 1, 2, 3))]
    samples[1]["prompt"] = samples[0]["prompt"]  # by its text
    samples[2]["tokens"][:4] = samples[1]["tokens"][:4]  # by its tokens
    (tmp_path / "in").mkdir()
    torch.save({"samples": samples[:2]}, tmp_path / "in" / "a.pt")
    torch.save({"samples": samples[2:]}, tmp_path / "in" / "b.pt")
    assert recognise(tmp_path / "in").name == "rl-rollouts"
    trace, _ = imported(tmp_path / "in", tmp_path / "trace")
    found = [(document.doc_id, document.group) for document in trace.documents]
    assert found == [("a/0", "prompt-0"), ("a/1", "prompt-0"), ("b/2", "prompt-0"), ("b/3", "prompt-1")]


def test_the_same_prompt_behind_other_padding(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    saved(tmp_path / "in", ".npz", padded([4], [3]))
    saved(tmp_path / "in", ".safetensors", padded([4], [5], (9, 5)))
    trace, _ = imported(tmp_path / "in", tmp_path / "trace")
    assert [document.group for document in trace.documents] == ["prompt-0", "prompt-0"]


def test_an_index_that_repeats_is_that_of_the_prompt(tmp_path: Path) -> None:
    batch = padded(PROMPTS, RESPONSES) | {"index": np.array([7, 8, 8])}
    del batch["input_ids"]
    trace, _ = imported(saved(tmp_path, ".pt", batch), tmp_path / "trace")
    found = [(document.doc_id, document.group) for document in trace.documents]
    assert found == [("batch/7", "prompt-0"), ("batch/8", "prompt-1"), ("batch/000002", "prompt-1")]


def test_other_archives_are_not_taken_for_rollouts(tmp_path: Path) -> None:
    folder = per_request(tmp_path)
    for path in (folder, *folder.rglob("*.*")):
        assert recognise(path).name == "routed-experts"
    assert recognise(recorder(tmp_path)).name == "sglang-recorder"
    path = saved(tmp_path, ".safetensors", {"experts": ids_of(5)})
    assert recognise(path).name == "safetensors"


def batch_of(**changed: Any) -> dict[str, Any]:
    return {name: value for name, value in (padded(PROMPTS, RESPONSES) | changed).items() if value is not None}


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (batch_of(routed_experts=None), "holds no rollout_routed_experts"),
        (batch_of(routed_experts=np.zeros((3, 11, 2), np.int64)), "expected .batch, tokens, layers, k.|masks|tokens"),
        (batch_of(routed_experts=ids_of(33).reshape(3, 11, 4, 3).astype(np.float32) + 0.5), "float32, expected whole"),
        (batch_of(attention_mask=np.ones((2, 11), np.int64)), "attention_mask has 2 entries for 3 samples"),
        (batch_of(attention_mask=np.full((3, 11), 2)), r"the mask \(attention\) holds other numbers than 0 and 1"),
        (batch_of(attention_mask=np.ones((3, 10), np.int64)), "a mask of 10 places for 11"),
        (batch_of(input_ids=np.ones((3, 20), int), attention_mask=np.ones((3, 20), int)), "11 rows of experts for 20"),
        (batch_of(input_ids=np.ones((3, 4), int), attention_mask=None, response_mask=None), "11 rows of experts for 4"),
        (batch_of(response_lengths=np.array([3, 99, 2])), "response_length is 99, expected a number from 0 to 11"),
        (batch_of(response_mask=np.ones((3, 40), np.int64)), "a mask of 40 places for 11"),
        (batch_of(routed_experts=np.full((3, 11, 4, 3), -7)), "holds -7"),
        (batch_of(routed_experts=np.zeros((3, 11, 4, 3), np.int64)), "no token"),
    ],
)  # fmt: skip
def test_wrong_batches_are_described(tmp_path: Path, batch: dict[str, Any], words: str) -> None:
    refused(saved(tmp_path, ".npz", batch), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a int in place 0, expected a sample"),
        ({"samples": "x"}, "neither a list of samples nor a dict of columns"),
        ({"samples": []}, "no token"),
        ([{"rollout_routed_experts": torch.ones(3, 2)}], r"experts are \(3, 2\), expected .tokens, layers, k."),
        ([{"rollout_routed_experts": "x"}], "experts are str"),
        ([{"rollout_routed_experts": torch.ones(3, 2, 2).int(), "tokens": torch.ones(2, 2).int()}], "tokens is"),
        ([{"rollout_routed_experts": torch.ones(3, 2, 2).int(), "response_length": 2.5}], "response_length is 2.5"),
        ({"rollout_routed_experts": [torch.ones(3, 2, 2).int()], "response_lengths": [1, 2]}, "2 entries for 1"),
    ],
)  # fmt: skip
def test_wrong_dumps_are_described(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", words)


def test_one_array_under_many_samples_is_refused(tmp_path: Path) -> None:
    sample = {"rollout_routed_experts": torch.from_numpy(ids_of(2000))}
    torch.save([sample] * 200_000, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "far more than the file holds")
