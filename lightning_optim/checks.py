"""Argument checks, whose messages say what was expected, what was got and what to do."""

import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "check_choice",
    "check_count",
    "check_flags",
    "check_folder",
    "check_fraction",
    "check_mapping",
    "check_name",
    "check_names",
    "check_path",
    "listed",
]


def check_flags(**values: Any) -> None:
    """Check that arguments are True or False: a string such as "no" would count as True."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that an argument is one of several strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check that an argument is a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")


def check_folder(name: str, folder: str | Path) -> None:
    """Check that a folder, or the nearest existing parent, is writable, by creating a temporary file in it.

    Raises:
        NotADirectoryError: If the path is a file, or lies below one.
        OSError: If the system denies it.
    """
    path = Path(folder).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"`{name}` must be a folder, got {str(folder)!r}, and {there} is a file. {_ADVICE}")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise type(error)(
            f"`{name}` must be a folder that can be written to, got {str(folder)!r}, and {there} refuses: {error}. "
            f"{_ADVICE}"
        ) from error


_ADVICE = "Give a folder that can be written to."


def check_fraction(name: str, value: Any) -> None:
    """Check that an argument is a fraction in [0, 1] or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0.0 <= value <= 1.0):
        raise ValueError(f"`{name}` must be a fraction in [0, 1] or None, got {value!r}.")


def check_mapping(name: str, value: Any, of: str) -> None:
    """Check that an argument is a mapping; ``of`` describes its keys and values."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a mapping of {of}, got {value!r}.")


def check_name(name: str, value: Any, example: str) -> None:
    """Check that an argument is a non-empty string or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise TypeError(f"`{name}` must be a non-empty string such as {example!r}, or None, got {value!r}.")


def check_names(name: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that the keys of a mapping are known."""
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"`{name}` has no {unknown[0]!r}; known: {', '.join(known)}.")


def check_path(name: str, value: Any) -> None:
    """Check that an argument is a path."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise TypeError(f"`{name}` must be a path, got {value!r}.")


def listed(name: str, value: Any, of: str) -> list[Any]:
    """Return a sequence other than a string as a list; ``of`` describes its items."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"`{name}` must be a list of {of}, got {value!r}.")
    return list(value)
