"""Sparsity goals: which weights are ranked together, where they start and where they end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.functional.granularity import Granularity
from lightning_optim.patterns import Pattern, check_pattern, first_match, shown
from lightning_optim.target import Weight

__all__ = ["CHANCE_ZEROS", "Goal", "Sparsity", "check_goals", "checked_sparsity", "make_goals", "number_of"]

Sparsity: TypeAlias = float | dict[Pattern, float] | Literal["hold"]

CHANCE_ZEROS = 1e-3
"""Fewer zeros than this fraction do not count as an earlier pruning: initialization and rounding leave a few."""


@dataclass
class Goal:
    """Weights that are ranked together, the sparsity they started with and the one they end with."""

    names: list[str]
    initial: float
    final: float


def checked_sparsity(sparsity: Any, final: float | None) -> Sparsity:
    """Check the argument ``sparsity``.

    Args:
        sparsity: As the user passed it.
        final: The sparsity that the granularity itself fixes (n:m), else None.
    """
    if sparsity is None:
        return 0.8 if final is None else final
    if sparsity == "hold":
        return "hold"
    if isinstance(sparsity, dict):
        if not sparsity:
            raise ValueError("`sparsity` as a dict maps patterns to fractions, got an empty one.")
        for pattern in sparsity:
            check_pattern("sparsity", pattern)
        return {pattern: _checked_fraction(value, final) for pattern, value in sparsity.items()}
    return _checked_fraction(sparsity, final)


def _checked_fraction(value: Any, final: float | None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`sparsity` must be a fraction in [0, 1), a dict of them, 'hold' or None, got {value!r}.")
    if not 0.0 <= value < 1.0:
        hint = f" For {value:g} % zeros pass {value / 100:g}." if 1 < value < 100 else ""
        raise ValueError(f"`sparsity` must be a fraction in [0, 1), got {value!r}.{hint}")
    if final is not None and abs(value - final) > 1e-9:
        raise ValueError(
            f"n:m granularity ends at the sparsity 1 - n/m = {final:g}, got sparsity={value:g}. Leave `sparsity` out, "
            "or take another granularity."
        )
    return float(value)


def number_of(weights: Mapping[str, Weight], names: Iterable[str] | None = None) -> int:
    """Return the number of entries of some weights, of all by default."""
    return sum(weights[name].parameter.numel() for name in (weights if names is None else names))


def make_goals(
    weights: Mapping[str, Weight],
    sparsity: Sparsity,
    *,
    scope: str,
    initial: Mapping[str, float],
    prefix: str = "",
) -> list[Goal]:
    """Return the goals of a run.

    Args:
        weights: The selected weights by name.
        sparsity: As :func:`checked_sparsity` returns it.
        scope: ``"global"`` or ``"layer"``.
        initial: Sparsity that each weight started with; missing ones were dense.
        prefix: Name prefix of the target.

    Raises:
        MisconfigurationException: If a pattern is the first that matches for no weight.
    """
    if sparsity == "hold":
        return []
    groups: list[tuple[list[str], float]] = []
    if isinstance(sparsity, dict):
        first = {name: first_match(sparsity, weight.name, weight.layer, prefix) for name, weight in weights.items()}
        for pattern, fraction in sparsity.items():
            names = [name for name in weights if first[name] == pattern]
            if not names:
                raise MisconfigurationException(
                    f"sparsity: {shown(pattern)} matches no selected layer that an earlier pattern does not match. "
                    f"Selected: {', '.join(weights)}."
                )
            groups.append((names, fraction))
    else:
        groups.append((list(weights), float(sparsity)))
    if scope == "layer":
        groups = [([name], fraction) for names, fraction in groups for name in names]
    return [Goal(names, _initial_of(weights, names, initial), fraction) for names, fraction in groups if names]


def _initial_of(weights: Mapping[str, Weight], names: list[str], initial: Mapping[str, float]) -> float:
    zeros = sum(initial.get(name, 0.0) * number_of(weights, [name]) for name in names)
    return zeros / number_of(weights, names)


def check_goals(goals: Iterable[Goal], weights: Mapping[str, Weight], granularity: Granularity) -> None:
    """Refuse goals below the sparsity that the weights already have.

    Raises:
        MisconfigurationException: With the sparsity of both.
    """
    for goal in goals:
        unit = _largest_unit(goal, weights, granularity)
        if goal.initial > goal.final + max(CHANCE_ZEROS, unit / number_of(weights, goal.names)):
            raise MisconfigurationException(
                f"the module already has {goal.initial:.2%} zeros in {', '.join(goal.names[:3])}"
                f"{' and more' if len(goal.names) > 3 else ''}, more than the {goal.final:.2%} asked. What is "
                "removed stays removed: ask for more, or pass 'hold'."
            )


def _largest_unit(goal: Goal, weights: Mapping[str, Weight], granularity: Granularity) -> float:
    """Size of the largest unit. The achieved sparsity can differ from the target by at most one unit."""
    if str(granularity) == "weight":
        return 1.0
    shapes = [shape for name in goal.names for shape in weights[name].shapes]
    return max(shape.numel() / min(shape[:2]) for shape in shapes)
