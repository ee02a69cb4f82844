"""What a command is, and how it says what the user can mend."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

__all__ = ["Command", "UserError", "command_parser", "console", "said_plainly"]


class UserError(Exception):
    """What the user can mend: shown without a traceback."""


@dataclass(frozen=True)
class Command:
    """A word after ``lightning-optim``.

    Attributes:
        name: The word.
        help: What it does, in one line.
        run: Runs it with the arguments after the word, and returns the exit code.
    """

    name: str
    help: str
    run: Callable[[Sequence[str]], int]


def command_parser(name: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """Return an empty parser for a command's own words."""
    return argparse.ArgumentParser(prog=f"lightning-optim {name}", description=description, **options)


def console() -> Console:
    """Return a console for a command's tables; a pipe or a log file has no width of its own and gets a wide one."""
    found = Console()
    if not found.is_terminal:
        found.width = 160
    return found


_MENDABLE = (ValueError, TypeError, OSError, ImportError, AttributeError, RuntimeError)


@contextmanager
def said_plainly() -> Iterator[None]:
    """Turn the package's own refusals into what is shown without a traceback.

    Only around what reads arguments and files. What a user's module does in a run keeps its traceback: there a
    ``ValueError`` is a bug to find, not a word to correct.
    """
    try:
        yield
    except (*_MENDABLE, MisconfigurationException) as error:
        raise UserError(str(error) or type(error).__name__) from error
