"""Splits, windows and targets, held against slow and obvious versions of themselves."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specmoe.dataset import (
    PARTS,
    Split,
    Window,
    Windows,
    ahead,
    known_ahead,
    routed_of,
    sharpen,
    split_documents,
    targets_of,
)
from specmoe.errors import SpecmoeError
from specmoe.topology import Topology
from specmoe.trace import DocumentRecord, Manifest, RoutingRecord, Source, Trace, TraceWriter

TOPOLOGY = Topology(model_id="dataset", layers=3, experts=5, top_k=2, hidden_size=4)
quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def document(name: str, domain: str = "d", text: str | None = None, tokens: int = 9, group: str = "") -> DocumentRecord:
    return DocumentRecord(
        doc_id=name,
        domain=domain,
        text_sha256=text or f"text of {name}",
        group=group,
        start=0,
        tokens=tokens,
        crc32={},
    )


def documents(count: int, domain: str = "d") -> list[DocumentRecord]:
    return [document(f"{domain}-{i:03d}", domain) for i in range(count)]


def parts_by_id(split: Split, of: Sequence[DocumentRecord]) -> dict[str, set[str]]:
    return {name: {of[index].doc_id for index in indices} for name, indices in split.parts.items()}


# Splits


def test_the_fractions_are_the_protocols() -> None:
    split = split_documents(documents(400))
    assert [len(split.parts[name]) for name in PARTS] == [210, 70, 120, 0]
    assert split.domain is None


@given(st.integers(3, 60), st.integers(0, 5))
@quick
def test_every_document_is_in_exactly_one_part_and_no_part_is_empty(count: int, seed: int) -> None:
    split = split_documents(documents(count), seed)
    assert sorted(index for name in PARTS for index in split.parts[name]) == list(range(count))
    for name, share in {"train": 0.525, "validation": 0.175, "test": 0.3}.items():
        assert len(split.parts[name]) >= 1
        assert abs(len(split.parts[name]) - share * count) <= 1.5


@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from("abcdef")), min_size=6, max_size=60), st.integers(0, 3))
@quick
def test_equal_texts_never_stand_on_two_sides(kinds: list[tuple[int, str]], seed: int) -> None:
    of = [document(f"{i}", domain, f"text {text}") for i, (text, domain) in enumerate(kinds)]
    try:
        split = split_documents(of, seed)
    except SpecmoeError:
        return
    texts = [{of[index].text_sha256 for index in split.parts[name]} for name in PARTS]
    for i, one in enumerate(texts):
        assert all(not one & other for other in texts[i + 1 :])
    for index in split.parts["held_out_domain"]:
        assert of[index].domain == split.domain
    for name in PARTS[:3]:
        assert all(of[index].domain != split.domain for index in split.parts[name])


def test_duplicates_go_together() -> None:
    of = [document(f"{i}-{copy}", text=f"text {i}") for i in range(10) for copy in range(3)]
    split = split_documents(of)
    assert [len(split.parts[name]) for name in PARTS] == [15, 6, 9, 0]
    for indices in split.parts.values():
        held = [of[index].text_sha256 for index in indices]
        assert all(held.count(text) == 3 for text in held)


def test_a_domain_of_a_fifth_or_less_is_held_out_where_there_are_four() -> None:
    of = documents(40, "a") + documents(40, "b") + documents(10, "c") + documents(10, "d")
    chosen = {split_documents(of, seed).domain for seed in range(12)}
    assert chosen == {"c", "d"}
    split = split_documents(of)
    assert {of[index].domain for index in split.parts["held_out_domain"]} == {split.domain}
    assert len(split.parts["held_out_domain"]) == 10
    assert split_documents(documents(40, "a") + documents(40, "b") + documents(10, "c")).domain is None
    assert split_documents([d for name in "abcd" for d in documents(10, name)]).domain is None


def test_a_domain_of_one_or_two_documents_is_too_small_to_hold_out() -> None:
    of = documents(30, "a") + documents(30, "b") + documents(2, "c") + documents(1, "d")
    assert split_documents(of).domain is None


def test_a_copy_of_a_held_out_text_is_in_no_part() -> None:
    of = documents(40, "a") + documents(40, "b") + documents(3, "c") + documents(1, "d")
    split = split_documents(of)
    assert split.domain == "c"
    copied = of[80].text_sha256
    of.append(document("a copy under another name", "a", copied))
    again = split_documents(of)
    assert again.domain == "c"
    assert 84 not in [index for name in PARTS for index in again.parts[name]]


def test_documents_without_an_event_to_foresee_are_left_out() -> None:
    of = [*documents(6), document("one token", tokens=1), document("empty", tokens=0)]
    assert sorted(index for name in PARTS for index in split_documents(of).parts[name]) == list(range(6))


def test_the_draw_depends_on_the_seed_alone() -> None:
    of = documents(60)
    state = random.getstate()
    splits = [split_documents(of, 7) for _ in range(2)]
    assert splits[0] == splits[1]
    assert random.getstate() == state
    assert split_documents(of, 8).parts != splits[0].parts
    assert split_documents(of, 8).hash != splits[0].hash


def test_the_order_of_documents_in_the_trace_changes_nothing() -> None:
    of = [
        document(f"{i}", domain, f"text {i // 2}") for domain in "abcdefg" for i in range(ord(domain), ord(domain) + 9)
    ]
    first = split_documents(of, 3)
    shuffled = list(of)
    random.Random(0).shuffle(shuffled)
    second = split_documents(shuffled, 3)
    assert parts_by_id(first, of) == parts_by_id(second, shuffled)
    assert first.domain == second.domain
    assert first.hash == second.hash


def test_the_hash_follows_names_texts_and_parts() -> None:
    of = documents(20)
    hashes = {
        split_documents(of).hash,
        split_documents(of[:-1]).hash,
        split_documents([*of[:-1], document("renamed", text=of[-1].text_sha256)]).hash,
        split_documents([*of[:-1], document(of[-1].doc_id, text="another text")]).hash,
        split_documents(of, 1).hash,
    }
    assert len(hashes) == 5
    assert split_documents([d.model_copy(update={"start": 5}) for d in of]).hash == split_documents(of).hash


def test_where_hidden_states_were_kept_for_a_sample_every_part_is_drawn_from_it() -> None:
    of = documents(40, "a") + documents(40, "b") + documents(10, "c") + documents(10, "d")
    sampled = [d.model_copy(update={"hidden_start": 0}) if i % 3 == 0 else d for i, d in enumerate(of)]
    split = split_documents(sampled)
    chosen = sorted(index for name in PARTS for index in split.parts[name])
    assert chosen == list(range(0, 100, 3))
    assert all(split.parts[name] for name in PARTS)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_documents_are_an_error_for_the_user(count: int) -> None:
    with pytest.raises(SpecmoeError, match=rf"{count} distinct document.*collect more"):
        split_documents(documents(count))
    if count:
        copies = [document(f"{i}", text=f"text {i % count}") for i in range(30)]
        with pytest.raises(SpecmoeError, match=f"{count} distinct"):
            split_documents(copies)


# What each event must foresee


def random_window(seed: int, batch: int = 3, tokens: int = 7) -> Window:
    """Slots without expert, ids beyond the experts, padding and context tokens, at random."""
    generator = torch.Generator().manual_seed(seed)
    layers, experts, top_k = TOPOLOGY.layers, TOPOLOGY.experts, TOPOLOGY.top_k
    ids = torch.rand(batch, tokens, layers, experts + 3, generator=generator).argsort(-1)[..., :top_k] - 1
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    valid = torch.arange(tokens) < lengths[:, None]
    first = torch.randint(0, 3, (batch,), generator=generator)
    router = torch.rand(batch, tokens, layers, experts, generator=generator)
    return Window(
        token_ids_BT=torch.zeros(batch, tokens, dtype=torch.long),
        valid_BT=valid,
        scored_BT=valid & (torch.arange(tokens) >= first[:, None]),
        expert_ids_BTLK=torch.where(valid[..., None, None], ids, -1),
        routed_BTLE=routed_of(ids, experts) * valid[..., None, None],
        router_BTLE=router / router.sum(-1, keepdim=True) * valid[..., None, None],
        hidden_BTLD=None,
        soft=True,
        document_B=torch.arange(batch),
    )


@given(st.integers(0, 10_000), st.lists(st.integers(1, 12), min_size=1, max_size=5))
@quick
def test_targets_are_what_a_loop_over_places_finds(seed: int, horizons: list[int]) -> None:
    window = random_window(seed)
    targets = targets_of(window, horizons)
    batch, tokens, layers, top_k = window.expert_ids_BTLK.shape
    assert targets.expert_ids_BTSHK.shape == (batch, tokens, layers, len(horizons), top_k)
    assert targets.known_BTSH.dtype == torch.bool
    known = known_ahead(window, horizons)
    for b in range(batch):
        for t in range(tokens):
            for s in range(layers):
                for h, horizon in enumerate(horizons):
                    more, layer = TOPOLOGY.place(s, horizon)
                    at = t + more
                    inside = at < tokens and bool(window.valid_BT[b, at])
                    ids = window.expert_ids_BTLK[b, at, layer].tolist() if inside else []
                    needed = sorted(e for e in ids if 0 <= e < TOPOLOGY.experts)
                    found = targets.expert_ids_BTSHK[b, t, s, h].tolist()
                    assert sorted(e for e in found if e >= 0) == needed
                    assert all(e == -1 or 0 <= e < TOPOLOGY.experts for e in found)
                    assert targets.routed_BTSHE[b, t, s, h].nonzero().flatten().tolist() == needed
                    expected = window.router_BTLE[b, at, layer] if inside else torch.zeros(TOPOLOGY.experts)
                    assert torch.equal(targets.router_BTSHE[b, t, s, h], expected)
                    assert bool(targets.known_BTSH[b, t, s, h]) == (bool(needed) and bool(window.scored_BT[b, t]))
                    assert bool(known[b, t, s, h]) == bool(targets.known_BTSH[b, t, s, h])


def test_what_lies_in_the_padding_is_never_a_target() -> None:
    window = random_window(5)
    dirty = dataclasses.replace(
        window,
        expert_ids_BTLK=torch.where(window.valid_BT[..., None, None], window.expert_ids_BTLK, 3),
        routed_BTLE=torch.where(window.valid_BT[..., None, None], window.routed_BTLE, 1.0),
    )
    ours, theirs = targets_of(dirty, (1, 2, 5)), targets_of(window, (1, 2, 5))
    assert torch.equal(ours.known_BTSH, theirs.known_BTSH)
    assert torch.equal(ours.expert_ids_BTSHK, theirs.expert_ids_BTSHK)
    assert torch.equal(known_ahead(dirty, (1, 2, 5)), known_ahead(window, (1, 2, 5)))


@given(st.integers(0, 1000), st.lists(st.integers(-9, 9), min_size=1, max_size=4))
@quick
def test_ahead_looks_both_ways(seed: int, horizons: list[int]) -> None:
    values = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(seed)) + 1
    shifted = ahead(values, horizons)
    flat = values.flatten(1, 2)
    for place in range(6):
        for h, horizon in enumerate(horizons):
            expected = flat[:, place + horizon] if 0 <= place + horizon < 6 else torch.zeros(2, 3)
            assert torch.equal(shifted[:, place // 2, place % 2, h], expected)


def test_context_tokens_are_seen_but_not_scored() -> None:
    window = random_window(1, tokens=8)
    window = dataclasses.replace(
        window,
        valid_BT=torch.ones(3, 8, dtype=torch.bool),
        scored_BT=(torch.arange(8) >= 4).expand(3, 8),
        expert_ids_BTLK=torch.tensor([0, 1]).expand(3, 8, 3, 2),
        routed_BTLE=torch.tensor([1.0, 1.0, 0, 0, 0]).expand(3, 8, 3, 5),
    )
    known = targets_of(window, (1,)).known_BTSH[..., 0]
    assert not known[:, :4].any()
    assert known[:, 4:].flatten(1).sum(1).tolist() == [4 * 3 - 1] * 3


def test_experts_as_zeros_and_ones() -> None:
    ids = torch.tensor([[0, 4], [-1, 2], [-1, -1], [5, 9], [3, 3]], dtype=torch.int16)
    expected = [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0] * 5, [0] * 5, [0, 0, 0, 1, 0]]
    assert routed_of(ids, 5).tolist() == expected
    assert routed_of(ids, 5).dtype == torch.float32


# Windows


def record(tokens: int, seed: int, *, hidden: bool = True, logits: bool = True, gates: bool = True) -> RoutingRecord:
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, TOPOLOGY.layers)
    scores = torch.randn(*shape, TOPOLOGY.experts, generator=generator)
    ids = scores.topk(TOPOLOGY.top_k, -1).indices
    return RoutingRecord(
        token_ids=torch.arange(tokens, dtype=torch.int32) + 1000 * seed,
        phase=(torch.arange(tokens) >= tokens // 2).to(torch.uint8),
        expert_ids=ids.to(torch.int16),
        gate_weights=torch.rand(*shape, TOPOLOGY.top_k, generator=generator) + 0.1 if gates else None,
        router_logits=scores if logits else None,
        hidden=torch.randn(*shape, TOPOLOGY.hidden_size, generator=generator).half() if hidden else None,
    )


def write(path: Path, records: Sequence[RoutingRecord]) -> Trace:
    present = {name for one in records for name, _ in one.tensors()}
    order = ("token_ids", "phase", "expert_ids", "gate_weights", "router_logits", "hidden")
    fields = tuple(name for name in order if name in present)
    with TraceWriter(path, Manifest(topology=TOPOLOGY, source=Source(kind="test"), fields=fields)) as writer:
        for number, one in enumerate(records):
            writer.add(f"{number}", "d", f"{number}", one)
    return Trace.open(path)


LENGTHS = (1, 5, 8, 17, 2)


@pytest.mark.parametrize("length", [1, 4, 8, 64])
@pytest.mark.parametrize("context", [0, 3, 20])
def test_every_token_is_scored_once_with_its_past_before_it(tmp_path: Path, length: int, context: int) -> None:
    trace = write(tmp_path / "trace", [record(tokens, seed) for seed, tokens in enumerate(LENGTHS)])
    windows = Windows(trace, [3, 1, 0, 4], length=length, context=context)
    assert windows.tokens == 17 + 5 + 1 + 2
    scored: list[tuple[int, int]] = []
    for window in windows.batches(2):
        for b, index in enumerate(window.document_B.tolist()):
            whole = trace.read(index)
            seen = window.token_ids_BT[b][window.valid_BT[b]] - 1000 * index
            own = window.token_ids_BT[b][window.scored_BT[b]] - 1000 * index
            assert bool((window.valid_BT[b] | ~window.scored_BT[b]).all())
            assert seen.tolist() == list(range(int(seen[0]), int(own[-1]) + 1))
            assert int(seen[0]) == max(0, int(own[0]) - context)
            scored += [(index, token) for token in own.tolist()]
            rows = slice(int(seen[0]), int(seen[-1]) + 1)
            valid = window.valid_BT[b]
            assert valid[: len(seen)].all()
            assert whole.router_logits is not None
            assert whole.hidden is not None
            assert window.hidden_BTLD is not None
            assert window.phase_BT is not None
            assert torch.equal(window.expert_ids_BTLK[b][valid], whole.expert_ids[rows].long())
            assert torch.equal(window.phase_BT[b][valid], whole.phase[rows].long())
            assert torch.equal(window.hidden_BTLD[b][valid], whole.hidden[rows].float())
            torch.testing.assert_close(window.router_BTLE[b][valid], whole.router_logits[rows].softmax(-1))
            assert torch.equal(window.routed_BTLE[b][valid], routed_of(whole.expert_ids[rows], TOPOLOGY.experts))
            assert (window.expert_ids_BTLK[b][~valid] == -1).all()
            for padding in (window.router_BTLE, window.routed_BTLE, window.hidden_BTLD):
                assert not padding[b][~valid].any()
    assert sorted(scored) == sorted((index, token) for index in (3, 1, 0, 4) for token in range(LENGTHS[index]))


def same_window(ours: Window, theirs: Window) -> bool:
    pairs = [(value, vars(theirs)[name]) for name, value in vars(ours).items()]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_batches_go_once_through_everything_in_an_order_that_the_generator_says(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", [record(40, seed) for seed in range(4)])
    windows = Windows(trace, range(4), length=4)
    assert len(windows) == 40

    def order(seed: int | None) -> list[Window]:
        return list(windows.batches(7, None if seed is None else torch.Generator().manual_seed(seed)))

    def firsts(batches: list[Window]) -> list[int]:
        return [token for batch in batches for token in batch.token_ids_BT[:, 0].tolist()]

    plain = order(None)
    assert [len(batch.document_B) for batch in plain] == [7, 7, 7, 7, 7, 5]
    assert firsts(plain) == [1000 * index + start for index in range(4) for start in range(0, 40, 4)]
    assert all(same_window(a, b) for a, b in zip(order(1), order(1), strict=True))
    assert firsts(order(1)) != firsts(order(2))
    assert sorted(firsts(order(1))) == firsts(plain)
    # Gathered rows and sliced rows are the same rows.
    rows = torch.tensor([3, 4, 5])
    assert same_window(windows.batch(rows), windows.batch(slice(3, 6)))


def test_only_documents_with_hidden_states_are_used_where_a_sample_was_kept(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", [record(6, seed, hidden=seed in {1, 4}) for seed in range(5)])
    windows = Windows(trace, range(5), length=4)
    assert sorted(set(windows.documents.tolist())) == [1, 4]
    for window in windows.batches(1):
        assert window.hidden_BTLD is not None
        assert bool((window.hidden_BTLD.abs().sum((-1, -2)) > 0)[window.valid_BT].all())
    with pytest.raises(SpecmoeError, match=r"no document.*hidden states"):
        Windows(trace, [0, 2], length=4)
    with pytest.raises(SpecmoeError, match="no document"):
        Windows(trace, [], length=4)


def test_without_hidden_states_every_document_is_used(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", [record(6, seed, hidden=False) for seed in range(3)])
    windows = Windows(trace, range(3), length=4)
    assert windows.documents.tolist() == [0, 0, 1, 1, 2, 2]
    assert windows.batch(slice(0, 2)).hidden_BTLD is None


def test_without_logits_the_gates_and_then_the_ids_stand_in(tmp_path: Path) -> None:
    records = [record(4, 0, logits=False), record(4, 0, logits=False, gates=False)]
    awkward = torch.tensor([[0, 1], [-1, 2], [7, 3], [-1, -1]], dtype=torch.int16)[:, None].expand(4, 3, 2).contiguous()
    weights = torch.tensor([[3.0, 1.0], [9.0, 2.0], [9.0, 0.5], [9.0, 9.0]])[:, None].expand(4, 3, 2).contiguous()
    expected = {
        True: [[0.75, 0.25, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0] * 5],
        False: [[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0] * 5],
    }
    for number, one in enumerate(records):
        gates = one.gate_weights is not None
        changed = dataclasses.replace(one, expert_ids=awkward, gate_weights=weights if gates else None)
        windows = Windows(write(tmp_path / f"{number}", [changed]), [0], length=4)
        window = windows.batch(slice(0, 1))
        assert not window.soft
        torch.testing.assert_close(window.router_BTLE[0, :, 1], torch.tensor(expected[gates]))
        assert torch.isfinite(window.router_BTLE).all()


def test_a_moved_window_is_the_same_window() -> None:
    window = random_window(3)
    assert same_window(window.to("cpu"), window)
    assert all(not isinstance(v, Tensor) or v.device.type == "meta" for v in vars(window.to("meta")).values())


# Temperatures


@given(st.floats(0.05, 20.0), st.integers(0, 100))
@quick
def test_sharpen_is_a_softmax_at_another_temperature(temperature: float, seed: int) -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    sharpened = sharpen(logits.softmax(-1), temperature)
    torch.testing.assert_close(sharpened, (logits / temperature).softmax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(sharpened.argsort(-1), logits.argsort(-1)) or temperature < 0.2
    torch.testing.assert_close(sharpened.sum(-1), torch.ones(4))


def test_sharpen_takes_zeros() -> None:
    assert torch.isfinite(sharpen(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), 0.3)).all()
    assert sharpen(torch.tensor([1.0, 0.0, 0.0]), 1.0).tolist() == pytest.approx([1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("mass", [0.6, 0.7, 0.9])
@pytest.mark.parametrize("sharpness", [0.05, 1.0, 8.0])
def test_the_temperature_gives_the_mass_asked_for(tmp_path: Path, mass: float, sharpness: float) -> None:
    scaled = []
    for seed in range(2):
        one = record(50, seed)
        assert one.router_logits is not None
        scaled.append(dataclasses.replace(one, router_logits=sharpness * one.router_logits))
    # A length that leaves padding: it must not count.
    windows = Windows(write(tmp_path / "trace", scaled), [0, 1], length=32, context=3)
    even = TOPOLOGY.top_k / TOPOLOGY.experts
    temperature = windows.router_temperature((mass - even) / (1 - even))
    top = sharpen(windows.router[windows.valid], temperature).topk(TOPOLOGY.top_k, -1).values.sum(-1)
    assert float(top.mean()) == pytest.approx(mass, abs=0.01)


def test_the_temperature_keeps_a_target_worth_learning_where_k_is_most_of_the_experts(tmp_path: Path) -> None:
    # 4 of 5 experts hold at least 0.8 at any temperature; a flat target would teach nothing.
    topology = TOPOLOGY.model_copy(update={"top_k": 4})
    scores = torch.randn(30, 3, 5, generator=torch.Generator().manual_seed(0))
    one = RoutingRecord(
        token_ids=torch.zeros(30, dtype=torch.int32),
        phase=torch.zeros(30, dtype=torch.uint8),
        expert_ids=scores.topk(4, -1).indices.to(torch.int16),
        router_logits=scores,
    )
    fields = ("token_ids", "phase", "expert_ids", "router_logits")
    with TraceWriter(tmp_path / "t", Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        writer.add("0", "d", "0", one)
    windows = Windows(Trace.open(tmp_path / "t"), [0], length=30)
    target = sharpen(windows.router, windows.router_temperature(0.7))
    least, most = target.topk(5, -1).values[..., -1], target.topk(5, -1).values[..., 0]
    assert float((most / least).median()) > 1.2


def test_a_group_stays_on_one_side_and_a_copy_in_another_group_is_left_out() -> None:
    # Pairs of neighbours are groups; every tenth document repeats the text of the one after it.
    documents = [document(f"d{i}", text=f"text {i + 1 if i % 10 == 3 else i}", group=f"g{i // 2}") for i in range(60)]
    for seed in range(5):
        parts = split_documents(documents, seed).parts
        side = {index: name for name, indices in parts.items() for index in indices}
        assert set(range(60)) - set(side) == set(range(4, 60, 10))
        assert all(side[i] == side[i + 1] for i in range(0, 60, 2) if i % 10 != 4)


def test_copies_without_a_group_stay_on_one_side() -> None:
    documents = [document(f"d{i}", text=f"text {i // 3}") for i in range(60)]
    side = {index: name for name, indices in split_documents(documents).parts.items() for index in indices}
    assert all(side[i] == side[i + 1] == side[i + 2] for i in range(0, 60, 3))
