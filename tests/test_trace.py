"""The trace store: what is written is read back, and damage of any kind is told, never passed on."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path, write_json, write_text
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Timing, Trace, TraceWriter
from specmoe.trace.integrity import header_sha256
from specmoe.trace.manifest import _digest
from specmoe.trace.writer import fields_of, keeps_hidden

TOPOLOGY = Topology(model_id="m", revision="r", layers=3, experts=8, top_k=2, hidden_size=4, bytes_per_expert=64)
OPTIONAL = ("gate_weights", "router_logits", "hidden")


def record(
    seed: int, tokens: int, fields: tuple[str, ...] = OPTIONAL, dtype: torch.dtype = torch.float16
) -> RoutingRecord:
    draw = torch.Generator().manual_seed(seed)
    shape = (tokens, TOPOLOGY.layers)
    tensors = {
        "gate_weights": torch.rand(*shape, TOPOLOGY.top_k, generator=draw),
        "router_logits": torch.randn(*shape, TOPOLOGY.experts, generator=draw),
        "hidden": torch.randn(*shape, TOPOLOGY.hidden_size, generator=draw).to(dtype),
    }
    return RoutingRecord(
        token_ids=torch.randint(0, 1000, (tokens,), generator=draw, dtype=torch.int32),
        phase=torch.randint(0, 2, (tokens,), generator=draw, dtype=torch.uint8),
        expert_ids=torch.randint(-1, 8, (*shape, TOPOLOGY.top_k), generator=draw, dtype=torch.int16),
        **{name: tensors[name] for name in fields},
    )


def manifest_for(fields: tuple[str, ...] = OPTIONAL) -> Manifest:
    return Manifest(topology=TOPOLOGY, source=Source(kind="test", settings={"a": [1, 2.5]}), fields=fields_of(fields))


def same(left: RoutingRecord, right: RoutingRecord) -> bool:
    a, b = dict(left.tensors()), dict(right.tensors())
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def write(
    directory: Path, records: list[RoutingRecord], fields: tuple[str, ...] = OPTIONAL, shard_bytes: int = 1
) -> None:
    with TraceWriter(directory, manifest_for(fields), shard_bytes=shard_bytes) as writer:
        for index, item in enumerate(records):
            writer.add(f"doc{index}", f"domain{index % 2}", f"sha{index}", item)


def reseal(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let a manifest lie, with a checksum that fits."""
    content = json.loads((directory / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    write_json(directory / "manifest.json", {**content, "sha256": _digest(content)})


def read_all(directory: Path) -> tuple[Manifest, list[Any], list[RoutingRecord]]:
    trace = Trace.open(directory)
    return trace.manifest, trace.documents, [trace.read(index) for index in range(len(trace))]


@pytest.mark.parametrize("fields", [c for n in range(4) for c in itertools.combinations(OPTIONAL, n)])
@pytest.mark.parametrize("shard_bytes", [1, 2000, 1 << 20])
def test_round_trip_of_every_choice_of_fields(tmp_path: Path, fields: tuple[str, ...], shard_bytes: int) -> None:
    records = [record(seed, tokens, fields) for seed, tokens in enumerate((5, 1, 0, 17, 3))]
    write(tmp_path, records, fields, shard_bytes)
    manifest, documents, found = read_all(tmp_path)
    assert all(map(same, found, records))
    assert [(d.doc_id, d.domain, d.text_sha256, d.tokens) for d in documents] == [
        (f"doc{i}", f"domain{i % 2}", f"sha{i}", len(r)) for i, r in enumerate(records)
    ]
    assert manifest.complete
    assert manifest.fields == fields_of(fields)
    assert manifest.topology == TOPOLOGY
    assert manifest.source == manifest_for().source
    Trace.open(tmp_path).verify()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hidden_states_of_some_documents_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = [True, False, False, True, True, False]
    records = [
        record(seed, 3 + seed, OPTIONAL if keep else ("gate_weights", "router_logits"), dtype)
        for seed, keep in enumerate(kept)
    ]
    write(tmp_path, records, shard_bytes=3000)
    _, documents, found = read_all(tmp_path)
    assert all(map(same, found, records))
    assert [document.hidden_start is not None for document in documents] == kept


def test_a_reader_may_ask_for_some_fields_only(tmp_path: Path) -> None:
    write(tmp_path, [record(0, 4)])
    found = Trace.open(tmp_path).read(0, fields=("router_logits",))
    assert {name for name, _ in found.tensors()} == {"token_ids", "phase", "expert_ids", "router_logits"}


def test_routers_and_timing_are_kept(tmp_path: Path) -> None:
    weight, bias = torch.randn(3, 8, 4), torch.randn(3, 8)
    with TraceWriter(tmp_path, manifest_for()) as writer:
        writer.keep_routers(weight, bias)
        writer.set_timing(Timing(layer_us_p50=12.5, machine="a machine"))
        writer.add("a", "d", "s", record(0, 3))
    trace = Trace.open(tmp_path)
    found = trace.routers()
    assert found is not None
    assert torch.equal(found[0], weight)
    assert torch.equal(found[1], bias)
    assert trace.manifest.timing == Timing(layer_us_p50=12.5, machine="a machine")
    path = tmp_path / "routers.safetensors"
    flip(path, path.stat().st_size - 3)
    with pytest.raises(SpecmoeError, match="damaged"):
        trace.routers()
    path.unlink()
    with pytest.raises(SpecmoeError, match="cannot be read"):
        trace.routers()


def test_other_documents_of_a_shard_are_not_needed(tmp_path: Path) -> None:
    records = [record(seed, 40) for seed in range(5)]
    write(tmp_path, records, shard_bytes=1 << 20)
    path = tmp_path / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            row = (last - first) // 200
            for doc in (0, 1, 3, 4):
                for at in range(start + first + doc * 40 * row, start + first + (doc + 1) * 40 * row):
                    content[at] ^= 0xFF
    path.write_bytes(content)
    trace = Trace.open(tmp_path)
    assert same(trace.read(2), records[2])
    for other in (0, 1, 3, 4):
        with pytest.raises(SpecmoeError, match=f"'doc{other}' fails its checksum"):
            trace.read(other)


def test_reading_one_document_touches_few_pages_of_its_shard(tmp_path: Path) -> None:
    wide = TOPOLOGY.model_copy(update={"hidden_size": 512})
    manifest = manifest_for().model_copy(update={"topology": wide})
    with TraceWriter(tmp_path, manifest, shard_bytes=1 << 30) as writer:
        for index in range(100):
            item = record(index, 100)
            hidden = torch.full((100, 3, 512), float(index), dtype=torch.float16)
            writer.add(f"doc{index}", "d", "s", RoutingRecord(**{**dict(item.tensors()), "hidden": hidden}))
    path = tmp_path / "shard-00000.safetensors"
    trace = Trace.open(tmp_path)
    found = trace.read(50)
    assert found.hidden is not None
    assert bool((found.hidden == 50).all())
    # Pages of the file that this process has mapped in. The kernel maps some around each that is touched.
    resident, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            counted = line.endswith(str(path))
        elif counted and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    assert path.stat().st_size > 30 << 20
    assert 0 < resident < path.stat().st_size / 4


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    write(tmp_path, [record(0, 3), record(1, 3)], shard_bytes=1 << 20)
    trace = Trace.open(tmp_path)
    found = trace.read(0)
    for _, tensor in found.tensors():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
    assert same(trace.read(0), record(0, 3))


# One process that starts writers and kills them: they inherit its imports, which take seconds.
KILLS = r"""
import os, pathlib, random, signal, sys, torch
sys.path.insert(0, sys.argv[2])
from test_trace import Trace, TraceWriter, manifest_for, record, same

directory, draw = pathlib.Path(sys.argv[1]), random.Random(0)

def item(index):
    return record(index, 1 + index % 7)

def write(report):
    with TraceWriter(directory, manifest_for(), shard_bytes=1500) as writer:
        writer.keep_routers(torch.ones(3, 8, 4))
        for index in range(400):
            if f"doc{index}" not in writer.written:
                writer.add(f"doc{index}", "d", "s", item(index))
                os.write(report, b"%d\n" % index)

def started():
    listen, report = os.pipe()
    process = os.fork()
    if process == 0:
        write(report)
        os._exit(0)
    os.close(report)
    return process, os.fdopen(listen)

last = 0
for _ in range(6):
    process, lines = started()
    goal = last + draw.randint(0, 60)
    for line in lines:
        last = int(line)
        if last >= goal:
            break
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    trace = Trace.open(directory, allow_incomplete=True)
    trace.verify()
    # At most one shard, here some ten documents, was still in memory.
    assert len(trace) >= last - 20, (len(trace), last)
    for index in range(len(trace)):
        assert trace.documents[index].doc_id == f"doc{index}"
        assert same(trace.read(index), item(index))
    assert not trace.manifest.complete
process, lines = started()
lines.read()
assert os.waitpid(process, 0)[1] == 0
trace = Trace.open(directory)
trace.verify()
assert [document.doc_id for document in trace.documents] == [f"doc{index}" for index in range(400)]
assert all(same(trace.read(index), item(index)) for index in range(400))
assert {path.name.split("-")[0] for path in directory.iterdir()} == {"manifest.json", "routers.safetensors", "shard"}
"""


def test_killed_at_any_moment_nothing_written_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLS, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_a_kill_left_is_swept_away(tmp_path: Path) -> None:
    write(tmp_path, [record(0, 3)])
    for name in ("shard-00001.safetensors", ".shard-00001.safetensors.77.tmp", ".tmpAbCdEf", ".manifest.json.77.tmp"):
        (tmp_path / name).write_bytes(b"half of something")
    assert len(Trace.open(tmp_path)) == 1
    with TraceWriter(tmp_path, manifest_for()) as writer:
        assert writer.written == {"doc0"}
        writer.add("doc1", "d", "s", record(1, 4))
    assert same(Trace.open(tmp_path).read(1), record(1, 4))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


def test_an_error_on_the_way_saves_what_was_added(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TraceWriter(tmp_path, manifest_for()) as writer:
            writer.add("doc0", "d", "s", record(0, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    trace = Trace.open(tmp_path, allow_incomplete=True)
    assert same(trace.read(0), record(0, 3))
    assert not trace.manifest.complete


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, manifest_for()), pytest.raises(SpecmoeError, match="another process is writing"):
        TraceWriter(tmp_path, manifest_for())
    with TraceWriter(tmp_path, manifest_for()) as writer:
        assert writer.written == set()


def test_a_directory_with_another_trace_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [record(0, 3)])
    other = manifest_for().model_copy(update={"topology": TOPOLOGY.model_copy(update={"revision": "x"})})
    with pytest.raises(SpecmoeError, match=r"another trace \(topology differs\)"):
        TraceWriter(tmp_path, other)
    assert same(Trace.open(tmp_path).read(0), record(0, 3))


def test_documents_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good = dict(record(0, 3).tensors())
    assert isinstance(good["hidden"], torch.Tensor)
    nan = good["hidden"].clone()
    nan[1, 2, 3] = float("nan")
    inf = torch.full_like(good["router_logits"], float("inf"))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"hidden": nan}, "hidden holds NaN"),
        ({"router_logits": inf}, "router_logits holds NaN or Inf"),
        ({"hidden": good["hidden"][:2]}, "hidden has shape"),
        ({"expert_ids": good["expert_ids"].long()}, "expert_ids has dtype"),
        ({"expert_ids": good["expert_ids"] - 2}, "expert_ids holds -"),
        ({"gate_weights": None}, "lacks gate_weights"),
    ]
    with TraceWriter(tmp_path, manifest_for()) as writer:
        writer.add("first", "d", "s", record(0, 3))
        for change, message in bad:
            with pytest.raises(SpecmoeError, match=f"'bad'.*{message}"):
                writer.add("bad", "d", "s", RoutingRecord(**{**good, **change}))
        with pytest.raises(SpecmoeError, match="'first' is already in"):
            writer.add("first", "d", "s", record(0, 3))
        with pytest.raises(SpecmoeError, match=r"hidden is torch\.float32, others torch\.float16"):
            writer.add("bad", "d", "s", record(0, 3, dtype=torch.float32))
    assert [document.doc_id for document in Trace.open(tmp_path).documents] == ["first"]
    with (
        TraceWriter(tmp_path / "no-hidden", manifest_for(("gate_weights",))) as writer,
        pytest.raises(SpecmoeError, match="unexpected hidden, router_logits"),
    ):
        writer.add("bad", "d", "s", record(0, 3))


