"""Is a trace worth anything? Every finding is planted once, and absent from traces that have no such fault."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from specmoe.cli import run_verb
from specmoe.diagnostics import Validation, shingles, validate_trace
from specmoe.diagnostics.copies import Leak, leak
from specmoe.diagnostics.findings import CHECKS
from specmoe.diagnostics.page import page
from specmoe.diagnostics.sample import sample_routing
from specmoe.diagnostics.scan import scan_trace
from specmoe.sources.synthetic import synthetic_trace
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

LAYERS, EXPERTS, TOP_K, WIDTH, VOCABULARY = 4, 8, 2, 16, 60
ROUTERS = torch.randn(LAYERS, EXPERTS, WIDTH, generator=torch.Generator().manual_seed(9))
Records = list[RoutingRecord]
ALL = ("gate_weights", "router_logits", "hidden")
NO_SHARDS: dict[str, Any] = {"shards": (), "routers_sha256": None}


def route(logits_TLE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gates, ids = logits_TLE.softmax(-1).topk(TOP_K, -1)
    return ids.to(torch.int16), gates


def model_records(documents: int = 30, tokens: int = 64, seed: int = 0) -> Records:
    """What a small model would give: routers on hidden states that follow from tokens, context and depth."""
    draw = np.random.default_rng(seed)
    embedding = np.random.default_rng(77).standard_normal((VOCABULARY, WIDTH))
    drift = np.random.default_rng(78).standard_normal((LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    records = []
    for number in range(documents):
        token_ids = draw.integers(0, VOCABULARY, tokens + number % 3)
        state = embedding[token_ids] + 0.4 * embedding[np.roll(token_ids, 1)]
        layers = []
        for layer in range(LAYERS):
            state = 0.8 * state + 0.8 * state @ drift[layer] + 0.2 * draw.standard_normal(state.shape)
            layers.append(state)
        hidden = torch.from_numpy(np.stack(layers, 1)).half()
        logits = torch.einsum("tld,led->tle", hidden.float(), ROUTERS)
        ids, gates = route(logits)
        records.append(
            RoutingRecord(
                token_ids=torch.from_numpy(token_ids.astype(np.int32)),
                phase=(torch.arange(len(token_ids)) >= 40).to(torch.uint8),
                expert_ids=ids,
                gate_weights=gates,
                router_logits=logits,
                hidden=hidden,
            )
        )
    return records


def write(
    path: Path,
    records: Records,
    fields: tuple[str, ...] = ALL,
    *,
    settings: dict[str, Any] | None = None,
    routers: torch.Tensor | None = ROUTERS,
    shas: Callable[[int], str] = str,
) -> Path:
    _, layers, top_k = records[0].expert_ids.shape
    topology = Topology(model_id="m", layers=layers, experts=EXPERTS, top_k=top_k, hidden_size=WIDTH)
    source = Source(kind="test", settings=settings or {})
    kept = ("token_ids", "phase", "expert_ids", *fields)
    with TraceWriter(path / "trace", Manifest(topology=topology, source=source, fields=kept)) as writer:
        if "hidden" in fields and routers is not None:
            writer.keep_routers(routers)
        for number, record in enumerate(records):
            tensors = {name: tensor for name, tensor in record.tensors() if name in kept}
            writer.add(f"doc-{number}", f"domain-{number % 2}", shas(number), RoutingRecord(**tensors))
    return path / "trace"


def found(path: Path) -> dict[str, str]:
    """Severity by code; the page and the JSON of each are made on the way."""
    result = validate_trace(path)
    assert Validation.model_validate_json(json.dumps(result.model_dump(mode="json"), allow_nan=False)) == result
    text = page(result)
    assert max(map(len, text.splitlines())) <= 112
    for finding in result.findings:
        assert f"{finding.code}: " in text
        assert "nan" not in finding.message
        assert "\n" not in finding.message
    return {finding.code: finding.severity for finding in result.findings}


def gates_of(record: RoutingRecord) -> torch.Tensor:
    assert record.gate_weights is not None
    return record.gate_weights


def ids_only(path: Path, ids: list[torch.Tensor], tokens: list[torch.Tensor] | None = None) -> Path:
    """A trace of given expert ids [T, L, K], of random tokens unless they are given."""
    draw = torch.Generator().manual_seed(5)
    records = []
    for number, ids_TLK in enumerate(ids):
        size = len(ids_TLK)
        text = torch.randint(0, 5000, (size,), generator=draw) if tokens is None else tokens[number]
        phase = torch.zeros(size, dtype=torch.uint8)
        records.append(RoutingRecord(token_ids=text.int(), phase=phase, expert_ids=ids_TLK.to(torch.int16)))
    return write(path, records, ())


# --- traces without a fault ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real routing: the bundled model on the held-out standard library."""
    from specmoe.sources.bundled import bundled_model
    from specmoe.sources.capture import collect
    from specmoe.sources.corpus import standard_library

    out = tmp_path_factory.mktemp("captured") / "trace"
    return collect(bundled_model(), standard_library("held-out"), out, max_tokens=3000, max_tokens_per_document=100)


def test_a_captured_trace_has_no_finding(captured: Path) -> None:
    assert found(captured) == {}
    result = validate_trace(captured)
    assert result.information is not None
    assert result.hidden is not None
    assert min(result.information.deviations.values()) > 20
    assert result.hidden.recall > result.hidden.frequency + 0.2
    assert result.hidden.correlation is not None
    assert min(result.hidden.correlation) > 0.999
    assert all(layer.overlap is not None and layer.overlap > layer.overlap_chance for layer in result.layers)


def test_a_synthetic_trace_has_no_finding_but_its_scale(synthetic_path: Path) -> None:
    # Its gate weights all sum to the same number below 1 by construction.
    assert found(synthetic_path) == {"scaled-gates": "note"}


def test_a_small_models_trace_has_no_finding(tmp_path: Path) -> None:
    assert found(write(tmp_path, model_records())) == {}


