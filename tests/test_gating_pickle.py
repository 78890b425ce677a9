"""The pickle importer: maps good files exactly, says what is wrong with doubtful ones, runs nothing."""

from __future__ import annotations

import os
import pickle
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import import_trace
from specmoe.sources.importers.restricted_pickle import Array, load_restricted
from specmoe.trace import Trace

LAYERS, EXPERTS, TOP_K, WIDTH = (1, 3, 5), 8, 2, 16
Point = dict[str, Any]


def points(texts: int = 24, *, noise: bool = False, seed: int = 0, pad: int = 0, length: int = 30) -> list[Point]:
    """A small model's routing: hidden states through a linear router, one point per text and layer."""
    rng = np.random.default_rng(seed)
    routers = rng.standard_normal((len(LAYERS), WIDTH, EXPERTS))
    result: list[Point] = []
    for text in range(texts):
        size = length + text % 3
        tokens = rng.integers(5, 1000, size)
        if pad:
            tokens = np.concatenate([tokens, np.full(pad, 1)])
        for layer, router in zip(LAYERS, routers, strict=True):
            hidden = rng.standard_normal((len(tokens), WIDTH)).astype(np.float32)
            logits = hidden @ router
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            result.append(
                {
                    "layer_id": layer,
                    "hidden_states": rng.standard_normal(hidden.shape).astype(np.float32) if noise else hidden,
                    "input_embeddings": tokens.astype(np.int64),
                    "target_routing": probabilities.astype(np.float32),
                    "target_top_k": np.argsort(-probabilities, 1, kind="stable")[:, :TOP_K].astype(np.int64),
                    "prev_layer_gates": [] if layer == 1 else [probabilities.astype(np.float32)],
                    "dataset_name": "wiki" if text % 2 else "code",
                    "sample_id": f"sample-{text}",
                    "sequence_length": len(tokens),
                }
            )
    return result


def as_torch(point: Point) -> Point:
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in point.items()}


def changed(data: list[Point], index: int, **fields: Any) -> list[Point]:
    return [{**point, **fields} if number == index else point for number, point in enumerate(data)]


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def run(tmp_path: Path, content: Any, protocol: int = 4) -> tuple[Trace, list[str]]:
    warnings = import_trace(write(tmp_path / "traces.pkl", content, protocol), tmp_path / "trace")
    assert all("\n" not in warning for warning in warnings)
    trace = Trace.open(tmp_path / "trace")
    trace.verify()
    return trace, warnings


def refused(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, tmp_path / "trace")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "trace").exists()


# --- good files ----------------------------------------------------------------------------------------


def test_fields_are_mapped_exactly(tmp_path: Path) -> None:
    data = points()
    trace, warnings = run(tmp_path, data)
    assert warnings == []
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (3, EXPERTS, TOP_K)
    assert trace.topology.hidden_size == WIDTH
    assert [document.doc_id for document in trace.documents] == [f"sample-{n}" for n in range(24)]
    assert [document.domain for document in trace.documents[:2]] == ["code", "wiki"]
    record = trace.read(5)
    assert record.router_logits is not None
    assert record.gate_weights is not None
    assert record.hidden is not None
    assert record.token_ids.tolist() == data[15]["input_embeddings"].tolist()
    assert record.phase.eq(0).all()
    assert record.hidden.dtype == torch.float16
    for layer in range(3):
        point = data[15 + layer]
        routing = torch.from_numpy(point["target_routing"])
        assert record.expert_ids[:, layer].tolist() == point["target_top_k"].tolist()
        torch.testing.assert_close(record.router_logits[:, layer], (routing + 1e-9).log())
        torch.testing.assert_close(record.router_logits[:, layer].softmax(-1), routing, atol=1e-6, rtol=1e-5)
        expected = routing.gather(1, torch.from_numpy(point["target_top_k"]))
        torch.testing.assert_close(record.gate_weights[:, layer], expected)
        assert torch.equal(record.hidden[:, layer], torch.from_numpy(point["hidden_states"]).half())


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("module", ["__main__", "training.gating_data"])
def test_objects_of_tensors_give_the_same_trace_as_dicts_of_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, protocol: int
) -> None:
    class GatingDataPoint:
        pass

    GatingDataPoint.__module__, GatingDataPoint.__qualname__ = module, "GatingDataPoint"
    monkeypatch.setitem(sys.modules, "training", types.ModuleType("training"))
    monkeypatch.setitem(sys.modules, module, sys.modules.get(module) or types.ModuleType(module))
    monkeypatch.setattr(sys.modules[module], "GatingDataPoint", GatingDataPoint, raising=False)
    data = points(texts=3)
    objects = []
    for point in data:
        instance = GatingDataPoint()
        instance.__dict__.update(as_torch(point))
        objects.append(instance)
    path = write(tmp_path / "objects.pkl", objects, protocol)
    monkeypatch.delattr(sys.modules[module], "GatingDataPoint")
    import_trace(path, tmp_path / "objects")
    expected, _ = run(tmp_path, data, protocol)
    actual = Trace.open(tmp_path / "objects")
    assert len(actual) == len(expected) == 3
    for index in range(3):
        for (name, left), (_, right) in zip(actual.read(index).tensors(), expected.read(index).tensors(), strict=True):
            assert torch.equal(left, right), name


