"""Patterns that select layers: the meaning of ``include``, ``exclude`` and ``{pattern: value}`` in every technique."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_optim.modules import COMPILED_CHILD
from lightning_optim.sharding import own_class

__all__ = [
    "NOT_INCLUDED",
    "Pattern",
    "Selector",
    "Verdict",
    "check_pattern",
    "check_patterns",
    "first_match",
    "matches",
    "pattern_name",
    "shown",
]

Pattern = type[nn.Module] | str | Callable[[str, nn.Module], bool]
"""A layer class; a name or glob pattern; ``"re:"`` and a regular expression; or a function ``(name, layer) -> bool``.

In this order: jsonargparse takes the first that fits.
"""

NOT_INCLUDED = "not in include"
REGEX = "re:"


def check_patterns(argument: str, patterns: Any) -> list[Pattern] | None:
    """Return patterns as a list of their own, None as it is.

    Args:
        argument: Its name, for errors.
        patterns: What the user passed.

    Raises:
        TypeError: If it is no list of patterns.
        ValueError: If a regular expression is not valid.
    """
    if patterns is None:
        return None
    if not isinstance(patterns, Sequence) or isinstance(patterns, str):
        raise TypeError(
            f"`{argument}` must be a list of names, patterns or layer classes, got {patterns!r}. Put it in a list."
        )
    for pattern in patterns:
        check_pattern(argument, pattern)
    return list(patterns)


def check_pattern(argument: str, pattern: Any) -> None:
    """Check one pattern, as :func:`check_patterns` does."""
    is_class = isinstance(pattern, type) and issubclass(pattern, nn.Module)
    is_function = callable(pattern) and not isinstance(pattern, (type, nn.Module))
    if not is_class and not is_function and (not isinstance(pattern, str) or not pattern):
        raise TypeError(
            f"`{argument}` takes names, glob patterns, 're:' with a regular expression, layer classes or functions of "
            f"(name, layer), got {pattern!r}."
        )
    if isinstance(pattern, str) and pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(
                f"`{argument}` has {pattern!r}, which is not a valid regular expression: {error}. For a glob pattern "
                "leave out 're:'."
            ) from error


def matches(pattern: Pattern, name: str, layer: nn.Module, prefix: str = "") -> bool:
    r"""Tell whether a pattern selects a parameter.

    A pattern that names a layer, or (not as a regular expression) a module above it, selects its weight. A bias is
    selected only by a pattern that ends in its name (``"*.bias"``, ``r"re:.*\.bias"``).

    Args:
        pattern: A name or glob pattern is compared with names as in the LightningModule's ``state_dict()``, and with
            those in the target. A regular expression must match the layer's whole name in the target
            (``re.fullmatch``), and a function receives that name: both select the same layers with a teacher around
            the model and without.
        name: The parameter's full name.
        layer: The module that holds it.
        prefix: The target's prefix, empty or ending in a dot.
    """
    own = name.removeprefix(prefix).replace(f"{COMPILED_CHILD}.", "")
    layer_name, _, leaf = own.rpartition(".")
    is_weight = "bias" not in leaf and ("weight" in leaf or not _is_torch_layer(layer))
    if isinstance(pattern, type):
        return isinstance(layer, pattern) and is_weight
    if not isinstance(pattern, str):
        return is_weight and bool(pattern(layer_name, layer))
    if pattern.startswith(REGEX):
        expression = re.compile(pattern.removeprefix(REGEX))
        named = pattern.endswith(leaf) and expression.fullmatch(own)
        return bool(named or (is_weight and expression.fullmatch(layer_name)))
    return any(
        _matches_parameter(pattern, candidate, leaf) or (is_weight and _matches_module(pattern, candidate))
        for candidate in {name, name.removeprefix(prefix), name.replace(f"{COMPILED_CHILD}.", "")}
    )


def _is_torch_layer(layer: nn.Module) -> bool:
    return own_class(layer).__module__.startswith("torch.nn.")


def _matches_parameter(pattern: str, name: str, leaf: str) -> bool:
    return pattern.rpartition(".")[2].rpartition("*")[2].endswith(leaf) and fnmatchcase(name, pattern)


def _matches_module(pattern: str, name: str) -> bool:
    """A pattern takes a layer when it matches the layer's name or that of a module above it."""
    parts = name.split(".")[:-1]
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(len(parts) + 1))


def first_match(by_pattern: Mapping[Pattern, Any], name: str, layer: nn.Module, prefix: str = "") -> Pattern | None:
    """Return the first key of ``{pattern: value}`` that selects a parameter, None without one."""
    return next((pattern for pattern in by_pattern if matches(pattern, name, layer, prefix)), None)


def pattern_name(pattern: Pattern) -> str:
    """Return how a pattern is named in messages and files: a string as it is, a class or function by its name."""
    if isinstance(pattern, str):
        return pattern
    name: str = getattr(pattern, "__qualname__", type(pattern).__qualname__)
    return name if isinstance(pattern, type) else f"{getattr(pattern, '__module__', type(pattern).__module__)}.{name}"


def shown(pattern: Pattern) -> str:
    """Return how a pattern is written in a message."""
    return repr(pattern) if isinstance(pattern, str) else pattern_name(pattern)


@dataclass(frozen=True)
class Verdict:
    """What ``include`` and ``exclude`` say of a parameter.

    Attributes:
        included: The patterns of ``include`` that select it.
        reason: Why it is left out; None where they do not leave it out.
    """

    included: list[Pattern]
    reason: str | None


class Selector:
    """Applies ``include`` and ``exclude`` to one parameter after the other, and remembers which patterns matched.

    Args:
        include: Exactly what is selected; None leaves that to the caller's default.
        exclude: What is left out; it wins.
        prefix: The target's.

    Raises:
        TypeError, ValueError: As :func:`check_patterns`.
    """

    def __init__(self, include: Any, exclude: Any, prefix: str = "") -> None:
        self._patterns = {
            "include": check_patterns("include", include),
            "exclude": check_patterns("exclude", exclude),
        }
        self._prefix = prefix
        self._matched: set[tuple[str, int]] = set()

    def judge(self, name: str, layer: nn.Module) -> Verdict:
        """Return what the patterns say of a parameter.

        Args:
            name: The parameter's full name.
            layer: The module that holds it.
        """
        included, excluded = (self._matching(argument, name, layer) for argument in ("include", "exclude"))
        if excluded:
            return Verdict(included, f"excluded by {shown(excluded[0])}")
        is_left_out = self._patterns["include"] is not None and not included
        return Verdict(included, NOT_INCLUDED if is_left_out else None)

    def _matching(self, argument: str, name: str, layer: nn.Module) -> list[Pattern]:
        matching = []
        for place, pattern in enumerate(self._patterns[argument] or ()):
            if matches(pattern, name, layer, self._prefix):
                matching.append(pattern)
                self._matched.add((argument, place))
        return matching

    def check_all_matched(self, names: Iterable[str]) -> None:
        """Raise where a pattern matched nothing.

        Args:
            names: Of what could have matched, for the error.

        Raises:
            ValueError: With the pattern, and what names look like.
        """
        for argument, patterns in self._patterns.items():
            for place, pattern in enumerate(patterns or ()):
                if (argument, place) not in self._matched:
                    raise ValueError(
                        f"{argument}: {shown(pattern)} matches no layer. Names look like: "
                        f"{', '.join(list(names)[:6]) or 'none'}. Write a module's name, a glob pattern such as "
                        "'encoder.*', 're:' with a regular expression of the layer's whole name, or a layer class."
                    )