@pytest.mark.parametrize("fields", [(), ("gate_weights",), ("router_logits",), ("hidden",)])
def test_a_trace_may_keep_less(tmp_path: Path, fields: tuple[str, ...]) -> None:
    assert found(write(tmp_path, model_records(), fields)) == {}


# --- numbers -------------------------------------------------------------------------------------------


def test_facts_are_what_a_plain_count_gives(tmp_path: Path) -> None:
    records = model_records(documents=12, tokens=30)
    result = validate_trace(write(tmp_path, records))
    sizes = [len(record) for record in records]
    facts = result.documents
    assert (facts.documents, facts.tokens) == (12, sum(sizes))
    assert (facts.shortest, facts.median, facts.longest) == (30, 31.0, 32)
    assert facts.decode == sum(int(record.phase.sum()) for record in records)
    assert facts.domains == {"domain-0": 6, "domain-1": 6}
    assert sum(part.documents for part in result.split.values()) == 12
    for layer in range(LAYERS):
        load, tops, joint = np.zeros(EXPERTS), np.zeros(EXPERTS), np.zeros((EXPERTS, EXPERTS))
        overlap, pairs = 0.0, 0
        for record in records:
            ids = record.expert_ids.tolist()
            for token, places in enumerate(ids):
                for expert in places[layer]:
                    load[expert] += 1
                tops[places[layer][0]] += 1
                if layer + 1 < LAYERS:
                    joint[places[layer][0], places[layer + 1][0]] += 1
                if token:
                    overlap += len({*places[layer]} & {*ids[token - 1][layer]}) / TOP_K
                    pairs += 1
        share, tokens = load / load.sum(), sum(sizes)
        entropy = -sum(p * np.log2(p) for p in share if p) / np.log2(EXPERTS)
        unevenness = sum(abs(a - b) for a in load for b in load) / (2 * EXPERTS * load.sum())
        measured = result.layers[layer]
        assert measured.entropy == pytest.approx(entropy)
        assert measured.gini == pytest.approx(unevenness)
        assert measured.dead == (load == 0).sum()
        assert measured.max_over_mean == pytest.approx(load.max() / load.mean())
        assert measured.overlap == pytest.approx(overlap / pairs)
        assert measured.overlap_chance == pytest.approx(((load / tokens) ** 2).sum() / TOP_K)
        top = tops / tops.sum()
        assert measured.top1_bits == pytest.approx(-(top[top > 0] * np.log2(top[top > 0])).sum())
        if layer + 1 < LAYERS:
            p = joint / joint.sum()
            plain = sum(
                p[i, j] * np.log2(p[i, j] / (p[i].sum() * p[:, j].sum()))
                for i in range(EXPERTS)
                for j in range(EXPERTS)
                if p[i, j]
            )
            filled = [np.count_nonzero(table) for table in (joint, joint.sum(0), joint.sum(1))]
            bias = (filled[0] - filled[1] - filled[2] + 1) / (2 * tokens * np.log(2))
            assert measured.next_bits == pytest.approx(max(0, plain - bias))
        else:
            assert measured.next_bits is None


def test_documents_of_any_length_are_cut_into_blocks_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specmoe.diagnostics import blocks

    path = write(tmp_path, [*model_records(3, 700), *model_records(20, 20, seed=1)])
    whole = validate_trace(path)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1)
    cut = validate_trace(path)
    assert cut.documents == whole.documents
    assert cut.findings == whole.findings
    for left, right in zip(cut.layers, whole.layers, strict=True):
        # A pair of tokens over a cut is lost, nothing else.
        assert left.model_copy(update={"overlap": None}) == right.model_copy(update={"overlap": None})
        assert left.overlap == pytest.approx(right.overlap, abs=0.01)


# --- findings about documents --------------------------------------------------------------------------


def test_empty_traces(tmp_path: Path) -> None:
    none = [RoutingRecord(*(tensor[:0] for _, tensor in model_records(1)[0].tensors()))]
    assert found(write(tmp_path / "a", none)) == {"empty": "error"}
    with TraceWriter(tmp_path / "b", Trace.open(tmp_path / "a" / "trace").manifest.model_copy(update=NO_SHARDS)):
        pass
    assert found(tmp_path / "b") == {"empty": "error"}


def test_too_few_documents(tmp_path: Path) -> None:
    single = validate_trace(write(tmp_path / "c", model_records(1, 600)))
    messages = [finding.message for finding in single.findings if finding.code == "cannot-split"]
    assert "caches and the oracle need no split (specmoe simulate, specmoe verdict)" in messages[0]
    assert found(write(tmp_path / "a", model_records(2, 600)))["cannot-split"] == "error"
    assert found(write(tmp_path / "b", model_records(6, 200)))["few-documents"] == "warning"


def test_too_short_documents(tmp_path: Path) -> None:
    records = model_records()
    short = [RoutingRecord(*(tensor[:size] for _, tensor in records[0].tensors())) for size in (0, 1)]
    assert found(write(tmp_path / "a", [*records, *short]))["short-documents"] == "note"
    assert found(write(tmp_path / "b", [*records, *short * 6]))["short-documents"] == "warning"


def test_duplicates(tmp_path: Path) -> None:
    records = model_records()
    path = write(tmp_path / "a", [*records, records[3]], shas=lambda n: "3" if n == 30 else str(n))
    assert found(path) == {"duplicate-documents": "note"}
    assert validate_trace(path).documents.same_text == validate_trace(path).documents.same_tokens == 1
    path = write(tmp_path / "b", [*records, *records[:10]], shas=lambda n: str(n % 30))
    assert found(path) == {"duplicate-documents": "warning"}