def test_a_writer_keeps_its_own_copy(tmp_path: Path) -> None:
    """What happens to a tensor after it was added, and whether inference mode is on, is of no account."""
    first = record(0, 3)
    with TraceWriter(tmp_path, manifest_for(), shard_bytes=1 << 20) as writer:
        with torch.inference_mode():
            writer.add("a", "d", "s", first)
        for _, tensor in first.tensors():
            tensor.zero_()
        writer.add("b", "d", "s", record(1, 9))
        writer.flush()
        writer.add("c", "d", "s", record(2, 2, dtype=torch.float32))
    trace = Trace.open(tmp_path)
    assert same(trace.read(0), record(0, 3))
    assert same(trace.read(1), record(1, 9))
    assert same(trace.read(2), record(2, 2, dtype=torch.float32))


def test_large_finite_numbers_are_no_overflow(tmp_path: Path) -> None:
    logits = torch.full((3, 3, 8), 3e38)
    item = RoutingRecord(**{**dict(record(0, 3).tensors()), "router_logits": logits})
    write(tmp_path, [item])
    assert same(Trace.open(tmp_path).read(0), item)


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_missing_truncated_and_flipped_shards(tmp_path: Path) -> None:
    write(tmp_path, [record(seed, 6) for seed in range(3)])
    path = tmp_path / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(SpecmoeError, match=r"shard-00001\.safetensors is missing"):
        Trace.open(tmp_path)
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SpecmoeError, match="truncated"):
            Trace.open(tmp_path)
    path.write_bytes(whole)
    flip(path, 60)
    with pytest.raises(SpecmoeError, match="damaged header"):
        Trace.open(tmp_path)
    path.write_bytes(whole)
    flip(path, len(whole) - 10)
    trace = Trace.open(tmp_path)
    assert same(trace.read(0), record(0, 6))
    with pytest.raises(SpecmoeError, match="'doc1' fails its checksum; capture again"):
        trace.read(1)
    with pytest.raises(SpecmoeError, match="'doc1' fails its checksum"):
        trace.verify()
    path.unlink()
    path.mkdir()
    with pytest.raises(SpecmoeError, match="cannot be read"):
        Trace.open(tmp_path)


