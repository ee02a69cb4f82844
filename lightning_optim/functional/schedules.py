"""Schedules: how sparsity moves from its initial to its final value over a window.

A schedule is a function ``schedule(u, initial, final) -> sparsity``. ``u`` is the progress through the window, a
fraction that is clipped to [0, 1]; the result is an absolute target, so that asking twice, late or after a resume
gives the same. Every schedule returns exactly ``initial`` at 0 and exactly ``final`` at 1 and is monotone in
between, in floating point too.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from lightning_optim.registry import Registry

__all__ = ["SCHEDULES", "Schedule", "cosine", "cubic", "exponential", "linear", "multi_step", "one_cycle", "one_shot"]

Schedule = Callable[[float, float, float], float]
SCHEDULES: Registry[Schedule] = Registry("schedule", trial=lambda schedule: schedule(0.5, 0.0, 0.5))

# Hubens et al. 2021, section 3: steepness and offset of the one-cycle curve.
_ALPHA = 14.0
_BETA = 6.0
# libm's sin and exp may be off by one unit in the last place; on this grid neighbouring values are further apart.
_GRID = 2.0**24


@SCHEDULES.register("cubic")
def cubic(u: float, initial: float, final: float) -> float:
    """Fast first and slow at the end: ``final + (initial - final) * (1 - u)**3``.

    Args:
        u: Progress through the window, clipped to [0, 1].
        initial: Sparsity at ``u = 0``, a fraction in [0, 1).
        final: Sparsity at ``u = 1``, a fraction in [0, 1).

    Returns:
        The sparsity to have at ``u``, a fraction.

    Raises:
        ValueError: If ``initial`` or ``final`` is outside [0, 1), or ``u`` is NaN.

    Examples:
        >>> cubic(0.5, 0.0, 0.5)
        0.4375

    References:
        Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".
    """
    return _move(u, initial, final, lambda u: 1.0 - (1.0 - u) * (1.0 - u) * (1.0 - u))


@SCHEDULES.register("linear")
def linear(u: float, initial: float, final: float) -> float:
    """The same number of weights at every event: ``initial + (final - initial) * u``.

    Args, result and errors as for :func:`cubic`.
    """
    return _move(u, initial, final, lambda u: u)


@SCHEDULES.register("cosine")
def cosine(u: float, initial: float, final: float) -> float:
    """Slow, fast, slow along half a cosine: ``initial + (final - initial) * (1 - cos(pi * u)) / 2``.

    Args, result and errors as for :func:`cubic`.
    """
    return _move(u, initial, final, lambda u: math.sin(0.5 * math.pi * _on_grid(u)) ** 2)


@SCHEDULES.register("exponential")
def exponential(u: float, initial: float, final: float) -> float:
    """The same fraction of what is left at every event: density falls geometrically.

    ``1 - (1 - initial) * ((1 - final) / (1 - initial))**u``. Args, result and errors as for :func:`cubic`.

    References:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks" prunes a fraction of
        what is left in each round.
    """

    def progress(u: float) -> float:
        rate = math.log1p(-final) - math.log1p(-initial)
        return math.expm1(rate * _on_grid(u)) / math.expm1(rate) if rate else u

    return _move(u, initial, final, progress)


@SCHEDULES.register("one_cycle")
def one_cycle(u: float, initial: float, final: float) -> float:
    """Slow start, steep middle and slow end, along a logistic curve.

    The paper's curve is ``initial + (final - initial) * (1 + exp(b - a)) / (1 + exp(b - a * u))`` with ``a = 14``
    and ``b = 6``. It starts 0.25 % of the way above ``initial``; here it is shifted and rescaled so that the start is
    exact too. Args, result and errors as for :func:`cubic`.

    References:
        Hubens et al. 2021, "One-Cycle Pruning: Pruning ConvNets Under a Tight Training Budget".
    """

    def logistic(u: float) -> float:
        return 1.0 / (1.0 + math.exp(_BETA - _ALPHA * u))

    def progress(u: float) -> float:
        return (logistic(_on_grid(u)) - logistic(0.0)) / (logistic(1.0) - logistic(0.0))

    return _move(u, initial, final, progress)


@SCHEDULES.register("one_shot")
def one_shot(u: float, initial: float, final: float) -> float:
    """All at once: ``final`` for every ``u > 0``.

    Args, result and errors as for :func:`cubic`.
    """
    return _move(u, initial, final, lambda _: 1.0)


@SCHEDULES.register("multi_step")
def multi_step(
    u: float,
    initial: float,
    final: float,
    *,
    milestones: Sequence[float] = (1 / 3, 2 / 3, 1.0),
    values: Sequence[float] = (1 / 3, 2 / 3, 1.0),
) -> float:
    """Stay, then jump at each milestone: ``initial + (final - initial) * value`` of the last milestone reached.

    In a callback: ``schedule={"multi_step": {"milestones": [0.3, 0.6, 1.0], "values": [0.5, 0.8, 1.0]}}``, in YAML the
    same. A milestone takes effect at the first event from there on. Other arguments, result and errors as for
    :func:`cubic`.

    Args:
        u: Progress.
        initial: At ``u = 0``.
        final: At ``u = 1``.
        milestones: Rising progress through the window, each in (0, 1].
        values: For each milestone the fraction of the way from ``initial`` to ``final``, never falling; the last is 1.

    Raises:
        TypeError: If ``milestones`` or ``values`` is no list of numbers.
        ValueError: If they differ in length, are out of range, fall, or do not end at 1.

    Examples:
        >>> [multi_step(u, 0.0, 0.8, milestones=[0.3, 0.6], values=[0.5, 1.0]) for u in (0.2, 0.3, 0.5, 0.6)]
        [0.0, 0.4, 0.4, 0.8]
    """
    _check_steps(milestones, values)
    steps = list(zip(milestones, values, strict=True))
    return _move(u, initial, final, lambda u: max((value for at, value in steps if at <= u), default=0.0))


def _check_steps(milestones: Any, values: Any) -> None:
    for name, numbers in (("milestones", milestones), ("values", values)):
        is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
        if not is_list or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
            raise TypeError(f"`{name}` must be a list of numbers, got {numbers!r}.")
    if not milestones or len(milestones) != len(values):
        raise ValueError(
            f"`milestones` and `values` must have one number for each step, got {len(milestones)} and {len(values)}."
        )
    if not 0.0 < milestones[0] <= milestones[-1] <= 1.0 or not all(a < b for a, b in pairwise(milestones)):
        raise ValueError(f"`milestones` must rise, each in (0, 1] (progress through the window), got {milestones!r}.")
    if not 0.0 <= values[0] <= values[-1] == 1.0 or not all(a <= b for a, b in pairwise(values)):
        raise ValueError(
            f"`values` must not fall and end at 1 (fractions of the way to the final value), got {values!r}."
        )


def _move(u: float, initial: float, final: float, progress: Callable[[float], float]) -> float:
    """Go from ``initial`` to ``final`` by ``progress`` in (0, 1), with both ends exact and nothing beyond them."""
    _check_fraction("initial", initial)
    _check_fraction("final", final)
    if math.isnan(u):
        raise ValueError("`u` must be a fraction in [0, 1], got nan.")
    if u <= 0.0:
        return initial
    if u >= 1.0:
        return final
    value = initial + (final - initial) * progress(u)
    low, high = sorted((initial, final))
    return min(max(value, low), high)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` must be a fraction in [0, 1), got {value}. For 80 % zeros pass 0.8.")


def _on_grid(u: float) -> float:
    return round(u * _GRID) / _GRID