def test_text_on_both_sides_of_the_split(tmp_path: Path) -> None:
    records = model_records(documents=40, tokens=120)

    def opened(count: int, length: int) -> Records:
        """The first documents begin with the same ``length`` tokens, routed the same."""
        first = dict(records[0].tensors())
        shared = []
        for record in records[:count]:
            own = dict(record.tensors())
            shared.append(RoutingRecord(**{n: torch.cat([first[n][:length], own[n][length:]]) for n in own}))
        return [*shared, *records[count:]]

    assert found(write(tmp_path / "a", opened(30, 100))) == {"split-leak": "error"}
    assert found(write(tmp_path / "b", opened(30, 55))) == {"split-leak": "note"}
    assert found(write(tmp_path / "c", opened(30, 40))) == {}
    # One group stays on one side.
    manifest = Trace.open(tmp_path / "a" / "trace").manifest.model_copy(update=NO_SHARDS)
    with TraceWriter(tmp_path / "e", manifest) as writer:
        for number, record in enumerate(opened(30, 100)):
            group = "chat" if number < 30 else ""
            writer.add(f"doc-{number}", "domain", str(number), record, group=group)
    assert "split-leak" not in found(tmp_path / "e")
    # The same tokens under another hash, as when texts differ only beyond the cut.
    assert found(write(tmp_path / "d", [*records, *records]))["split-leak"] == "error"


def test_without_token_ids_equal_routing_stands_in_for_equal_text(tmp_path: Path) -> None:
    records = [replace(record, token_ids=torch.full_like(record.token_ids, -1)) for record in model_records()]
    assert found(write(tmp_path / "a", records)) == {"unknown-tokens": "note"}
    both = found(write(tmp_path / "b", [*records, *records]))
    assert both == {"unknown-tokens": "note", "split-leak": "error"}


def cut(record: RoutingRecord, start: int, stop: int | None = None) -> RoutingRecord:
    return RoutingRecord(**{name: tensor[start:stop].clone() for name, tensor in record.tensors()})