def test_every_kind_of_array_survives(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = [matrix, matrix.T[1:], matrix.bfloat16(), matrix.half(), matrix.long(), torch.nn.Parameter(matrix)]
    tensors += [torch.zeros(0, 3), torch.tensor(3)]
    arrays = [np.arange(6, dtype=">i4").reshape(2, 3).T, np.zeros((0, 2)), np.array(["a", "bcd"])]
    arrays += [np.array([True, False]), np.array([[1.5]], np.float16)]
    for protocol in range(6):
        loaded = load_restricted(write(tmp_path / "a.pkl", tensors + arrays, protocol), "X")
        assert all(isinstance(value, Array) for value in loaded)
        for value, tensor in zip(loaded, tensors, strict=False):
            assert value.numpy().shape == tensor.shape
            assert np.array_equal(value.numpy(), tensor.detach().float().numpy())
        for value, array in zip(loaded[len(tensors) :], arrays, strict=True):
            assert np.array_equal(value.numpy(), array)


def test_plain_values_survive(tmp_path: Path) -> None:
    values = [{1, 2}, frozenset([3]), bytearray(b"ab"), 1j, b"\xff", b"", OrderedDict(a=1), torch.Size([2]), None, 1.5]
    values += [np.float32(2.5), np.int64(7), np.str_("name")]
    for protocol in range(6):
        assert load_restricted(write(tmp_path / "a.pkl", values, protocol), "X") == values


def test_logits_stay_logits_and_gates_are_their_softmax(tmp_path: Path) -> None:
    data = points(texts=3)
    for point in data:
        point["target_routing"] = np.log(point["target_routing"]) + 3
    trace, _ = run(tmp_path, data)
    record = trace.read(0)
    assert record.router_logits is not None
    assert record.gate_weights is not None
    assert torch.equal(record.router_logits[:, 1], torch.from_numpy(data[1]["target_routing"]))
    expected = record.router_logits.softmax(-1).gather(-1, record.expert_ids.long())
    torch.testing.assert_close(record.gate_weights, expected)
    assert trace.manifest.source.settings["routing"] == "logits"


def test_top_1_ids_may_lack_their_last_axis(tmp_path: Path) -> None:
    data = points(texts=3)
    for point in data:
        point["target_top_k"] = point["target_top_k"][:, 0]
    trace, _ = run(tmp_path, data)
    assert trace.topology.top_k == 1
    assert trace.read(1).expert_ids[:, 2, 0].tolist() == data[5]["target_top_k"].tolist()


def test_token_ids_win_over_input_embeddings_and_may_be_a_list(tmp_path: Path) -> None:
    data = points(texts=3)
    for point in data:
        point["token_ids"] = [7] + point["input_embeddings"][1:].tolist()
        point["input_embeddings"] = None
    trace, _ = run(tmp_path, data)
    assert trace.read(0).token_ids[0] == 7


def test_texts_without_sample_id_are_joined_by_their_tokens(tmp_path: Path) -> None:
    data = points(texts=4)
    expected, _ = run(tmp_path, data)
    for point in data:
        del point["sample_id"]
    import_trace(write(tmp_path / "b.pkl", data), tmp_path / "b")
    actual = Trace.open(tmp_path / "b")
    assert [document.doc_id for document in actual.documents] == [f"text-{n:05d}" for n in range(4)]
    for index in range(4):
        assert torch.equal(actual.read(index).expert_ids, expected.read(index).expert_ids)


def test_one_sample_id_in_two_datasets_is_two_texts(tmp_path: Path) -> None:
    data = points(texts=4)
    for number, point in enumerate(data):
        point["sample_id"] = number // 6
    trace, _ = run(tmp_path, data)
    assert sorted(document.doc_id for document in trace.documents) == ["code/0", "code/1", "wiki/0", "wiki/1"]


def test_points_in_any_order(tmp_path: Path) -> None:
    data = points(texts=4)
    expected, _ = run(tmp_path, data)
    by_name = {document.doc_id: index for index, document in enumerate(expected.documents)}
    random.Random(0).shuffle(data)
    import_trace(write(tmp_path / "b.pkl", data), tmp_path / "b")
    actual = Trace.open(tmp_path / "b")
    for index, document in enumerate(actual.documents):
        assert torch.equal(actual.read(index).expert_ids, expected.read(by_name[document.doc_id]).expert_ids)


def test_hidden_beyond_float16_is_kept_in_float32(tmp_path: Path) -> None:
    data = points(texts=3)
    data[4]["hidden_states"] = data[4]["hidden_states"] * 1e5
    hidden = run(tmp_path, data)[0].read(1).hidden
    assert hidden is not None
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden[:, 1], torch.from_numpy(data[4]["hidden_states"]))


