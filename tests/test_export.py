"""Exports hold what the trace holds, appear whole or not at all, and replace nothing unasked."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.sources.importers import ImportOptions, import_trace
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter
from specmoe.trace.export import export_trace, format_of

pq = pytest.importorskip("pyarrow.parquet")

SHAPE = Topology(model_id="m", layers=3, experts=8, top_k=2, hidden_size=5)
ALL = ("token_ids", "phase", "expert_ids", "gate_weights", "router_logits", "hidden")


def record_of(
    tokens: int, seed: int, fields: tuple[str, ...] = ALL, dtype: torch.dtype = torch.float16
) -> RoutingRecord:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, 3, 8, generator=generator).argsort(-1)[..., :2].short()
    if tokens:
        ids[0, 0, 1] = -1
        ids[-1, 2, 0] = 8  # a zero expert, beyond E
    values = {
        "gate_weights": torch.rand(tokens, 3, 2, generator=generator),
        "router_logits": torch.randn(tokens, 3, 8, generator=generator),
        "hidden": torch.randn(tokens, 3, 5, generator=generator).to(dtype),
    }
    return RoutingRecord(
        token_ids=torch.randint(-1, 1000, (tokens,), generator=generator, dtype=torch.int32),
        phase=torch.randint(0, 2, (tokens,), generator=generator, dtype=torch.uint8),
        expert_ids=ids,
        **{name: value for name, value in values.items() if name in fields},
    )


def make(
    path: Path,
    fields: tuple[str, ...] = ALL,
    lengths: tuple[int, ...] = (7, 0, 30, 1),
    dtypes: tuple[torch.dtype, ...] = (torch.float16,),
    shard_bytes: int = 64 << 20,
) -> Trace:
    manifest = Manifest(topology=SHAPE, source=Source(kind="capture", settings={"dtype": "x"}), fields=fields)
    with TraceWriter(path, manifest, shard_bytes=shard_bytes) as writer:
        for number, length in enumerate(lengths):
            record = record_of(length, number, fields, dtypes[number % len(dtypes)])
            if number == 3:
                record = RoutingRecord(**{name: value for name, value in record.tensors() if name != "hidden"})
            writer.add(f"döc/{number}", "wiki" if number % 2 else "", "0", record)
    return Trace.open(path)


def assert_same(left: RoutingRecord, right: RoutingRecord) -> None:
    ours, theirs = dict(left.tensors()), dict(right.tensors())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("fields", [ALL, ALL[:3], ALL[:4], (*ALL[:3], "hidden")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_npz_comes_back_as_it_was(tmp_path: Path, fields: tuple[str, ...], dtype: torch.dtype) -> None:
    trace = make(tmp_path / "trace", fields, dtypes=(dtype,))
    export_trace(trace, tmp_path / "a.npz", format="npz")
    warnings = import_trace(tmp_path / "a.npz", tmp_path / "again", options=ImportOptions(model_id="m"))
    again = Trace.open(tmp_path / "again")
    again.verify()
    assert warnings == []
    assert again.manifest.fields == fields
    assert again.topology == SHAPE.model_copy(update={} if "hidden" in fields else {"hidden_size": 0})
    assert [(d.doc_id, d.domain, d.tokens) for d in again.documents] == [
        (d.doc_id, d.domain, d.tokens) for d in trace.documents
    ]
    for index in range(len(trace)):
        left, right = trace.read(index), again.read(index)
        if left.hidden is not None and not len(left):
            left = RoutingRecord(**{name: value for name, value in left.tensors() if name != "hidden"})
        assert_same(left, right)


def test_npz_is_numpys_own(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace")
    export_trace(trace, tmp_path / "a.npz", format="npz", hidden=False)
    arrays = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert set(arrays.files) == {
        *("experts", "token_ids", "phase", "seq_offsets", "num_experts", "doc_ids", "domains"),
        *("gate_weights", "router_logits"),
    }
    assert arrays["experts"].shape == (38, 3, 2)
    assert arrays["seq_offsets"].tolist() == [0, 7, 7, 37, 38]
    assert arrays["doc_ids"].tolist() == ["döc/0", "döc/1", "döc/2", "döc/3"]
    assert np.array_equal(arrays["experts"][7:37], trace.read(2).expert_ids.numpy())


def test_mixed_hidden_dtypes_are_widened(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace", lengths=(5, 6), dtypes=(torch.float16, torch.bfloat16), shard_bytes=1)
    assert len(trace.manifest.shards) == 2
    export_trace(trace, tmp_path / "a.npz", format="npz")
    hidden = np.load(tmp_path / "a.npz")["hidden"]
    assert hidden.dtype == np.float32
    for index, rows in enumerate((hidden[:5], hidden[5:])):
        kept = trace.read(index).hidden
        assert kept is not None
        assert np.array_equal(rows, kept.float().numpy())
    export_trace(trace, tmp_path / "a.parquet", format="parquet")
    assert str(pq.read_schema(tmp_path / "a.parquet").field("hidden").type).count("float") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parquet_has_a_row_per_token(tmp_path: Path, dtype: torch.dtype) -> None:
    trace = make(tmp_path / "trace", dtypes=(dtype,))
    export_trace(trace, tmp_path / "a.parquet", format="parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.metadata.num_row_groups == 3  # the empty document has none
    about = json.loads(file.schema_arrow.metadata[b"specmoe"])
    assert Topology.model_validate(about["topology"]) == SHAPE
    assert about["source"]["settings"] == {"dtype": "x"}
    for group, index in enumerate((0, 2, 3)):
        table = file.read_row_group(group)
        record, document = trace.read(index), trace.documents[index]
        rows = table.to_pydict()
        assert set(rows["doc_id"]) == {document.doc_id}
        assert set(rows["domain"]) == {document.domain}
        assert rows["position"] == list(range(len(record)))
        assert rows["token_id"] == record.token_ids.tolist()
        assert rows["phase"] == [("prefill", "decode")[phase] for phase in record.phase.tolist()]
        assert rows["expert_ids"] == record.expert_ids.tolist()
        assert record.gate_weights is not None
        assert record.router_logits is not None
        assert rows["gate_weights"] == record.gate_weights.tolist()
        assert rows["router_logits"] == record.router_logits.tolist()
        assert rows["hidden"] == ([None] if record.hidden is None else record.hidden.float().tolist())


def test_parquet_of_ids_alone(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace", ALL[:3])
    export_trace(trace, tmp_path / "a.parquet", format="parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["doc_id", "domain", "position", "token_id", "phase", "expert_ids"]
    assert table.num_rows == 38


def test_format_by_name(tmp_path: Path) -> None:
    assert format_of(Path("a.PARQUET"), None) == "parquet"
    assert format_of(Path("a.parquet"), "npz") == "npz"
    with pytest.raises(SpecmoeError, match=r"name the format with --format"):
        format_of(Path("a.csv"), None)
    with pytest.raises(SpecmoeError, match="unknown format 'csv'"):
        format_of(Path("a.npz"), "csv")


@pytest.mark.parametrize("format", ["npz", "parquet"])
class TestFailure:
    """What goes wrong leaves nothing behind and nothing changed."""

    def test_what_is_there_stays_unless_forced(self, tmp_path: Path, format: Any) -> None:
        trace = make(tmp_path / "trace")
        out = tmp_path / f"a.{format}"
        out.write_text("mine")
        with pytest.raises(SpecmoeError, match=r"exists; replace it with --force"):
            export_trace(trace, out, format=format)
        assert out.read_text() == "mine"
        export_trace(trace, out, format=format, force=True)
        for own in ("manifest.json", "shard-00000.safetensors"):
            before = (trace.directory / own).read_bytes()
            with pytest.raises(SpecmoeError, match="over what it is made from"):
                export_trace(trace, trace.directory / own, format=format, force=True)
            assert (trace.directory / own).read_bytes() == before
        assert out.stat().st_size > 100
        with pytest.raises(SpecmoeError, match="is a folder"):
            export_trace(trace, tmp_path, format=format, force=True)

    def test_an_interruption_leaves_nothing(self, tmp_path: Path, format: Any) -> None:
        trace = make(tmp_path / "trace")

        def interrupt(done: int, total: int) -> None:
            assert total == 4
            if done == 3:
                raise KeyboardInterrupt

        (tmp_path / "out").mkdir()
        with pytest.raises(KeyboardInterrupt):
            export_trace(trace, tmp_path / "out" / "a", format=format, on_progress=interrupt)
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_damaged_trace(self, tmp_path: Path, format: Any) -> None:
        trace = make(tmp_path / "trace")
        shard = tmp_path / "trace" / trace.manifest.shards[0].file
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
        with pytest.raises(SpecmoeError, match="fails its checksum"):
            export_trace(Trace.open(tmp_path / "trace"), tmp_path / "out" / "a", format=format)
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_full_disk(self, tmp_path: Path, format: Any) -> None:
        make(tmp_path / "trace", lengths=(400, 400, 400))
        out = tmp_path / "out" / f"a.{format}"
        command = [sys.executable, "-m", "specmoe", "export-trace", str(tmp_path / "trace"), "--out", str(out)]
        full = subprocess.run(command, preexec_fn=limit_file_size, capture_output=True, text=True, check=False)
        assert full.returncode == 2, full.stderr
        assert "Traceback" not in full.stderr
        assert "limit on file size" in full.stderr
        assert list(out.parent.iterdir()) == []

    def test_memory_is_bounded_by_a_document(self, tmp_path: Path, format: Any) -> None:
        trace = make(tmp_path / "trace", lengths=(1000,) * 24)
        size = sum(shard.bytes for shard in trace.manifest.shards)
        tracemalloc.start()
        export_trace(trace, tmp_path / "a", format=format)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size / 3


def limit_file_size() -> None:
    # The kernel then refuses to write past this size, as it would on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make(tmp_path / "trace")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SpecmoeError, match=r"pip install 'specmoe\[parquet\]'"):
        export_trace(trace, tmp_path / "out" / "a.parquet", format="parquet")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "trace")
    run: Callable[..., int] = lambda *words: run_verb(["export-trace", str(tmp_path / "trace"), *words])  # noqa: E731
    assert run("--out", str(tmp_path / "a.npz"), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 38
    assert facts["bytes"] == (tmp_path / "a.npz").stat().st_size
    assert run("--out", str(tmp_path / "b"), "--format", "parquet", "--no-hidden") == 0
    assert "38 tokens in 4 documents" in capsys.readouterr().out
    assert "hidden" not in pq.read_schema(tmp_path / "b").names
    assert run("--out", str(tmp_path / "a.npz")) == 2
    assert "--force" in capsys.readouterr().err
    assert run("--out", str(tmp_path / "a.npz"), "--force") == 0
    assert run("--out", str(tmp_path / "a.csv")) == 2