def one_after_the_other(*records: RoutingRecord) -> RoutingRecord:
    parts = [dict(record.tensors()) for record in records]
    return RoutingRecord(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def without_ids(record: RoutingRecord, stop: int | None = None) -> RoutingRecord:
    ids = record.token_ids.clone()
    ids[:stop] = -1
    return replace(record, token_ids=ids)


def leaked(path: Path, train: Sequence[int]) -> Leak:
    """What all documents but those of ``train`` share with these; of the share, six digits."""
    trace = Trace.open(path)
    judged = tuple(index for index in range(len(trace)) if index not in train)
    told = leak(scan_trace(trace), sample_routing(trace), tuple(train), judged)
    return replace(told, share=round(told.share, 6))


def conversations(count: int, prompt: int, answer: int) -> Records:
    """Two turns each, as an engine tells of them: the second's prompt is all of the first. Ids of answers only."""
    turns = []
    for record, more in zip(
        model_records(count, prompt + answer), model_records(count, answer + 10, seed=1), strict=True
    ):
        first = cut(record, 0, prompt + answer)
        turns += [without_ids(first, prompt), without_ids(one_after_the_other(first, more), prompt + answer + 10)]
    return turns


def test_conversations_that_grow_leak_and_are_not_made_up(tmp_path: Path) -> None:
    path = write(tmp_path / "a", conversations(20, 30, 20), ())
    assert found(path) == {"split-leak": "error", "unknown-tokens": "note"}
    message = next(f.message for f in validate_trace(path).findings if f.code == "split-leak")
    assert "by their routing, as their token ids are unknown" in message
    # A first turn is all in its second; of a second, 50 of 80 to 82 tokens are in its first.
    trained = [*range(0, 20, 2), *range(21, 40, 2)]
    told = leaked(path, trained)
    assert (told.judged, told.mostly, told.routed, told.partly, told.example) == (20, 20, 20, 0, 1)
    assert told.share == round((10 * 1 + sum(50 / (80 + n % 3) for n in range(10))) / 20, 6)
    # Of conversations that are kept together nothing is left on the other side.
    assert leaked(path, range(20)) == Leak(20, 0, 0, 0.0, 0, None)


def test_short_documents_are_seen(tmp_path: Path) -> None:
    records = [cut(record, 0, 30) for record in model_records(40)]
    sampled = [one_after_the_other(cut(records[n], 0, 20), cut(records[n + 20], 20)) for n in range(20)]
    path = write(tmp_path / "a", [*records[:20], *sampled], ())
    # Of the lengths at which beginnings are compared 20 is one.
    assert leaked(path, range(20)) == Leak(20, 20, 0, round(20 / 30, 6), 0, 20)
    assert found(path)["split-leak"] == "error"
    # Seven tokens of ten are a header at best, half is not more than half, and other texts share nothing.
    short = [cut(record, 0, 10) for record in records[:20]]
    also = [one_after_the_other(cut(records[n], 0, 7), cut(records[n + 20], 7, 10)) for n in range(20)]
    assert leaked(write(tmp_path / "b", [*short, *also], ()), range(20)).mostly == 0
    half = [one_after_the_other(cut(records[n], 0, 15), cut(records[n + 20], 15)) for n in range(20)]
    assert leaked(write(tmp_path / "c", [*records[:20], *half], ()), range(20)).mostly == 0
    assert leaked(write(tmp_path / "d", records, ()), range(20)) == Leak(20, 0, 0, 0.0, 0, None)
    # The same without ids, by routing, which is compared token by token.
    silent = [without_ids(record) for record in [*records[:20], *sampled]]
    assert leaked(write(tmp_path / "e", silent, ()), range(20)) == Leak(20, 20, 0, round(20 / 30, 6), 20, 20)
    # Known on one side and unknown on the other.
    mixed = [*records[:20], *map(without_ids, sampled)]
    assert leaked(write(tmp_path / "f", mixed, ()), range(20)).mostly == 20
    assert leaked(write(tmp_path / "g", mixed, ()), range(20, 40)).mostly == 20


def test_what_is_known_decides_over_routing(tmp_path: Path) -> None:
    """Equal routing under other ids is made up, not a leak; under unknown ids it is a leak, not made up."""
    records = model_records(30)
    copies = [replace(records[n], token_ids=(records[n].token_ids + 1) % VOCABULARY) for n in range(10)]
    path = write(tmp_path / "a", [*records, *copies], ())
    assert found(path) == {"copied-routing": "error"}
    assert leaked(path, range(30)).mostly == 0
    unknown = [without_ids(copy) for copy in copies]
    path = write(tmp_path / "b", [*records, *unknown], ())
    assert leaked(path, range(30)) == Leak(10, 10, 0, 1.0, 10, 30)
    assert found(path) == {"split-leak": "error", "unknown-tokens": "note"}
    # An unknown copy between two that contradict each other does not hide them.
    assert "copied-routing" in found(write(tmp_path / "c", [*records, *unknown, *copies], ()))


def test_unknown_ids_alone_are_no_leak(tmp_path: Path) -> None:
    records = model_records(40)
    partly = [without_ids(record, 30) for record in records]
    assert found(write(tmp_path / "a", partly, ())) == {"unknown-tokens": "note"}
    # Routers with little to choose route alike by chance, also in documents of a few tokens.
    draw = torch.Generator().manual_seed(0)
    for number, (length, layers, experts) in enumerate(((60, 1, 3), (12, 2, 3), (9, 1, 8))):
        ids = [torch.randint(0, experts, (length, layers, 1), generator=draw) for _ in range(80)]
        tokens = [torch.full((length,), -1) for _ in range(80)]
        assert leaked(ids_only(tmp_path / str(number), ids, tokens), range(40)).mostly == 0
    # Most copies of a document's larger part are still told from them, by what stands at the same place.
    ids = [torch.randint(0, 2, (120, 1, 1), generator=draw) for _ in range(40)]
    ids[20:] = [torch.cat([ids[n][:110], ids[n + 20][110:]]) for n in range(20)]
    path = ids_only(tmp_path / "copies", ids, [torch.full((120,), -1)] * 40)
    assert leaked(path, range(20)).mostly >= 10
    # A text that repeats itself is found where all of it is there twice.
    twice = [without_ids(one_after_the_other(cut(record, 0, 30), cut(record, 0, 30))) for record in records[:20]]
    assert leaked(write(tmp_path / "c", [*twice, *twice], ()), range(20)) == Leak(20, 20, 0, 1.0, 20, 20)
    # Rows that are alike throughout, as padding is, say nothing of a text.
    tail = [one_after_the_other(cut(record, 0, 20), *[cut(records[0], 5, 6)] * 40) for record in records]
    assert leaked(write(tmp_path / "b", [without_ids(record) for record in tail], ()), range(20)).mostly == 0


def test_leaks_of_a_trace_so_large_that_runs_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", conversations(20, 130, 120), ())
    records = model_records(20, 300)
    fresh = model_records(20, 300, seed=1)
    known = [*records, *(one_after_the_other(cut(records[n], 0, 220), cut(fresh[n], 220)) for n in range(20))]
    other = write(tmp_path / "b", known, ())
    partly = [one_after_the_other(cut(records[n], 0, 120), without_ids(cut(fresh[n], 120))) for n in range(20)]
    third = write(tmp_path / "c", [*records, *partly], ())
    exact = leaked(path, range(0, 40, 2)), leaked(other, range(20))
    assert leaked(third, range(20)) == Leak(20, 0, 20, 0.0, 0, None)
    monkeypatch.setattr(shingles, "_MOST_KEPT", 1 << 11)
    assert scan_trace(Trace.open(path)).text.step == 8
    assert leaked(third, range(20)) == Leak(20, 0, 20, 0.0, 0, None)
    for before, now in zip(exact, (leaked(path, range(0, 40, 2)), leaked(other, range(20))), strict=True):
        assert before.mostly == now.mostly == 20
        assert now.share == pytest.approx(before.share, abs=0.1)


@pytest.mark.parametrize("front", [False, True])
def test_padding(tmp_path: Path, front: bool) -> None:
    def padded(record: RoutingRecord, size: int) -> RoutingRecord:
        place = 0 if front else len(record) - 1
        tensors = {}
        for name, tensor in record.tensors():
            filler = tensor[place : place + 1].expand(size, *tensor.shape[1:])
            filler = torch.full_like(filler, 1) if name == "token_ids" else filler
            tensors[name] = torch.cat([filler, tensor] if front else [tensor, filler])
        return RoutingRecord(**tensors)

    records = model_records()
    assert found(write(tmp_path / "a", [padded(record, 20) for record in records]))["padding"] == "error"
    some = [padded(record, 12) if number % 5 == 0 else record for number, record in enumerate(records)]
    assert found(write(tmp_path / "b", some))["padding"] == "warning"
    assert "padding" not in found(write(tmp_path / "c", [padded(record, 5) for record in records]))


# --- findings about K and E ----------------------------------------------------------------------------


def test_another_top_k_than_the_models(tmp_path: Path) -> None:
    records = model_records()
    right = {"config": {"num_experts_per_tok": TOP_K, "num_experts": EXPERTS}}
    assert found(write(tmp_path / "a", records, settings=right)) == {}
    for number, wrong in enumerate(({"top_k": 3}, {"config": {"num_local_experts": 16}})):
        assert found(write(tmp_path / f"b{number}", records, settings=wrong)) == {"top-k-mismatch": "error"}


def test_an_expert_named_twice(tmp_path: Path) -> None:
    records = model_records()
    ids = records[4].expert_ids.clone()
    ids[7, 2, 1] = ids[7, 2, 0]
    records[4] = replace(records[4], expert_ids=ids)
    path = write(tmp_path, records)
    assert found(path)["repeated-experts"] == "error"
    assert "1 of " in next(f.message for f in validate_trace(path).findings if f.code == "repeated-experts")
    assert "layer 2" in next(f.message for f in validate_trace(path).findings if f.code == "repeated-experts")


def test_slots_without_an_expert(tmp_path: Path) -> None:
    ids = [record.expert_ids for record in model_records()]
    empty = [torch.cat([one, torch.full_like(one, -1)], -1) for one in ids]
    wider = [replace(record, expert_ids=one) for record, one in zip(model_records(), empty, strict=True)]
    assert found(write(tmp_path / "a", wider, ()))["empty-slots"] == "warning"
    dropping = []
    for record in model_records():
        ids = record.expert_ids.clone()
        ids[::9, :, 1] = -1
        dropping.append(replace(record, expert_ids=ids))
    assert found(write(tmp_path / "b", dropping, ())) == {"dropped-slots": "note"}
    assert found(write(tmp_path / "c", dropping, ("gate_weights",)))["unserved-gates"] == "warning"
    right = [replace(r, gate_weights=gates_of(r) * (r.expert_ids >= 0)) for r in dropping]
    assert found(write(tmp_path / "d", right)) == {"dropped-slots": "note"}


def test_ids_beyond_the_experts(tmp_path: Path) -> None:
    records = []
    for record in model_records():
        ids = record.expert_ids.clone()
        ids[::5, 1, 1] = EXPERTS + 3
        records.append(replace(record, expert_ids=ids))
    path = write(tmp_path / "a", records)
    assert found(path) == {"beyond-experts": "note"}
    # A model with two zero experts has no id 11.
    topology = Trace.open(path).topology.model_copy(update={"zero_experts": 2})
    kept = ("token_ids", "phase", "expert_ids")
    with TraceWriter(tmp_path / "b", Manifest(topology=topology, source=Source(kind="test"), fields=kept)) as writer:
        for number, record in enumerate(records):
            bare = RoutingRecord(record.token_ids, record.phase, record.expert_ids)
            writer.add(f"doc-{number}", "d", str(number), bare)
    assert found(tmp_path / "b") == {"beyond-experts": "error"}


def test_a_number_of_experts_taken_from_the_ids(tmp_path: Path) -> None:
    path = write(tmp_path, model_records(), settings={"experts_from": "ids"})
    assert found(path) == {"inferred-experts": "note"}


def with_slot(records: Records, ids_of: Callable[[int], torch.Tensor], at: int = TOP_K) -> Records:
    """The same records with one slot more in every layer, of the ids that ``ids_of`` gives for so many tokens."""
    wider = []
    for record in records:
        slot = ids_of(len(record))[:, None, None].expand(-1, LAYERS, 1).to(torch.int16)
        ids = torch.cat([record.expert_ids[..., :at], slot, record.expert_ids[..., at:]], -1)
        wider.append(RoutingRecord(record.token_ids, record.phase, ids))
    return wider


@pytest.mark.parametrize("at", [0, TOP_K])
def test_a_shared_expert_in_a_slot_of_its_own(tmp_path: Path, at: int) -> None:
    draw = torch.Generator().manual_seed(0)
    fewer = [replace(record, expert_ids=record.expert_ids % 6) for record in model_records(60)]
    fewer = [
        replace(r, expert_ids=torch.stack([r.expert_ids[..., 0], (r.expert_ids[..., 0] + 1) % 6], -1)) for r in fewer
    ]
    assert "shared-slot" not in found(write(tmp_path / "a", fewer, ()))
    constant = with_slot(fewer, lambda size: torch.full((size,), 6), at)
    path = write(tmp_path / "b", constant, ())
    codes = found(path)
    assert codes["shared-slot"] == "error"
    assert "always-used" not in codes  # the same thing is not said twice
    message = next(f.message for f in validate_trace(path).findings if f.code == "shared-slot")
    assert message.startswith(f"slot {at} of 0 to 2 holds expert 6 for every token in every layer")
    replicas = with_slot(fewer, lambda size: torch.randint(6, 8, (size,), generator=draw), at)
    assert found(write(tmp_path / "c", replicas, ()))["shared-slot"] == "error"
    # Where the number of experts does not count it, it is one of those beyond.
    beyond = with_slot(model_records(60), lambda size: torch.randint(8, 12, (size,), generator=draw), at)
    codes = found(write(tmp_path / "d", beyond, ()))
    assert (codes["shared-slot"], codes["beyond-experts"]) == ("error", "note")


def test_a_slot_that_may_be_a_shared_expert(tmp_path: Path) -> None:
    short = [RoutingRecord(*(tensor[:2] for _, tensor in record.tensors())) for record in model_records()]
    few = with_slot(short, lambda size: torch.full((size,), 9))
    assert found(write(tmp_path / "a", few, ()))["shared-slot"] == "warning"


# --- findings about the routing ------------------------------------------------------------------------


def test_an_expert_that_every_token_uses(tmp_path: Path) -> None:
    def always(layers: list[int], but: int = 0) -> Records:
        """Expert 7 is one of the two, in either slot."""
        changed = []
        for record in model_records(40):
            ids = record.expert_ids % 7
            swap = torch.arange(len(ids)) % 2
            for layer in layers:
                ids[torch.arange(len(ids)), layer, swap] = 7
                ids[:but, layer, 0], ids[:but, layer, 1] = 1, 2
            other = ids[..., 0] == ids[..., 1]
            ids[..., 1][other] = (ids[..., 1][other] + 1) % 7
            changed.append(RoutingRecord(record.token_ids, record.phase, ids))
        return changed

    every = write(tmp_path / "a", always([0, 1, 2, 3]), ())
    assert found(every)["always-used"] == "error"
    assert "expert 7 in every layer" in next(
        f.message for f in validate_trace(every).findings if f.code == "always-used"
    )
    some = write(tmp_path / "b", always([1, 3]), ())
    assert found(some)["always-used"] == "warning"
    assert "in 2 layers of 4 (expert 7 in layer 1)" in str(validate_trace(some).findings)
    # 1 of 64 tokens without it is more than a hundredth, and a layer that has collapsed is called so.
    assert "always-used" not in found(write(tmp_path / "c", always([0, 1, 2, 3], but=1), ()))
    ids = [torch.tensor([5, 1]).expand(60, LAYERS, 2).contiguous() for _ in range(20)]
    assert "always-used" not in found(ids_only(tmp_path / "d", ids))


def alike(record: RoutingRecord, start: int, length: int, token: int | None = None) -> RoutingRecord:
    """The record with some tokens routed as the first of them, all of one token id if it is given."""
    tensors = {name: tensor.clone() for name, tensor in record.tensors()}
    tensors["expert_ids"][start : start + length] = tensors["expert_ids"][start]
    if token is not None:
        tensors["token_ids"][start : start + length] = token
    return RoutingRecord(**tensors)


def test_tokens_in_a_row_that_are_routed_alike(tmp_path: Path) -> None:
    def codes(name: str, documents: int, *change: Any) -> tuple[str, str]:
        records = model_records()
        records = [alike(record, *change) if n < documents else record for n, record in enumerate(records)]
        path = write(tmp_path / name, records, ())
        said = [finding for finding in validate_trace(path).findings if finding.code == "constant-routing"]
        assert ("constant-routing" in found(path)) == bool(said)
        return (said[0].severity, said[0].message) if said else ("", "")

    severity, message = codes("a", 3, 20, 8)
    assert severity == "warning"
    assert message.startswith("24 tokens (1.2%) stand in runs of 8 or more that are routed alike in all 4 layers")
    assert "the longest run 8 tokens in 'doc-0'" in message
    assert codes("b", 30, 20, 7)[0] == ""
    assert codes("c", 30, 20, 9)[0] == "error"
    # White space may be routed so; so much of it is padding.
    severity, message = codes("d", 3, 20, 9, 5)
    assert severity == "note"
    assert message.startswith("27 tokens (1.4%)")
    assert codes("e", 30, 20, 9, 5)[0] == "warning"
    assert codes("f", 3, 20, 9, -1)[0] == "warning"
    # The run's first token may follow itself: it still is one token's run.
    assert codes("g", 3, 0, 9, 5)[0] == "note"


def test_tokens_routed_alike_where_that_says_nothing(tmp_path: Path) -> None:
    ids = [torch.tensor([5, 1]).expand(60, LAYERS, 2).contiguous() for _ in range(20)]
    assert "constant-routing" not in found(ids_only(tmp_path / "a", ids))
    none = [alike(record, 20, 9) for record in model_records()]
    for record in none:
        record.expert_ids[20:29] = -1
    assert "constant-routing" not in found(write(tmp_path / "b", none, ()))
    # The end of one document and the beginning of the next are no run.
    ends = [alike(alike(record, len(record) - 6, 6), 0, 6) for record in model_records()]
    for before, after in itertools.pairwise(ends):
        after.expert_ids[:6] = before.expert_ids[-1]
    assert "constant-routing" not in found(write(tmp_path / "c", ends, ()))


@pytest.mark.parametrize("size", [1, 1 << 10, 2 << 20])
def test_runs_are_counted_whole_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    from specmoe.diagnostics import blocks
    from specmoe.diagnostics.scan import scan_trace

    monkeypatch.setattr(blocks, "_BLOCK_BYTES", size)  # of at least 256 tokens
    records = model_records(4, 700)
    records[1] = alike(records[1], 250, 12)
    records[2] = alike(alike(records[2], 509, 300), 100, 9, 3)
    records[3] = alike(alike(records[3], 692, 99), 252, 8, 4)
    scan = scan_trace(Trace.open(write(tmp_path, records, ())))
    # The documents have 700, 701, 702 and 700 tokens.
    assert (scan.alike.tokens, scan.alike.runs) == (12 + 193 + 8, 3)
    assert scan.alike.repeats == 9 + 8
    assert scan.alike.longest == (193, 2)


def test_runs_end_with_their_document_and_their_token_where_a_block_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specmoe.diagnostics import blocks
    from specmoe.diagnostics.scan import scan_trace

    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1)  # of 256 tokens
    first, second, third = (RoutingRecord(*(t[:512] for _, t in r.tensors())) for r in model_records(3, 520))
    first, third = alike(alike(first, 500, 12, 1), 0, 7, 1), alike(third, 250, 12, 3)
    second = alike(second, 0, 7, 1)
    second.expert_ids[:7] = first.expert_ids[-1]
    third.token_ids[256:262] = 4
    scan = scan_trace(Trace.open(write(tmp_path, [first, second, third], ())))
    assert (scan.alike.repeats, scan.alike.tokens) == (12, 12)