def test_manifests_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match=r"is not a trace.*specmoe collect"):
        Trace.open(tmp_path / "nowhere")
    write(tmp_path, [record(0, 3)])
    path = tmp_path / "manifest.json"
    good = path.read_text()
    for text, message in [
        ("", "cannot be read as JSON"),
        (good[: len(good) // 2], "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"format": ' + "1" * 5000 + "}", "cannot be read as JSON"),
        ("[]", "does not describe a specmoe trace"),
        (good.replace("specmoe-trace", "other"), "does not describe a specmoe trace"),
        (good.replace('"version": 1', '"version": 2'), "has trace version 2, this specmoe reads version 1"),
        (good.replace('"top_k": 2', '"top_k": 1'), "was changed after it was written"),
    ]:
        path.write_text(text)
        with pytest.raises(SpecmoeError, match=message):
            Trace.open(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecmoeError, match="cannot be read as JSON"):
        Trace.open(tmp_path)


LIES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m["topology"].update(layers=4), "has shape"),
    (lambda m: m["topology"].update(hidden_size=5), "hidden has shape"),
    (lambda m: m["topology"].update(top_k=9), "damaged at topology"),
    (lambda m: m["topology"].update(layers=-1), "damaged at topology.layers"),
    (lambda m: m.update(fields=["token_ids", "phase"]), "fields are wrong"),
    (lambda m: m["fields"].append("secrets"), "fields are wrong"),
    (lambda m: m["fields"].remove("router_logits"), "other fields than the manifest says"),
    (lambda m: m["shards"][1].update(tokens=99), "document table contradicts"),
    (lambda m: m["shards"][1].update(documents=7), "document table contradicts"),
    (lambda m: m["shards"][1].update(bytes=7), "truncated"),
    (lambda m: m["shards"][1].update(sha256="0" * 64), "damaged header"),
    (lambda m: m["shards"][1].update(file="../manifest.json"), "damaged at shards.1.file"),
    (lambda m: m["shards"].append(m["shards"][0]), "names a document twice"),
    (lambda m: m.update(extra=1), "damaged at extra"),
    (lambda m: m.pop("topology"), "damaged at topology"),
    (lambda m: m.update(shards="none"), "damaged at shards"),
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_manifests_that_lie(tmp_path: Path, lie: Callable[[dict[str, Any]], Any], message: str) -> None:
    write(tmp_path, [record(seed, 6) for seed in range(2)])
    reseal(tmp_path, lie)
    with pytest.raises(SpecmoeError, match=message):
        Trace.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 1}, "overlap or leave a gap"),
        ({"hidden_start": 2}, "overlap or leave a gap"),
        ({"tokens": 5}, "contradicts the manifest"),
        ({"tokens": -5}, "damaged header"),
        ({"doc_id": 5}, "damaged header"),
        ({"crc32": {}}, "other fields"),
        ({"hidden_start": None}, "other fields"),
    ],
)
def test_document_tables_that_lie(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, [record(0, 6)])
    path = tmp_path / "shard-00000.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    table = json.loads(header["__metadata__"]["documents"])
    table[0].update(change)
    save_file(load_file(str(path)), str(path), metadata={"documents": json.dumps(table)})
    facts = {"bytes": path.stat().st_size, "sha256": header_sha256(path)}
    reseal(tmp_path, lambda m: m["shards"][0].update(facts))
    with pytest.raises(SpecmoeError, match=message):
        Trace.open(tmp_path)


