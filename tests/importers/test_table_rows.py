"""Rows of anybody's: every form and name gives the routing that was written, and what is unclear is said."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_samples import (
    BIGMOEONEDGE_HEAD,
    EXPERTS,
    LAYERS,
    TOP_K,
    Routing,
    activations,
    bigmoeonedge,
    foreign_rows,
    jsonl,
    llama_ranks,
    problems,
    refused,
    routing,
    run,
    table,
)

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import _streams, _tables, _text, import_trace, recognise
from specmoe.sources.importers._columns import Columns, column_map
from specmoe.sources.importers.base import ImportOptions
from specmoe.trace import Phase, Trace


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def holds(
    trace: Trace, number: int, source: Routing, *, weights: bool = True, prompt: int | None = 5, tokens: bool = True
) -> None:
    """The document is what the rows were made from."""
    record = trace.read(number)
    assert record.expert_ids.tolist() == source.ids_TLK.tolist()
    if weights:
        assert record.gate_weights is not None
        assert torch.equal(record.gate_weights, torch.from_numpy(source.weights_TLK).float())
    else:
        assert record.gate_weights is None
    assert record.token_ids.tolist() == ([100 + t for t in range(len(source))] if tokens else [-1] * len(source))
    written = [Phase.PREFILL if prompt is None or t < prompt else Phase.DECODE for t in range(len(source))]
    assert record.phase.tolist() == written


# --- forms ---------------------------------------------------------------------------------------------


def in_slots(rows: list[dict[str, Any]], first: int = 0) -> list[dict[str, Any]]:
    """Lists in columns of their own."""
    return [
        {key: value for key, value in row.items() if not isinstance(value, list)}
        | {f"expert_{first + at}": expert for at, expert in enumerate(row["topk_ids"])}
        | {f"weight_{first + at}": weight for at, weight in enumerate(row["topk_weights"])}
        for row in rows
    ]


def tokens(source: Routing, form: str, request: str = "r0") -> list[dict[str, Any]]:
    """One row per token, layers within."""
    rows = []
    for token, (ids_LK, weights_LK) in enumerate(
        zip(source.ids_TLK.tolist(), source.weights_TLK.tolist(), strict=True)
    ):
        row = {
            "seq_id": request,
            "position": token,
            "token_id": 100 + token,
            "phase": "prompt" if token < 5 else "output",
        }
        if form == "lists":  # by place: dense layers are empty
            full: list[list[Any]] = [[] for _ in range(LAYERS[-1] + 1)]
            of_weights: list[list[Any]] = [[] for _ in full]
            for layer, name in enumerate(LAYERS):
                full[name], of_weights[name] = ids_LK[layer], weights_LK[layer]
            row |= {"experts": full, "weights": of_weights}
        elif form == "by name":
            names = [f"model.layers.{name}.mlp" for name in LAYERS]
            row |= {"selected_experts": dict(zip(names, ids_LK, strict=True))}
            row |= {"routing_weights": dict(zip(names, weights_LK, strict=True))}
        elif form == "objects":
            parts = [
                {"layer_id": name, "expert_ids": ids_LK[layer], "scores": weights_LK[layer]}
                for layer, name in reversed(list(enumerate(LAYERS)))
            ]
            row |= {"layers": parts}
        else:
            row |= {
                "routing": {
                    str(name): {"ids": ids_LK[layer], "expertWeights": weights_LK[layer]}
                    for layer, name in enumerate(LAYERS)
                }
            }
        rows.append(row)
    return rows


def spelled(rows: list[dict[str, Any]], spell: Callable[[list[Any]], str]) -> list[dict[str, Any]]:
    return [{key: spell(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows]


def both(form: Callable[[Routing, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return form(routing(8), "r0") + form(routing(6, 1), "r1")


def pairs() -> list[dict[str, Any]]:
    return both(lambda source, name: foreign_rows(source, request=name))


FORMS: dict[str, tuple[str, Callable[[], str]]] = {
    "objects of pairs": ("a.jsonl", lambda: jsonl(pairs())),
    "objects of pairs in slots": ("a.jsonl", lambda: jsonl(in_slots(pairs()))),
    "objects of experts": ("a.jsonl", lambda: jsonl(activations(pairs()))),
    "CSV with lists": ("a.csv", lambda: table(pairs())),
    "TSV with lists": ("a.tsv", lambda: table(pairs(), delimiter="\t")),
    "CSV of semicolons": ("a.csv", lambda: table(pairs(), delimiter=";")),
    "CSV below remarks": ("a.csv", lambda: table(pairs(), head="# a model\n# a day\n")),
    "CSV with Windows lines": ("a.csv", lambda: table(pairs()).replace("\n", "\r\n")),
    "spaces": ("a.csv", lambda: table(spelled(pairs(), lambda value: " ".join(map(str, value))))),
    "numpy's brackets": ("a.csv", lambda: table(spelled(pairs(), lambda value: f"[ {'  '.join(map(str, value))}]"))),
    "semicolons": ("a.csv", lambda: table(spelled(pairs(), lambda value: ";".join(map(str, value))))),
    "bars": ("a.csv", lambda: table(spelled(pairs(), lambda value: "|".join(map(str, value))))),
    "tuples": ("a.csv", lambda: table(spelled(pairs(), lambda value: str(tuple(value))))),
    "slots from 0": ("a.csv", lambda: table(in_slots(pairs()))),
    "slots from 1": ("a.csv", lambda: table(in_slots(pairs(), 1))),
    "e0, e1": ("a.csv", lambda: table(in_slots(pairs())).replace("expert_", "e").replace("weight_", "w")),
    "experts": ("a.csv", lambda: table(activations(pairs()))),
    "experts of slots from 1": ("a.csv", lambda: table(activations(pairs(), 1))),
    "whole numbers as pandas writes them beside gaps": (
        "a.csv",
        lambda: table(
            [row | {"Layer": float(row["Layer"]), "rank": float(row["rank"])} for row in activations(pairs())]
        ),
    ),
    "tokens with lists": ("a.jsonl", lambda: jsonl(both(lambda source, name: tokens(source, "lists", name)))),
    "tokens with layers by name": (
        "a.jsonl",
        lambda: jsonl(both(lambda source, name: tokens(source, "by name", name))),
    ),
    "tokens with objects": ("a.jsonl", lambda: jsonl(both(lambda source, name: tokens(source, "objects", name)))),
    "CSV of tokens with lists": (
        "a.csv",
        lambda: table(
            [
                row | {name: json.dumps(row[name]) for name in ("experts", "weights")}
                for row in both(lambda source, name: tokens(source, "lists", name))
            ]
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_was_written(tmp_path: Path, form: str) -> None:
    name, text = FORMS[form]
    path = write(tmp_path / name, text())
    assert recognise(path).name == "rows"
    trace, warnings = run(path, tmp_path / "trace")
    assert (trace.topology.layers, trace.topology.experts, trace.topology.top_k) == (len(LAYERS), EXPERTS, TOP_K)
    assert [document.doc_id for document in trace.documents] == ["r0", "r1"]
    holds(trace, 0, routing(8))
    holds(trace, 1, routing(6, 1))
    assert trace.manifest.source.settings["layers"] == list(LAYERS)
    assert trace.manifest.source.settings["experts_from"] == "ids"
    assert warnings == []


def test_objects_within_may_be_named_by_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(tokens(routing(8), "objects by name")))
    refused(path, tmp_path / "trace", "hold the experts; name one with --map experts=COLUMN; there are: ids, expertW")
    trace, _ = run(path, tmp_path / "named", columns={"experts": "ids"})
    holds(trace, 0, routing(8))


@pytest.mark.parametrize("form", ["objects of pairs", "experts", "slots from 1", "tokens with objects"])
def test_the_order_of_rows_does_not_matter(tmp_path: Path, form: str) -> None:
    name, text = FORMS[form]
    head, *rows = text().splitlines(keepends=True)
    rows = rows if name.endswith(".csv") else [head, *rows]
    for number, how in enumerate((random.Random(0).shuffle, lambda rows: rows.sort(key=lambda row: hash(row[::-1])))):
        how(rows)
        path = write(tmp_path / str(number) / name, "".join([head] * name.endswith(".csv") + rows))
        trace, warnings = run(path, tmp_path / f"trace-{number}")
        assert warnings == []
        order = [document.doc_id for document in trace.documents]
        assert sorted(order) == ["r0", "r1"]
        holds(trace, order.index("r0"), routing(8))
        holds(trace, order.index("r1"), routing(6, 1))


@pytest.mark.parametrize("form", ["objects of pairs", "experts", "tokens with lists"])
def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    name, text = FORMS[form]
    path = write(tmp_path / name, text())
    for size in (150, 1000):
        monkeypatch.setattr(_text, "_BLOCK_BYTES", size)
        trace, _ = run(path, tmp_path / f"trace-{size}")
        holds(trace, 0, routing(8))
        holds(trace, 1, routing(6, 1))


def test_mixed_documents_go_through_a_temporary_file_and_sorted_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specmoe.sources.importers import table_rows

    made = []
    genuine = _streams.temporary_file
    monkeypatch.setattr(table_rows, "temporary_file", lambda: made.append(genuine()) or made[-1])
    monkeypatch.setattr(_text, "_BLOCK_BYTES", 2000)
    sources = [routing(30 + seed, seed) for seed in range(5)]
    rows = [foreign_rows(source, request=f"r{seed}") for seed, source in enumerate(sources)]
    run(write(tmp_path / "sorted.jsonl", jsonl([row for part in rows for row in part])), tmp_path / "sorted")
    assert made == []
    turns = [row for turn in zip(*(part[:90] for part in rows), strict=True) for row in turn]
    mixed = [*turns, *(row for part in reversed(rows) for row in part[90:])]
    trace, warnings = run(write(tmp_path / "mixed.jsonl", jsonl(mixed)), tmp_path / "mixed")
    assert [file.closed for file in made] == [True]
    assert warnings == []
    assert [document.doc_id for document in trace.documents] == [f"r{seed}" for seed in range(5)]
    for number, source in enumerate(sources):
        holds(trace, number, source)


def test_documents_that_come_back_in_a_later_block_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = foreign_rows(routing(8)), foreign_rows(routing(8, 1), request="r1")
    first = jsonl(one[:12] + other[:12])
    monkeypatch.setattr(_text, "_BLOCK_BYTES", len(first) + 9)  # in no block do rows lie mixed
    trace, _ = run(write(tmp_path / "a.jsonl", first + jsonl(one[12:] + other[12:])), tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["r0", "r1"]
    holds(trace, 0, routing(8))
    holds(trace, 1, routing(8, 1))


def test_a_full_disk_below_the_temporary_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specmoe.sources.importers import table_rows

    class Full(io.BytesIO):
        def write(self, _: object, /) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_rows, "temporary_file", Full)
    rows = [
        row
        for turn in zip(foreign_rows(routing(5)), foreign_rows(routing(5, 1), request="b"), strict=True)
        for row in turn
    ]
    refused(write(tmp_path / "a.jsonl", jsonl(rows)), tmp_path / "trace", "needs a temporary file.*No space left")


# --- what rows may leave out ---------------------------------------------------------------------------------


def test_nothing_is_made_up(tmp_path: Path) -> None:
    rows = [
        {"step": row["pos"], "layer": row["layerIdx"], "experts": row["topk_ids"]} for row in foreign_rows(routing(8))
    ]
    trace, warnings = run(write(tmp_path / "a.jsonl", jsonl(rows)), tmp_path / "trace")
    assert [document.doc_id for document in trace.documents] == ["a.jsonl"]
    holds(trace, 0, routing(8), weights=False, prompt=None, tokens=False)
    assert warnings == ["no column says which tokens the model wrote; all count as prefill"]
    assert (trace.documents[0].domain, trace.documents[0].group) == ("", "")


def test_experts_without_slots_take_the_order_of_their_rows(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "rank"} for row in activations(pairs())]
    rows.sort(key=lambda row: (row["Layer"], -row["tokenIndex"]))  # stable: slots stay in order
    trace, _ = run(write(tmp_path / "a.csv", table(rows)), tmp_path / "trace")
    assert trace.topology.top_k == TOP_K
    order = [document.doc_id for document in trace.documents]
    holds(trace, order.index("r0"), routing(8))
    holds(trace, order.index("r1"), routing(6, 1))
    refused(
        write(tmp_path / "twice.csv", table(rows) + table(rows).split("\n", 1)[1]),
        tmp_path / "twice",
        f"line {len(rows) + 2}: expert .* for the same token .* a second time",
    )


def test_tokens_without_numbers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_text, "_BLOCK_BYTES", 400)
    first, second = tokens(routing(8), "lists"), tokens(routing(6, 1), "lists", "r1")
    for number, rows in enumerate((first + second, [row for both in zip(first, second, strict=False) for row in both])):
        rows = [{key: value for key, value in row.items() if key != "position"} for row in rows]
        trace, _ = run(write(tmp_path / f"{number}.jsonl", jsonl(rows)), tmp_path / str(number))
        whole = routing(8)
        holds(trace, 0, whole if number == 0 else Routing(whole.ids_TLK[:6], whole.weights_TLK[:6]))
        holds(trace, 1, routing(6, 1))


def test_missing_places_hold_no_expert_and_are_counted(tmp_path: Path) -> None:
    rows = foreign_rows(routing(8))
    rows = [row for row in rows if (row["pos"], row["layerIdx"]) != (2, LAYERS[1]) and row["pos"] != 6]
    rows[0]["topk_ids"], rows[0]["topk_weights"] = rows[0]["topk_ids"][:1], rows[0]["topk_weights"][:1]
    trace, warnings = run(write(tmp_path / "a.jsonl", jsonl(rows)), tmp_path / "trace")
    expected = np.delete(routing(8).ids_TLK, 6, 0)
    expected[2, 1], expected[0, 0, 1:] = -1, -1
    assert trace.read(0).expert_ids.tolist() == expected.tolist()
    weights = np.where(expected < 0, 0, np.delete(routing(8).weights_TLK, 6, 0))
    assert torch.equal(trace.read(0).gate_weights, torch.from_numpy(weights).float())
    assert any("1 of 21 (token, layer) places have no row" in warning for warning in warnings)
    assert any("1 tokens are missing by their numbers" in warning for warning in warnings)


def test_empty_cells(tmp_path: Path) -> None:
    rows = in_slots(foreign_rows(routing(8)))
    rows[4] |= {"expert_2": "", "weight_2": "", "input_id": ""}
    trace, _ = run(write(tmp_path / "a.csv", table(rows)), tmp_path / "trace")
    expected = routing(8).ids_TLK.copy()
    expected[1, 1, 2] = -1
    assert trace.read(0).expert_ids.tolist() == expected.tolist()
    assert trace.read(0).gate_weights[1, 1, 2] == 0
    assert trace.read(0).token_ids.tolist() == [100 + token for token in range(8)]  # the token's other rows say it
    rows[4]["pos"] = ""
    refused(write(tmp_path / "b.csv", table(rows)), tmp_path / "refused", "line 6: expected whole numbers in pos")


def test_domains_groups_and_folders(tmp_path: Path) -> None:
    rows = [
        row | {"dataset": dataset, "conversation_id": f"c{int(row['req_id'][1]) // 2}"}
        for dataset in ("math", "code")
        for seed in range(3)
        for row in foreign_rows(routing(4, seed), request=f"r{seed}")
    ]
    trace, _ = run(write(tmp_path / "in" / "a.jsonl", jsonl(rows)), tmp_path / "one")
    run(tmp_path / "in" / "a.jsonl", tmp_path / "again")
    found = [(document.doc_id, document.domain, document.group) for document in trace.documents]
    assert found == [
        (f"{dataset}/r{seed}", dataset, f"c{seed // 2}") for dataset in ("math", "code") for seed in range(3)
    ]
    # Files of a folder number their requests anew, and one may be packed.
    (tmp_path / "in" / "b.csv.gz").write_bytes(gzip.compress(table(activations(foreign_rows(routing(5, 7)))).encode()))
    trace, _ = run(tmp_path / "in", tmp_path / "both")
    assert [document.doc_id for document in trace.documents][-2:] == ["a.jsonl:code/r2", "b.csv.gz:r0"]
    holds(trace, 6, routing(5, 7))
    write(tmp_path / "in" / "c.tsv", table(activations(foreign_rows(routing(6, 8))), delimiter="\t"))
    trace, _ = run(tmp_path / "in", tmp_path / "three")
    assert [document.doc_id for document in trace.documents][-2:] == ["b.csv.gz:r0", "c.tsv:r0"]
    holds(trace, 7, routing(6, 8))


def test_a_conversation_without_requests_is_the_document(tmp_path: Path) -> None:
    rows = [{"session": row.pop("req_id"), **row} for row in pairs()]
    trace, _ = run(write(tmp_path / "a.jsonl", jsonl(rows)), tmp_path / "trace")
    assert [(document.doc_id, document.group) for document in trace.documents] == [("r0", "r0"), ("r1", "r1")]


def test_generated_tokens_that_are_counted_anew_come_behind_the_prompt(tmp_path: Path) -> None:
    rows = [
        row | {"pos": row["pos"] - 5 if row["phase"] == "decode" else row["pos"]} for row in foreign_rows(routing(8))
    ]
    trace, warnings = run(write(tmp_path / "a.jsonl", jsonl(rows)), tmp_path / "trace")
    holds(trace, 0, routing(8))
    assert warnings == [
        "in 1 documents, generated tokens have numbers that tokens of the prompt have, too; "
        "they were put behind the prompt"
    ]


# --- the same as importers that know the format ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "text", "columns"),
    [
        ("problem-jsonl", "a.jsonl", lambda: jsonl(problems(routing(8)) + problems(routing(5, 1), problem=1)), {}),
        ("llama-moe-trace", "a.csv", lambda: llama_ranks(routing(8), prompt=5), {}),
        (
            "bigmoeonedge-csv",
            "a.csv",
            lambda: BIGMOEONEDGE_HEAD + bigmoeonedge(routing(8), prompt=1),
            {"token": "step", "document": "turn"},
        ),
    ],
)
def test_known_formats_are_read_alike(
    tmp_path: Path, name: str, file: str, text: Callable[[], str], columns: dict[str, str]
) -> None:
    path = write(tmp_path / file, text())
    known, _ = run(path, tmp_path / "known", format=name)
    trace, _ = run(path, tmp_path / "rows", format="rows", columns=columns)
    assert len(trace) == len(known)
    for number in range(len(known)):
        ours, theirs = dict(trace.read(number).tensors()), dict(known.read(number).tensors())
        if name == "problem-jsonl":  # which knows that only generated tokens are in it
            ours["phase"] = theirs["phase"]
            assert trace.documents[number].doc_id == known.documents[number].doc_id
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        "layer experts token",
        "layer_idx expert_ids token_idx",
        "layerId topkIds position",
        "Moe-Layer topk_indices POS",
        "LAYER_INDEX selected_experts step",
        "moe_layer_idx expert_indices token_position",
    ],
)
def test_the_usual_names(tmp_path: Path, names: str) -> None:
    layer, experts, token = names.split()
    rows = [{layer: row["layerIdx"], token: row["pos"], experts: row["topk_ids"]} for row in foreign_rows(routing(8))]
    for name, text in (("a.jsonl", jsonl(rows)), ("a.csv", table(rows))):
        assert recognise(write(tmp_path / name, text)).name == "rows"
        trace, _ = run(tmp_path / name, tmp_path / f"trace-{name}")
        holds(trace, 0, routing(8), weights=False, prompt=None, tokens=False)


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def odd(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Under names that nobody could guess."""
    names = dict(zip(rows[0], ("who", "where", "L", "picks", "strength", "word", "doing"), strict=True))
    return [{names[key]: value for key, value in row.items()} for row in rows]