def test_dead_experts_and_collapsed_layers(tmp_path: Path) -> None:
    lame = []
    for record in model_records():
        assert record.router_logits is not None
        ids, _ = route(record.router_logits - 99 * (torch.arange(EXPERTS) == 6))
        lame.append(replace(record, expert_ids=ids))
    assert found(write(tmp_path / "a", lame, ())) == {"dead-experts": "note"}
    one, all_of_them = [], []
    for record in model_records():
        value = record.expert_ids.clone()
        value[:, 2] = torch.tensor([5, 1])
        one.append(replace(record, expert_ids=value))
        value = torch.tensor([5, 1], dtype=torch.int16).expand_as(value).contiguous()
        all_of_them.append(replace(record, expert_ids=value))
    some = found(write(tmp_path / "b", one, ()))
    assert some["collapsed-layers"] == "warning"
    every = found(write(tmp_path / "c", all_of_them, ()))
    assert every["collapsed-layers"] == "error"
    # Two collapsed layers are no copies of each other, nor are two collapsed documents.
    assert not {"identical-layers", "shifted-layers", "copied-routing"} & {*some, *every}


def test_a_layer_that_copies_another(tmp_path: Path) -> None:
    same, later = [], []
    for record in model_records():
        value = record.expert_ids.clone()
        value[:, 3] = value[:, 0].flip(-1)
        same.append(replace(record, expert_ids=value))
        value = record.expert_ids.clone()
        value[:-2, 3] = record.expert_ids[2:, 1]
        later.append(replace(record, expert_ids=value))
    assert found(write(tmp_path / "a", same, ())) == {"identical-layers": "error"}
    path = write(tmp_path / "b", later, ())
    assert found(path) == {"shifted-layers": "error"}
    (finding,) = validate_trace(path).findings
    assert "layer 3 routes as layer 1 does 2 tokens later" in finding.message


