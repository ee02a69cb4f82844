"""A search space: a recipe in which some arguments are left open."""

import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_optim.distillation.module import DistillationModule
from lightning_optim.provenance import as_plain
from lightning_optim.recipe import Recipe
from lightning_optim.techniques import TECHNIQUES

if TYPE_CHECKING:
    import optuna

__all__ = ["Choice", "Range", "Space"]

Point = Mapping[str, Any]
"""Name of an open argument -> its value; of a choice that holds more than plain values, its label."""

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole numbers if both are.

    Raises:
        ValueError: If the ends are no finite numbers in this order, or ``log`` begins at 0 or below.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        if not all(_is_number(end) and math.isfinite(end) for end in ends) or not self.low < self.high:
            raise ValueError(f"a range is (low, high) with low < high, got ({self.low!r}, {self.high!r}).")
        if not isinstance(self.log, bool):
            raise ValueError(f"`log` of a range must be true or false, got {self.log!r}.")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range begins above 0, got {self.low!r}.")

    @property
    def is_whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: "optuna.Trial", name: str) -> float:
        """Ask Optuna for a value."""
        if self.is_whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, float(self.low), float(self.high), log=self.log)

    def samples(self) -> dict[str, float]:
        """Return both ends and the middle."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return {"low": self.low, "high": self.high, "middle": int(middle) if self.is_whole else middle}


@dataclass(frozen=True)
class Choice:
    """One of several values, which may hold ranges and choices themselves."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("a choice needs at least one value, got an empty list.")
        if len(set(map(_typed, self.labels))) < len(self.options):
            raise ValueError(f"a choice has each value once, got {list(self.labels)!r}.")

    @property
    def labels(self) -> tuple[Any, ...]:
        """The values as Optuna stores them: plain ones as they are, others as text."""
        return tuple(option if isinstance(option, PLAIN) else _label(option) for option in self.options)

    def suggest(self, trial: "optuna.Trial", name: str) -> Any:
        """Ask Optuna for the label of a value."""
        return trial.suggest_categorical(name, self.labels)

    def samples(self) -> dict[str, Any]:
        """Return the label of the first, the middle and the last value."""
        return {"low": self.labels[0], "middle": self.labels[len(self.labels) // 2], "high": self.labels[-1]}

    def place(self, label: Any) -> int:
        """Return the place of a label's value."""
        return list(map(_typed, self.labels)).index(_typed(label))


class Space:
    """A recipe whose arguments may be open.

    An open argument is ``(low, high)`` (whole numbers if both ends are; ``(low, high, "log")`` on a logarithmic scale;
    in YAML ``{low: 1, high: 8, log: true}``) or a list of values to choose from, also of mappings with open arguments
    in them, and with None for a technique that may be left out. An argument that is a list by itself (``exclude``) is
    open where it is a list of lists.

    Args:
        content: Keys of a recipe, or the path of a YAML file with them.

    Raises:
        ValueError: If nothing is open, or a recipe rejects a value; the message names the argument.
        FileNotFoundError: If there is no such file.

    Examples:
        >>> space = Space({"weight_pruning": (0.5, 0.9), "quantization": [True, None]})
        >>> list(space.leaves)
        ['weight_pruning', 'quantization']
    """

    def __init__(self, content: Mapping[str, Any] | str | Path) -> None:
        if isinstance(content, (str, Path)):
            content = _read(content)
        if not isinstance(content, Mapping):
            raise TypeError(f"`space` must be a recipe with open arguments, or a YAML file of one, got {content!r}.")
        self._content = {str(key): _parsed(value, str(key), str(key)) for key, value in content.items()}
        self._above: dict[str, Point] = {}
        self.leaves: dict[str, Range | Choice] = {}
        for name, leaf, above in _leaves(self._content, "", {}):
            self.leaves[name], self._above[name] = leaf, above
        if not self.leaves:
            raise ValueError(
                "`space` leaves nothing open, so there is nothing to search. Give an argument a range (low, high) or "
                "a list of values: {'weight_pruning': (0.5, 0.9)}."
            )
        self._check()

    def suggest(self, trial: "optuna.Trial") -> dict[str, Any]:
        """Return a point that Optuna proposes."""
        point: dict[str, Any] = {}

        def chosen(name: str, leaf: Range | Choice) -> Any:
            point[name] = leaf.suggest(trial, name)
            return point[name]

        _resolved(self._content, "", chosen)
        return point

    def recipe(self, point: Point) -> Recipe:
        """Return the recipe of a point."""
        return Recipe.load(_resolved(self._content, "", lambda name, leaf: point[name]))

    def distils(self) -> bool:
        """Whether any of its recipes may distil."""
        return self._content.get("distillation") not in (None, False)

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain types: what a study remembers."""
        plain = as_plain(_plain(self._content))
        return {str(key): value for key, value in plain.items()}

    def _check(self) -> None:
        """Let a recipe check each end and choice, the others at their lower, middle or upper end."""
        for name, leaf in self.leaves.items():
            for value in leaf.labels if isinstance(leaf, Choice) else leaf.samples().values():
                self._check_value({**self._above[name], name: value})

    def _check_value(self, given: Point) -> None:
        """Raise if no recipe takes a value, wherever the others are: windows overlap in some corners and not in all."""
        errors: list[Exception] = []
        for corner in ("low", "middle", "high"):
            try:
                self.recipe({**{name: leaf.samples()[corner] for name, leaf in self.leaves.items()}, **given})
            except (TypeError, ValueError) as error:
                errors.append(error)
            else:
                return
        name, value = list(given.items())[-1]
        raise ValueError(f"`space` at {name} = {value!r}: {errors[0]}") from errors[0]


def _read(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no space file {str(path)!r}.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the space {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"the space {str(path)!r} must be a mapping of a recipe's keys, got {found!r}.")
    return found


# What is open.


def _parsed(value: Any, part: str, argument: str, where: str = "") -> Any:
    """Return a value with its ranges and choices told apart."""
    where = where or part
    try:
        if isinstance(value, (Range, Choice)):
            return value
        if isinstance(value, tuple):
            return _range(value)
        if isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {"low", "high", "log"}:
            return Range(**value)
        if isinstance(value, list) and _is_open_list(value, part, argument):
            return Choice(tuple(_parsed(option, part, argument, where) for option in value))
    except ValueError as error:
        if str(error).startswith("`space`"):
            raise
        raise ValueError(f"`space` at {where}: {error}") from error
    if isinstance(value, Mapping):
        return {key: _parsed(item, part, str(key), f"{where}.{key}") for key, item in value.items()}
    return value


def _range(value: tuple[Any, ...]) -> Range:
    if len(value) not in (2, 3) or (len(value) == 3 and value[2] != "log"):
        raise ValueError(f'a range is (low, high) or (low, high, "log"), got {value!r}.')
    return Range(value[0], value[1], log=len(value) == 3)


def _is_open_list(value: Sequence[Any], part: str, argument: str) -> bool:
    """Whether a list is one of choices; that of an argument that is a list is, if it holds lists."""
    if argument not in _lists_of(part):
        return True
    return bool(value) and all(item is None or isinstance(item, list) for item in value)


@cache
def _lists_of(part: str) -> frozenset[str]:
    """Return the arguments of a recipe's key that are lists."""
    makes = DistillationModule if part == "distillation" else None
    makes = TECHNIQUES[part].callback_class if part in TECHNIQUES else makes
    if makes is None:
        return frozenset()
    hints = {name: parameter.annotation for name, parameter in signature(makes).parameters.items()}
    return frozenset(name for name, hint in hints.items() if any(_is_list(part) for part in (hint, *_args(hint))))


def _args(hint: Any) -> tuple[Any, ...]:
    return () if _is_list(hint) else typing.get_args(hint)


def _is_list(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Sequence) and not issubclass(origin, tuple)


def _leaves(node: Any, name: str, above: Point) -> Iterator[tuple[str, Range | Choice, Point]]:
    """Yield each open argument with the choices that must be taken to reach it."""
    if isinstance(node, (Range, Choice)):
        yield name, node, above
    if isinstance(node, Choice):
        for place, (label, option) in enumerate(zip(node.labels, node.options, strict=True)):
            yield from _leaves(option, f"{name}[{place}]", {**above, name: label})
    if isinstance(node, dict):
        for key, item in node.items():
            yield from _leaves(item, _below(name, key), above)


def _resolved(node: Any, name: str, chosen: Callable[[str, Range | Choice], Any]) -> Any:
    if isinstance(node, Range):
        return chosen(name, node)
    if isinstance(node, Choice):
        place = node.place(chosen(name, node))
        return _resolved(node.options[place], f"{name}[{place}]", chosen)
    if isinstance(node, dict):
        return {key: _resolved(item, _below(name, key), chosen) for key, item in node.items()}
    return node


def _below(name: str, key: Any) -> str:
    key = key.__name__ if isinstance(key, type) else str(key)
    return f"{name}.{key}" if name else key


def _plain(node: Any) -> Any:
    if isinstance(node, Range):
        return {"low": node.low, "high": node.high, "log": node.log}
    if isinstance(node, Choice):
        return [_plain(option) for option in node.options]
    if isinstance(node, dict):
        return {_below("", key): _plain(item) for key, item in node.items()}
    return node


def _label(option: Any) -> str:
    """Return an option that is no plain value as short text: ``pruning_ratio: 0.1 to 0.8``."""
    if isinstance(option, Range):
        return f"{option.low} to {option.high}" + (" (log)" if option.log else "")
    if isinstance(option, Choice):
        return " or ".join(map(str, option.labels))
    if isinstance(option, dict):
        return ", ".join(f"{_below('', key)}: {_label(item)}" for key, item in option.items()) or "{}"
    return str(as_plain(option))


def _typed(label: Any) -> tuple[str, Any]:
    return type(label).__name__, label


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
