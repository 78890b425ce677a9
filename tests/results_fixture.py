"""Results files made up for the tests of what is shown: plausible numbers, and nasty ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specmoe.results import (
    CalibrationBin,
    Control,
    Epoch,
    Interval,
    Journey,
    Latency,
    Made,
    PredictorResult,
    Protocol,
    Results,
    SeedResult,
    SplitFacts,
    TestDocuments,
    TraceFacts,
)
from specmoe.topology import Topology

HORIZONS = (1, 2, 3, 4)
DOCUMENTS = 60
DOMAINS = ("asyncio", "collections", "email", "html", "http", "json", "logging", "unittest")
HELD_OUT = "xml"
LAYERS, EXPERTS, TOP_K = 8, 16, 2
EVENTS = 445 * LAYERS

# name: category, sees, parameters, recall@K by horizon, latency p50 in µs, training seconds
_LEARNED: dict[str, tuple[str, str, int, tuple[float, ...], float, float]] = {
    "ContextualGatingPredictor": ("attention-based", "context", 512_340, (0.872, 0.838, 0.801, 0.779), 1420, 61),
    "TransformerGatingPredictor": ("attention-based", "context", 868_112, (0.876, 0.844, 0.812, 0.790), 2380, 96),
    "HierarchicalGatingPredictor": ("attention-based", "context", 431_770, (0.869, 0.833, 0.797, 0.771), 980, 44),
    "LayerSpecificPredictor": ("ensemble", "hidden", 655_000, (0.878, 0.836, 0.789, 0.752), 88, 21),
    "HierarchicalEnsemble": ("ensemble", "context", 1_180_406, (0.884, 0.849, 0.818, 0.794), 4150, 133),
    "ImprovedPredictor": ("multi-scale", "context", 318_220, (0.881, 0.845, 0.809, 0.781), 610, 38),
    "TinySpeculationModel": ("edge", "hidden", 17_052, (0.838, 0.781, 0.735, 0.702), 41, 9),
    "SmallSpeculationModel": ("edge", "hidden", 38_112, (0.851, 0.799, 0.752, 0.721), 52, 11),
    "RegularizedSpeculationModel": ("edge", "hidden", 214_000, (0.866, 0.821, 0.776, 0.743), 118, 19),
}
_TRAINING_FREE: dict[str, tuple[str, tuple[float, ...], float]] = {
    "random": ("nothing", (0.125, 0.125, 0.125, 0.125), 6),
    "layer-frequency": ("nothing", (0.142, 0.142, 0.141, 0.141), 5),
    "previous-token": ("routing", (0.271, 0.274, 0.279, 0.281), 7),
    "decayed-recent": ("routing", (0.305, 0.306, 0.309, 0.308), 9),
    "markov": ("routing", (0.298, 0.271, 0.262, 0.255), 8),
    "token-table": ("token", (0.601, 0.592, 0.581, 0.571), 6),
    "token-table-markov": ("token", (0.643, 0.612, 0.594, 0.579), 13),
    "next-router": ("hidden", (0.791, 0.716, 0.652, 0.598), 12),
    "sequence-activation": ("context", (0.322, 0.315, 0.311, 0.306), 160),
    "ridge": ("hidden", (0.852, 0.797, 0.741, 0.689), 15),
}


def full_results() -> Results:
    """Nine learned predictors with three seeds, ten training-free, and every optional part."""
    rng = np.random.default_rng(7)
    hardness = rng.normal(0, 0.035, DOCUMENTS)
    ridge_documents = _documents(rng, hardness, _TRAINING_FREE["ridge"][1])
    predictors = [_learned(rng, name, hardness, ridge_documents) for name in _LEARNED] + [
        _training_free(rng, name, hardness, ridge_documents) for name in _TRAINING_FREE
    ]
    topology = Topology(
        model_id="specmoe/demo-olmoe", revision="3f1c9a", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden_size=128
    )
    trace = TraceFacts(
        name="demo",
        fingerprint="9b2f0c4d51e7a836",
        topology=topology,
        tokens=183_552,
        documents=412,
        domains=9,
        fields=("token_ids", "expert_ids", "gate_weights", "router_logits", "hidden"),
        source={"kind": "python-stdlib", "python": "3.11.2"},
        layer_us_p50=212.0,
    )
    parts = {"train": 190, "validation": 63, "test": DOCUMENTS, "held_out_domain": 12}
    return Results(
        made=Made(
            date="2026-01-15T09:30:00+00:00",
            commit="0123abcd" * 5,
            command="specmoe train --seeds 3",
            versions={"specmoe": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
            hardware={"cpu": "a test fixture", "cores": "2", "memory": "8 GB"},
            seconds=312.4,
        ),
        trace=trace,
        split=SplitFacts(
            hash="5c1de0aa94b7f213",
            seed=0,
            documents=parts,
            tokens={name: 445 * documents for name, documents in parts.items()},
            held_out_domain=HELD_OUT,
        ),
        protocol=Protocol(
            horizons=HORIZONS,
            budgets={"K": 2, "1.5K": 3, "2K": 4, "3K": 6, "4K": 8},
            seeds=(0, 1, 2),
            bootstrap_draws=1000,
        ),
        test_documents=TestDocuments(
            ids=tuple(f"document {number}" for number in range(DOCUMENTS)), events=((EVENTS,) * 4,) * DOCUMENTS
        ),
        predictors=tuple(predictors),
        controls=(
            Control(name="true router on its true input", expected="exactly 100 %", value=100.0, holds=True),
            Control(name="ridge on shuffled targets", expected="the recall of layer frequency", value=14.3, holds=True),
            Control(name="best on the synthetic source", expected="at most the known 71.4 %", value=71.1, holds=True),
        ),
        control_trace=trace.model_copy(
            update={"name": "untrained", "topology": topology.model_copy(update={"model_id": "demo-untrained"})}
        ),
        untrained={
            name: _intervals([value] * 4, 0.006)
            for name, value in {
                "random": 0.125,
                "layer-frequency": 0.21,
                "previous-token": 0.62,
                "markov": 0.51,
                "token-table": 0.32,
                "next-router": 0.64,
                "ridge": 0.80,
            }.items()
        },
        journey=_journey(rng),
    )


def nasty_results() -> Results:
    """Hostile names, parts that are missing, predictors and seeds that failed."""
    evil = "</script><script>alert('model')</script>"
    whole = full_results()
    topology = whole.trace.topology.model_copy(update={"model_id": evil, "revision": '"><img src=x onerror=alert(1)>'})
    first, *rest = whole.predictors
    renamed = first.model_copy(update={"name": "<b>Bold</b> & 'quoted' \"name\" \u2028 {{ 7 * 7 }} ${x} a.b[0]"})
    failed = rest[0].model_copy(
        update={
            "status": "failed",
            "reason": "loss is NaN at epoch 3 <script>alert('reason')</script>",
            "scores": {},
            "seeds": tuple(SeedResult(seed=s, status="failed", reason="loss is NaN") for s in range(3)),
            "per_layer": (),
            "document_sums": {},
            "calibration": {},
            "latency": None,
        }
    )
    one_failed = rest[1].model_copy(
        update={"seeds": (*rest[1].seeds[:2], SeedResult(seed=2, status="failed", reason="Inf gradient"))}
    )
    skipped = PredictorResult(
        name="sequence-activation", category="training-free", sees="context", needs=("hidden",), source="",
        learned=False, parameters=0, status="skipped", reason="the trace keeps no hidden states",
    )  # fmt: skip
    sparse = rest[2].model_copy(
        update={
            "per_layer": ((None, 0.5, None, 0.25),) * LAYERS,
            "document_sums": {},
            "latency": None,
            "calibration": {1: ()},
            "over_ridge": {},
        }
    )
    others = tuple(result for result in rest[3:] if result.name != "sequence-activation")
    assert whole.journey is not None
    tokens = (
        "</script>",
        "<!--",
        "{{7*7}}",
        "\n",
        "\t",
        "",
        "\u2028",
        "日本",
        "&amp;",
        '"',
        *whole.journey.tokens[10:],
    )
    return whole.model_copy(
        update={
            "trace": whole.trace.model_copy(update={"topology": topology, "layer_us_p50": None}),
            "predictors": (renamed, failed, one_failed, sparse, *others, skipped),
            "controls": (Control(name="<i>broken</i>", expected="<u>100</u>", value=93.0, holds=False),),
            "journey": whole.journey.model_copy(
                update={"document": "a/<img src=x onerror=alert(2)>.py", "tokens": tokens}
            ),
        }
    )


def only(results: Results, *names: str, **changes: Any) -> Results:
    """The same results with some predictors only, and ``changes`` made to the top level."""
    kept = tuple(result for result in results.predictors if result.name in names)
    return results.model_copy(update={"predictors": kept, **changes})


def bare_results() -> Results:
    """As little as the schema allows: no predictor, control, journey, domain or timing."""
    whole = full_results()
    return whole.model_copy(
        update={
            "predictors": (),
            "controls": (),
            "control_trace": None,
            "untrained": {},
            "journey": None,
            "trace": whole.trace.model_copy(update={"layer_us_p50": None}),
            "split": whole.split.model_copy(update={"held_out_domain": None}),
            "protocol": whole.protocol.model_copy(update={"horizons": (1,)}),
            "test_documents": whole.test_documents.model_copy(
                update={"events": tuple(row[:1] for row in whole.test_documents.events)}
            ),
        }
    )


def _documents(rng: np.random.Generator, hardness: np.ndarray, recalls: tuple[float, ...]) -> np.ndarray:
    noise = rng.normal(0, 0.006, (DOCUMENTS, len(recalls)))
    values = np.array(recalls) + (hardness - hardness.mean())[:, None] + noise - noise.mean(0)
    return values.clip(0, 1)


def _sums(documents: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(EVENTS * float(value), 4) for value in row) for row in documents)


def _interval(values: np.ndarray) -> Interval:
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Interval(value=mean, low=mean - half, high=mean + half)


def _by_horizon(documents: np.ndarray) -> dict[int, Interval]:
    return {h: _interval(documents[:, column]) for column, h in enumerate(HORIZONS)}


def _intervals(values: list[float] | tuple[float, ...], half: float) -> dict[int, Interval]:
    return {
        h: Interval(value=value, low=max(0.0, value - half), high=min(1.0, value + half))
        for h, value in zip(HORIZONS, values, strict=True)
    }


def _shared(
    rng: np.random.Generator,
    recalls: tuple[float, ...],
    documents: np.ndarray,
    ridge: np.ndarray,
    offsets: Sequence[float] = (0.0,),
) -> dict[str, Any]:
    """What learned and training-free predictors have alike."""
    base = np.array(recalls)
    scores = {"recall@K": _by_horizon(documents)}
    for metric, share in {"recall@1.5K": 0.35, "recall@2K": 0.55, "recall@3K": 0.75, "recall@4K": 0.85}.items():
        scores[metric] = _intervals(list(base + (1 - base) * share), 0.004)
    scores["coverage@K"] = _intervals(list(base**2), 0.01)
    scores["gate_mass@K"] = _intervals(list(base + (1 - base) * 0.1), 0.005)
    scores["top1"] = _intervals(list(base * 0.9), 0.006)
    scores["kl"] = _intervals(list(1.4 * (1 - base)), 0.01)
    scores["ece"] = _intervals(list(0.05 * (1 - base)), 0.001)
    scores["brier"] = _intervals(list(0.12 * (1 - base)), 0.001)
    decay = 1 - 0.06 * np.abs(np.arange(LAYERS) - 4)[:, None] / 4
    layers = (base[None] * decay + rng.normal(0, 0.008, (LAYERS, len(base)))).clip(0, 1)
    calibration = {
        h: tuple(
            CalibrationBin(
                predicted=(bin_ + 0.5) / 10,
                observed=float(np.clip((bin_ + 0.5) / 10 + 0.09 * math.sin(bin_) * (1 - base[column]), 0, 1)),
                count=int(4000 / (1 + bin_)),
            )
            for bin_ in range(10)
        )
        for column, h in enumerate(HORIZONS)
    }
    return {
        "scores": scores,
        "per_layer": tuple(tuple(float(value) for value in row) for row in layers),
        "per_domain": {
            name: {"recall@K": _intervals(list((base + shift).clip(0, 1)), 0.015)}
            for name, shift in zip(DOMAINS, np.linspace(-0.04, 0.03, len(DOMAINS)), strict=True)
        },
        "per_phase": {},
        "held_out_domain": _intervals(list((base - 0.03).clip(0, 1)), 0.012),
        "calibration": calibration,
        "over_ridge": _by_horizon(documents - ridge),
        "lift": _by_horizon(documents - ridge),
        "document_sums": {"recall@K": tuple(_sums(documents + offset) for offset in offsets)},
    }


def _learned(rng: np.random.Generator, name: str, hardness: np.ndarray, ridge: np.ndarray) -> PredictorResult:
    category, sees, parameters, recalls, latency, seconds = _LEARNED[name]
    documents = _documents(rng, hardness, recalls)
    seeds: list[SeedResult] = []
    offsets: list[float] = []
    for seed in range(3):
        offset = float(rng.normal(0, 0.002))
        offsets.append(offset)
        parts = {"train": 0.02, "validation": 0.003, "test": 0.0, "held_out_domain": -0.03}
        epochs = int(12 + rng.integers(0, 9))
        seeds.append(
            SeedResult(
                seed=seed,
                best_epoch=epochs - 5,
                stopped="patience",
                train_seconds=seconds * float(rng.uniform(0.9, 1.1)),
                curve=tuple(
                    Epoch(
                        epoch=epoch,
                        train_loss=2.2 * math.exp(-epoch / 4) + 0.9,
                        validation_loss=2.1 * math.exp(-epoch / 4) + 1.0,
                        validation_recall=recalls[1] + offset - 0.35 * math.exp(-epoch / 2.5)
                        + float(rng.normal(0, 0.002)),
                        learning_rate=2e-3,
                    )
                    for epoch in range(1, epochs + 1)
                ),
                recall={
                    part: {h: value + gain + offset for h, value in zip(HORIZONS, recalls, strict=True)}
                    for part, gain in parts.items()
                },
            )
        )  # fmt: skip
    return PredictorResult(
        name=name,
        category=category,
        sees=sees,
        needs=("hidden",),
        source="a fixture",
        learned=True,
        parameters=parameters,
        seeds=tuple(seeds),
        latency=Latency(p50_us=latency, p99_us=latency * 1.8, events=2000),
        **_shared(rng, recalls, documents, ridge, [offset - sum(offsets) / 3 for offset in offsets]),
    )


def _training_free(rng: np.random.Generator, name: str, hardness: np.ndarray, ridge: np.ndarray) -> PredictorResult:
    sees, recalls, latency = _TRAINING_FREE[name]
    documents = (
        ridge if name == "ridge" else _documents(rng, hardness if sees != "nothing" else hardness * 0.1, recalls)
    )
    shared = _shared(rng, recalls, documents, ridge)
    shared["over_ridge"] = {} if name == "ridge" else shared["over_ridge"]
    return PredictorResult(
        name=name,
        category="training-free",
        sees=sees,
        needs=(),
        source="a fixture",
        learned=False,
        parameters=0,
        seeds=(
            SeedResult(
                seed=0,
                train_seconds=0.4,
                recall={
                    part: dict(zip(HORIZONS, (value + gain for value in recalls), strict=True))
                    for part, gain in {"train": 0.005, "validation": 0.001, "test": 0.0}.items()
                },
            ),
        ),
        latency=Latency(p50_us=latency, p99_us=latency * 2, events=2000),
        **shared,
    )


_SENTENCE = (
    "def", " read", "_json", "(", "path", ":", " Path", ")", " ->", " Any", ":", "\n", "    ", '"""', "Read", " a",
    " file", " and", " parse", " it", ".", '"""', "\n", "    ", "return", " json", ".", "loads", "(", "path", ".",
    "read", "_text", "())",
)  # fmt: skip


