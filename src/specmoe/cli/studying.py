"""``specmoe learning-curve`` and ``specmoe leave-one-domain-out``: the same predictors, other training documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specmoe.cli.options import (
    AsJson,
    Device,
    Horizons,
    Out,
    PresetName,
    RecipeFile,
    Seeds,
    TracePath,
    Workers,
    parse_horizons,
    print_json,
    resolve_device,
    resolve_recipes,
)
from specmoe.errors import SpecmoeError
from specmoe.locks import writes

if TYPE_CHECKING:
    from specmoe.suite.study import Conditions
    from specmoe.suite.study_results import Study

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("learning-curve")(learning_curve)
    app.command("leave-one-domain-out")(leave_one_domain_out)


_MOST_SHARES = 100

Only = Annotated[
    list[str] | None,
    typer.Option(help="Names or patterns like 'Tiny*', several times; ridge and a token table are shown beside."),
]


@writes("learning-curve")
def learning_curve(
    trace: TracePath,
    out: Out,
    only: Only = None,
    shares: Annotated[str, typer.Option(help="Of the training documents, in %.")] = "12.5,25,50,100",
    seeds: Seeds = 3,
    horizons: Horizons = "1-4",
    recipes: RecipeFile = None,
    preset: PresetName = None,
    workers: Workers = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Would more data help? Recall by the share of training documents; killed and started again, it continues."""
    from specmoe.predictors.registry import select
    from specmoe.suite.study import learning_curve as run

    options = _options(seeds, horizons, resolve_recipes(recipes, preset), workers, device)
    wanted, names = parse_shares(shares), select(only or ())
    with _conditions(**options) as conditions:
        study = run(trace, out, names, conditions, shares=wanted)
    _show(study, out, "learning-curve", json)


@writes("leave-one-domain-out")
def leave_one_domain_out(
    trace: TracePath,
    out: Out,
    only: Only = None,
    seeds: Seeds = 3,
    horizons: Horizons = "1-4",
    recipes: RecipeFile = None,
    preset: PresetName = None,
    workers: Workers = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """What does text of another kind cost? Each domain kept out in turn; killed and started again, it continues."""
    from specmoe.predictors.registry import select
    from specmoe.suite.study import leave_one_domain_out as run

    options = _options(seeds, horizons, resolve_recipes(recipes, preset), workers, device)
    names = select(only or ())
    with _conditions(**options) as conditions:
        study = run(trace, out, names, conditions)
    _show(study, out, "domains", json)


def parse_shares(text: str) -> tuple[float, ...]:
    """``12.5,25,100`` in % as shares from 0 to 1.

    Raises:
        SpecmoeError: it is not such a list.
    """
    try:
        shares = tuple(sorted({float(part) / 100 for part in text.split(",")}))
    except ValueError as error:
        raise SpecmoeError(f"--shares {text!r} is not a list of percentages like 12.5,25,50,100") from error
    if not all(0 < share <= 1 for share in shares):
        raise SpecmoeError(f"--shares {text!r}: each must lie above 0 and be at most 100")
    if len(shares) > _MOST_SHARES:
        raise SpecmoeError(f"--shares has {len(shares)} shares, each to be trained on; give at most {_MOST_SHARES}")
    return shares


def _options(
    seeds: int, horizons: str, recipes: dict[str, dict[str, Any]], workers: int | None, device: str
) -> dict[str, Any]:
    return {
        "seeds": tuple(range(seeds)),
        "horizons": parse_horizons(horizons),
        "recipes": recipes,
        "workers": workers,
        "device": resolve_device(device),
    }


@contextmanager
def _conditions(**options: Any) -> Iterator[Conditions]:
    """The conditions of a study whose progress is shown, one view a cut."""
    from specmoe.cli.progress import TrainingView
    from specmoe.suite.study import Conditions

    view: TrainingView | None = None

    def stage(text: str) -> None:
        nonlocal view
        if view is not None:
            view.__exit__(None, None, None)
        view = TrainingView().__enter__()
        view.stage(text)

    def passed_on(name: str) -> Callable[[Any], None]:
        return lambda news: getattr(view, name)(news)

    try:
        yield Conditions(on_stage=stage, on_plan=passed_on("plan"), on_event=passed_on("event"), **options)
    finally:
        if view is not None:
            view.__exit__(None, None, None)


def _show(study: Study, out: Path, name: str, json: bool) -> None:
    from specmoe.report.study_page import write_study_page
    from specmoe.report.study_text import study_lines

    page = out / f"{name}.html"
    write_study_page(study, page)
    if json:
        print_json(study.model_dump(mode="json"))
        return
    typer.echo("\n".join(study_lines(study)))
    typer.echo(f"\nresults: {out / f'{name}.json'}\nreport:  {page}")
