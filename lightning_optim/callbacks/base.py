"""What every compression callback shares: selection, peers, plan, logging, and structural changes of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lightning_optim import checkpoint
from lightning_optim.callbacks.commit import commit
from lightning_optim.callbacks.monitors import check_score_is_logged, warn_of_plain_monitors
from lightning_optim.callbacks.windowed import WindowedCallback, callbacks_of, mro_names
from lightning_optim.change import Change, Changed
from lightning_optim.checks import check_name
from lightning_optim.patterns import Pattern, check_patterns, pattern_name
from lightning_optim.strategies.common import INSTEAD, check_supported
from lightning_optim.structured.optimizers import check_optimizer
from lightning_optim.window import Window

__all__ = ["CompressionCallback", "builds_later", "callbacks_of", "compressions", "mro_names", "ranks_per_batch"]


def compressions(trainer: pl.Trainer) -> "list[CompressionCallback]":
    """Return the Trainer's compression callbacks."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, CompressionCallback)]


def ranks_per_batch(trainer: pl.Trainer) -> int:
    """Return how many ranks get the same batch: those that share layers by tensor parallelism."""
    arguments = trainer.distributed_sampler_kwargs
    return 1 if arguments is None else trainer.world_size // int(arguments["num_replicas"])


def builds_later(pl_module: pl.LightningModule) -> bool:
    """Whether layers may be built after ``Callback.setup``."""
    base = next(cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule")
    return any(getattr(type(pl_module), hook) is not getattr(base, hook) for hook in ("setup", "configure_model"))


class CompressionCallback(WindowedCallback):
    """Base of the callbacks that compress the model of a running ``fit``.

    :class:`WindowedCallback` says when it acts. This class attaches the plan to the module, refuses a second callback
    of the same technique on the same layers, logs, and carries a change of the model's structure to everything that
    holds its parameters (:meth:`commit`). A subclass provides :meth:`target_parameters`, :meth:`start`,
    :meth:`apply_event`, :meth:`last_line`, and what it keeps in the state.

    Args:
        window: When the technique acts.
        module: Dotted name of the module it acts on; default the whole model.
        include: What is selected, instead of the default.
        exclude: What is left out.
    """

    recipe: Mapping[str, Any] | None = None
    """The recipe's arguments that it was made from, for the checkpoint."""
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
        super().__init__(window)
        check_name("module", module, "encoder")
        self.module = module
        self.include = check_patterns("include", include)
        self.exclude = check_patterns("exclude", exclude)

    @property
    def state_key(self) -> str:
        """Class name with module, include and exclude: several instances can run together."""
        patterns = {"include": self.include, "exclude": self.exclude}
        named = {argument: given and list(map(pattern_name, given)) for argument, given in patterns.items()}
        return self._generate_state_key(module=self.module, **named)

    @property
    def label(self) -> str:
        """Class name, with the module where one was given: how its messages begin."""
        name = type(self).__name__
        return name if self.module is None else f"{name}({self.module})"

    # What a subclass provides.

    def selected(self) -> Mapping[str, Any]:
        """Return by name what only one callback of this technique may act on."""
        return self.target_parameters()

    def model_changed(self, pl_module: pl.LightningModule, changed: Changed) -> None:
        """Follow a change of the model's structure, by this technique or another."""

    def plan_entry(self) -> dict[str, Any]:
        """Return what the technique adds to the plan, as plain types."""
        return {}

    def last_line(self, pl_module: pl.LightningModule) -> str:
        """Return the sentence that says what was requested and what was reached."""
        raise NotImplementedError

    # Trainer events.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the strategy and attach the plan before anything is loaded."""
        checkpoint.attach(pl_module, compressions)
        if stage == "fit":
            check_supported(type(self).__name__, trainer.strategy, self.instead)
            check_score_is_logged(callbacks_of(trainer))
            if compressions(trainer)[0] is self and not self.reached_end:
                warn_of_plain_monitors(type(self).__name__, callbacks_of(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the plan; the module's own hook does the same where callbacks are not asked."""
        _write_plan(pl_module, checkpoint)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was reached."""
        rank_zero_info(self.last_line(pl_module))

    def release(self, pl_module: pl.LightningModule) -> None:
        """Remove hooks from optimizers and from the module."""
        super().release(pl_module)
        checkpoint.detach(pl_module)

    # What a subclass calls.

    def check_holders(self, cannot: str) -> None:
        """Refuse optimizers whose state cannot follow a change of the parameters that they hold.

        Args:
            cannot: What cannot be done then: ``"remove channels"``.

        Raises:
            MisconfigurationException: If there is one, while events are to come.
        """
        for optimizer in [] if self.window.closed else self._holders:
            try:
                check_optimizer(optimizer)
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__} cannot {cannot}: {error}") from error

    def check_peers(self, trainer: pl.Trainer) -> None:
        """Refuse another callback of the same technique that selects the same.

        Raises:
            MisconfigurationException: With a name that both select.
        """
        ours = {id(value): name for name, value in self.selected().items()}
        for peer in compressions(trainer):
            if peer is self or _technique(peer) is not _technique(self):
                continue
            both = [ours[id(value)] for value in peer.selected().values() if id(value) in ours]
            if both:
                raise MisconfigurationException(
                    f"{both[0]} is selected by two {_technique(self).__name__} callbacks: {self.state_key} and "
                    f"{peer.state_key}. Select different layers with `module`, `include` or `exclude`."
                )

    def log_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: Mapping[str, float]) -> None:
        """Give metrics to the loggers at this step, and to other callbacks and the progress bar.

        ``log_dict`` alone would reach loggers only at every ``log_every_n_steps``-th step, or at the epoch's end.
        """
        if trainer.barebones:
            return
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)
        pl_module.log_dict(dict(metrics), logger=False)

    def commit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, change: Change, *, reset: bool = False
    ) -> Changed:
        """Change the model's structure while it trains, and let everything follow that holds its parameters.

        These are the optimizers, averaged copies, DDP, compiled graphs, a distillation module's projectors, and the
        Trainer's compression callbacks, by :meth:`model_changed`.

        Args:
            trainer: The running Trainer.
            pl_module: The LightningModule.
            change: ``change(root)``, see :data:`lightning_optim.change.Change`; called again for each averaged copy.
            reset: Whether parameters that lost entries lose their optimizer state too.

        Returns:
            What became of the model's parameters and layers.
        """
        changed = commit(trainer, pl_module, change, who=self.label, reset=reset)
        for callback in compressions(trainer):
            callback.model_changed(pl_module, changed)
        return changed


def _technique(callback: CompressionCallback) -> type:
    """Return the class that makes a callback's technique: the one right below CompressionCallback."""
    return next(cls for cls in type(callback).__mro__ if CompressionCallback in cls.__bases__)


def _write_plan(pl_module: pl.LightningModule, file: dict[str, Any]) -> None:
    if checkpoint.KEY not in file:  # one callback writes it for all
        plan = checkpoint.plan_of(pl_module)  # a new one where `teardown` dropped an empty one
        plan.contributors = compressions
        checkpoint.write_plan(plan, file)
    if "on_load_checkpoint" not in vars(pl_module):  # after the fit: nothing stays attached
        checkpoint.detach(pl_module)