MAP = "document=who,position=where,layer=L,experts=picks,weight=strength,token_id=word,phase=doing"


def test_the_user_names_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", table(odd(pairs())))
    with pytest.raises(SpecmoeError, match="no known format"):
        recognise(path)
    trace, warnings = run(path, tmp_path / "trace", columns=column_map([MAP]))
    assert warnings == []
    holds(trace, 0, routing(8))
    holds(trace, 1, routing(6, 1))
    settings = trace.manifest.source.settings
    assert settings["columns"] == dict(
        pair.split("=") for pair in MAP.replace("position", "token").replace("weight=", "weights=").split(",")
    )
    with pytest.raises(SpecmoeError, match="--map goes with --format rows, not with problem-jsonl"):
        import_trace(path, tmp_path / "x", format="problem-jsonl", options=ImportOptions(columns={"layer": "L"}))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["layers=x"], "unknown field in --map 'layers'; did you mean layer"),
        (["Layer=x"], "did you mean layer"),
        (["layer"], "takes pairs like layer=layer_idx, separated by commas; found 'layer'"),
        (["layer=a", "layer=b"], "names layer twice"),
        (["expert=a,experts=b"], "names experts twice"),
        ([""], "takes pairs"),
    ],
)
def test_a_map_that_cannot_be_understood(pairs: list[str], words: str) -> None:
    with pytest.raises(SpecmoeError, match=words):
        column_map(pairs)