@pytest.fixture(scope="module")
def small_trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], Any]:
    directory = tmp_path_factory.mktemp("small")
    write(directory, [record(0, 4), record(1, 2, OPTIONAL[:2]), record(2, 3)], shard_bytes=1200)
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    return directory, files, read_all(directory)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_told_or_harmless(small_trace: tuple[Path, dict[str, bytes], Any], data: st.DataObject) -> None:
    """Any change of bytes in any file gives a SpecmoeError, or leaves the data as it was."""
    directory, files, (manifest, documents, records) = small_trace
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    kind = data.draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "swap"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "overwrite":
        new = data.draw(st.binary(min_size=1, max_size=12))
        content[at : at + len(new)] = new
    elif kind == "cut":
        del content[at : at + data.draw(st.integers(1, 40))]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
    else:
        other = data.draw(st.integers(0, len(content) - 1))
        content[at], content[other] = content[other], content[at]
    path = directory / name
    try:
        path.write_bytes(content)
        try:
            found_manifest, found_documents, found = read_all(directory)
        except SpecmoeError as error:
            message = str(error)
            assert message.count("\n") == 0
        else:
            assert found_manifest == manifest
            assert found_documents == documents
            assert all(map(same, found, records))
    finally:
        path.write_bytes(files[name])


