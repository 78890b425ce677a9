"""Recipes that can be changed: what is refused, and that a change reaches everything that depends on it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.predictors.base import Recipe, parameter_count
from specmoe.predictors.presets import PRESETS, preset
from specmoe.predictors.recipes import CHANGEABLE, kind_of, load_recipes, merged, values_of, with_recipe
from specmoe.predictors.registry import PREDICTORS
from specmoe.predictors.search import SHARED, Choice, Range, SearchSpace
from specmoe.suite.data import SuiteData
from specmoe.suite.jobs import Job, job_fingerprint, load_predictor, run_job
from specmoe.suite.run import jobs_of, run_jobs
from specmoe.topology import REFERENCE
from specmoe.training import build_scheduler

TINY = PREDICTORS["TinySpeculationModel"]
LEARNED = [name for name, kind in PREDICTORS.items() if kind.recipe.epochs > 0]


def test_a_changed_recipe_makes_a_class_of_the_same_name() -> None:
    before = TINY.recipe
    changed = with_recipe(TINY, learning_rate=1, epochs=3.0)
    assert (changed.__name__, changed.__doc__) == (TINY.__name__, TINY.__doc__)
    assert issubclass(changed, TINY)
    assert changed.recipe == dataclasses.replace(before, learning_rate=1.0, epochs=3)
    assert (type(changed.recipe.learning_rate), type(changed.recipe.epochs)) == (float, int)
    assert TINY.recipe is before
    assert with_recipe(TINY) is TINY
    assert with_recipe(changed, epochs=5).recipe.learning_rate == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rte": 0.1}, "did you mean learning_rate"),
        ({"category": "edge"}, "unknown recipe field"),
        ({"search": {}}, "unknown recipe field"),
        ({"learning_rate": "0.1"}, "must be a number"),
        ({"learning_rate": True}, "must be a number"),
        ({"learning_rate": float("nan")}, "must be a number"),
        ({"learning_rate": 0}, "more than 0 and at most 10"),
        ({"epochs": 0}, "at least 1"),
        ({"epochs": 2.5}, "whole number"),
        ({"batch_windows": -1}, "at least 1"),
        ({"dropout": 1.0}, "at least 0 and less than 1"),
        ({"clip": 0.0}, "more than 0"),
        ({"scheduler": "linear"}, "cosine or plateau"),
        ({"soft_targets": 1}, "true or false"),
        ({"width": [1.0]}, "must be a number"),
    ],
)
def test_values_that_do_not_hold_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecmoeError, match=words) as caught:
        with_recipe(TINY, **changes)
    assert "TinySpeculationModel" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_trained_has_no_recipe_to_change() -> None:
    with pytest.raises(SpecmoeError, match="Ridge has no recipe to change"):
        kind_of("Ridge", {"Ridge": {"epochs": 3}})
    assert kind_of("Ridge", {}) is PREDICTORS["Ridge"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no recipe file"),
        ('{"TinySpeculationModel": 3}', "is no recipe file"),
        ('{"TinySpeculation": {}}', "did you mean TinySpeculationModel"),
        ('{"TinySpeculationModel": {"epoch": 3}}', "did you mean epochs"),
        ('{"TinySpeculationModel": {"epochs": -3}}', "at least 1"),
        ('{"Ridge": {"epochs": 3}}', "not trained"),
    ],
)
def test_recipe_files_that_do_not_hold(
    text: str, words: str, synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipes.json"
    path.write_text(text)
    with pytest.raises(SpecmoeError, match=words) as caught:
        load_recipes(path)
    assert str(path) in str(caught.value)
    assert run_verb(["train", str(synthetic_path), "--out", str(tmp_path / "o"), "--recipes", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_later_recipes_lie_over_earlier_ones() -> None:
    under = {"Tiny": {"epochs": 1, "clip": 2.0}, "Small": {"epochs": 4}}
    assert merged(under, {"Tiny": {"epochs": 9}}) == {"Tiny": {"epochs": 9, "clip": 2.0}, "Small": {"epochs": 4}}
    assert under["Tiny"]["epochs"] == 1


# Presets and search spaces


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_for_the_nine(name: str) -> None:
    recipes = preset(name)
    assert len(recipes) == 9
    for predictor in recipes:
        assert values_of(kind_of(predictor, recipes).recipe).items() >= dict(recipes[predictor]).items()


def test_presets_are_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    seed, release = preset("seed"), preset("0.1.0")
    # What is on record of the original script, and nothing else.
    assert {field for changes in seed.values() for field in changes} == {
        "label_smoothing", "clip", "patience", "soft_targets", "batch_windows", "scheduler",
    }  # fmt: skip
    assert seed["TransformerGatingPredictor"]["batch_windows"] == 16
    assert seed["TransformerGatingPredictor"]["scheduler"] == "cosine"
    assert seed["TinySpeculationModel"]["batch_windows"] == 32
    assert seed["TinySpeculationModel"]["scheduler"] == "plateau"
    assert all(set(changes) == set(CHANGEABLE) for changes in release.values())
    assert run_verb(["list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["TinySpeculationModel"]["presets"]["seed"] == seed["TinySpeculationModel"]
    assert entries["TinySpeculationModel"]["recipe"] == values_of(TINY.recipe)
    assert entries["TinySpeculationModel"]["search"]["learning_rate"]["log"] is True
    assert (entries["Ridge"]["presets"], entries["Ridge"]["recipe"], entries["Ridge"]["search"]) == ({}, {}, {})


def test_an_unknown_preset(synthetic_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["train", str(synthetic_path), "--out", str(tmp_path), "--preset", "sed"]) == 2
    assert "did you mean seed?" in capsys.readouterr().err


@pytest.mark.parametrize("name", LEARNED)
def test_search_spaces_hold_the_recipe_and_have_an_effect(name: str) -> None:
    kind = PREDICTORS[name]
    hash(kind.recipe)
    for field, place in kind.recipe.search.items():
        assert field in CHANGEABLE
        assert place.holding(getattr(kind.recipe, field)) == place, f"the {field} in force lies outside of the search"
        ends = place.values if isinstance(place, Choice) else (place.low, place.high)
        for end in ends:
            with_recipe(kind, **{field: end})
    if "width" in kind.recipe.search:
        with torch.device("meta"):
            sizes = [parameter_count(with_recipe(kind, width=width)(REFERENCE)) for width in (0.5, 1.0, 2.0)]
        assert sizes[0] < sizes[1] < sizes[2]
    if "dropout" in kind.recipe.search:
        with torch.device("meta"):
            module = with_recipe(kind, dropout=0.37)(REFERENCE)
        assert 0.37 in {part.p for part in module.modules() if isinstance(part, nn.Dropout)}


def test_places_to_look() -> None:
    assert Range(1, 4).whole
    assert not Range(1.0, 4).whole
    assert Range(1, 4).holding(9) == Range(1, 9)
    assert Range(0.1, 4.0, log=True).holding(0.0) == Range(0.0, 4.0)
    assert Choice((1, 2)).holding(3) == Choice((1, 2, 3))
    space = SHARED.but(epochs=None, width=Range(0.5, 2.0))
    assert "epochs" not in space
    assert "epochs" in SHARED
    assert hash(space) == hash(SHARED.but(width=Range(0.5, 2.0), epochs=None))
    assert space != SHARED
    for wrong in (lambda: Range(2, 1), lambda: Range(0, 1, log=True), lambda: Choice((1,)), lambda: Choice((1, 1))):
        with pytest.raises(ValueError, match=r"range|choice"):
            wrong()
    assert Recipe(category="edge", sees="hidden", source="", search=SearchSpace()).search == SearchSpace()


# What a change reaches


def test_a_change_enters_the_fingerprint(synthetic_path: Path) -> None:
    job = Job("TinySpeculationModel", 0)

    def fingerprint(**changes: Any) -> str:
        return job_fingerprint(job, SuiteData.load(synthetic_path, (1,), recipes={job.predictor: changes}))

    plain = job_fingerprint(job, SuiteData.load(synthetic_path, (1,)))
    assert fingerprint() == fingerprint(learning_rate=TINY.recipe.learning_rate) == plain
    assert len({plain, fingerprint(learning_rate=0.1), fingerprint(width=2.0), fingerprint(warmup=0.1)}) == 4


def test_a_change_reaches_workers_and_lies_with_the_weights(synthetic_path: Path, tmp_path: Path) -> None:
    changes = {"epochs": 2, "width": 8.0, "scheduler": "cosine", "warmup": 0.5}
    data = SuiteData.load(synthetic_path, (1, 2), recipes={"TinySpeculationModel": changes})
    jobs = jobs_of(["TinySpeculationModel"], (0, 1), data)
    results = run_jobs(jobs, synthetic_path, data, tmp_path, workers=2)
    assert [len(results[job].curve) for job in jobs] == [2, 2]
    # Built again by what lies with the weights, whatever recipes are in force by then.
    plain = SuiteData.load(synthetic_path, (1, 2))
    again = load_predictor(jobs[1], tmp_path, plain)
    assert again.recipe == data.kind("TinySpeculationModel").recipe
    assert parameter_count(again) > parameter_count(TINY(plain.topology, plain.horizons))


def test_warm_up_rises_falls_and_survives_an_interruption(synthetic_path: Path, tmp_path: Path) -> None:
    recipe = with_recipe(TINY, scheduler="cosine", warmup=0.2, epochs=5, learning_rate=1.0).recipe
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    scheduler = build_scheduler(optimizer, recipe, steps_per_epoch=20)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert all(earlier >= later for earlier, later in itertools.pairwise(rates[19:]))
    assert 0.02 <= rates[-1] < 0.03

    job = Job("TinySpeculationModel", 0)
    changes = {"scheduler": "cosine", "warmup": 0.5, "epochs": 3}
    data = SuiteData.load(synthetic_path, (1,), recipes={job.predictor: changes})

    class Stop(Exception):
        pass

    def stop(report: Any) -> None:
        if report.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        run_job(job, data, tmp_path / "a", on_epoch=stop)
    assert run_job(job, data, tmp_path / "a").curve == run_job(job, data, tmp_path / "b").curve