@pytest.mark.parametrize(
    ("change", "columns", "words"),
    [
        (lambda row: row | {"step": 1}, {}, "pos and step may each be the token; .* token=pos or --map token=step"),
        (lambda row: row | {"moe_layer": 1}, {}, "layerIdx and moe_layer may each be the layer"),
        (lambda row: row | {"score": 1}, {}, "topk_weights and score may each be the weights"),
        (lambda row: row | {"expert": 1}, {}, "topk_ids and expert may each be the experts"),
        (lambda row: row | {"category": "a", "dataset": "b"}, {}, "category and dataset may each be the domain"),
        (lambda row: without(row, "layerIdx"), {}, "hold the layer; .* layer=COLUMN; there are: req_id, pos, topk_ids"),
        (lambda row: without(row, "pos"), {}, "no column is known to hold the token;"),
        (lambda row: without(row, "topk_ids"), {}, "no column is known to hold the experts;"),
        (lambda row: row, {"layer": "layer_indx"}, "layer=layer_indx: there is no such column; did you mean layerIdx"),
        (lambda row: row, {"group": "zzz"}, "--map group=zzz: there is no such column; there are: req_id"),
    ],
)  # fmt: skip
def test_unclear_columns_are_named_with_what_settles_them(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], columns: dict[str, str], words: str
) -> None:
    rows = [change(row) for row in foreign_rows(routing(8))]
    for name, text in (("a.jsonl", jsonl(rows)), ("a.csv", table(rows))):
        path = write(tmp_path / name, text)
        with pytest.raises(SpecmoeError, match=words) as caught:
            import_trace(path, tmp_path / "trace", format="rows", options=ImportOptions(columns=columns))
        assert str(path) in str(caught.value)
        if "may each" in words:
            assert recognise(path).name == "rows"  # so that this is what the user reads


