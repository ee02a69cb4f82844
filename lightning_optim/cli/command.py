"""CLI command definition and user-facing error handling."""

import sysconfig
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

__all__ = ["Command", "UserError", "command_parser", "console", "is_users", "need_jsonargparse", "said_plainly"]


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


def command_parser(name: str, description: str, *, example: str | None = None, **options: Any) -> ArgumentParser:
    """Return an empty parser for a command's own arguments.

    Args:
        name: Of the command.
        description: What it does.
        example: Arguments that the help ends with, after the command.
        options: Of the parser.
    """
    prog = f"lightning-optim {name}"
    return ArgumentParser(prog, description=description, epilog=example and f"example: {prog} {example}", **options)


def console() -> Console:
    """Return a console for a command's tables; a pipe or a log file has no width of its own and gets a wide one."""
    found = Console()
    if not found.is_terminal:
        found.width = 160
    return found


_PACKAGE = Path(__file__).parents[1]
_INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
_MENDABLE = (ValueError, TypeError, OSError, ImportError, AttributeError, RuntimeError)


@contextmanager
def said_plainly() -> Iterator[None]:
    """Turn refusals of the package, and of the libraries below, into what is shown without a traceback.

    What the user's own code raises keeps its traceback: there a ``ValueError`` is a bug to find, not a word to correct.
    """
    try:
        yield
    except (*_MENDABLE, MisconfigurationException) as error:
        if is_users(error):
            raise
        raise UserError(str(error) or type(error).__name__) from error


def is_users(error: BaseException) -> bool:
    """Whether an error comes out of the user's own code, and is not the package's answer to what that asked for."""
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if frames and frames[-1].is_relative_to(_PACKAGE):
        return False
    reason = error.__cause__ or error.__context__  # jsonargparse tells of an error in a constructor by one of its own
    return not all(map(_is_installed, frames)) or (reason is not None and is_users(reason))


def _is_installed(file: Path) -> bool:
    """Whether a file belongs to Python, to an installed library or to this package."""
    homes = [_PACKAGE, *(Path(path) for name, path in sysconfig.get_paths().items() if name in _INSTALLED)]
    return str(file).startswith("<") or any(file.is_relative_to(home) for home in homes)


def need_jsonargparse() -> None:
    """Say which extra is missing.

    Raises:
        UserError: If jsonargparse is not installed.
    """
    try:
        import jsonargparse  # noqa: F401
    except ImportError as error:
        raise UserError(
            "configuration files need jsonargparse, which is not installed. Install it with: "
            'python -m pip install "lightning-optim[cli]"'
        ) from error
