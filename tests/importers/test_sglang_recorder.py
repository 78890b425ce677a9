"""Recorder dumps: requests are told apart by their positions, and never mixed up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_samples import EXPERTS, LAYERS, TOP_K, dump, pass_record, recorder

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import import_trace, recognise
from specmoe.sources.importers.sglang_passes import DECODE, EXTEND, MIXED, Pass, tell_apart
from specmoe.trace import RoutingRecord, Trace

NAME = "expert_distribution_recorder_1.0_0.pt"


def imported(path: Path, out: Path) -> tuple[Trace, list[str]]:
    warnings = import_trace(path, out)
    trace = Trace.open(out)
    trace.verify()
    return trace, warnings


def refused(path: Path, words: str) -> None:
    with pytest.raises(SpecmoeError, match=words) as caught:
        import_trace(path, path.parent / "trace", format="sglang-recorder")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(path)) == 1


def tokens(record: RoutingRecord) -> list[tuple[int, int]]:
    """Request and position of each token, which the samples' token ids encode."""
    return [divmod(token, 1000) for token in record.token_ids.tolist()]


def test_prefill_decode_and_mixed_passes(tmp_path: Path) -> None:
    path = recorder(tmp_path)
    assert recognise(path).name == "sglang-recorder"
    assert recognise(tmp_path).name == "sglang-recorder"
    trace, warnings = imported(path, tmp_path / "trace")
    assert len(warnings) == 1
    assert "layers [0]" in warnings[0]
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (LAYERS, EXPERTS, TOP_K)
    assert [document.doc_id for document in trace.documents] == [f"request-{n:06d}" for n in range(3)]
    first, second, third = (trace.read(index) for index in range(3))
    assert tokens(first) == [(1, position) for position in range(7)]
    assert tokens(second) == [(2, position) for position in range(9)]
    assert tokens(third) == [(3, position) for position in range(6)]
    assert first.phase.tolist() == [0] * 4 + [1] * 3
    assert third.phase.tolist() == [0] * 5 + [1]
    records = torch.load(path, weights_only=True)["records"]
    in_pass_2 = records[2]["topk_ids_of_layer"][1:, :, :TOP_K].transpose(0, 1)
    assert torch.equal(third.expert_ids[:5].long(), in_pass_2[:5].long())
    assert torch.equal(first.expert_ids[5].long(), in_pass_2[5].long())


def test_a_prompt_in_chunks(tmp_path: Path) -> None:
    records = [
        pass_record(0, EXTEND, [(1, 0, 3), (2, 0, 8)]),
        pass_record(1, DECODE, [(1, 3, 1)]),
        pass_record(2, EXTEND, [(2, 8, 8), (3, 4, 5)]),  # 3 begins behind a prefix that was cached
        pass_record(3, EXTEND, [(3, 9, 2)]),
        pass_record(4, DECODE, [(1, 4, 1), (2, 16, 1), (3, 11, 1)]),
    ]
    trace, _ = imported(dump(tmp_path / NAME, records), tmp_path / "trace")
    assert [tokens(trace.read(index)) for index in range(3)] == [
        [(1, position) for position in range(5)],
        [(2, position) for position in range(17)],
        [(3, position) for position in range(4, 12)],
    ]


def test_equal_positions_are_told_apart_by_order_or_not_at_all() -> None:
    prefill = Pass(EXTEND, np.array([0, 1, 0, 1, 0]), [2, 2, 1])
    both = Pass(DECODE, np.array([2, 2, 1]), [1, 1, 1])
    one = Pass(DECODE, np.array([3, 2]), [1, 1])
    streams = tell_apart([prefill, both, one])
    parts = [[(part.index, part.start) for part in stream.segments] for stream in streams]
    # Of the two that waited for position 3 one has finished; which, nobody can say.
    assert parts == [[(0, 0), (1, 0)], [(0, 2), (1, 1)], [(0, 4), (1, 2), (2, 1)], [(2, 0)]]


def simulated(seed: int) -> list[Pass]:
    """A server: requests arrive, prompts are chunked, batches keep their order, requests finish at random."""
    generator = random.Random(seed)
    passes: list[Pass] = []
    owners: list[list[int]] = []
    running: list[list[int]] = []  # [request, next position]
    chunk: list[int] | None = None  # [request, done, total]
    number = 0
    for _ in range(60):
        if chunk is not None or generator.random() < 0.4:
            parts = []
            if chunk is not None:
                parts.append((chunk[0], chunk[1], chunk[2]))
            while generator.random() < 0.5:
                parts.append((number, generator.choice([0, 0, 4]), generator.randint(6, 40)))
                number += 1
            if not parts:
                continue
            request, start, end = parts[-1]
            chunk = None
            if end - start > 3 and generator.random() < 0.5:
                chunk = [request, start + 3, end]
                parts[-1] = (request, start, start + 3)
            mixed = generator.random() < 0.5 and bool(running)
            decoded = [(one[0], one[1], one[1] + 1) for one in running] if mixed else []
            rows = [(request, position) for request, a, b in parts + decoded for position in range(a, b)]
            lengths = [b - a for _, a, b in parts + decoded]
            passes.append(Pass(MIXED if mixed else EXTEND, np.array([p for _, p in rows]), lengths))
            owners.append([request for request, _ in rows])
            if mixed:
                running = [[request, position + 1] for request, position in running]
            running += [[request, end] for request, _, end in parts if chunk is None or request != chunk[0]]
        elif running:
            passes.append(Pass(DECODE, np.array([one[1] for one in running]), [1] * len(running)))
            owners.append([one[0] for one in running])
            running = [[request, position + 1] for request, position in running]
        running = [one for one in running if generator.random() > 0.1]
    simulated.owners = owners  # type: ignore[attr-defined]
    return passes