def test_a_map_settles_what_is_unclear(tmp_path: Path) -> None:
    rows = [row | {"step": 7, "score": [1.0], "e0": 3} for row in foreign_rows(routing(8))]
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    trace, warnings = run(path, tmp_path / "trace", columns=column_map(["token=pos,weights=topk_weights"]))
    holds(trace, 0, routing(8))
    assert warnings == ["columns that nothing was made of: step, score, e0"]
    trace, _ = run(path, tmp_path / "without", columns=column_map(["token=pos", "weights="]))
    holds(trace, 0, routing(8), weights=False)


def test_slots_by_any_name(tmp_path: Path) -> None:
    text = table(in_slots(foreign_rows(routing(8)))).replace("expert_", "pick_").replace("weight_", "how_much")
    trace, _ = run(
        write(tmp_path / "a.csv", text), tmp_path / "trace", columns={"experts": "pick_", "weights": "how_much"}
    )
    holds(trace, 0, routing(8))


def test_slots_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    rows = [{"pos": 0, "layer": 0} | {f"e{slot}": 20 + slot for slot in (10, 2, 0, 11, 1, *range(3, 10))}]
    trace, _ = run(write(tmp_path / "a.csv", table(rows)), tmp_path / "trace")
    assert trace.read(0).expert_ids.tolist() == [[[20 + slot for slot in range(12)]]]


