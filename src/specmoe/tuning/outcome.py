"""What a search found, as it is kept in ``tuning.json``, and how it becomes a recipe file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.predictors.recipes import load_recipes
from specmoe.results import ByHorizon, Interval
from specmoe.schema import FileModel

__all__ = [
    "Outcome",
    "Search",
    "apply_recipe",
    "command_to_train",
    "evidence_in_words",
    "gain_in_words",
    "load_tuning",
    "save_search",
]

TUNING, RECIPES = "tuning.json", "recipes.json"


class Outcome(FileModel):
    """How one trial ended.

    Attributes:
        number: in the journal. in_force: whether it is the recipe in force, which the others are measured against.
        state: ``complete``; ``pruned``, stopped early because it fell behind; ``failed``, its loss diverged.
        values: of the fields that are searched. reason: why it was pruned or failed.
        recall: recall@K on the validation part, 0 to 1, mean over horizons; of a pruned trial the last epoch's over
            all events and horizons together; None if it failed. by_horizon: the same of each horizon.
        epochs: that were trained. best_epoch: whose weights were judged. seconds: wall clock of the training.
    """

    number: int
    in_force: bool = False
    state: Literal["complete", "pruned", "failed"]
    values: dict[str, Any]
    recall: float | None = None
    by_horizon: dict[int, float] = Field(default_factory=dict)
    epochs: int = 0
    best_epoch: int = 0
    seconds: float = 0.0
    reason: str = ""


class Search(FileModel):
    """A search for one predictor on one trace.

    Attributes:
        predictor: its name. study: the name of the study in the journal; it changes with all that trials depend on.
        trace, split_hash, horizons, seed, documents: what trials were trained and judged on (validation documents).
        start: every value of the recipe in force. space: field → where was looked.
        trials: that came to an end, in the order of their numbers. interrupted: that a kill ended; each was repeated.
        best: number of the trial with the highest recall; None as long as none is complete.
        gain: its recall minus that of the recipe in force, with a 95 % interval paired over validation documents.
            As the best of many is chosen by these documents, it flatters: expect less on others. None as long as the
            recipe in force has no recall. gain_by_horizon: the same of each horizon.
        changes: what the best trial changes, to be put into a recipe file.
        importance: field → its share in what made trials differ (PED-ANOVA, Watanabe et al., 2023); empty below
            ``FEWEST_FOR_IMPORTANCE`` complete trials.
    """

    predictor: str
    study: str
    trace: str
    split_hash: str
    horizons: tuple[int, ...]
    seed: int
    documents: int
    start: dict[str, Any]
    space: dict[str, dict[str, Any]]
    trials: tuple[Outcome, ...] = ()
    interrupted: int = 0
    best: int | None = None
    gain: Interval | None = None
    gain_by_horizon: ByHorizon = Field(default_factory=dict)
    changes: dict[str, Any] = Field(default_factory=dict)
    importance: dict[str, float] = Field(default_factory=dict)

    @property
    def best_trial(self) -> Outcome | None:
        """The outcome of the best trial."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    @property
    def in_force(self) -> Outcome | None:
        """The outcome of the recipe in force."""
        return next((trial for trial in self.trials if trial.in_force), None)


class _File(FileModel):
    format: Literal["specmoe-tuning"] = "specmoe-tuning"
    version: Literal[1] = 1
    searches: dict[str, Search] = Field(default_factory=dict)


def load_tuning(out: Path) -> dict[str, Search]:
    """The searches in a folder by predictor, none if there were none.

    Raises:
        SpecmoeError: ``tuning.json`` is damaged.
    """
    path = out / TUNING
    if not path.exists():
        return {}
    try:
        return _File.model_validate(read_json(path)).searches
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SpecmoeError(f"{path} is damaged at {place}: {first['msg']}; delete it, it is made anew") from error


def save_search(out: Path, search: Search) -> None:
    """Write a search beside those of other predictors."""
    searches = {**load_tuning(out), search.predictor: search}
    write_json(out / TUNING, _File(searches=searches).model_dump(mode="json"))


def apply_recipe(out: Path, search: Search) -> Path:
    """Write what the best trial changes into ``out/recipes.json``, in place of what was there for this predictor.

    Raises:
        SpecmoeError: no trial is complete, or the file that is there is damaged.
    """
    if search.best is None:
        raise SpecmoeError(f"no trial of {search.predictor} came to its end: there is nothing to apply")
    path = out / RECIPES
    recipes = {name: dict(changes) for name, changes in (load_recipes(path) if path.exists() else {}).items()}
    recipes.pop(search.predictor, None)
    if search.changes:
        recipes[search.predictor] = search.changes
    write_json(path, recipes)
    return path


def gain_in_words(gain: Interval) -> str:
    """``+0.15 [+0.02, +0.29]``, in percentage points: two decimals, as what a search gains is often small.

    The limits are left out where no interval could be drawn.
    """
    value, low, high = (f"{100 * share:+.2f}".replace("-", "−") for share in (gain.value, gain.low, gain.high))
    return f"{value} [{low}, {high}]" if gain.high > gain.low else value


def evidence_in_words(search: Search) -> str:
    """What the gain of a search rests on: ``95 % interval over 12 validation documents``."""
    if search.gain is None or search.gain.high <= search.gain.low:
        return f"no interval over {search.documents} validation document{'' if search.documents == 1 else 's'}"
    return f"95 % interval over {search.documents} validation documents"


def command_to_train(trace: Path, out: Path, search: Search) -> str:
    """The command that trains with the recipe that ``--apply`` writes."""
    horizons = ",".join(str(horizon) for horizon in search.horizons)
    words = ["specmoe", "train", str(trace), "--out", str(out / "train"), "--recipes", str(out / RECIPES)]
    return shlex.join([*words, "--only", search.predictor, "--horizons", horizons])
