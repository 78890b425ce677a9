"""Small files of every array format, written from the formats' descriptions, and the routing that they hold."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

LAYERS, EXPERTS, TOP_K, WIDTH = 4, 16, 3, 8
LENGTHS = (5, 1, 12, 7)


def ids_of(tokens: int, seed: int = 0, *, layers: int = LAYERS, experts: int = EXPERTS, k: int = TOP_K) -> np.ndarray:
    """Distinct random experts per token and layer, [tokens, layers, k]."""
    return np.ascontiguousarray(np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), -1)[..., :k])


def offsets() -> np.ndarray:
    return np.concatenate([[0], np.cumsum(LENGTHS)])


def flat_arrays(**more: Any) -> dict[str, np.ndarray]:
    tokens = sum(LENGTHS)
    return {
        "experts": ids_of(tokens).astype(np.uint8),
        "token_ids": np.arange(100, 100 + tokens, dtype=np.int32),
        "seq_offsets": offsets(),
        **more,
    }


def full_arrays() -> dict[str, np.ndarray]:
    """Everything that an .npz may hold."""
    rng = np.random.default_rng(1)
    tokens = sum(LENGTHS)
    return flat_arrays(
        layers=np.arange(1, LAYERS + 1),
        prompt_number=np.array([7, 8, 107, 300], np.int32),
        domains=np.array(["a", "a", "b", "b"]),
        phase=(np.arange(tokens) % 2).astype(np.uint8),
        gate_weights=rng.random((tokens, LAYERS, TOP_K)).astype(np.float16),
        router_logits=rng.standard_normal((tokens, LAYERS, EXPERTS)),
        hidden=rng.standard_normal((17, LAYERS, WIDTH)).astype(np.float16),
        hidden_offsets=np.array([0, 5, 5, 17, 17]),
    )


def npz(folder: Path, *, compressed: bool = True, **arrays: np.ndarray) -> Path:
    path = folder / "sample.npz"
    (np.savez_compressed if compressed else np.savez)(path, **(arrays or full_arrays()))
    return path


def per_request(folder: Path) -> Path:
    """A folder with every kind of file that holds routed experts."""
    path = folder / "requests"
    (path / "deeper").mkdir(parents=True)
    np.save(path / "alone.npy", ids_of(6).astype(np.int32))
    np.savez(path / "many.npz", first=ids_of(4, 1).astype(np.uint8), second=ids_of(3, 2).astype(np.uint8))
    request = {
        "prompt_routed_experts": torch.from_numpy(ids_of(3, 3)).short(),
        "routed_experts": torch.from_numpy(ids_of(2, 4)).short(),
        "prompt_token_ids": [1, 2, 3],
        "token_ids": torch.tensor([4, 5, 6]),
    }
    torch.save([torch.from_numpy(ids_of(2, 5)).to(torch.uint16), request], path / "deeper" / "mixed.pt")
    return path


def npy_text(array: np.ndarray) -> str:
    """Base64 of a ``.npy``, as vLLM sends it."""
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def sglang_response(name: str, prompt: int, generated: int, seed: int, skipped: int = 0) -> dict[str, Any]:
    """As SGLang's ``/generate`` answers: int32 in base64, no shape, dense layers filled with 0."""
    ids = ids_of(prompt + generated - 1, seed, layers=LAYERS + 1)
    ids[:, 0] = 0
    return {
        "text": "…",
        "output_ids": list(range(500, 500 + generated)),
        "meta_info": {
            "id": name,
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "routed_experts": base64.b64encode(ids[skipped:].astype("<i4").tobytes()).decode(),
        },
    }


def vllm_response(name: str, prompt: int, generated: int, seed: int) -> dict[str, Any]:
    """As vLLM's completions endpoint answers with return_token_ids."""
    ids = ids_of(prompt + generated - 1, seed).astype(np.uint8)
    return {
        "id": name,
        "choices": [{"index": 0, "token_ids": list(range(generated)), "routed_experts": npy_text(ids)}],
        "prompt_token_ids": list(range(900, 900 + prompt)),
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated},
    }