# --- faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[7].update(topk_ids=[1, 2]), "line 8: expected .* just as many numbers in topk_weights"),
        (lambda rows: rows[7].update(topk_ids=[1, 2, 2.5]), "line 8: expected"),
        (lambda rows: rows[7].update(topk_ids=[1, 2, "3"]), "line 8: expected"),
        (lambda rows: rows[7].update(topk_ids="x"), "line 8: expected"),
        (lambda rows: rows[7].update(topk_ids=[1, 2, 99999]), "line 8: expert id 99999"),
        (lambda rows: rows[7].update(topk_ids=[1, 2, -2]), "line 8: expert id -2"),
        (lambda rows: rows[7].update(topk_weights=[1, 2, float("nan")]), "line 8: gate weight nan"),
        (lambda rows: rows[7].update(topk_weights=[1, 2, None]), "line 8: gate weight nan"),
        (lambda rows: rows[7].pop("topk_weights"), "line 8: expected"),
        (lambda rows: rows[7].pop("layerIdx"), "line 8: expected whole numbers in pos, layerIdx"),
        (lambda rows: rows[7].update(layerIdx=-1), "line 8: layer -1"),
        (lambda rows: rows[7].update(layerIdx=1.5), "line 8: expected"),
        (lambda rows: rows[7].update(pos=1e300), "line 8: expected"),
        (lambda rows: rows[7].update(pos=float("nan")), "line 8: expected"),
        (lambda rows: rows[7].update(input_id=-5), "line 8: token id -5"),
        (lambda rows: rows[7].update(input_id=9), "line 8: token 2 has the token_id 9 here and another elsewhere"),
        (lambda rows: rows[7].update(phase="decode"), "line 7: token 2 has the phase 0 here and another elsewhere"),
        (lambda rows: rows[7].update(phase="elsewhere"), "line 8: expected .* prefill or decode, or 0 or 1, in phase"),
        (lambda rows: rows.append(rows[7]), "line 25: slot 0 of layer 2 for the same token a second time"),
        (lambda rows: [row.update(topk_ids=[], topk_weights=[]) for row in rows], "no routed expert"),
        (lambda rows: rows[-1].update(group="b") or [row.update(group="a") for row in rows[:-1]], "--map document="),
    ],
)
def test_rows_that_do_not_fit_are_named_by_their_line(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], object], words: str
) -> None:
    rows = foreign_rows(routing(8))
    change(rows)
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    refused(path, tmp_path / "trace", words, format="rows")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no routed expert"),
        ("token,layer,expert\n", "no routed expert"),
        ("token,layer,expert\n1,2,3", "last line has no end"),
        ("token,layer,expert\n1,2,3\n1,2\n", "line 3: expected 3 columns"),
        ("token,layer,experts\n1,2,3\n1,2,3,4\n", "line 3: expected 3 columns"),
        ('token,layer,experts\n1,2,"3 4"\n1,3,"5 6\n', "line 3: a quote that begins there is never closed"),
        ("token,layer,expert,layer\n1,2,3,4\n", "line 1: two columns are named 'layer'"),
        ("token,layer,e0,e2\n1,2,3,4\n", "e0, e2 are not numbered from 0 or 1 on without a gap"),
        ("token,layer,e0,e1,e2,w0,w1\n1,2,3,4,5,6,7\n", "3 columns hold experts and 2 weights"),
        ("token,layer,expert,slot\n1,2,3,-1\n", "line 2: slot -1"),
        ("token,layer,expert,slot\n1,2,3,0\n1,2,3,0\n", "line 3: slot 0 of layer 2 for the same token a second time"),
        ("# nothing\n", "no line that names its columns"),
        ('[{"token": 1}]\n', "begins with a JSON list; write one JSON object per line"),
        ('{"token": 1, "layer": 2, "experts": [3]}\n[1]\n', "line 2: expected a JSON object"),
        ("5,3,1\n5,4,2\n", "no column is known to hold the layer; .* there are: 5, 3, 1"),
        ('token,layer,experts\n1,2,"[1, 2] [3]"\n', "line 2: expected"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    refused(write(tmp_path / "a.csv", text), tmp_path / "trace", words, format="rows")


def test_weights_of_other_layers_than_the_experts(tmp_path: Path) -> None:
    row = {"pos": 0, "experts": {"1": [1, 2], "2": [3, 4]}, "weights": {"2": [0.5, 0.5], "1": [0.6, 0.4]}}
    refused(write(tmp_path / "a.jsonl", jsonl([row])), tmp_path / "trace", "line 1: expected", format="rows")


def test_files_with_and_without_weights_do_not_go_together(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.csv", "token,layer,expert,weight\n1,2,3,0.5\n")
    write(tmp_path / "in" / "b.csv", "token,layer,expert\n1,2,3\n")
    with pytest.raises(SpecmoeError, match=r"b.csv, line 1: this file has gate weights and others have none, or the"):
        import_trace(tmp_path / "in", tmp_path / "trace")


def test_line_breaks_in_quotes_and_long_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["a\nb", "\n\n\n", 'say "so"\n', "plain", "x" * 200_000, "\n", ",", "end\n"]
    rows = [{"text": words[row["pos"]], **row} for row in foreign_rows(routing(8))]
    path = write(tmp_path / "a.csv", table(rows))
    for size in (_text._BLOCK_BYTES, 300):
        monkeypatch.setattr(_text, "_BLOCK_BYTES", size)
        trace, warnings = run(path, tmp_path / f"trace-{size}")
        holds(trace, 0, routing(8))
        assert warnings == ["columns that nothing was made of: text"]
    rows[9]["pos"] = "x"
    refused(write(path, table(rows)), tmp_path / "refused", "line 26: expected")


def test_columns_know_their_names_in_every_spelling() -> None:
    columns = Columns(["Layer-IDX", "TopK_Ids", "pos"], {}, "file")
    assert [columns.need(field) for field in ("layer", "experts", "token")] == ["Layer-IDX", "TopK_Ids", "pos"]
    assert columns.get("group") is None
    # What the user gives to one field is no other's.
    assert Columns(["step", "pos"], {"document": "step"}, "file").need("token") == "pos"


def test_numbers_of_cells() -> None:
    assert _tables.wholes(["1", " 2", "3.0", ""], True, -1).tolist() == [1, 2, 3, -1]
    assert _tables.lists(["[1, 2]", "[]", ""], True) == [[1, 2], [], []]
    assert _tables.lists(["1;2", "3|4", "5, 6", "(7,)", "8"], True) == [[1, 2], [3, 4], [5, 6], [7], [8]]
    for bad in (["1.5"], ["nan"], ["x"], ["1,2"], ["true"], ["9" * 30]):
        with pytest.raises(ValueError, match=r"."):
            _tables.wholes(bad, True)