def test_progress_and_continuing_after_an_interruption(tmp_path: Path) -> None:
    path = write(tmp_path / "traces.pkl", points(texts=5))

    def interrupt(done: int, total: int) -> None:
        assert total == 5
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_trace(path, tmp_path / "trace", on_progress=interrupt)
    assert len(Trace.open(tmp_path / "trace", allow_incomplete=True)) == 3
    seen: list[int] = []
    import_trace(path, tmp_path / "trace", on_progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3, 4, 5]
    assert len(Trace.open(tmp_path / "trace")) == 5
    with pytest.raises(SpecmoeError, match="another trace"):
        import_trace(write(tmp_path / "other.pkl", points(texts=5, seed=1)), tmp_path / "trace")


# --- doubtful files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_hidden_states_that_are_noise(tmp_path: Path, seed: int) -> None:
    trace, warnings = run(tmp_path, points(noise=True, seed=seed))
    assert len(warnings) == 1
    assert "look like noise" in warnings[0]
    assert trace.read(0).hidden is not None


def test_noise_is_noticed_where_some_experts_are_frequent(tmp_path: Path) -> None:
    data = points(noise=True)
    for point in data:
        logits = np.log(point["target_routing"]) + np.linspace(4, 0, EXPERTS)
        point["target_routing"] = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
        point["target_top_k"] = np.argsort(-point["target_routing"], 1, kind="stable")[:, :TOP_K]
    _, warnings = run(tmp_path, data)
    assert "look like noise" in warnings[0]


def test_weak_but_real_signal_is_no_noise(tmp_path: Path) -> None:
    # Two noisy copies' worth of noise over the signal, and 160 columns of nothing beside it.
    rng = np.random.default_rng(5)
    data = points(texts=40)
    for point in data:
        hidden = point["hidden_states"]
        noisy = hidden + 2 * rng.standard_normal(hidden.shape)
        nothing = rng.standard_normal((len(hidden), 10 * WIDTH))
        point["hidden_states"] = np.concatenate([noisy, nothing], 1).astype(np.float32)
    assert run(tmp_path, data)[1] == []


def test_too_few_texts_to_probe_is_said(tmp_path: Path) -> None:
    _, warnings = run(tmp_path, points(texts=4, noise=True))
    assert len(warnings) == 1
    assert "were not probed" in warnings[0]


