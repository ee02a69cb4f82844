"""Weights and temperatures that change during the run, following the schedules that pruning uses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_optim.functional.schedules import SCHEDULES, Schedule
from lightning_optim.window import Window, planned_steps

__all__ = ["Ramp", "RampState", "Ramps"]


@dataclass(frozen=True)
class Ramp:
    """A number that goes from ``initial`` to ``final`` while the run goes from ``start`` to ``end``.

    Args:
        initial: Value until ``start``.
        final: Value from ``end`` on.
        schedule: Name in ``functional.schedules.SCHEDULES`` or a callable.
        start: A step (int) or a fraction of the planned steps (float).
        end: A step or a fraction, like ``start``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is not finite, a name is unknown, or the window is empty.

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
    """A number in the loss, constant or a ramp, with the window resolved for a fit.

    Args:
        name: Argument name, for errors.
        value: A number, a :class:`Ramp`, or a mapping of its arguments.
        low: Smallest allowed value.
        high: Largest allowed value.
        hint: What to pass instead, for the error.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a value is out of range.
    """

    def __init__(self, name: str, value: Any, low: float, high: float, hint: str) -> None:
        ramp = Ramp(**value) if isinstance(value, Mapping) else value
        ends = (ramp.initial, ramp.final) if isinstance(ramp, Ramp) else (ramp,)
        for end in ends:
            if isinstance(end, bool) or not isinstance(end, (int, float)):
                raise TypeError(f"`{name}` must be a number or a Ramp, got {value!r}.")
            if not low <= end <= high:
                raise ValueError(f"`{name}` {hint}, got {end}.")
        self.ramp = ramp if isinstance(ramp, Ramp) else Ramp(float(ramp), float(ramp))
        self.constant = not isinstance(ramp, Ramp)
        self.window = Window(self.ramp.start, self.ramp.end)
        self.never = max(ends) == 0.0
        """Whether the value is 0 all along."""

    def value(self, step: int) -> float:
        """Return the value at an optimizer step."""
        return self.ramp.initial if self.constant else self.ramp.at(self.window.progress(step))


class Ramps:
    """The weight and the temperature of a distillation over a run.

    Args:
        alpha: Weight of the distillation loss, a number or a ramp.
        temperature: A number or a ramp; None: each loss has its own.
    """

    def __init__(self, alpha: Any, temperature: Any) -> None:
        self.alpha = RampState("alpha", alpha, 0.0, 1.0, "must be a weight in [0, 1]")
        self.temperature: RampState | None = None
        if temperature is not None:
            hint = "must be a number > 0 (4.0 is usual)"
            self.temperature = RampState("temperature", temperature, 1e-6, 1e6, hint)
        self.step = 0
        """Optimizer steps so far; under manual optimization the batches with such a step."""
        self._restored = False

    @property
    def _states(self) -> dict[str, RampState]:
        states = {"alpha": self.alpha, "temperature": self.temperature}
        return {name: state for name, state in states.items() if state is not None}

    def begin(self, trainer: Any, *, automatic_optimization: bool = True) -> None:
        """Resolve the windows when a fit starts; those restored from a checkpoint are kept."""
        changing = [state for state in self._states.values() if not state.constant]
        planned = planned_steps(trainer, automatic_optimization=automatic_optimization) if changing else 0.0
        if not self._restored and trainer.global_step == 0:  # that of a restored run is 0 until later
            self.step = 0
        for state in changing:
            if not self._restored:
                state.window.restart()
            if not state.window.resolved:
                state.window.resolve(planned)
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        """Return the windows, for a checkpoint."""
        return {name: state.window.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, windows: Mapping[str, Any]) -> None:
        """Restore the windows of a run that continues."""
        for name, state in self._states.items():
            if name in windows:
                state.window.load_state_dict(windows[name])
        self._restored = True
