"""CLI entry point: finds the command, and reports user errors in one line without a traceback."""

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim._version import __version__
from lightning_optim.cli import compare, consolidate, demo, export, recipes, recommend, search, show, train
from lightning_optim.cli.command import Command, UserError, is_users

__all__ = ["COMMANDS", "main"]

COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        *train.COMMANDS,
        compare.COMMAND,
        export.COMMAND,
        show.COMMAND,
        recipes.COMMAND,
        search.COMMAND,
        recommend.COMMAND,
        consolidate.COMMAND,
        demo.COMMAND,
    )
}
"""Name -> command, in the order of the help text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Arguments after ``lightning-optim``; default those of this process.

    Returns:
        The exit code: 0, or 1 with one line on stderr for a user error; argparse exits with 2 for unknown commands and
        options.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    name, rest = parser.parse_args(given[:1]), given[1:]
    _import_from_here()
    try:
        return COMMANDS[name.command].run(rest)
    except (UserError, MisconfigurationException) as error:
        return _said(error)
    except (ValueError, TypeError) as error:
        if not (_is_raised_in(error, _PACKAGE) or _is_lightnings(error)):
            raise  # what a user's module raises in a run is a bug to find
        return _said(error)
    except (OSError, RuntimeError) as error:
        if not _is_lightnings(error):
            raise
        return _said(error)


_PACKAGE = Path(__file__).parents[1]
_LIGHTNING = Path(pl.__file__).parents[1]


def _is_lightnings(error: Exception) -> bool:
    """Whether an error is Lightning's about the arguments: none of the user's code was running."""
    return _is_raised_in(error, _LIGHTNING) and not is_users(error)


def _is_raised_in(error: Exception, folder: Path) -> bool:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(folder)


def _said(error: Exception) -> int:
    notes = getattr(error, "__notes__", ())
    sys.stderr.write(f"error: {' '.join(' '.join([str(error), *notes]).split())}\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lightning-optim",
        usage="lightning-optim COMMAND ...",
        description="Make a model smaller, faster and cheaper inside the Trainer, and measure the gain.",
        epilog=f"commands:\n{listed}\n\n`lightning-optim COMMAND --help` lists the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="what to do")
    parser.add_argument("--version", action="version", version=f"lightning-optim {__version__}")
    return parser


def _import_from_here() -> None:
    """Let class paths refer to modules in the working directory, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
