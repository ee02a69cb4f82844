"""When a technique acts: steps counted, the window resolved to steps, events due."""

import math
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["Window", "planned_steps"]


class Window:
    """The part of a run in which a technique acts.

    A *step* is a training batch in which an optimizer that holds a target parameter stepped. The owner counts it
    with :meth:`count_step`; under plain automatic optimization the count equals ``trainer.global_step``. Events are
    due at ``start``, at ``end`` and every ``every_n_steps`` between. Once resolved the window is part of the state:
    a resumed run keeps it, also when ``max_epochs`` was raised.

    Args:
        start: First step (``int``), or a fraction of the planned steps (``float`` in [0, 1]).
        end: Last step, in the same words. ``1`` is the first step, ``1.0`` the end of the run.
        every_n_steps: Steps between events.
        events: How many events to spread evenly over the window after the one at ``start``, instead of
            ``every_n_steps``.
        names: What ``start`` and ``end`` are called in the owner's arguments, for error texts.

    Raises:
        TypeError: If ``start`` or ``end`` is neither int nor float, or ``every_n_steps`` is no int.
        ValueError: If a value is out of range or ``start`` is after ``end``.

    Examples:
        >>> window = Window(0.1, 0.5, every_n_steps=20)
        >>> window.resolve(100)
        >>> window.event_steps()
        [10, 30, 50]
    """

    def __init__(
        self,
        start: int | float,
        end: int | float,
        *,
        every_n_steps: int = 1,
        events: int | None = None,
        names: tuple[str, str] = ("start", "end"),
    ) -> None:
        self.names = names
        self.start = _checked(names[0], start)
        self.end = _checked(names[1], end)
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be a whole number >= 1, got {every_n_steps!r}.")
        if events is not None and (type(events) is not int or events < 1):
            raise ValueError(f"`events` must be a whole number >= 1, got {events!r}.")
        self.every_n_steps = every_n_steps
        self.events = events
        if type(start) is type(end) and start > end:
            raise ValueError(f"`{names[0]}` must not be after `{names[1]}`, got {start!r} > {end!r}.")
        self.restart()

    def restart(self) -> None:
        """Open the window anew: no step counted, nothing resolved."""
        self.step = 0
        self.last_event = -1
        self.start_step: int | None = None
        self.end_step: int | None = None

    @property
    def resolved(self) -> bool:
        """Whether ``start`` and ``end`` are known as steps."""
        return self.end_step is not None

    def resolve(self, planned: float, *, clamp: bool = False) -> None:
        """Turn ``start`` and ``end`` into steps.

        Args:
            planned: Steps the run will take; ``math.inf`` when unknown.
            clamp: Move a window that lies beyond the planned steps to their end (``fast_dev_run``) instead of
                warning.

        Raises:
            MisconfigurationException: If a fraction is asked of an unknown number of steps, or the resolved start
                is after the resolved end.
        """
        start = self._as_step(self.names[0], self.start, planned)
        end = self._as_step(self.names[1], self.end, planned)
        if clamp:
            end = min(end, int(planned))
            start = min(start, end)
        if start > end:
            raise MisconfigurationException(
                f"`{self.names[0]}`={self.start!r} is step {start}, after `{self.names[1]}`={self.end!r} at step {end} "
                f"of {planned} planned steps. Give both as steps or both as fractions."
            )
        if end > planned:
            rank_zero_warn(
                f"`{self.names[1]}` is step {end}, but the run is planned to take {planned:.0f} steps: the window will "
                f"not close. Lower `{self.names[1]}` or train longer."
            )
        self.start_step, self.end_step = start, end

    def _as_step(self, name: str, value: int | float, planned: float) -> int:
        if isinstance(value, int):
            return value
        if math.isinf(planned):
            raise MisconfigurationException(
                f"`{name}`={value!r} is a fraction of the planned steps, and this run has no known number of steps "
                "(max_epochs=-1, max_time alone, a loader without length, or manual optimization with max_steps). "
                f"Give `{name}` as an int, in steps."
            )
        return max(math.floor(value * planned + 0.5), 1 if value > 0 else 0)

    def count_step(self) -> None:
        """Count one step."""
        self.step += 1

    def due(self, step: int | None = None) -> bool:
        """Tell whether an event is due at ``step`` (now by default) and has not happened yet."""
        step = self.step if step is None else step
        if self.start_step is None or self.end_step is None or step <= self.last_event:
            return False
        if not self.start_step <= step <= self.end_step:
            return False
        return step == self.end_step or (step - self.start_step) % self._interval() == 0

    def _interval(self) -> int:
        if self.events is None or self.start_step is None or self.end_step is None:
            return self.every_n_steps
        return max(1, math.ceil((self.end_step - self.start_step) / self.events))

    def event_done(self) -> None:
        """Note that the event of this step has happened."""
        self.last_event = self.step

    def progress(self, step: int | None = None) -> float:
        """Return how far the window is at ``step`` (now by default), in [0, 1]; 1 from ``end`` on."""
        step = self.step if step is None else step
        if self.start_step is None or self.end_step is None or step < self.start_step:
            return 0.0
        if step >= self.end_step:
            return 1.0
        return (step - self.start_step) / (self.end_step - self.start_step)

    @property
    def within(self) -> bool:
        """Whether the step that was just counted lies in the window, its ends included."""
        return self.is_open(self.step)

    def is_open(self, step: int) -> bool:
        """Whether a step lies in the window, its ends included."""
        return self.start_step is not None and self.end_step is not None and self.start_step <= step <= self.end_step

    def nears(self, step: int) -> bool:
        """Whether the window is open at a step, or opens within the time between two events."""
        if self.start_step is None or self.end_step is None:
            return False
        return self.start_step - self._interval() <= step <= self.end_step

    @property
    def next_event(self) -> int | None:
        """Step of the first event after this step, None after the last."""
        return next((step for step in self.event_steps() if step > self.step), None) if self.resolved else None

    @property
    def closes_now(self) -> bool:
        """Whether this step is the last of the window."""
        return self.end_step is not None and self.step >= self.end_step

    @property
    def closed(self) -> bool:
        """Whether the event at ``end`` has happened."""
        return self.end_step is not None and self.last_event >= self.end_step

    def event_steps(self) -> list[int]:
        """Return the steps of all events of the resolved window."""
        if self.start_step is None or self.end_step is None:
            raise RuntimeError("the window is not resolved yet; call `resolve` first.")
        return sorted({*range(self.start_step, self.end_step + 1, self._interval()), self.end_step})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {
            "step": self.step,
            "last_event": self.last_event,
            "start_step": self.start_step,
            "end_step": self.end_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.step, self.last_event = state["step"], state["last_event"]
        self.start_step, self.end_step = state["start_step"], state["end_step"]


def _checked(name: str, value: int | float) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"`{name}` must be an int (a step) or a float in [0, 1] (a fraction of the run), got {value!r}."
        )
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` as a float is a fraction in [0, 1], got {value!r}. For a step pass an int.")
    if value < 0:
        raise ValueError(f"`{name}` must be a step >= 0, got {value!r}.")
    return value


def planned_steps(trainer: Any, *, automatic_optimization: bool = True) -> float:
    """Return how many steps the Trainer's whole run will take, ``math.inf`` when that cannot be known.

    Args:
        trainer: A Trainer whose data is attached (from ``on_fit_start`` on).
        automatic_optimization: The LightningModule's flag: under manual optimization ``max_steps`` counts optimizer
            steps, not batches, so it bounds nothing that is known.
    """
    if not automatic_optimization and trainer.max_steps != -1:
        return float(trainer.fast_dev_run) if trainer.fast_dev_run else math.inf
    try:
        planned = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulate_grad_batches changes with the epoch
        return math.inf
    if planned < 0 or math.isinf(planned):
        return math.inf
    return float(planned) * (1 - _virtual_epochs(trainer) / max(trainer.max_epochs or 1, 1))


def _virtual_epochs(trainer: Any) -> int:
    """StochasticWeightAveraging adds an epoch to ``max_epochs`` that only updates BatchNorm statistics."""
    averaging = [c for c in trainer.callbacks if hasattr(c, "swa_end") and hasattr(c, "_max_epochs")]
    return sum(trainer.max_epochs - c._max_epochs for c in averaging if c._max_epochs != -1)
