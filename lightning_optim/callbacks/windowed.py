"""When a callback acts: the life cycle of a fit, the steps that count, and the events that are due."""

import time
import weakref
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_optim.optimizers import StepWatch, check_current, held_ids, replaced_parameters, unwrapped
from lightning_optim.techniques import TECHNIQUES
from lightning_optim.window import Window, planned_steps

__all__ = ["WindowedCallback", "callbacks_of", "mro_names"]


def mro_names(instance: object) -> set[str]:
    """Return the names of an object's classes: they are the same in ``lightning`` and ``pytorch_lightning``."""
    return {cls.__name__ for cls in type(instance).__mro__}


def callbacks_of(trainer: pl.Trainer) -> list[Any]:
    """Return the Trainer's callbacks (an attribute that Lightning does not declare)."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


class WindowedCallback(pl.Callback):
    """Base of callbacks that act on a model at events of a window while it trains.

    It counts the steps of the optimizers that hold a target parameter, runs the events that are due, and removes its
    hooks in ``teardown`` and ``on_exception``.

    A fit is *fresh* unless it goes on: from state that was restored, or because the same Trainer fits the same module
    again. A fresh fit opens the window anew; one that goes on keeps it, also when ``max_epochs`` was raised.

    Args:
        window: When it acts.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.event_seconds = 0.0
        """Wall time of the events so far, which PerformanceScore subtracts from the training time."""
        self._restored = False
        self._fitted: tuple[Any, Any] | None = None
        self._handles: list[Any] = []
        self._holders: list[Optimizer] = []
        self._stepped = False
        self._advance = _Advance()

    @property
    def order(self) -> float:
        """Where several techniques act in one step, the lower acts first, whatever the order of the Trainer's list."""
        return TECHNIQUES.order_of(self)

    @property
    def reached_end(self) -> bool:
        """Whether the model is as compressed as requested."""
        return self.window.closed

    # What a subclass provides.

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters whose optimizer steps are counted, by name."""
        raise NotImplementedError

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Prepare a fit; ``fresh`` unless it goes on from state."""
        raise NotImplementedError

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the model as the window requires now."""
        raise NotImplementedError

    def after_step(self, optimizer: Optimizer) -> None:
        """Run right after an optimizer that holds a target parameter stepped."""

    def resolve_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule, passed: int = 0) -> None:
        """Turn the window into steps, ``passed`` of which the run has taken already."""
        planned = planned_steps(trainer, automatic_optimization=pl_module.automatic_optimization)
        self.window.resolve(planned - passed, clamp=bool(getattr(trainer, "fast_dev_run", False)))

    # Trainer events.

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the window and prepare the fit.

        Lightning restores callback state before this hook, also for a new ``fit`` without a checkpoint path: only
        ``_restored`` and the pair of Trainer and module tell whether this fit goes on.
        """
        goes_on = self._fitted is not None and (self._fitted[0]() is trainer and self._fitted[1]() is pl_module)
        fresh = not self._restored and not goes_on
        self._fitted = None  # until this fit has really started
        if fresh:
            self.window.restart()
        if not self.window.resolved:
            self.resolve_window(trainer, pl_module)
        self.start(trainer, pl_module, fresh=fresh)
        self._fitted = (weakref.ref(trainer), weakref.ref(pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register the step hooks; an event that is due before the first step happens here."""
        self.register_hooks(trainer)
        if self.window.step == 0 and trainer.global_step > 0:  # joined a run that had begun without it
            self.resolve_window(trainer, pl_module, passed=trainer.global_step)
        self._advance = _Advance(self.window.step)
        if _windowed(trainer)[-1] is self:  # all are ready
            _finish_all(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A new batch: its first optimizer step will count."""
        self._stepped = False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Count a step that a loss scaler may go on to skip: Lightning's ``global_step`` counts it too."""
        self.count_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the batch for all techniques in their order; those that did it already have nothing left to do."""
        self._advance.batches += 1
        _finish_all(trainer, pl_module)

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the event that is due; calling it twice in a batch is harmless."""
        if not self.window.due():
            return
        started = time.perf_counter()
        self.apply_event(trainer, pl_module)
        self.window.event_done()
        self.event_seconds += time.perf_counter() - started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise where the first epoch brought no step of an optimizer that holds a target parameter.

        Raises:
            MisconfigurationException: If there was none. Where the Trainer has optimizers for other parameters too,
                theirs may begin later: that is a warning.
        """
        self._advance.check(type(self).__name__, self.window.step, self._holders, trainer.optimizers)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove what the fit installed."""
        self.release(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove what the fit installed: Lightning calls no ``teardown`` after an exception."""
        self.release(pl_module)

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove hooks from optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._holders = [], []
        self._restored = False

    # Steps.

    def register_hooks(self, trainer: pl.Trainer) -> None:
        """Watch the optimizers that hold a target parameter.

        Raises:
            MisconfigurationException: If there is none and events are to come.
        """
        if any(replaced_parameters(optimizer) for optimizer in trainer.optimizers):
            check_current("Restoring the checkpoint's structure", trainer.lightning_module, trainer.optimizers)
        targets = {id(parameter) for parameter in self.target_parameters().values()}
        self._holders = [optimizer for optimizer in trainer.optimizers if targets & held_ids(optimizer)]
        if not self._holders and not self.reached_end:
            raise MisconfigurationException(
                f"no optimizer of the Trainer holds a parameter that {type(self).__name__} selected, so its window "
                "would never advance. Give the parameters to an optimizer, or select others. An optimizer that was "
                "built before the module's parameters were replaced (in `__init__`) holds the old ones: build it in "
                "`configure_optimizers`."
            )
        self._handles = [StepWatch(optimizer, self._after_step) for optimizer in self._holders]

    def _after_step(self, optimizer: Optimizer) -> None:
        self.count_step(optimizer)
        self.after_step(optimizer)

    def count_step(self, optimizer: Optimizer) -> None:
        """Count the first step of a batch in which an optimizer that holds a target parameter steps."""
        optimizer = unwrapped(optimizer)
        if not self._stepped and any(optimizer is holder for holder in self._holders):
            self._stepped = True
            self.window.count_step()

    # State.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window; a subclass restores the rest."""
        self.window.load_state_dict(state_dict["window"])
        self.event_seconds = state_dict["event_seconds"]
        self._restored = self.window.resolved

    def state_dict(self) -> dict[str, Any]:
        """Return the window as plain types; a subclass adds the rest."""
        return {"window": self.window.state_dict(), "event_seconds": self.event_seconds}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_holders": [], "_fitted": None}


def _windowed(trainer: pl.Trainer) -> list[WindowedCallback]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, WindowedCallback)]


def _finish_all(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    for callback in sorted(_windowed(trainer), key=lambda callback: callback.order):
        callback.finish_batch(trainer, pl_module)


class _Advance:
    """Whether the window advanced in the first epoch that trained a batch."""

    def __init__(self, first_step: int = 0) -> None:
        self.first_step = first_step
        self.batches = 0

    def check(self, who: str, step: int, holders: Sequence[Optimizer], optimizers: Sequence[Optimizer]) -> None:
        if not self.batches or not holders or step > self.first_step:
            return
        names = ", ".join(sorted({type(optimizer).__name__ for optimizer in holders}))
        said = (
            f"{who}: {self.batches} batches were trained, and no step of the optimizer that holds the selected "
            f"parameters ({names}) was seen, so its window does not advance."
        )
        if len(holders) < len(optimizers):
            rank_zero_warn(f"{said} It begins with the first such step.")
            self.first_step = -1  # once
            return
        raise MisconfigurationException(
            f"{said} Step the optimizer that `configure_optimizers` returned: under manual optimization "
            "`self.optimizers().step()`."
        )
