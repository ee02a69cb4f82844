"""What every compression callback shares: selection, window, plan, optimizer hooks, and their removal."""

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import checkpoint
from lightning_optim.callbacks.monitors import check_score_is_logged
from lightning_optim.checks import check_name
from lightning_optim.optimizers import StepWatch, check_current, held_ids, replaced_parameters, unwrapped
from lightning_optim.strategies.common import INSTEAD, check_supported
from lightning_optim.target import Pattern, find_target
from lightning_optim.window import Window, planned_steps

__all__ = ["CompressionCallback", "callbacks_of", "compressions", "mro_names", "ranks_per_batch"]


def mro_names(instance: object) -> set[str]:
    """Return the names of an object's classes: they are the same in ``lightning`` and ``pytorch_lightning``."""
    return {cls.__name__ for cls in type(instance).__mro__}


def callbacks_of(trainer: pl.Trainer) -> list[Any]:
    """Return the Trainer's callbacks (an attribute that Lightning does not declare)."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def compressions(trainer: pl.Trainer) -> "list[CompressionCallback]":
    """Return the Trainer's compression callbacks."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, CompressionCallback)]


def ranks_per_batch(trainer: pl.Trainer) -> int:
    """Return how many ranks get the same batch: those that share layers by tensor parallelism."""
    words = trainer.distributed_sampler_kwargs
    return 1 if words is None else trainer.world_size // int(words["num_replicas"])