@pytest.mark.parametrize("seed", range(30))
def test_no_document_mixes_requests(seed: int) -> None:
    passes = simulated(seed)
    owners: list[list[int]] = simulated.owners  # type: ignore[attr-defined]
    streams = tell_apart(passes)
    seen = 0
    requests = set()
    for stream in streams:
        owned = {owners[part.index][row] for part in stream.segments for row in range(part.start, part.stop)}
        assert len(owned) == 1
        positions = np.concatenate([passes[part.index].positions[part.start : part.stop] for part in stream.segments])
        assert (np.diff(positions) == 1).all()
        seen += len(positions)
        requests |= owned
    assert seen == sum(len(one.positions) for one in passes)
    # Most requests stay in one piece.
    assert len(streams) <= 1.7 * len(requests)


def test_moved_experts_are_mapped_back(tmp_path: Path) -> None:
    mapping = torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(n)) for n in range(5)])
    mapping = torch.cat([mapping, mapping[:, :4]], 1)  # four experts have a second copy
    path = dump(tmp_path / NAME, [pass_record(0, EXTEND, [(1, 0, 9)])], mapping)
    trace, warnings = imported(path, tmp_path / "trace")
    assert any("had been moved" in warning for warning in warnings)
    assert trace.topology.experts == EXPERTS
    physical = torch.load(path, weights_only=True)["records"][0]["topk_ids_of_layer"][1:, :, :TOP_K].long()
    expected = torch.stack([mapping[layer + 1][physical[layer]] for layer in range(LAYERS)], 1)
    assert torch.equal(trace.read(0).expert_ids.long(), expected)


def test_ranks_that_repeat_each_other_and_ranks_that_do_not(tmp_path: Path) -> None:
    records = [pass_record(0, EXTEND, [(1, 0, 9)])]
    for rank, content in enumerate([records, records, [pass_record(0, EXTEND, [(2, 0, 4)])]]):
        dump(tmp_path / f"expert_distribution_recorder_5.0_{rank}.pt", content)
    trace, warnings = imported(tmp_path, tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["5.0_0-0/request-000000", "5.0_2-1/request-000000"]
    assert any("1 of 3 files repeat another rank's tokens" in warning for warning in warnings)


def test_passes_of_other_kinds_are_counted(tmp_path: Path) -> None:
    verify = pass_record(1, 5, [(1, 9, 4)])
    idle = pass_record(2, 4, [])
    path = dump(tmp_path / NAME, [pass_record(0, EXTEND, [(1, 0, 9)]), verify, idle])
    trace, warnings = imported(path, tmp_path / "trace")
    assert trace.tokens == 9
    assert any("2 passes were left out" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"rank": 0, "logical_count": torch.zeros(2, 3, 4)}, "record again with .*per_token"),
        ({"records": [{"forward_pass_id": 0, "global_physical_count": torch.zeros(3, 4)}]}, "per_token"),
        ({"records": 3}, "no list of records"),
        ([], "holds a list"),
        ({"records": [3]}, "record 0 is a int"),
        ({"records": []}, "no token"),
        ({"records": [], "last_physical_to_logical_map": torch.zeros(3)}, "no matrix"),
        ({"records": [], "last_physical_to_logical_map": torch.full((3, 4), -1)}, "impossible expert"),
    ],
)
def test_other_dumps_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / NAME)
    refused(tmp_path / NAME, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": [1]}, "do not fit"),
        ({"input_ids": "x"}, "input_ids is no list"),
        ({"input_ids": [-1] * 9}, "outside of 0"),
        ({"positions": [1.5] * 9}, "positions is no list"),
        ({"positions": torch.zeros(3, 9)}, "positions is no list"),
        ({"topk_ids_of_layer": torch.zeros(5, 8, 8).int()}, "do not fit"),
        ({"topk_ids_of_layer": torch.zeros(5, 9, 8)}, "no array"),
        ({"topk_ids_of_layer": torch.full((5, 9, 8), EXPERTS).int()}, "beyond the 16 physical experts"),
        ({"topk_ids_of_layer": torch.full((5, 9, 8), -2).int()}, "beyond the 16 physical experts"),
        ({"topk_ids_of_layer": torch.full((5, 9, 8), -1).int()}, "no layer routes"),
        ({"topk_ids_of_layer": torch.zeros(4, 9, 8).int()}, "5 layers, the records 4"),
        ({"extend_seq_lens": [4, 4]}, "adds up to 8"),
        ({"extend_seq_lens": None}, "extend_seq_lens is no list"),
        ({"extend_seq_lens": [10**9, -(10**9)]}, "outside of 0"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    record = {**pass_record(0, EXTEND, [(1, 0, 9)]), **changes}
    refused(dump(tmp_path / NAME, [record]), words)


def test_positions_that_are_no_run_stay_apart() -> None:
    streams = tell_apart([Pass(EXTEND, np.array([0, 5, 2]), [3]), Pass(DECODE, np.array([3]), [1])])
    assert [len(stream.segments) for stream in streams] == [1, 1]