def test_gates_that_are_always_empty(tmp_path: Path) -> None:
    data = [{**point, "prev_layer_gates": []} for point in points()]
    _, warnings = run(tmp_path, data)
    assert len(warnings) == 1
    assert "prev_layer_gates is empty" in warnings[0]


def test_padding_counted_as_text_is_named_and_stripped(tmp_path: Path) -> None:
    data = points(pad=10, length=29)
    trace, warnings = run(tmp_path, data)
    assert len(warnings) == 1
    assert "24 of 24 texts end in a run of token 1, 25.0% of all tokens" in warnings[0]
    assert [document.tokens for document in trace.documents[:3]] == [29, 30, 31]
    assert all((trace.read(index).token_ids != 1).all() for index in range(24))


def test_padding_that_sequence_length_excludes_is_no_warning(tmp_path: Path) -> None:
    data = points(pad=10)
    for point in data:
        point["sequence_length"] = np.int64(point["sequence_length"] - 10)
    trace, warnings = run(tmp_path, data)
    assert warnings == []
    assert (trace.read(0).token_ids != 1).all()
    assert len(trace.read(0)) == 30


def test_a_common_last_token_is_no_padding(tmp_path: Path) -> None:
    trace, warnings = run(tmp_path, points(pad=1))
    assert warnings == []
    assert trace.read(0).token_ids[-1] == 1


def test_incomplete_contradictory_and_repeated_points_are_counted(tmp_path: Path) -> None:
    data = points()
    data[4]["input_embeddings"] = data[4]["input_embeddings"] + 1
    data.append(data[9])
    data.append({**data[9], "layer_id": 77})
    del data[0]
    trace, warnings = run(tmp_path, data)
    assert len(trace) == 22
    assert sorted(warning.split(" ", 1)[0] for warning in warnings) == ["1", "1", "1", "layers"]
    text = " | ".join(warnings)
    for words in ("1 data points repeat", "layers [77]", "1 of 24 texts lack a layer", "layers disagree on the tokens"):
        assert words in text


def test_top_k_that_contradicts_the_routing_is_counted(tmp_path: Path) -> None:
    data = points()
    data[0]["target_top_k"] = data[0]["target_top_k"].copy()
    data[0]["target_top_k"][:7] = np.argsort(data[0]["target_routing"][:7], 1)[:, :TOP_K]
    data[1]["target_top_k"] = data[1]["target_top_k"][:, ::-1].copy()  # order carries no weight
    _, warnings = run(tmp_path, data)
    assert len(warnings) == 1
    assert "at 7 of 2,232 places" in warnings[0]


def test_hidden_states_of_some_points_are_left_out(tmp_path: Path) -> None:
    data = points(texts=3)
    del data[4]["hidden_states"]
    trace, warnings = run(tmp_path, data)
    assert "some points have no hidden_states" in warnings[0]
    assert "hidden" not in trace.manifest.fields
    assert trace.read(0).hidden is None