@pytest.mark.parametrize("shift", [0, 5])
def test_a_document_whose_routing_is_anothers(tmp_path: Path, shift: int) -> None:
    records = model_records(tokens=80)
    for copy in (11, 17):
        value = records[copy].expert_ids.clone()
        length = min(len(value) - shift, len(records[3]))
        value[shift : shift + length] = records[3].expert_ids[:length]
        records[copy] = replace(records[copy], expert_ids=value)
    path = write(tmp_path, records, ())
    assert found(path) == {"copied-routing": "error"}
    assert "3 of 30 documents" in validate_trace(path).findings[0].message


def test_certain_synthetic_routing_is_copies_of_few_documents(tmp_path: Path) -> None:
    shape = Topology(model_id="s", layers=4, experts=8, top_k=2, hidden_size=16)
    synthetic_trace(tmp_path / "t", topology=shape, documents=60, tokens=60, determinism=1.0, seed=1)
    assert found(tmp_path / "t")["split-leak"] == "error"


def test_routing_without_anything_to_foresee(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.tensor([8.0, 4, 2, 2, 1, 1, 1, 1])
    places = weights.expand(40 * 50 * LAYERS, -1)
    ids = list(torch.multinomial(places, TOP_K, generator=draw).view(40, 50, LAYERS, TOP_K))
    tokens = [torch.randint(0, 30, (50,), generator=draw) for _ in range(40)]
    assert found(ids_only(tmp_path / "a", ids, tokens)) == {"iid-routing": "error"}
    # One source is enough: tokens, the layer before, or the token before.
    by_token = torch.rand(30, LAYERS, EXPERTS, generator=draw).topk(TOP_K, -1).indices
    chosen = torch.rand(40, 50, LAYERS, 1, generator=draw) < 0.2
    mixed = [torch.where(chosen[n], by_token[tokens[n]], ids[n]) for n in range(40)]
    assert found(ids_only(tmp_path / "b", mixed, tokens)) == {}
    below = [value.clone() for value in ids]
    sticky = [value.clone() for value in ids]
    for value in below:
        follow = torch.rand(50, generator=draw) < 0.3
        value[follow, 2] = (value[follow, 1] + 1) % EXPERTS
    for value in sticky:
        for token in range(1, 50):
            if torch.rand((), generator=draw) < 0.3:
                value[token] = value[token - 1]
    assert found(ids_only(tmp_path / "c", below, tokens)) == {}
    assert found(ids_only(tmp_path / "d", sticky, tokens)) == {}
    # Too little to tell.
    assert "iid-routing" not in found(ids_only(tmp_path / "e", ids[:15], tokens[:15]))


def test_routing_that_only_hidden_states_foresee_is_not_called_hopeless(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    routers = ROUTERS * (torch.arange(WIDTH) < 8)
    records = []
    for record in model_records(40, 50):
        # The next layer's route hides where no earlier route shows it.
        hidden = torch.randn(len(record), LAYERS, WIDTH, generator=draw)
        hidden[:, :-1, 8:] = hidden[:, 1:, :8]
        logits = torch.einsum("tld,led->tle", hidden.half().float(), routers)
        ids, gates = route(logits)
        tokens = torch.randint(0, 5000, (len(record),), generator=draw).int()
        records.append(RoutingRecord(tokens, record.phase, ids, gates, logits, hidden.half()))
    assert "iid-routing" not in found(write(tmp_path / "a", records, routers=routers))
    assert found(write(tmp_path / "b", records, ())) == {"iid-routing": "error"}


# --- findings about gates and logits -------------------------------------------------------------------


def test_gates_that_are_no_probabilities(tmp_path: Path) -> None:
    def with_gates(change: Callable[[torch.Tensor], torch.Tensor]) -> Records:
        return [replace(record, gate_weights=change(gates_of(record))) for record in model_records()]

    def codes(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, str]:
        return found(write(tmp_path / name, with_gates(change), ("gate_weights",)))

    normal = lambda gates: gates / gates.sum(-1, keepdim=True)  # noqa: E731
    assert codes("normalised", normal) == {}
    assert codes("scaled", lambda gates: 2.5 * normal(gates)) == {"scaled-gates": "note"}
    assert codes("zero", torch.zeros_like) == {"scaled-gates": "warning"}
    assert codes("negative", lambda gates: gates.log() + 1) == {"negative-gates": "error"}
    assert codes("wild", lambda gates: 20 * gates.square()) == {"odd-gates": "warning"}
    assert codes("even", lambda gates: torch.full_like(gates, 0.5)) == {"constant-gates": "warning"}
    assert codes("sigmoid", lambda gates: gates.sqrt()) == {}


def test_gates_in_another_order_than_the_ids(tmp_path: Path) -> None:
    flipped = [replace(record, gate_weights=gates_of(record).flip(-1)) for record in model_records()]
    assert found(write(tmp_path / "a", flipped))["unordered-gates"] == "error"
    some = [*flipped[:3], *model_records()[3:]]
    assert found(write(tmp_path / "b", some))["unordered-gates"] == "warning"
    # Ids and weights may come in any order, as long as it is the same.
    both = [replace(record, expert_ids=record.expert_ids.flip(-1)) for record in flipped]
    assert found(write(tmp_path / "c", both)) == {}


def test_logits_that_do_not_lead_to_the_ids(tmp_path: Path) -> None:
    biased = []
    for record in model_records():
        assert record.router_logits is not None
        scores = record.router_logits.sigmoid()
        ids = (scores + torch.linspace(0, 0.5, EXPERTS)).topk(TOP_K, -1).indices
        biased.append(replace(record, expert_ids=ids.to(torch.int16), gate_weights=scores.gather(-1, ids)))
    assert found(write(tmp_path / "a", biased)) == {"route-not-top-k": "note"}
    foreign = []
    for record in model_records():
        assert record.router_logits is not None
        foreign.append(replace(record, router_logits=record.router_logits.roll(7, 0).contiguous()))
    codes = found(write(tmp_path / "b", foreign, ("router_logits",)))
    assert codes == {"foreign-logits": "error"}


# --- findings about hidden states ----------------------------------------------------------------------


def with_hidden(change: Callable[[torch.Tensor], torch.Tensor]) -> Records:
    return [replace(r, hidden=change(r.hidden).contiguous()) for r in model_records() if r.hidden is not None]


def test_hidden_states_that_are_noise(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    noise = with_hidden(lambda hidden: torch.randn(hidden.shape, generator=draw).half())
    assert found(write(tmp_path / "a", noise, ("hidden",))) == {"noise-hidden": "error"}
    assert found(write(tmp_path / "b", noise)) == {"noise-hidden": "error", "foreign-routers": "error"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hidden: hidden.roll(-1, 1), "aligned with "),
        (lambda hidden: hidden.roll(1, 0), "aligned with token t-1"),
        (lambda hidden: hidden.roll(-1, 0), "aligned with token t+1"),
        (lambda hidden: hidden[:, [2, 3, 0, 1]], "permuted"),
    ],
)
def test_hidden_states_of_another_place(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    path = write(tmp_path, with_hidden(change), ("hidden",))
    codes = found(path)
    assert codes == {"misplaced-hidden": "error"}
    assert words in validate_trace(path).findings[0].message


@pytest.mark.parametrize(("by", "words"), [(1, "aligned with layer s+1"), (-1, "aligned with layer s-1")])
def test_real_hidden_states_one_layer_off(captured: Path, tmp_path: Path, by: int, words: str) -> None:
    # Neighbouring layers of a residual stream resemble each other, so this is the hard case.
    trace = Trace.open(captured)
    shape = trace.topology
    manifest = Manifest(topology=shape, source=Source(kind="test"), fields=trace.manifest.fields)
    with TraceWriter(tmp_path, manifest) as writer:
        for index, document in enumerate(trace.documents):
            record = trace.read(index)
            assert record.hidden is not None
            places = (torch.arange(shape.layers) + by).clamp(0, shape.layers - 1)
            moved = replace(record, hidden=record.hidden[:, places])
            writer.add(document.doc_id, document.domain, document.text_sha256, moved)
    assert found(tmp_path) == {"misplaced-hidden": "error"}
    assert words in validate_trace(tmp_path).findings[0].message


def test_hidden_states_one_layer_late(tmp_path: Path) -> None:
    # Layer s holds what the router of layer s + 1 read, and the last layer repeats its own.
    path = write(tmp_path, with_hidden(lambda hidden: hidden[:, [1, 2, 3, 3]]), ("hidden",))
    assert found(path) == {"misplaced-hidden": "error"}
    assert "aligned with layer s+1" in validate_trace(path).findings[0].message


def test_routers_that_do_not_give_the_logits(tmp_path: Path) -> None:
    moved = write(tmp_path / "a", model_records(), routers=ROUTERS.roll(1, 0))
    assert found(moved) == {"foreign-routers": "error"}
    assert "hidden × router 1 gives those of layer 0" in validate_trace(moved).findings[0].message
    bent = ROUTERS + 0.3 * torch.randn(ROUTERS.shape, generator=torch.Generator().manual_seed(1))
    assert found(write(tmp_path / "b", model_records(), routers=bent)) == {"foreign-routers": "warning"}
    assert found(write(tmp_path / "c", model_records(), routers=None)) == {}


def test_too_few_documents_to_probe(tmp_path: Path) -> None:
    records = [record if number < 5 else replace(record, hidden=None) for number, record in enumerate(model_records())]
    assert found(write(tmp_path, records))["unprobed-hidden"] == "note"


# --- anything that a trace may hold ---------------------------------------------------------------------


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_a_trace_holds_it_is_answered(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    top_k = data.draw(st.integers(1, experts))
    width, scale = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0.0, 1.0, 1e30, 3e38]))
    fields = tuple(name for name in ALL if data.draw(st.booleans()))
    span = data.draw(st.sampled_from([(-1, experts + 2), (0, experts), (-1, 0), (0, 1)]))
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 60, 120]), max_size=30))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    topology = Topology(model_id="m", layers=layers, experts=experts, top_k=top_k, hidden_size=width)
    path = tmp_path_factory.mktemp("any") / "trace"
    manifest = Manifest(
        topology=topology, source=Source(kind="test"), fields=("token_ids", "phase", "expert_ids", *fields)
    )

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=draw) - 0.5) * scale

    with TraceWriter(path, manifest) as writer:
        if data.draw(st.booleans()):
            writer.keep_routers(numbers(layers, experts, width))
        for number, size in enumerate(sizes):
            tensors = {
                "gate_weights": numbers(size, layers, top_k),
                "router_logits": numbers(size, layers, experts),
                "hidden": numbers(size, layers, width),
            }
            if data.draw(st.booleans()):
                tensors.pop("hidden")
            record = RoutingRecord(
                token_ids=torch.randint(-1, 4, (size,), generator=draw, dtype=torch.int32),
                phase=torch.randint(0, 2, (size,), generator=draw, dtype=torch.uint8),
                expert_ids=torch.randint(*span, (size, layers, top_k), generator=draw, dtype=torch.int16),
                **{name: tensor for name, tensor in tensors.items() if name in fields},
            )
            writer.add(f"doc-{number}", "d", str(number), record)
    found(path)


