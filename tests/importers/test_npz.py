"""The .npz importer: every array goes where it belongs; no header is believed."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_samples import EXPERTS, LAYERS, LENGTHS, TOP_K, WIDTH, flat_arrays, full_arrays, npz, offsets

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
        import_trace(path, path.parent / "trace", format="npz")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "document 'sequence-" in str(caught.value)
    assert str(caught.value).count(str(path)) <= 1


def raw_member(shape: str, dtype: str = "<i8", data: bytes = b"", order: str = "False") -> bytes:
    """The bytes of a .npy with any header."""
    text = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def with_member(path: Path, name: str, content: bytes) -> Path:
    """A sample with one member replaced."""
    arrays = {key: value for key, value in flat_arrays().items() if key != name}
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("compressed", [True, False])
def test_the_required_arrays_alone(tmp_path: Path, compressed: bool) -> None:
    arrays = flat_arrays(prompt_number=np.array([100, 101, 102, 300]), layers=np.arange(1, 5))
    path = npz(tmp_path, compressed=compressed, **arrays)
    assert recognise(path).name == "npz"
    trace, warnings = imported(path, tmp_path / "trace", experts=64)
    assert warnings == []
    assert trace.manifest.source.kind == "npz"
    assert trace.manifest.source.settings["layers"] == [1, 2, 3, 4]
    shape = trace.topology
    assert (shape.layers, shape.experts, shape.top_k, shape.hidden_size) == (LAYERS, 64, TOP_K, 0)
    assert [document.doc_id for document in trace.documents] == ["prompt-100", "prompt-101", "prompt-102", "prompt-300"]
    domains = ["prompts-1-100", "prompts-101-200", "prompts-101-200", "prompts-201-300"]
    assert [document.domain for document in trace.documents] == domains
    for index, (start, stop) in enumerate(zip(offsets(), offsets()[1:], strict=False)):
        record = trace.read(index)
        assert record.expert_ids.tolist() == arrays["experts"][start:stop].tolist()
        assert record.token_ids.tolist() == arrays["token_ids"][start:stop].tolist()
        assert record.phase.eq(0).all()


def test_every_optional_array(tmp_path: Path) -> None:
    arrays = full_arrays()
    trace, warnings = imported(npz(tmp_path, **arrays), tmp_path / "trace")
    assert warnings == []
    assert (trace.topology.experts, trace.topology.hidden_size) == (EXPERTS, WIDTH)
    assert [document.domain for document in trace.documents] == ["a", "a", "b", "b"]
    for index, (start, stop) in enumerate(zip(offsets(), offsets()[1:], strict=False)):
        record = trace.read(index)
        assert record.gate_weights is not None
        assert record.router_logits is not None
        assert torch.equal(record.phase, torch.from_numpy(arrays["phase"][start:stop]))
        assert torch.equal(record.gate_weights, torch.from_numpy(arrays["gate_weights"][start:stop]).float())
        assert torch.equal(record.router_logits, torch.from_numpy(arrays["router_logits"][start:stop]).float())
    first, none, third = (trace.read(index).hidden for index in (0, 1, 2))
    assert first is not None
    assert third is not None
    assert none is None
    assert torch.equal(torch.cat([first, third]), torch.from_numpy(arrays["hidden"]))


def test_bfloat16_and_hidden_of_every_token(tmp_path: Path) -> None:
    hidden = torch.randn(sum(LENGTHS), LAYERS, WIDTH).bfloat16()
    path = npz(tmp_path, **flat_arrays(hidden_bf16=hidden.view(torch.uint16).numpy()))
    trace, _ = imported(path, tmp_path / "trace")
    kept = trace.read(2).hidden
    assert kept is not None
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, hidden[6:18])


def test_names_big_endian_numbers_unknown_arrays_and_no_tokens(tmp_path: Path) -> None:
    arrays = flat_arrays(doc_ids=np.array(["x", "y", "ü", "z" * 40]), more=np.zeros(3))
    arrays["experts"] = arrays["experts"].astype(">i4")
    del arrays["token_ids"]
    trace, warnings = imported(npz(tmp_path, **arrays), tmp_path / "trace")
    assert warnings == ["arrays that no field of a trace stands for were left out: more"]
    assert [document.doc_id for document in trace.documents] == ["x", "y", "ü", "z" * 40]
    assert trace.topology.experts == int(arrays["experts"].max()) + 1
    assert trace.read(0).token_ids.eq(-1).all()
    assert trace.read(3).expert_ids.tolist() == arrays["experts"][18:].tolist()


def test_empty_documents_and_missing_experts_survive(tmp_path: Path) -> None:
    arrays = flat_arrays(seq_offsets=np.array([0, 0, 5, 25, 25]), num_experts=np.array(12))
    arrays["experts"] = arrays["experts"].astype(np.int16)
    arrays["experts"][3, 1, 2] = -1
    trace, _ = imported(npz(tmp_path, **arrays), tmp_path / "trace")
    assert [document.tokens for document in trace.documents] == [0, 5, 20, 0]
    assert trace.documents[0].doc_id == "sequence-000000"
    assert trace.topology.experts == 12  # ids beyond are zero experts, kept as they are
    assert trace.read(1).expert_ids[3, 1, 2] == -1


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"experts": np.zeros((25, 4), np.uint8)}, r"experts has shape \(25, 4\)"),
        ({"experts": np.zeros((25, 4, 0), np.uint8)}, "no layer, or no expert"),
        ({"experts": np.zeros((0, 4, 3), np.uint8)}, "no token"),
        ({"experts": np.zeros((25, 4, 3))}, "experts has dtype float64"),
        ({"experts": np.full((25, 4, 3), 40000)}, "experts holds 40000"),
        ({"experts": np.full((25, 4, 3), -2)}, "experts holds -2"),
        ({"seq_offsets": np.array([0, 5, 4, 25])}, "must rise from 0 to 25"),
        ({"seq_offsets": np.array([0, 24])}, "must rise from 0 to 25"),
        ({"seq_offsets": np.array([1, 25])}, "must rise from 0 to 25"),
        ({"seq_offsets": np.array([0.0, 25.0])}, "seq_offsets has shape"),
        ({"seq_offsets": np.array(25)}, "seq_offsets has shape"),
        ({"token_ids": np.zeros(24, np.int32)}, r"token_ids has shape \(24,\)"),
        ({"token_ids": np.full(25, -3)}, "token_ids holds -3"),
        ({"token_ids": np.full(25, 1 << 40)}, "token_ids holds 1099511627776"),
        ({"token_ids": np.zeros((25, 2), np.int32)}, r"token_ids has shape \(25, 2\)"),
        ({"gate_weights": np.full((25, 4, 3), np.nan)}, "gate_weights holds NaN"),
        ({"gate_weights": np.full((25, 4, 3), 1e300)}, "beyond float32"),
        ({"gate_weights": np.ones((25, 4, 3), np.int32)}, "gate_weights has dtype int32"),
        ({"gate_weights": np.ones((25, 4, 2))}, "gate_weights has shape"),
        ({"router_logits": np.ones((25, 3, 16))}, "router_logits has shape"),
        ({"hidden": np.ones((24, 4, 8), np.float32)}, "hidden has 24 rows"),
        ({"hidden": np.ones((25, 4, 0), np.float32)}, "hidden has shape"),
        ({"hidden": np.ones((9, 4, 8)), "hidden_offsets": np.array([0, 9, 9, 9, 9])}, "another number of hidden"),
        ({"hidden_bf16": np.ones((25, 4, 8), np.float32)}, "expected bfloat16"),
        ({"phase": np.full(25, 2, np.uint8)}, "phase must hold"),
        ({"prompt_number": np.array([1, 1, 2, 3])}, "the same name"),
        ({"prompt_number": np.array([1, 2, 3])}, "expected 4 whole numbers"),
        ({"doc_ids": np.array(["a", "b", "a", "c"])}, "the same name"),
        ({"doc_ids": np.array(["a", "b", "\ud800", "c"])}, "no text"),
        ({"doc_ids": np.array([{}], object)}, "Python objects"),
        ({"num_experts": np.array(0)}, "no possible model"),
        ({"num_experts": np.array([1, 2])}, "expected 1 whole"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    refused(npz(tmp_path, **{**flat_arrays(), **arrays}), words)


def test_missing_arrays_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for missing in ("experts", "seq_offsets"):
        np.savez(path, **{name: array for name, array in flat_arrays().items() if name != missing})
        refused(path, f"it has no array '{missing}'")
    path.write_bytes(b"")
    refused(path, "damaged")
    path.write_bytes(b"PK\x03\x04 and more")
    refused(path, "damaged")
    with pytest.raises(SpecmoeError, match="cannot be read"):
        import_trace(tmp_path, tmp_path / "trace", format="npz")


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (raw_member("(1000000000000, 4, 3)"), "declares shape"),
        (raw_member("(-1, 4, 3)"), "impossible shape"),
        (raw_member("(1,) * 3"), "no readable numpy header"),
        (raw_member("(25, 4, 3)", data=b"\0" * 2399), "declares shape"),
        (raw_member("(25, 4, 3)", "|O", b"\0" * 2400), "Python objects"),
        (raw_member("(25, 4, 3)", data=b"\0" * 2400, order="True"), "ascontiguousarray"),
        (raw_member("(" * 300 + "1" + ")" * 300), "no readable numpy header"),
        (raw_member(str((1,) * 30)), "impossible shape"),
        (b"nothing", "no readable numpy header"),
        (b"", "no readable numpy header"),
    ],
)
def test_no_header_is_believed(tmp_path: Path, member: bytes, words: str) -> None:
    refused(with_member(tmp_path / "a.npz", "experts", member), words)


def test_no_size_in_the_archive_is_believed(tmp_path: Path) -> None:
    # The archive and the array agree on 10 TB, which a few hundred bytes cannot hold.
    path = npz(tmp_path, **flat_arrays(experts=np.zeros((25, 4, 3), np.uint8)))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"experts.npy") - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 24 : entry + 28] = struct.pack("<I", (1 << 32) - 2)
    path.write_bytes(content)
    refused(path, "declares shape|damaged")


def test_truncated_and_flipped_data(tmp_path: Path) -> None:
    path = npz(tmp_path, compressed=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "damaged")
    place = whole.index(b"experts.npy") + 200
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    refused(path, "CRC")