# --- files that are no such thing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_id": None}, "point 1: layer_id"),
        ({"layer_id": "three"}, "point 1: layer_id"),
        ({"target_routing": None}, "point 1: the field target_routing is missing"),
        ({"target_top_k": None}, "point 1: the field target_top_k is missing"),
        ({"input_embeddings": None}, r"point 1: the field token_ids or input_embeddings"),
        ({"input_embeddings": np.zeros((31, 16), np.float32)}, "point 1: input_embeddings has shape"),
        ({"input_embeddings": np.full(30, 0.5)}, "point 1: input_embeddings holds something other than whole"),
        ({"target_routing": np.zeros(30, np.float32)}, r"point 1: target_routing has shape \(30,\)"),
        ({"target_routing": np.full((30, EXPERTS), np.nan, np.float32)}, "point 1: target_routing holds NaN"),
        ({"target_routing": np.full((30, EXPERTS), 1e300)}, "point 1: target_routing holds NaN or Inf"),
        ({"target_routing": np.full((30, 9), 1 / 9)}, "point 1 has 9 experts"),
        ({"target_top_k": np.full((30, 2), EXPERTS)}, "point 1: target_top_k holds"),
        ({"target_top_k": np.full((29, 2), 0)}, "point 1: target_top_k has shape"),
        ({"target_top_k": np.full((30, 3), 0)}, "point 1 has 8 experts, top-3"),
        ({"hidden_states": np.full((30, WIDTH), np.inf, np.float16)}, "point 1: hidden_states holds NaN"),
        ({"hidden_states": np.zeros((29, WIDTH))}, "point 1: hidden_states has shape"),
        ({"hidden_states": [[0.0]]}, "point 1: hidden_states is a list"),
        ({"hidden_states": np.array(["a"])}, "point 1: hidden_states holds something other than numbers"),
        ({"sequence_length": -1}, "point 1: sequence_length"),
        ({"sample_id": []}, "point 1: sample_id"),
        ({"sample_id": "\ud800"}, "point 1: sample_id"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, fields: Point, words: str) -> None:
    refused(tmp_path, changed(points(texts=2), 1, **fields), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x93NUMPY and more", "damaged"),
        (b"PK\x03\x04rest", "torch.save"),
        ({"points": []}, "type dict, not a list"),
        ([], "empty"),
        ([1, 2], "point 0 is of type int"),
        (pickle.dumps(points(texts=1))[:-40], "damaged"),
        (
            [{**point, "sample_id": number} for number, point in enumerate(points(texts=2))],
            "no text has all MoE layers",
        ),
        ([{**point, "sequence_length": 0} for point in points(texts=2)], "not padding"),
    ],
)
def test_wrong_content_is_described(tmp_path: Path, content: Any, words: str) -> None:
    refused(tmp_path, content, words)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pkl", tmp_path):
        with pytest.raises(SpecmoeError, match=r"no known format|does not exist"):
            import_trace(path, tmp_path / "trace")


