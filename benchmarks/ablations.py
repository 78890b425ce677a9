"""What limits the predictors: each row changes one thing and trains anew; judged on the validation part only.

A row is a predictor of the registry with another recipe, other training data, or one of its inputs left out. Rows that
are in the run file already are not run again, so an interrupted run goes on.

    python benchmarks/ablations.py TRACE [--save FILE] [--seeds 2] [--only PATTERN] [--horizons 1-4]
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from specmoe.cli.options import parse_horizons
from specmoe.dataset import Windows
from specmoe.evaluation import Ratios, evaluate, paired_difference
from specmoe.files import read_json, write_json
from specmoe.predictors.base import Predictor, parameter_count
from specmoe.predictors.recipes import with_recipe
from specmoe.predictors.registry import PREDICTORS
from specmoe.suite.assemble import made_now
from specmoe.suite.data import SuiteData, trace_fingerprint
from specmoe.training import fit


@dataclass(frozen=True)
class Row:
    """One change. ``recipe``: fields changed. ``without``: inputs left out. ``share``: of the training documents."""

    predictor: str
    change: str
    recipe: dict[str, Any] = field(default_factory=dict)
    without: str = ""
    share: float = 1.0

    @property
    def key(self) -> str:
        """Its name in the run file."""
        return f"{self.predictor}: {self.change}"


def rows_of(data: SuiteData) -> Iterator[Row]:
    """Every row that makes sense on a trace; each predictor's recipe in force comes first."""
    schedule = {"scheduler": "cosine", "warmup": 0.05}
    for name in ("LayerSpecificPredictor", "TransformerGatingPredictor", "RouterResidualPredictor"):
        if data.lacks(PREDICTORS[name]) or "hidden" not in data.available:
            continue
        recipe = PREDICTORS[name].recipe
        yield Row(name, "as it is")
        yield Row(name, "half of the training documents", share=0.5)
        yield Row(name, "a quarter of the training documents", share=0.25)
        yield Row(name, "twice the epochs", {"epochs": 2 * recipe.epochs})
        if recipe.scheduler == "plateau":
            yield Row(name, "cosine schedule with warm-up", schedule)
            yield Row(name, "cosine schedule with warm-up, twice the epochs", {**schedule, "epochs": 2 * recipe.epochs})
        yield Row(name, "hard targets", {"soft_targets": False})
        yield Row(name, "half the width", {"width": 0.5})
        yield Row(name, "twice the width", {"width": 2.0})
        yield Row(
            name, "training windows of 64 tokens", {"window": 64, "batch_windows": max(1, recipe.batch_windows // 4)}
        )
    if not data.lacks(PREDICTORS["RouterResidualPredictor"]):
        for part, said in (
            ("lens", "the next token's lens"),
            ("token", "the token's id"),
            ("routing", "earlier tokens' routing"),
            ("past", "the previous token's router inputs"),
        ):
            yield Row("RouterResidualPredictor", f"without {said}", without=part)
    name = "RouteHistoryPredictor"
    yield Row(name, "as it is")
    yield Row(name, "half of the training documents", share=0.5)
    yield Row(name, "a quarter of the training documents", share=0.25)
    yield Row(name, "half the width", {"width": 0.5})
    yield Row(name, "twice the width", {"width": 2.0})
    yield Row(name, "twice the epochs", {"epochs": 2 * PREDICTORS[name].recipe.epochs})
    yield Row(name, "twice the learning rate", {"learning_rate": 2 * PREDICTORS[name].recipe.learning_rate})
    yield Row(name, "cross-entropy to the distribution", {"objective": "distribution"})
    yield Row(name, "dropout .1", {"dropout": 0.1})
    yield Row(name, "training windows of 16 tokens", {"window": 16, "batch_windows": 16})
    for part, said in (
        ("token", "token ids"),
        ("earlier", "earlier tokens' routing"),
        ("same", "earlier tokens of the same id"),
    ):
        yield Row(name, f"without {said}", without=part)


def kind_of(row: Row) -> type[Predictor]:
    """The row's predictor class."""
    kind = with_recipe(PREDICTORS[row.predictor], **row.recipe)
    return type(kind.__name__, (kind,), {"without": frozenset({row.without})}) if row.without else kind


def training_data(row: Row, data: SuiteData, kind: type[Predictor]) -> SuiteData:
    """The trace cut for a row: its share of the training documents, in windows of its recipe's length."""
    documents = data.split.parts["train"]
    kept = documents[:: round(1 / row.share)]
    if len(kept) == len(documents) and kind.recipe.window == data.train.length:
        return data
    split = replace(data.split, parts={**data.split.parts, "train": kept})
    return replace(data, split=split, train=Windows(data.trace, kept, length=kind.recipe.window))


def run(row: Row, data: SuiteData, seeds: int) -> tuple[dict[str, Any], Ratios]:
    """Train the row's predictor with each seed and judge it on the validation part."""
    kind = kind_of(row)
    cut = training_data(row, data, kind)
    tallies, seconds, parameters = [], [], 0
    for seed in range(seeds):
        torch.manual_seed(seed)
        predictor = kind(data.topology, data.horizons)
        fitted = fit(predictor, cut.train, data.validation, cut.knowledge, seed=seed)
        tallies.append(evaluate(predictor, data.validation, only_recall=True))
        seconds.append(fitted.seconds)
        parameters = parameter_count(predictor)
    ratios = Ratios.of(tallies, "recall@K")
    facts = {
        "predictor": row.predictor,
        "change": row.change,
        "recall": dict(zip(map(str, data.horizons), ratios.estimate().tolist(), strict=True)),
        "parameters": parameters,
        "training_tokens": cut.train.tokens,
        "train_seconds": round(statistics.mean(seconds), 1),
    }
    return facts, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--save", type=Path, default=Path("docs/runs/ablations.json"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="*")
    parser.add_argument("--horizons", default="1-4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = SuiteData.load(options.trace, parse_horizons(options.horizons))
    fingerprint = [trace_fingerprint(data.trace), data.split.hash, list(data.horizons), options.seeds]
    content: dict[str, Any] = read_json(options.save) if options.save.exists() else {}
    if content.get("fingerprint") != fingerprint:
        content = {"fingerprint": fingerprint, "rows": {}, "sums": {}}
    content["trace"] = {"name": data.trace.directory.name, "topology": data.topology.model_dump(mode="json")}
    content |= {"documents": len(data.split.parts["validation"]), "seeds": options.seeds}
    for row in rows_of(data):
        if row.key in content["rows"] or not fnmatch.fnmatch(row.key, options.only):
            continue
        facts, ratios = run(row, data, options.seeds)
        content["sums"][row.key] = ratios.sums_SGH.tolist()
        if row.change != "as it is":
            reference = Ratios(torch.tensor(content["sums"][f"{row.predictor}: as it is"]).double(), ratios.events_GH)
            gains = paired_difference(ratios, reference, data.horizons)
            facts["gain"] = {str(h): gain.model_dump() for h, gain in gains.items()}
        content["rows"][row.key] = facts
        content["made"] = made_now(0.0).model_dump(mode="json")
        write_json(options.save, content)
        shown = "  ".join(f"{100 * value:.1f}" for value in facts["recall"].values())
        print(f"{row.key:75s} {shown}  ({facts['train_seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
