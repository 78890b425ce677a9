"""Which axis is which: by the number of tokens, by what the user says, and never in silence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_samples import EXPERTS, LAYERS, TOP_K, WIDTH, ids_of, npz, per_request
from safetensors.torch import save_file

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace
from specmoe.sources.importers.axes import arranged, axes_doubt, axes_of, layers_first
from specmoe.trace import Trace

TOKENS = 40
IDS = ids_of(TOKENS)
LAYERS_FIRST = IDS.transpose(1, 0, 2).copy()
AXES = ("layers", "tokens", "k")


def imported(path: Path, out: Path, **options: Any) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out, options=ImportOptions(experts=EXPERTS, **options))
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def same(trace: Trace, ids_TLK: np.ndarray = IDS) -> None:
    assert (trace.topology.layers, trace.topology.top_k) == ids_TLK.shape[1:]
    assert torch.cat([trace.read(index).expert_ids for index in range(len(trace))]).tolist() == ids_TLK.tolist()


# --- the names -------------------------------------------------------------------------------------------


def test_every_order_of_the_axes() -> None:
    for order in itertools.permutations(range(3)):
        text = ",".join(("tokens", "layers", "k")[axis] for axis in order)
        assert arranged(IDS.transpose(order), "x", axes_of(text)).tolist() == IDS.tolist()
        assert arranged(IDS.transpose(order)[None], "x", axes_of(f"batch,{text}")).tolist() == IDS.tolist()
    assert arranged(IDS[:, None], "x", axes_of(" Tokens, batch,LAYERS ,k")).tolist() == IDS.tolist()


@pytest.mark.parametrize("text", ["", "tokens", "tokens,layers", "tokens,layers,k,k", "tokens,layers,experts", "t,l,k"])
def test_names_that_are_no_axes(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SpecmoeError, match="must name tokens, layers and k once each"):
        axes_of(text)
    np.save(tmp_path / "a.npy", IDS)
    assert run_verb(["import", str(tmp_path / "a.npy"), "--out", str(tmp_path / "t"), "--axes", text]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_shapes_that_do_not_fit_the_names() -> None:
    with pytest.raises(SpecmoeError, match=r"x has shape \(40, 4, 3\), but --axes names 4: batch,tokens,layers,k"):
        arranged(IDS, "x", axes_of("batch,tokens,layers,k"))
    with pytest.raises(SpecmoeError, match="a batch of 2; save each"):
        arranged(np.stack([IDS, IDS]), "x", axes_of("batch,tokens,layers,k"))


def test_doubt_is_about_the_larger_of_two_axes() -> None:
    assert layers_first((4, 40, 3), (40,))
    assert not layers_first((40, 4, 3), (40,))
    assert not layers_first((40, 40, 3), (40,))
    assert not layers_first((4, 39, 3), (40,))
    assert axes_doubt(40, 4, 3) == axes_doubt(4, 4, 3) == axes_doubt(9000, 256, 8) == []
    assert "tokens, layers, k = 4, 40, 3" in axes_doubt(4, 40, 3)[0]
    assert "tokens, layers, k = 9,000, 257, 8" in axes_doubt(9000, 257, 8)[0]


# --- arrays of requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("forwarded", [39, 40])
def test_a_request_is_turned_where_only_the_second_axis_fits_its_tokens(tmp_path: Path, forwarded: int) -> None:
    ids = ids_of(forwarded)
    fields = {"prompt_token_ids": np.arange(30), "token_ids": np.arange(100, 110)}
    np.savez(tmp_path / "a.npz", routed_experts=ids.transpose(1, 0, 2), **fields)
    trace, warnings = imported(tmp_path / "a.npz", tmp_path / "a")
    assert warnings == ["1 of 1 requests are [layers, tokens, k] by their numbers of tokens; turned"]
    same(trace, ids)
    assert trace.read(0).token_ids.tolist() == [*range(30), *range(100, 110)][:forwarded]
    assert trace.read(0).phase.tolist() == [0] * 30 + [1] * (forwarded - 30)
    np.savez(tmp_path / "b.npz", routed_experts=ids, **fields)
    trace, warnings = imported(tmp_path / "b.npz", tmp_path / "b")
    assert warnings == []
    same(trace, ids)


def test_a_prompt_alone_tells_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", routed_experts=LAYERS_FIRST, prompt_token_ids=np.arange(TOKENS))
    trace, _ = imported(tmp_path / "a.npz", tmp_path / "trace")
    same(trace)
    assert trace.read(0).token_ids.tolist() == list(range(TOKENS))


def test_where_both_axes_fit_the_usual_order_holds(tmp_path: Path) -> None:
    ids = ids_of(LAYERS)
    np.savez(tmp_path / "a.npz", routed_experts=ids, prompt_token_ids=np.arange(LAYERS))
    trace, warnings = imported(tmp_path / "a.npz", tmp_path / "trace")
    assert warnings == []
    same(trace, ids)


def test_where_no_axis_fits_the_error_names_them(tmp_path: Path) -> None:
    fields = {"prompt_token_ids": np.arange(20), "token_ids": np.arange(10)}
    np.savez(tmp_path / "a.npz", routed_experts=IDS, **fields)
    words = "40 rows for 20 prompt and 10 generated tokens, with axes read as tokens, layers, k = 40, 4, 3"
    with pytest.raises(SpecmoeError, match=words):
        imported(tmp_path / "a.npz", tmp_path / "trace")


def test_without_tokens_more_layers_than_tokens_are_warned_of(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LAYERS_FIRST)
    _, warnings = imported(tmp_path / "a.npy", tmp_path / "a")
    assert any(
        "tokens, layers, k = 4, 40, 3" in warning and "--axes layers,tokens,k" in warning for warning in warnings
    )
    trace, warnings = imported(tmp_path / "a.npy", tmp_path / "b", axes=AXES)
    assert not any("axes" in warning for warning in warnings)
    same(trace)
    # One long request is enough for all.
    np.savez(tmp_path / "c.npz", short=ids_of(2), long=ids_of(9))
    assert not any("axes" in warning for warning in imported(tmp_path / "c.npz", tmp_path / "c")[1])


def test_layers_first_requests_of_different_lengths_are_refused_with_the_remedy(tmp_path: Path) -> None:
    for length in (9, 12):
        np.save(tmp_path / f"{length}.npy", ids_of(length).transpose(1, 0, 2))
    with pytest.raises(
        SpecmoeError, match=r"9 layers, top-3; the data before it 12.*axes were read as tokens, layers, k"
    ):
        imported(tmp_path, tmp_path / "trace")
    trace, _ = imported(tmp_path, tmp_path.parent / f"{tmp_path.name}-trace", axes=AXES)
    same(trace, np.concatenate([ids_of(12), ids_of(9)]))


def test_the_verb_forces_every_order_upon_every_kind_of_file(tmp_path: Path) -> None:
    source = Trace.open(imported(per_request(tmp_path), tmp_path / "source")[0].directory)
    whole = torch.cat([source.read(index).expert_ids for index in range(len(source))]).numpy()
    turned = tmp_path / "turned"
    turned.mkdir()
    np.save(turned / "a.npy", whole.transpose(2, 0, 1)[:, None])
    np.savez(turned / "b.npz", x=whole.transpose(2, 0, 1)[:, None])
    torch.save({"x": torch.from_numpy(whole.transpose(2, 0, 1)[:, None].copy())}, turned / "c.pt")
    out = tmp_path / "trace"
    assert run_verb(["import", str(turned), "--out", str(out), "--axes", "k,batch,tokens,layers"]) == 0
    same(Trace.open(out), np.concatenate([whole] * 3))


# --- npz and safetensors -------------------------------------------------------------------------------------


def flat(order: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    fields = {
        "experts": IDS.astype(np.uint8),
        "gate_weights": rng.random((TOKENS, LAYERS, TOP_K)).astype(np.float32),
        "router_logits": rng.random((TOKENS, LAYERS, EXPERTS)).astype(np.float32),
        "hidden": rng.random((TOKENS, LAYERS, WIDTH)).astype(np.float16),
    }
    return {name: array.transpose(order) for name, array in fields.items()}


ROWS = {"token_ids": np.arange(TOKENS), "seq_offsets": np.array([0, 25, TOKENS])}


def equal(trace: Trace, other: Trace) -> None:
    assert len(trace) == len(other)
    for index in range(len(trace)):
        ours, theirs = dict(trace.read(index).tensors()), dict(other.read(index).tensors())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_npz_in_any_order_is_the_same_trace(tmp_path: Path, order: tuple[int, ...]) -> None:
    plain, _ = imported(npz(tmp_path, **flat((0, 1, 2)), **ROWS), tmp_path / "plain")
    path = npz(tmp_path, **{name: np.ascontiguousarray(array) for name, array in flat(order).items()}, **ROWS)
    names = tuple(("tokens", "layers", "k")[axis] for axis in order)
    trace, warnings = imported(path, tmp_path / "named", axes=names)
    assert warnings == []
    equal(trace, plain)
    if order == (1, 0, 2):
        trace, warnings = imported(path, tmp_path / "told")
        assert warnings == ["experts (4, 40, 3) is [layers, tokens, k] by its 40 tokens; arrays were turned"]
        equal(trace, plain)
    else:
        with pytest.raises(
            SpecmoeError, match=r"from 0 to 3.*ends at 40: experts has shape \(3, 4, 40\), read as tokens"
        ):
            imported(path, tmp_path / "told")


@pytest.mark.parametrize("known", ["token_ids", "seq_offsets", "nothing"])
def test_safetensors_layers_first(tmp_path: Path, known: str) -> None:
    names = {
        "experts": "topk_ids",
        "gate_weights": "topk_weights",
        "router_logits": "router_logits",
        "hidden": "hidden",
    }

    def saved(path: Path, order: tuple[int, ...], kept: tuple[str, ...]) -> Path:
        tensors = {names[name]: torch.from_numpy(array.copy()) for name, array in flat(order).items()}
        save_file(tensors | {name: torch.from_numpy(ROWS[name]) for name in kept}, path)
        return path

    kept = () if known == "nothing" else (known,)
    plain, _ = imported(saved(tmp_path / "a.safetensors", (0, 1, 2), kept), tmp_path / "plain")
    turned = saved(tmp_path / "b.safetensors", (1, 0, 2), kept)
    trace, warnings = imported(turned, tmp_path / "named", axes=AXES)
    assert not any("turned" in warning for warning in warnings)
    equal(trace, plain)
    trace, warnings = imported(turned, tmp_path / "told")
    if known == "nothing":
        assert any("tokens, layers, k = 4, 40, 3" in warning for warning in warnings)
    else:
        assert any("1 of 1 files are [layers, tokens, ·] by their tokens" in warning for warning in warnings)
        equal(trace, plain)
    last = saved(tmp_path / "c.safetensors", (2, 1, 0), kept)
    equal(imported(last, tmp_path / "last", axes=("k", "layers", "tokens"))[0], plain)


def test_formats_that_say_it_themselves_take_no_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"layer": 0, "token_idx": 0, "experts": [0, 1]}\n')
    assert run_verb(["import", str(path), "--out", str(tmp_path / "t"), "--axes", "layers,tokens,k"]) == 2
    words = "--axes is for arrays (npz, safetensors, routed-experts, routed-responses); problem-jsonl says itself"
    assert words in capsys.readouterr().err


def test_responses_layers_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"choices": [{"routed_experts": LAYERS_FIRST.tolist()}]}) + "\n")
    assert any("--axes layers,tokens,k" in warning for warning in imported(path, tmp_path / "a")[1])
    same(imported(path, tmp_path / "b", axes=AXES)[0])
    answer = {"choices": [{"routed_experts": LAYERS_FIRST.tolist()}], "prompt_token_ids": list(range(TOKENS))}
    path.write_text(json.dumps(answer) + "\n")
    trace, warnings = imported(path, tmp_path / "c")
    assert warnings == ["1 of 1 requests are [layers, tokens, k] by their numbers of tokens; turned"]
    same(trace)