# --- files that try to do harm -------------------------------------------------------------------------


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def storage_bytes(payload: Any) -> bytes:
    """A torch storage whose embedded pickle is ``payload`` instead of a reference to its numbers."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in (*head, payload, ["0"]))


_load_from_bytes = getattr(torch.storage, "_load_from_bytes")  # noqa: B009
_rebuild_tensor_v2 = getattr(torch, "_utils")._rebuild_tensor_v2  # noqa: B009
_reconstruct: Any = np.zeros(1).__reduce__()[0]
_frombuffer: Any = np.zeros(1).__reduce_ex__(5)[0]


def test_nothing_is_run(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    touch = Call(os.system, f"touch {harm}")
    evaluate = Call(eval, f"open({str(harm)!r}, 'w')")
    in_object_array = np.empty(1, dtype=object)
    in_object_array[0] = touch
    cases = [
        (touch, f"{os.system.__module__}.system"),
        (evaluate, "builtins.eval"),
        (Call(getattr, "a", "upper"), "builtins.getattr"),
        (Call(__import__, "os"), "builtins.__import__"),
        (Call(Path, "/"), r"pathlib\."),
        (in_object_array, "numpy object array"),
        (Call(torch.load, str(harm)), "torch.serialization.load"),
        (Call(_load_from_bytes, pickle.dumps(touch)), "system"),
        (Call(_load_from_bytes, storage_bytes(touch)), "system"),
        (Call(_load_from_bytes, storage_bytes(Call(_load_from_bytes, b""))), "torch.storage._load_from_bytes"),
        (Call(_reconstruct, np.matrix, (0,), b"b"), "numpy.*matrix"),
        (Call(_reconstruct, dict, (0,), b"b"), "builtins.dict"),
    ]
    for payload, words in cases:
        for protocol in (2, 4):
            for content in (payload, [payload], [{"layer_id": payload}]):
                refused(tmp_path, pickle.dumps(content, protocol), words)
    assert not harm.exists()
    # The same payload does harm where it is unpickled without care, so the test can fail.
    pickle.loads(pickle.dumps(touch))
    assert harm.exists()


def test_names_reached_through_admitted_ones_are_refused(tmp_path: Path) -> None:
    for module, name in (
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy", "load"),
        ("builtins", "object.__subclasses__"),
        ("numpy._core.multiarray", "_reconstruct.__call__"),
    ):
        program = (
            b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
        )
        refused(tmp_path, program + b"\x93.", name)


def test_admitted_names_cannot_be_changed(tmp_path: Path) -> None:
    # GLOBAL, a state, BUILD: sets attributes of whatever the name stands for.
    for name in (
        b"numpy\ndtype",
        b"_codecs\nencode",
        b"numpy\nndarray",
        b"collections\nOrderedDict",
        b"x\nGatingDataPoint",
    ):
        for state in (b"}X\x08\x00\x00\x00__call__Ns", b"N}X\x08\x00\x00\x00__call__Ns\x86"):
            refused(tmp_path, b"\x80\x02c" + name + b"\n" + state + b"b.", "refused|damaged")
    assert len(run(tmp_path, points(texts=3))[0]) == 3


def test_declared_sizes_beyond_the_file_are_refused(tmp_path: Path) -> None:
    huge = 1 << 40
    storage = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    float32 = np.dtype("f4")
    cases = [
        (Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (huge,), float32, False, b"1234")), "declares the shape"),
        (Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (huge, 0, 1 << 62), float32, False, b"")), "impossible"),
        (Call(_frombuffer, b"1234", float32, (huge,), "C"), "declares the shape"),
        (Call(_rebuild_tensor_v2, typed, 0, (huge,), (0,), False, OrderedDict()), "declares the shape"),
        (Call(_rebuild_tensor_v2, typed, 3, (2,), (1,), False, OrderedDict()), "declares the shape"),
        (Call(_rebuild_tensor_v2, typed, 0, (2,), (-1,), False, OrderedDict()), "impossible"),
        (Call(_rebuild_tensor_v2, typed, -1, (2,), (1,), False, OrderedDict()), "without its storage"),
        (Call(bytearray, huge), "bytearray"),
    ]
    for payload, words in cases:
        refused(tmp_path, [payload], words)


def test_pickle_bombs_are_refused(tmp_path: Path) -> None:
    many = 50_000
    cases = {
        "memo index": b"\x80\x02]r\xff\xff\xff\x7f.",
        "nests tuples": b"\x80\x04})" + b"\x85" * many + b"Ns.",
        "tuples into": b"\x80\x04})" + b"2\x86" * 80 + b"Ns.",
        "impossible shape": b"\x80\x04}ctorch\nSize\n)\x85\x85RNs.",
        "damaged": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"abc",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "point 0 is of type list": b"\x80\x04" + b"]" * many + b"a" * (many - 1) + b".",
    }
    for words, content in cases.items():
        refused(tmp_path, content, words)


def test_lists_that_unfold_to_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    nested: list[Any] = [0.0, 0.0]
    for _ in range(60):
        nested = [nested, nested]
    refused(tmp_path, changed(points(texts=2), 1, target_routing=nested), "target_routing is a list")
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    refused(tmp_path, changed(points(texts=2), 1, token_ids=cyclic), "token_ids is a list")


def test_layers_that_share_one_array_cannot_fill_the_memory(tmp_path: Path) -> None:
    size = 20_000
    shared = {
        "hidden_states": np.zeros((size, 64), np.float32),
        "target_routing": np.full((size, 2), 0.5, np.float16),
        "target_top_k": np.zeros((size, 1), np.uint8),
        "token_ids": np.arange(size),
        "sample_id": 0,
    }
    refused(tmp_path, [{**shared, "layer_id": layer} for layer in range(300)], "unfolds to")


def test_damage_anywhere_gives_a_trace_or_one_clear_line(tmp_path: Path) -> None:
    data = points(texts=1, length=3)
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for content in (pickle.dumps(data, 4), pickle.dumps([as_torch(point) for point in data], 2)):
        for trial in range(150):
            broken = bytearray(content)
            if trial % 3 == 0:
                del broken[rng.randrange(len(broken)) :]
            else:
                for _ in range(rng.choice((1, 1, 4))):
                    broken[rng.randrange(len(broken))] = rng.randrange(256)
            (tmp_path / "broken.pkl").write_bytes(broken)
            try:
                import_trace(tmp_path / "broken.pkl", tmp_path / f"trace-{outcomes[True]}")
                outcomes[True] += 1
            except SpecmoeError as error:
                assert "\n" not in str(error)
                outcomes[False] += 1
    assert min(outcomes.values()) > 10