def jsonl(folder: Path, *lines: Any) -> Path:
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def responses(folder: Path) -> Path:
    return jsonl(folder, sglang_response("a", 60, 9, 0), sglang_response("b", 20, 1, 1, skipped=4))


def chunks_of(response: dict[str, Any], *, bearer: int = 0) -> list[dict[str, Any]]:
    """A completion as its stream brings it: a token at a time, the experts on chunk ``bearer``, usage at the end."""
    chunks: list[dict[str, Any]] = []
    for choice in response["choices"]:
        for number, token in enumerate(choice["token_ids"]):
            last = number == len(choice["token_ids"]) - 1
            part = {"index": choice["index"], "token_ids": [token], "finish_reason": "stop" if last else None}
            part["routed_experts"] = choice["routed_experts"] if number == bearer else None
            chunk: dict[str, Any] = {
                "id": response["id"],
                "object": "text_completion",
                "choices": [part],
                "usage": None,
            }
            chunks.append(chunk if number else {**chunk, "prompt_token_ids": response["prompt_token_ids"]})
    return [*chunks, {"id": response["id"], "choices": [], "usage": response["usage"]}]


def events(*values: Any) -> str:
    """A stream as a client logs it."""
    return "".join(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n" for value in values)


def stream(folder: Path) -> Path:
    path = folder / "responses.sse"
    first, second = chunks_of(vllm_response("a", 6, 3, 0)), chunks_of(vllm_response("b", 4, 4, 1), bearer=3)
    path.write_text(": hello\n" + events(*first, "[DONE]", *second, "[DONE]"))
    return path


def batch(folder: Path) -> Path:
    path = folder / "output.jsonl"
    lines = [
        {"id": "b1", "custom_id": "one", "response": {"status_code": 200, "body": vllm_response("a", 5, 3, 0)}},
        {"id": "b2", "custom_id": "two", "response": {"status_code": 500, "body": {"message": "out of memory"}}},
        {"id": "b3", "custom_id": "three", "response": None, "error": {"code": "expired", "message": "too late"}},
        {"id": "b4", "custom_id": "four", "response": {"status_code": 200, "body": vllm_response("b", 3, 2, 1)}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def indented(folder: Path) -> Path:
    path = folder / "responses.json"
    path.write_text(json.dumps([vllm_response("a", 5, 3, 0), vllm_response("b", 3, 2, 1)], indent=2))
    return path


def packed(folder: Path) -> Path:
    plain = responses(folder)
    path = plain.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    return path


def pass_record(number: int, mode: int, parts: list[tuple[int, int, int]], seed: int = 0) -> dict[str, Any]:
    """One record of the recorder: parts are (request, first position, tokens); token ids tell request and position."""
    positions = [position for _, first, count in parts for position in range(first, first + count)]
    tokens = [1000 * request + p for request, first, count in parts for p in range(first, first + count)]
    ids = np.full((LAYERS + 1, len(tokens), 8), -1, np.int32)  # layer 0 is dense, slots beyond k are unused
    ids[1:, :, :TOP_K] = ids_of(len(tokens), seed + number).transpose(1, 0, 2)
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": tokens,
        "positions": positions,
        "extend_seq_lens": None if mode == 2 else [count for _, _, count in parts],
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(ids),
        "misc_objects": [],
        "global_physical_count": torch.zeros(LAYERS + 1, EXPERTS, dtype=torch.int32),
    }


def dump(path: Path, records: list[dict[str, Any]], mapping: torch.Tensor | None = None) -> Path:
    identity = torch.arange(EXPERTS).repeat(LAYERS + 1, 1)
    content = {"records": records, "last_physical_to_logical_map": identity if mapping is None else mapping}
    torch.save(content, path)
    return path


def recorder(folder: Path) -> Path:
    records = [
        pass_record(0, 1, [(1, 0, 4), (2, 0, 6)]),
        pass_record(1, 2, [(1, 4, 1), (2, 6, 1)]),
        pass_record(2, 3, [(3, 0, 5), (1, 5, 1), (2, 7, 1)]),
        pass_record(3, 2, [(1, 6, 1), (2, 8, 1), (3, 5, 1)]),
    ]
    return dump(folder / "expert_distribution_recorder_17.5_0.pt", records)


def flame(folder: Path, *, tokens: int = 5000, layers: tuple[int, ...] = (2, 3), statistics: bool = True) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = folder / "flame-moe-290m"
    (model / "samples").mkdir(parents=True)
    actives = model / "actives" / "iter_0540"
    actives.mkdir(parents=True)
    ids, scores = flame_arrays(tokens, len(layers))
    for place, layer in enumerate(layers):
        lists = [pa.array(list(rows[:, place])) for rows in (scores, ids)]
        table = pa.table({"scores": lists[0], "indices": lists[1]})
        pq.write_table(table, actives / f"layer_{layer:02d}.parquet", row_group_size=1500, write_statistics=statistics)
    halves = np.split(np.arange(tokens, dtype=np.int32), [tokens // 3])
    for number, half in enumerate(halves):
        pq.write_table(pa.table({"token_id": half}), model / "samples" / f"{number:03d}.parquet")
    return actives


def flame_arrays(tokens: int, layers: int) -> tuple[np.ndarray, np.ndarray]:
    scores = np.sort(np.random.default_rng(0).random((tokens, layers, 6)).astype(np.float16))[..., ::-1]
    return ids_of(tokens, layers=layers, experts=64, k=6).astype(np.int16), scores


def tensors_of(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "input_ids": torch.arange(tokens),
        "topk_ids": torch.from_numpy(ids_of(tokens, seed)),
        "routing_weights": torch.rand(tokens, LAYERS, TOP_K, dtype=torch.bfloat16),
        "router_logits": torch.randn(tokens, LAYERS, EXPERTS, dtype=torch.float64),
        "hidden_states": torch.randn(tokens, LAYERS, WIDTH, dtype=torch.bfloat16),
    }


def by_layer(tensors: dict[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
    """The same tensors, one per layer; ``form`` holds {layer} and {name}."""
    return {
        form.format(layer=3 * layer + 1, name=name): tensor[:, layer].contiguous()
        for name, tensor in tensors.items()
        if tensor.dim() == 3
        for layer in range(LAYERS)
    } | {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1}


def safetensors_set(folder: Path) -> Path:
    path = folder / "set"
    path.mkdir()
    save_file(tensors_of(9), path / "a.safetensors")
    save_file(by_layer(tensors_of(7, 1), "layers.{layer}.mlp.{name}"), path / "b.safetensors")
    return path


def rollout_sample(index: int, group: int, prompt: int, response: int, seed: int, **more: Any) -> dict[str, Any]:
    """As slime's ``Sample.to_dict`` gives it: rows for all tokens but the last, dense layers filled with 0."""
    ids = ids_of(prompt + response - 1, seed, layers=LAYERS + 1).astype(np.int32)
    ids[:, 0] = 0
    return {
        "group_index": group,
        "index": index,
        "prompt": f"question {group}",
        "tokens": [
            *range(1000 * group, 1000 * group + prompt),
            *range(7000 + 100 * index, 7000 + 100 * index + response),
        ],
        "response": "…",
        "response_length": response,
        "reward": 0.5,
        "loss_mask": [1] * response,
        "rollout_routed_experts": ids,
        "status": "completed",
        "metadata": {"raw_reward": None},
        **more,
    }


def rollouts(folder: Path) -> Path:
    """A dump of slime's: two prompts with two samples each."""
    samples = [rollout_sample(index, index // 2, 4 + index // 2, 3 + index, index) for index in range(4)]
    torch.save({"rollout_id": 0, "samples": samples}, folder / "rollout_0.pt")
    return folder / "rollout_0.pt"


def padded(prompts: list[int], responses: list[int], width: tuple[int, int] = (6, 5)) -> dict[str, np.ndarray]:
    """A batch as verl lays it out: prompts padded left, responses right, the last token without experts."""
    batch, places = len(prompts), sum(width)
    ids = np.zeros((batch, places, LAYERS, TOP_K), np.int16)
    attention, tokens = np.zeros((batch, places), np.int64), np.zeros((batch, places), np.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, stop = width[0] - prompt, width[0] + response
        attention[row, start:stop] = 1
        tokens[row, start:stop] = [*range(500, 500 + prompt), *range(900 + 10 * row, 900 + 10 * row + response)]
        ids[row, start : stop - 1] = ids_of(prompt + response - 1, row)
    return {
        "routed_experts": ids,
        "input_ids": tokens,
        "attention_mask": attention,
        "response_mask": attention[:, width[0] :],
    }


# A sample of every array format for those who walk the registry.
SAMPLES: dict[str, Callable[[Path], Path]] = {
    "npz": npz,
    "routed-experts": per_request,
    "routed-responses": responses,
    "sglang-recorder": recorder,
    "flame-moe": flame,
    "safetensors": safetensors_set,
    "rl-rollouts": rollouts,
}
# Other forms that an importer reads, by its name and theirs.
FORMS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("routed-responses", "stream"): stream,
    ("routed-responses", "batch"): batch,
    ("routed-responses", "indented"): indented,
    ("routed-responses", "gzip"): packed,
}


# --- routing as a model gives it, for what only a measure can tell -------------------------------------------


def texts(documents: int = 40, tokens: int = 60, *, layers: int = 5, experts: int = 16, k: int = 3) -> dict[str, Any]:
    """Token ids and expert ids of documents: experts follow from the token, with noise; slots fall by weight."""
    rng = np.random.default_rng(5)
    taste = rng.standard_normal((50, layers, experts)) + rng.standard_normal((layers, experts))
    words = rng.zipf(1.4, (documents, tokens)) % 50
    ids = np.argsort(-(taste[words] + 0.7 * rng.standard_normal((documents, tokens, layers, experts))), -1)[..., :k]
    return {
        "token_ids": words.reshape(-1).astype(np.int32),
        "experts": np.ascontiguousarray(ids.reshape(-1, layers, k).astype(np.uint8)),
        "seq_offsets": np.arange(documents + 1) * tokens,
    }


def with_slot(arrays: dict[str, Any], ids_T: np.ndarray, *, at: int = -1) -> dict[str, Any]:
    """The same with one slot more, which holds ``ids_T`` in every layer."""
    experts = arrays["experts"]
    slot = np.broadcast_to(ids_T[:, None], experts.shape[:2]).astype(experts.dtype)
    place = experts.shape[2] if at == -1 else at
    return {**arrays, "experts": np.insert(experts, place, slot, axis=2)}


def recall_of(trace: Any, name: str) -> float:
    """recall@K of a training-free predictor at horizon 1, prepared on the train part and judged on the rest."""
    import functools

    from specmoe.dataset import Windows, split_documents
    from specmoe.evaluation import evaluate
    from specmoe.predictors.base import Knowledge
    from specmoe.predictors.registry import PREDICTORS

    parts = split_documents(trace.documents).parts
    train = Windows(trace, parts["train"], length=512)
    judged = Windows(trace, [*parts["validation"], *parts["test"]], length=512)
    predictor = PREDICTORS[name](trace.topology, (1,))
    predictor.prepare(Knowledge(functools.partial(train.batches, 8)))
    tally = evaluate(predictor, judged, only_recall=True)
    return float(tally.sums["recall@K"].sum() / tally.events.sum())