class CompressionCallback(pl.Callback):
    """Base of the callbacks that compress the model of a running ``fit``.

    It counts steps, attaches the plan to the module, registers step hooks on the optimizers that hold a target
    parameter, and takes everything back in ``teardown`` and ``on_exception``. A subclass gives
    :meth:`target_parameters`, :meth:`apply_event` and what it keeps in the state.

    Args:
        window: When the technique acts.
        module: Dotted name of the module it acts on; default the whole model.
        include: What is selected, instead of the default.
        exclude: What is left out.
    """

    contributes_to_plan = True
    order = 2
    """Where several techniques act on one target, the lower goes first, whatever the order of the Trainer's list."""
    recipe: Mapping[str, Any] | None = None
    """The words of the recipe it was made from, for the checkpoint."""
    instead = INSTEAD
    """What to do under a strategy that the technique does not support."""

    def __init__(
        self,
        window: Window,
        *,
        module: str | None = None,
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] | None = None,
    ) -> None:
        self.window = window
        check_name("module", module, "encoder")
        self.module = module
        self.include = _as_list("include", include)
        self.exclude = _as_list("exclude", exclude)
        self._event_seconds = 0.0
        self._restored = False
        self._handles: list[Any] = []
        self._stepped = False
        self._advance = _Advance()
        self._holders: list[Optimizer] = []
        self._fitted: tuple[Any, Any] | None = None

    @property
    def state_key(self) -> str:
        """Class name with module, include and exclude: several instances can run together."""
        return self._generate_state_key(module=self.module, include=_words(self.include), exclude=_words(self.exclude))

    @property
    def event_seconds(self) -> float:
        """Wall time of the events so far, which PerformanceScore takes off the training time."""
        return self._event_seconds

    @property
    def reached_end(self) -> bool:
        """Whether the model is as compressed as was asked."""
        return self.window.closed

    # What a subclass gives.

    def target_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters whose optimizer steps are counted, by name."""
        raise NotImplementedError

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        """Prepare a fit; ``fresh`` unless the run goes on from state."""
        raise NotImplementedError

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the model as the window asks now."""
        raise NotImplementedError

    def after_step(self, optimizer: Optimizer) -> None:
        """Run right after an optimizer that holds a target parameter stepped."""

    def parameters_replaced(
        self, pl_module: pl.LightningModule, kept: Mapping[str, tuple[Tensor, tuple[int, ...]]]
    ) -> None:
        """Another technique made parameters smaller: flat surviving indices and new shape by full name."""

    # Trainer events.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the strategy and attach the plan before anything is loaded."""
        checkpoint.attach(pl_module)
        if stage == "fit":
            check_supported(type(self).__name__, trainer.strategy, self.instead)
            check_score_is_logged(callbacks_of(trainer))
            self._warn_of_plain_monitors(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the layers and resolve the window; a run that goes on keeps what it had."""
        goes_on = self._fitted is not None and (self._fitted[0]() is trainer and self._fitted[1]() is pl_module)
        fresh = not self._restored and not goes_on
        self._fitted = None  # until this fit has really started
        if fresh:
            self.window.restart()
        if not self.window.resolved:
            self._resolve_window(trainer, pl_module)
        self.start(trainer, pl_module, fresh=fresh)
        self._fitted = (weakref.ref(trainer), weakref.ref(pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register the step hooks; an event that is due before the first step happens here."""
        self._register_hooks(trainer)
        if self.window.step == 0 and trainer.global_step > 0:  # joined a run that had begun without it
            self._resolve_window(trainer, pl_module, passed=trainer.global_step)
        self._advance = _Advance(self.window.step)
        if compressions(trainer)[-1] is self:  # all are ready
            self._finish_all(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A new batch: its first optimizer step will count."""
        self._stepped = False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Count a step that a loss scaler may go on to skip: Lightning's ``global_step`` counts it too."""
        self._count(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the batch for all techniques in their order; those that did it already have nothing left to do."""
        self._advance.batches += 1
        self._finish_all(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise where the first epoch brought no step of an optimizer that holds a target parameter.

        Raises:
            MisconfigurationException: If there was none. Where the Trainer has optimizers for other parameters too,
                theirs may begin later: that is a warning.
        """
        self._advance.check(type(self).__name__, self.window.step, self._holders, trainer.optimizers)

    def _finish_all(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in sorted(compressions(trainer), key=lambda callback: callback.order):
            callback.finish_batch(trainer, pl_module)

    def finish_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the event that is due; calling it twice in a batch is harmless."""
        self._run_event_if_due(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the plan; the module's own hook does the same where callbacks are not asked."""
        self._write_plan(pl_module, checkpoint)

    def _write_plan(self, pl_module: pl.LightningModule, file: dict[str, Any]) -> None:
        if checkpoint.KEY not in file:  # one callback writes it for all
            checkpoint.write_plan(checkpoint.plan_of(pl_module), file)
        if not self._attached(pl_module):
            checkpoint.detach(pl_module)

    def _attached(self, pl_module: pl.LightningModule) -> bool:
        return "on_load_checkpoint" in pl_module.__dict__

    def plan_entry(self) -> dict[str, Any]:
        """Return what the technique adds to the plan, as plain types."""
        return {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was reached."""
        rank_zero_info(self.last_line(pl_module))

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was asked and what was reached."""
        raise NotImplementedError

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take everything back."""
        self._release(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take everything back: Lightning calls no ``teardown`` after an exception."""
        self._release(pl_module)

    def _release(self, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._holders = [], []
        self._restored = False
        checkpoint.detach(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window; a subclass restores the rest."""
        self.window.load_state_dict(state_dict["window"])
        self._event_seconds = state_dict["event_seconds"]
        self._restored = self.window.resolved

    def state_dict(self) -> dict[str, Any]:
        """Return the window as plain types; a subclass adds the rest."""
        return {"window": self.window.state_dict(), "event_seconds": self._event_seconds}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_holders": [], "_fitted": None}

    # How it is done.

    def _warn_of_plain_monitors(self, trainer: pl.Trainer) -> None:
        plain = [c for c in callbacks_of(trainer) if _prefers_the_dense_model(c)]
        if compressions(trainer)[0] is self and plain and not self.reached_end:
            named = " and ".join(f"{type(c).__name__}(monitor={c.monitor!r})" for c in plain)
            rank_zero_warn(
                f"{named} watches a metric while {type(self).__name__} compresses, so it prefers the epochs before. "
                "Use lightning_optim.CompressedCheckpoint, or monitor PerformanceScore's 'P', whose infeasible "
                "values are never the best."
            )

    def _resolve_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule, passed: int = 0) -> None:
        planned = planned_steps(trainer, automatic_optimization=pl_module.automatic_optimization)
        self.window.resolve(planned - passed, clamp=bool(getattr(trainer, "fast_dev_run", False)))

    def _register_hooks(self, trainer: pl.Trainer) -> None:
        if any(replaced_parameters(optimizer) for optimizer in trainer.optimizers):
            check_current("Restoring the checkpoint's structure", trainer.lightning_module, trainer.optimizers)
        targets = {id(parameter) for parameter in self.target_parameters().values()}
        holders = [optimizer for optimizer in trainer.optimizers if targets & held_ids(optimizer)]
        if not holders and not self.reached_end:
            raise MisconfigurationException(
                f"no optimizer of the Trainer holds a parameter that {type(self).__name__} selected, so its window "
                "would never advance. Give the parameters to an optimizer, or select others. An optimizer that was "
                "built before the module's parameters were replaced (in `__init__`) holds the old ones: build it in "
                "`configure_optimizers`."
            )
        self._holders = holders
        self._handles = [StepWatch(optimizer, self._after_step) for optimizer in holders]

    def _after_step(self, optimizer: Optimizer) -> None:
        self._count(optimizer)
        self.after_step(optimizer)

    def _count(self, optimizer: Optimizer) -> None:
        optimizer = unwrapped(optimizer)
        if not self._stepped and any(optimizer is holder for holder in self._holders):
            self._stepped = True
            self.window.count_step()

    def _run_event_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.window.due():
            return
        started = time.perf_counter()
        self.apply_event(trainer, pl_module)
        self.window.event_done()
        self._event_seconds += time.perf_counter() - started

    def find_target(self, pl_module: pl.LightningModule) -> tuple[str, nn.Module]:
        """Return the prefix and the module the technique acts on."""
        return find_target(pl_module, self.module)


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


def _prefers_the_dense_model(callback: Any) -> bool:
    names = mro_names(callback)
    watches = "EarlyStopping" in names or ("ModelCheckpoint" in names and "CompressedCheckpoint" not in names)
    monitor = getattr(callback, "monitor", None)
    if monitor is None or monitor in ("step", "epoch", "P"):
        return False
    return watches and not monitor.startswith("P/")


def _as_list(name: str, patterns: Sequence[Pattern] | None) -> list[Pattern] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, Sequence) or isinstance(patterns, str):
        raise TypeError(
            f"`{name}` must be a list of names, patterns or layer classes, got {patterns!r}. Put it in a list."
        )
    for pattern in patterns:
        is_class = isinstance(pattern, type) and issubclass(pattern, nn.Module)
        if not is_class and (not isinstance(pattern, str) or not pattern):
            raise TypeError(f"`{name}` holds names, glob patterns or layer classes, got {pattern!r}.")
    return list(patterns)


def _words(patterns: list[Pattern] | None) -> list[str] | None:
    return None if patterns is None else [p if isinstance(p, str) else p.__qualname__ for p in patterns]
