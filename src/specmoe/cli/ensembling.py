"""``specmoe ensemble``: is a blend of a run's predictors worth its time?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specmoe.cli.options import AsJson, Device, print_json, resolve_device
from specmoe.cli.stages import StageLine
from specmoe.errors import SpecmoeError
from specmoe.locks import locked

if TYPE_CHECKING:
    from specmoe.training import EpochReport

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("ensemble")(ensemble)


def ensemble(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `specmoe train`.")],
    trace: Annotated[Path | None, typer.Option(help="The run's trace; default: in or beside RUN, by its name.")] = None,
    members: Annotated[
        list[str] | None, typer.Option(help="Names of predictors of the run; may be given several times.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=2, max=1000, help="So many of the strongest on the validation part; default: 5.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Predictor that the blend teaches.")] = None,
    picks: Annotated[int, typer.Option(min=1, max=100, help="Of the greedy selection, at most.")] = 12,
    seeds: Annotated[int | None, typer.Option(min=1, max=100, help="At most so many of the run's seeds.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: RUN/ensemble.")] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Blend a run's best predictors, and teach a small one: the gain and the added latency; resumes after a kill."""
    from specmoe.ensembling import ensemble as blend_all
    from specmoe.ensembling.page import write_ensemble_page
    from specmoe.ensembling.words import ensemble_lines

    if members and top is not None:
        raise SpecmoeError("--members names all members and --top chooses them: give one of the two")
    target = out or run / "ensemble"
    with locked(target, "ensemble"), _View() as view:
        result = blend_all(
            run,
            target,
            trace=trace,
            members=members,
            top=top or 5,
            picks=picks,
            student=student,
            seeds=seeds,
            device=resolve_device(device),
            on_stage=view.stage,
            on_epoch=view.epoch,
        )
        page = target / "ensemble.html"
        write_ensemble_page(result, page)
    if json:
        print_json(result.model_dump(mode="json"))
        return
    typer.echo("\n".join(ensemble_lines(result)))
    files = ", ".join(str(target / file) for each in result.contenders if each.key == "blend" for file in each.files)
    typer.echo(f"\nresults: {target / 'ensemble.json'}\nreport:  {page}\nblend:   {files}")


class _View(StageLine):
    """What is done now, and how far the student is."""

    def epoch(self, title: str, report: EpochReport, epochs: int) -> None:
        """Take in an epoch's report."""
        note = f"epoch {report.epoch} of {epochs}, validation recall@K {100 * report.validation_recall:.1f} %"
        self.show(title, report.epoch, epochs, note)
