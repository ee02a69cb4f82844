"""Weights and temperatures that change over the run, by the schedules that pruning uses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_optim.functional.schedules import SCHEDULES, Schedule
from lightning_optim.window import Window

__all__ = ["Ramp", "RampState"]


@dataclass(frozen=True)
class Ramp:
    """A number that goes from ``initial`` to ``final`` while the run goes from ``start`` to ``end``.

    Args:
        initial: Value until ``start``.
        final: Value from ``end`` on.
        schedule: Name in ``functional.schedules.SCHEDULES`` or a callable.
        start: A step (int) or a fraction of the planned steps (float).
        end: In the same words.

    Examples:
        >>> Ramp(0.9, 0.1).at(0.5)
        0.5
    """

    initial: float
    final: float
    schedule: Schedule | str | dict[str, Any] = "linear"
    start: int | float = 0.0
    end: int | float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("initial", self.initial), ("final", self.final)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TypeError(f"`{name}` of a ramp must be a number, got {value!r}.")
        SCHEDULES.resolve(self.schedule)
        Window(self.start, self.end)

    def at(self, progress: float) -> float:
        """Return the value at a progress through the window, in [0, 1]; both ends are exact."""
        if progress <= 0.0:
            return self.initial
        if progress >= 1.0:
            return self.final
        part = 2.0 * SCHEDULES.resolve(self.schedule)(progress, 0.0, 0.5)  # schedules end below 1
        return self.initial + (self.final - self.initial) * part


class RampState:
    """A number of the loss, constant or a ramp, with the window that a fit resolved.

    Args:
        name: Argument name, for errors.
        given: A number, a :class:`Ramp`, or a mapping of its arguments.
        low: Smallest value allowed.
        high: Largest.
        hint: What to do instead, for the error.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a value is out of range.
    """

    def __init__(self, name: str, given: Any, low: float, high: float, hint: str) -> None:
        ramp = Ramp(**given) if isinstance(given, Mapping) else given
        values = (ramp.initial, ramp.final) if isinstance(ramp, Ramp) else (ramp,)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` must be a number or a Ramp, got {given!r}.")
            if not low <= value <= high:
                raise ValueError(f"`{name}` {hint}, got {value}.")
        self.ramp = ramp if isinstance(ramp, Ramp) else Ramp(float(ramp), float(ramp))
        self.constant = not isinstance(ramp, Ramp)
        self.window = Window(self.ramp.start, self.ramp.end)
        self.never = max(values) == 0.0
        """Whether the value is 0 all along."""

    def value(self, step: int) -> float:
        """Return the value at an optimizer step."""
        return self.ramp.initial if self.constant else self.ramp.at(self.window.progress(step))

    def begin(self, planned: float, *, fresh: bool) -> None:
        """Resolve the window; one that was restored stays."""
        if self.constant:
            return
        if fresh:
            self.window.restart()
        if not self.window.resolved:
            self.window.resolve(planned)