# --- the verb ------------------------------------------------------------------------------------------


def test_every_check_says_what_it_looks_for() -> None:
    assert all(check.__doc__ for check in CHECKS)
    documented = (Path(__file__).parent.parent / "docs" / "validate.md").read_text(encoding="utf-8")
    source = Path(__file__).read_text(encoding="utf-8")
    for check in CHECKS:
        code = check.__name__.replace("_", "-")
        assert f"`{code}`" in documented, code
        assert f'"{code}"' in source, code


def test_the_verb_prints_a_page_and_its_exit_code_tells_of_errors(
    tmp_path: Path, synthetic_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(["validate", str(synthetic_path)]) == 0
    out = capsys.readouterr().out
    tokens = f"{Trace.open(synthetic_path).tokens:,}"
    assert f"{tokens} (" in out
    assert "1 note" in out
    assert run_verb(["validate", str(write(tmp_path, model_records(2)))]) == 1
    assert "ERROR   cannot-split" in capsys.readouterr().out


def test_the_verb_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, model_records(2))
    assert run_verb(["validate", str(path), "--json"]) == 1
    result = Validation.model_validate_json(capsys.readouterr().out)
    assert result.has_errors
    assert result == validate_trace(path)


def test_bad_input_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["validate", str(tmp_path)]) == 2
    path = write(tmp_path, model_records(4))
    shard = path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    assert run_verb(["validate", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 2
