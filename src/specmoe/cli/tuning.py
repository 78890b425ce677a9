"""``specmoe tune``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from specmoe.cli.options import (
    AsJson,
    Device,
    Horizons,
    Out,
    PresetName,
    RecipeFile,
    TracePath,
    Workers,
    finite,
    parse_horizons,
    print_json,
    resolve_device,
    resolve_recipes,
)
from specmoe.locks import writes

if TYPE_CHECKING:
    from specmoe.tuning import Search, TrialNews

__all__ = ["register"]

_SHOWN = 5


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("tune")(tune)


@writes("tune")
def tune(
    trace: TracePath,
    only: Annotated[list[str], typer.Option(help="Names or patterns like 'Tiny*'; may be given several times.")],
    out: Out,
    trials: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Trials in all, those of earlier runs among them.")
    ] = 20,
    workers: Workers = None,
    horizons: Horizons = "1-4",
    timeout: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="Seconds after which no trial is begun.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Write the best recipe into OUT/recipes.json.")] = False,
    recipes: RecipeFile = None,
    preset: PresetName = None,
    seed: Annotated[int, typer.Option(min=0, max=4000, help="Of the weights and of the proposals.")] = 0,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Look for a better recipe by the validation part; killed and started again, it continues."""
    import os

    from specmoe.predictors.registry import PREDICTORS, select
    from specmoe.tuning import apply_recipe, command_to_train, load_tuning, write_picture
    from specmoe.tuning import tune as search_for

    names = select(only)
    # A pattern means those of its predictors that can be tuned; a name means that one.
    names = [name for name in names if name in only or PREDICTORS[name].recipe.epochs > 0] or names
    start, where = resolve_recipes(recipes, preset), resolve_device(device)
    if workers is None:
        workers = 1 if where.startswith("cuda") else os.cpu_count() or 1
    found: dict[str, Search] = {}
    for name in names:
        with _View(name) as view:
            found[name] = search_for(
                trace,
                out,
                name,
                trials=trials,
                horizons=parse_horizons(horizons),
                recipes=start,
                workers=workers,
                timeout=timeout,
                seed=seed,
                device=where,
                on_news=view.news,
            )
    page = write_picture(out, load_tuning(out))
    if apply:
        for search in found.values():
            apply_recipe(out, search)
    if json:
        print_json({name: search.model_dump(mode="json") for name, search in found.items()})
        return
    for search in found.values():
        _print(search)
        if search.changes:
            how = "with this recipe" if apply else "run this again with --apply, then"
            typer.echo(f"{how}: {command_to_train(trace, out, search)}")
    typer.echo(f"\nsearch:  {out / 'tuning.json'}\npicture: {page}")
    if apply:
        typer.echo(f"recipes: {out / 'recipes.json'}")


class _View:
    """One line of progress with the best recall so far and the time left."""

    def __init__(self, title: str) -> None:
        from specmoe.cli.progress import ProgressLine

        self._line = ProgressLine(title)
        self._begun = time.monotonic()
        self._shares: dict[int, float] = {}
        self._before: int | None = None

    def __enter__(self) -> _View:
        self._line.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._line.__exit__(None, None, None)

    def news(self, news: TrialNews) -> None:
        """Take in an epoch's report or the end of a trial."""
        ended = news.outcome is not None
        if self._before is None:
            self._before = news.done - ended
        self._shares[news.number] = news.share
        if ended:
            self._shares.pop(news.number)
        done = min(news.trials, news.done + sum(self._shares.values()))
        spent = done - self._before
        parts = [f"trial {min(news.done + (not ended), news.trials)} of {news.trials}"]
        if news.epoch is not None:
            parts.append(f"epoch {news.epoch.epoch} recall@K {100 * news.epoch.validation_recall:.1f} %")
        if news.best is not None:
            parts.append(f"best {100 * news.best:.2f} %")
        if spent > 0:
            parts.append(f"about {(time.monotonic() - self._begun) * (news.trials - done) / spent:.0f} s left")
        self._line.update(done, news.trials, ", ".join(parts))


def _print(search: Search) -> None:
    from rich.table import Table

    from specmoe.cli.terminal import SafeConsole
    from specmoe.tuning import evidence_in_words, gain_in_words

    table = Table(title=f"{search.predictor}: validation recall@K, mean over horizons")
    for column in ("trial", "recall", "epochs", "seconds", "changes"):
        table.add_column(column, justify="left" if column == "changes" else "right")
    complete = sorted((t for t in search.trials if t.state == "complete"), key=lambda t: -(t.recall or 0))
    shown = complete[:_SHOWN]
    shown += [trial for trial in complete[_SHOWN:] if trial.in_force]
    for trial in shown:
        changed = {n: v for n, v in trial.values.items() if v != search.start.get(n)}
        said = ", ".join(f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in changed.items())
        name = "in force" if trial.in_force else str(trial.number)
        cells = (f"{100 * (trial.recall or 0):.2f} %", f"{trial.best_epoch} of {trial.epochs}", f"{trial.seconds:.0f}")
        table.add_row(name, *cells, said or "–")
    SafeConsole().print(table)
    states = [trial.state for trial in search.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    again = f"; {search.interrupted} interrupted and tried again" if search.interrupted else ""
    typer.echo(f"{len(states)} trials: {counts}{again}")
    best = search.best_trial
    if best is not None and best.in_force:
        typer.echo("nothing beat the recipe in force")
    elif search.gain is not None:
        typer.echo(
            f"gain over the recipe in force: {gain_in_words(search.gain)} points "
            f"({evidence_in_words(search)}; chosen by these documents, so expect less on others)"
        )
