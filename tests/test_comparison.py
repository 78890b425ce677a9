"""``specmoe compare``: a difference where there is one, and a refusal where the two do not compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from results_fixture import full_results
from specmoe.cli import run_verb
from specmoe.report.comparison import compare, read_side, side_of
from specmoe.results import Results

WHOLE = full_results()
BEST = "HierarchicalEnsemble"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "run"
    WHOLE.save(folder / "results.json")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a comparison that must be refused: one line, exit code 2, nothing compared."""
    assert run_verb(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_difference_is_that_of_the_estimates_with_its_interval(saved: Path) -> None:
    a, b = (side_of(saved, WHOLE, name) for name in (BEST, "TinySpeculationModel"))
    found, back = compare(a, b), compare(b, a)
    for h in WHOLE.protocol.horizons:
        difference = found.difference[h]
        assert difference.value == pytest.approx(found.ours[h].value - found.theirs[h].value)
        assert difference.low < difference.value < difference.high
        assert back.difference[h].value == pytest.approx(-difference.value)
    sentence = found.sentences()[0]
    low, high = (f"{100 * limit:.1f}" for limit in (found.difference[1].low, found.difference[1].high))
    assert sentence == (
        f"1 layer ahead: {BEST} foresees {100 * found.difference[1].value:.1f} points more than TinySpeculationModel "
        f"(95 % interval {low} to {high}), on 60 documents."
    )
    assert "points fewer than" in back.sentences()[0]


def test_pairing_makes_the_interval_narrow(saved: Path) -> None:
    """Documents differ more than predictors do: without pairs the interval would be wider."""
    found = compare(side_of(saved, WHOLE, BEST), side_of(saved, WHOLE, "TransformerGatingPredictor"))
    width = found.difference[1].high - found.difference[1].low
    apart = ((found.ours[1].high - found.ours[1].low) ** 2 + (found.theirs[1].high - found.theirs[1].low) ** 2) ** 0.5
    assert width < 0.8 * apart


def test_the_same_against_itself_shows_no_difference(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["compare", str(saved), str(saved / "results.json"), "--horizon", "3"]) == 0
    said = capsys.readouterr().out
    assert "3 layers ahead" in said
    assert "no difference can be shown" in said or "are equal" in said
    # Both are called the same, so their files tell them apart.
    assert str(saved / "results.json") in said


def test_without_a_name_it_is_the_best_by_validation(saved: Path) -> None:
    def validation(name: str) -> float:
        predictor = next(p for p in WHOLE.predictors if p.name == name)
        return sum(seed.recall["validation"][1] for seed in predictor.seeds) / len(predictor.seeds)

    chosen = read_side(str(saved)).predictor
    assert chosen.learned
    assert all(validation(chosen.name) >= validation(p.name) for p in WHOLE.predictors if p.learned)
    free = WHOLE.model_copy(update={"predictors": tuple(p for p in WHOLE.predictors if not p.learned)})
    assert side_of(saved, free).predictor.name == "ridge"


def test_a_path_may_hold_a_colon(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    WHOLE.save(folder / "results.json")
    assert read_side(str(folder)).path == folder / "results.json"
    assert read_side(f"{folder}:ridge").predictor.name == "ridge"


def test_two_predictors_of_one_file_as_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["compare", BEST, "ridge", "--results", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["a"]["predictor"], found["b"]["predictor"]) == (BEST, "ridge")
    assert found["a"]["seeds"] == [0, 1, 2]
    assert set(found["horizons"]) == {"1", "2", "3", "4"}
    assert found["horizons"]["1"]["settled"] is True
    assert found["documents"] == 60
    assert len(found["said"]) == 4


def changed(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def without_sums(content: dict[str, Any]) -> None:
    for predictor in content["predictors"]:
        predictor["document_sums"] = {}


def other_document(content: dict[str, Any]) -> None:
    content["test_documents"]["ids"][3] = "another"


def other_events(content: dict[str, Any]) -> None:
    content["test_documents"]["events"][3][0] += 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed("split", "hash", to="0000"), "splits differ"),
        (changed("protocol", "metric_version", to=1), "metric version"),
        (changed("trace", "fingerprint", to="0000"), "other traces"),
        (changed("trace", "topology", "top_k", to=4), "other shapes"),
        (changed("protocol", "budgets", "2K", to=5), "budgets differ"),
        (other_document, "other test documents"),
        (other_events, "numbers of events"),
        (without_sums, "keeps no recall@K per document"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_compare_is_refused(
    change: Callable[[dict[str, Any]], None],
    reason: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = WHOLE.model_dump(mode="json")
    change(content)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    for pair in ((saved, path), (path, saved)):
        assert reason in refused(capsys, f"{pair[0]}:{BEST}", f"{pair[1]}:{BEST}")


def test_other_horizons_need_one_that_both_have(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, numbers = ("horizons",), (1, 3)
    keep = [WHOLE.protocol.horizons.index(h) for h in numbers]
    content = WHOLE.model_dump(mode="json")
    content["protocol"][names[0]] = list(numbers)
    content["test_documents"]["events"] = [[row[i] for i in keep] for row in content["test_documents"]["events"]]
    for predictor in content["predictors"]:
        predictor["per_layer"] = [[row[i] for i in keep] for row in predictor["per_layer"]]
        predictor["document_sums"] = {
            metric: [[[row[i] for i in keep] for row in seed] for seed in seeds]
            for metric, seeds in predictor["document_sums"].items()
        }
    path = tmp_path / "fewer.json"
    path.write_text(json.dumps(content))
    assert "--horizon (1, 3)" in refused(capsys, str(saved), str(path))
    assert "horizon 2 is not in both" in refused(capsys, str(saved), str(path), "--horizon", "2")
    assert run_verb(["compare", f"{saved}:{BEST}", f"{path}:ridge", "--horizon", "3", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)["horizons"]
    assert run_verb(["compare", BEST, "ridge", "--results", str(saved), "--json"]) == 0
    assert here == {"3": json.loads(capsys.readouterr().out)["horizons"]["3"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), ("{", "cannot be read as JSON"), ("[]", "not a specmoe results file")],
)
def test_garbage_is_refused(
    content: str | None, said: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "garbage.json"
    if content is not None:
        path.write_text(content)
    assert said in refused(capsys, str(saved), str(path))


def test_unknown_names_are_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean ridge?" in refused(capsys, f"{saved}:rigde", str(saved))
    assert "keeps no recall@7K" in refused(capsys, str(saved), str(saved), "--metric", "recall@7K")


def test_controls_that_do_not_hold_are_said(saved: Path) -> None:
    broken = WHOLE.model_copy(
        update={"controls": tuple(c.model_copy(update={"holds": False}) for c in WHOLE.controls[:1])}
    )
    found = compare(side_of(saved, broken, BEST), side_of(saved, WHOLE, "ridge"))
    assert "Beware: one control does not hold" in found.sentences()[-1]
    assert isinstance(Results.model_validate(found.a.results), Results)
