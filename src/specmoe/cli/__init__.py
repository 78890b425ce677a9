"""The command line. Verbs parse, call the library and print; they hold no logic.

Heavy packages are imported inside the verbs, so that ``specmoe --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from specmoe.cli import collecting, listing, pretraining, reporting, training
from specmoe.errors import SpecmoeError

__all__ = ["app", "main", "run_verb"]

# Newer typer brings its own copy of click; this is ClickException of whichever one it uses.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Which experts come next? Capture a Mixture-of-Experts model's routing, train predictors on it, compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (collecting, training, reporting, listing, pretraining):
    module.register(app)


def main() -> None:
    """Entry point of the ``specmoe`` command."""
    sys.exit(run_verb(sys.argv[1:]))


def run_verb(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Errors that the user can put right end in one line on standard error and code 2, Ctrl-C in code 130.
    """
    try:
        return app(arguments, standalone_mode=False) or 0
    except SpecmoeError as error:
        _say(f"error: {' '.join(str(error).split())}")
    except _UsageError as error:
        error.show()
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; run the same command again to continue")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, say) has gone; there is nobody left to tell.
        sys.stderr.close()
        return 0
    return 2


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
