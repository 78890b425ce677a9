"""The command line. Verbs parse, call the library and print; they hold no logic.

Heavy packages are imported inside the verbs, so that ``specmoe --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any

import typer

from specmoe import __version__
from specmoe.cli import (
    collecting,
    comparing,
    ensembling,
    exporting,
    families,
    hardware,
    listing,
    pretraining,
    reporting,
    simulating,
    studying,
    training,
    tuning,
    validating,
    verdict,
)
from specmoe.cli.terminal import guarded_output, shown
from specmoe.errors import SpecmoeError
from specmoe.memory import ran_out

__all__ = ["app", "main", "run_verb"]

_INTERRUPTED = 130
# Newer typer brings its own copy of click; this is ClickException of whichever one it uses.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Which experts come next? Capture a Mixture-of-Experts model's routing, train predictors on it, compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (
    collecting,
    families,
    validating,
    exporting,
    training,
    tuning,
    ensembling,
    reporting,
    comparing,
    studying,
    simulating,
    verdict,
    hardware,
    listing,
    pretraining,
):
    module.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"specmoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What can stand before a verb."""


def main() -> None:
    """Entry point of the ``specmoe`` command."""
    _hush_dependencies()
    code = run_verb(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        # It was said already. What could not be written is dropped, or the interpreter would fail on it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _hush_dependencies() -> None:
    """Keep notes of other packages to their developers off the terminal, in worker processes too.

    Whoever asks for them (``python -W``, PYTHONWARNINGS, TRANSFORMERS_VERBOSITY) gets them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    os.environ["PYTHONWARNINGS"] = "ignore::DeprecationWarning,ignore::PendingDeprecationWarning,ignore::FutureWarning"


def run_verb(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Errors that the user can put right end in one line on standard error and code 2, Ctrl-C in code 130.
    """
    try:
        with guarded_output():
            code = app(arguments, standalone_mode=False) or 0
    except SpecmoeError as error:
        return _refuse(str(error))
    except _UsageError as error:
        if not error.format_message():  # Nothing was asked for, and the help has been printed.
            return 2
        return _refuse(f"{error.format_message().rstrip('.')}; see: specmoe {_verb_of(error)}--help")
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        return _refuse(
            "memory ran out; lower what is held at once (--workers, --batch, --horizons, --max-tokens, "
            "--tokens-per-document, the window of a recipe), or take a machine with more"
        )
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, say) has gone; there is nobody left to tell.
        sys.stderr.close()
        return 0
    # Some versions of typer turn Ctrl-C into this code by themselves.
    if code == _INTERRUPTED:
        _say("interrupted; run the same command again to continue")
    return code


def _refuse(message: str) -> int:
    """Say in one line what the user can put right; returns the exit code."""
    _say(f"error: {shown(' '.join(message.split()))}")
    return 2


def _verb_of(error: Any) -> str:
    """The verb whose options an error is about and a space; empty where there is none yet."""
    context, names = getattr(error, "ctx", None), ""
    while context is not None and context.parent is not None:
        context, names = context.parent, f"{context.info_name} {names}"
    return names


def _say(text: str) -> None:
    with suppress(OSError):  # A full disk behind it: the exit code is all that is left to tell.
        print(text, file=sys.stderr, flush=True)