def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the system refuses a write in the middle of a shard."""
    records = [record(index, 5) for index in range(120)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        with TraceWriter(tmp_path, manifest_for()) as writer:
            for index in range(4):
                writer.add(f"doc{index}", "d", "s", records[index])
            writer.flush()
            for index in range(4, 120):
                writer.add(f"doc{index}", "d", "s", records[index])
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
            try:
                # Failing does not lose what is pending: it fails again, and could be written later.
                with pytest.raises(SpecmoeError, match="cannot write"):
                    writer.flush()
                writer.flush()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(SpecmoeError, match="cannot write") as caught:
        fill()
    assert "limit on file size" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    trace = Trace.open(tmp_path, allow_incomplete=True)
    # Leaving the block saved the rest, as there was room again.
    assert len(trace) == 120
    assert all(same(trace.read(index), records[index]) for index in range(120))


def test_a_disk_that_stays_full_keeps_what_was_written(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        with TraceWriter(tmp_path, manifest_for()) as writer:
            for index in range(4):
                writer.add(f"doc{index}", "d", "s", record(index, 5))
            writer.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
            for index in range(4, 120):
                writer.add(f"doc{index}", "d", "s", record(index, 5))
            writer.flush()

    try:
        with pytest.raises(SpecmoeError, match="cannot write"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    trace = Trace.open(tmp_path, allow_incomplete=True)
    assert [document.doc_id for document in trace.documents] == [f"doc{index}" for index in range(4)]
    assert all(same(trace.read(index), record(index, 5)) for index in range(4))
    with TraceWriter(tmp_path, manifest_for()) as writer:
        writer.add("doc4", "d", "s", record(4, 5))
    assert same(Trace.open(tmp_path).read(4), record(4, 5))
    assert not list(tmp_path.glob(".*"))


def test_a_device_without_space_is_named(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with (
        pytest.raises(SpecmoeError, match="no space left on the disk; free some"),
        atomic_path(target),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    with pytest.raises(SpecmoeError, match="no space left on the disk"), atomic_path(target):
        # safetensors reports the system's error with an exception type of its own.
        raise_no_space()
    assert list(tmp_path.iterdir()) == []


def raise_no_space() -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecmoeError, match="cannot write"):
        TraceWriter(tmp_path / "file" / "below", manifest_for())
    with pytest.raises(SpecmoeError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "text")


def test_files_are_as_readable_as_others_of_this_user(tmp_path: Path) -> None:
    write(tmp_path, [record(0, 3)])
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {plain.stat().st_mode}


def test_the_sample_of_hidden_states_is_stable() -> None:
    kept = [keeps_hidden(f"doc{index}", "sample:0.25") for index in range(2000)]
    assert kept == [keeps_hidden(f"doc{index}", "sample:0.25") for index in range(2000)]
    assert 0.2 < sum(kept) / 2000 < 0.3
    assert keeps_hidden("x", "all")
    assert not keeps_hidden("x", "none")
    for wrong in ("", "some", "sample", "sample:", "sample:0", "sample:1.5", "sample:x", "sample:nan"):
        with pytest.raises(SpecmoeError, match="--keep-hidden"):
            keeps_hidden("x", wrong)