def _journey(rng: np.random.Generator) -> Journey:
    actual = tuple(
        tuple(tuple(int(e) for e in rng.choice(EXPERTS, TOP_K, replace=False)) for _ in range(LAYERS))
        for _ in _SENTENCE
    )

    def foreseen(skill: float, horizon: int) -> tuple[tuple[tuple[int, ...] | None, ...], ...]:
        rows: list[tuple[tuple[int, ...] | None, ...]] = []
        for token, layers in enumerate(actual):
            row: list[tuple[int, ...] | None] = []
            for layer, experts in enumerate(layers):
                others = [e for e in range(EXPERTS) if e not in experts]
                guess = tuple(e if rng.random() < skill else int(rng.choice(others)) for e in experts)
                row.append(None if token == 0 and layer < horizon else guess)
            rows.append(tuple(row))
        return tuple(rows)

    skills = {
        "HierarchicalEnsemble": _LEARNED["HierarchicalEnsemble"][3],
        "TinySpeculationModel": _LEARNED["TinySpeculationModel"][3],
        "ridge": _TRAINING_FREE["ridge"][1],
        "previous-token": _TRAINING_FREE["previous-token"][1],
    }
    return Journey(
        document="json/decoder.py",
        tokens=_SENTENCE,
        actual=actual,
        predictions={
            name: {h: foreseen(skill, h) for h, skill in zip(HORIZONS, values, strict=True)}
            for name, values in skills.items()
        },
    )
