"""The replayed cache against an LRU in plain Python, and what windows make of it."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specmoe import residency
from specmoe.dataset import Windows, targets_of
from specmoe.errors import SpecmoeError
from specmoe.residency import cache_size, cold_in_stream, replay
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def plain_cold(stream_NLK: Tensor, experts: int, cache_experts: int, lag: int) -> Tensor:
    """One ordered dictionary a layer, most recently used last."""
    cold = torch.zeros(stream_NLK.shape, dtype=torch.bool)
    tokens, layers, _ = stream_NLK.shape
    for layer in range(layers):
        cache: OrderedDict[int, None] = OrderedDict()
        contents = [set(cache)] * lag
        for token in range(tokens):
            ids = stream_NLK[token, layer].tolist()
            cold[token, layer] = torch.tensor([0 <= e < experts and e not in contents[-lag] for e in ids])
            # The smallest id ends up as the one used last.
            for expert in sorted((e for e in ids if 0 <= e < experts), reverse=True):
                cache[expert] = None
                cache.move_to_end(expert)
            while len(cache) > cache_experts:
                cache.popitem(last=False)
            contents.append(set(cache))
    return cold


def stream(tokens: int, layers: int, experts: int, top_k: int, seed: int, holes: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Some experts are much more in demand than others, so that there is something to hold.
    demand = 1.5 * torch.randn(layers, experts, generator=generator)
    ids = (demand + torch.randn(tokens, layers, experts, generator=generator)).topk(top_k, -1).indices
    odd = torch.rand(ids.shape, generator=generator)
    ids = torch.where(odd < holes, -1, ids)
    return torch.where(odd > 1 - holes / 2, experts, ids).to(torch.int16)


@given(
    st.integers(1, 8).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    st.integers(0, 40),
    st.integers(1, 3),
    st.integers(0, 10_000),
    st.data(),
)
@quick
def test_it_is_an_lru(size: tuple[int, int], tokens: int, layers: int, seed: int, data: st.DataObject) -> None:
    experts, top_k = size
    cache_experts = data.draw(st.integers(top_k, experts))
    step = data.draw(st.sampled_from([1, 3, 1 << 18]))
    ids = stream(tokens, layers, experts, top_k, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency, "_CHUNK", step * layers * experts)
        found = cold_in_stream(ids, experts, cache_experts, (1, 2, 4))
    for lag in (1, 2, 4):
        assert torch.equal(found[lag], plain_cold(ids, experts, cache_experts, lag)), lag


def test_golden_counts() -> None:
    # A loop over three experts is the worst that can happen to two places, and nothing to three.
    loop = torch.arange(30).remainder(3).view(30, 1, 1)
    assert int(cold_in_stream(loop, 4, 2)[1].sum()) == 30
    assert int(cold_in_stream(loop, 4, 3)[1].sum()) == 3
    # One access of two experts does not push its own out; of two used together the larger id leaves first.
    pairs = torch.tensor([[0, 1], [1, 2], [0, 3], [1, 2]]).view(4, 1, 2)
    assert cold_in_stream(pairs, 4, 2)[1].flatten(1).int().tolist() == [[1, 1], [0, 1], [1, 1], [1, 1]]
    assert cold_in_stream(pairs, 4, 3)[1].flatten(1).int().tolist() == [[1, 1], [0, 1], [0, 1], [0, 1]]
    token, layer = torch.arange(4000).view(-1, 1), torch.arange(3)
    first = (token * token + 5 * layer) % 13
    wide = torch.stack([first, (first + 1 + token % 3) % 16], -1)
    missed = {n: int(cold_in_stream(wide, 16, n)[1].sum()) for n in (2, 4, 8, 16)}
    assert (
        missed
        == {n: int(plain_cold(wide, 16, n, 1).sum()) for n in (2, 4, 8, 16)}
        == {2: 20509, 4: 15797, 8: 9243, 16: 41}
    )


def test_a_larger_cache_never_lacks_more() -> None:
    # Inclusion (Mattson et al., 1970): what n experts hold, n + 1 hold too.
    ids = stream(500, 2, 12, 3, seed=5)
    colds = [cold_in_stream(ids, 12, n)[1] for n in range(3, 13)]
    for small, large in itertools.pairwise(colds):
        assert not (large & ~small).any()
    first_uses = sum(len({e for e in ids[:, layer].flatten().tolist() if 0 <= e < 12}) for layer in range(2))
    assert int(colds[-1].sum()) == first_uses


def test_long_streams_count_in_wider_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = stream(50, 1, 6, 2, seed=3)
    assert torch.equal(cold_in_stream(ids.int(), 6, 3)[1], cold_in_stream(ids.long(), 6, 3)[1])


def write(path: Path, lengths: tuple[int, ...], topology: Topology, seed: int = 0) -> Trace:
    source = Source(kind="test")
    manifest = Manifest(topology=topology, source=source, fields=("token_ids", "phase", "expert_ids"))
    with TraceWriter(path, manifest) as writer:
        for number, tokens in enumerate(lengths):
            ids = stream(tokens, topology.layers, topology.experts, topology.top_k, seed + number)
            record = RoutingRecord(
                token_ids=torch.zeros(tokens, dtype=torch.int32),
                phase=torch.zeros(tokens, dtype=torch.uint8),
                expert_ids=ids,
            )
            writer.add(f"{number}", "d", f"{number}", record)
    return Trace.open(path)


@pytest.mark.parametrize(("length", "context"), [(5, 2), (64, 0), (8, 8)])
def test_every_event_sees_the_cache_of_its_moment(tmp_path: Path, length: int, context: int) -> None:
    """The definition itself, event by event: the cache after everything up to the event, its own experts included."""
    topology = Topology(model_id="cache", layers=3, experts=8, top_k=2, hidden_size=4)
    horizons, held = (1, 2, 3, 4, 7), 3
    trace = write(tmp_path / "trace", (17, 6, 11), topology)
    windows = Windows(trace, (0, 1, 2), length=length, context=context)
    replayed = replay(windows, horizons, held)

    contents: dict[tuple[int, int, int], list[set[int]]] = {}
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(topology.layers)]
    needed = missed = 0
    for index in range(3):
        for token, layers in enumerate(trace.read(index).expert_ids.tolist()):
            for layer, ids in enumerate(layers):
                wanted = sorted((e for e in ids if 0 <= e < topology.experts), reverse=True)
                needed += len(wanted)
                missed += sum(e not in caches[layer] for e in wanted)
                for expert in wanted:
                    caches[layer][expert] = None
                    caches[layer].move_to_end(expert)
                while len(caches[layer]) > held:
                    caches[layer].popitem(last=False)
                contents[index, token, layer] = [set(cache) for cache in caches]
    assert (replayed.needed, replayed.missed) == (needed, missed)

    seen = 0
    starts = [start for index in range(3) for start in range(0, trace.documents[index].tokens, length)]
    for rows, window in windows.by_length(12):
        targets = targets_of(window, horizons)
        cold = replayed.cold(rows, window, horizons)
        assert cold.shape == targets.expert_ids_BTSHK.shape
        for b, t, s, h in targets.known_BTSH.nonzero().tolist():
            token = max(0, starts[int(rows[b])] - context) + t
            target_layer = (s + horizons[h]) % topology.layers
            held_then = contents[int(window.document_B[b]), token, s][target_layer]
            ids = targets.expert_ids_BTSHK[b, t, s, h].tolist()
            assert cold[b, t, s, h].tolist() == [e >= 0 and e not in held_then for e in ids]
            seen += 1
    assert seen > 300


def test_the_stated_size() -> None:
    topology = Topology(model_id="m", layers=2, experts=18, top_k=2, hidden_size=4)
    assert cache_size(topology) == 5
    assert cache_size(topology.model_copy(update={"top_k": 8})) == 8
    assert cache_size(topology, 18) == 18
    for wrong in (1, 19, 0, -3):
        with pytest.raises(SpecmoeError, match=r"choose 2 .* to 18"):
            cache_size(topology, wrong)
