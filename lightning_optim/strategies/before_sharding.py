"""What happens before a module is sharded: checks, and the last access of callbacks to the whole module."""

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn

from lightning_optim.strategies.common import check_batchnorm_sync
from lightning_optim.strategies.cost import SHARDED_PRECISIONS
from lightning_optim.target import averaged_copies

__all__ = ["BeforeSharding", "announce_sharding", "check_shardable"]


@runtime_checkable
class BeforeSharding(Protocol):
    """A callback that acts right before the module is sharded, after its plan was restored."""

    def before_sharding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change or copy the module while it is whole."""


def announce_sharding(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Call ``before_sharding`` of the module and of the callbacks that have it."""
    announced = getattr(module, "before_sharding", None)  # a DistillationModule's
    if announced is not None:
        announced(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BeforeSharding):
            callback.before_sharding(trainer, module)


def check_shardable(strategy: Any, trainer: pl.Trainer) -> None:
    """Refuse a precision, a norm or a callback that sharding does not support.

    Raises:
        MisconfigurationException: With what to use instead.
    """
    name, precision = type(strategy).__name__, strategy.precision_plugin.precision
    if precision not in SHARDED_PRECISIONS:
        raise MisconfigurationException(
            f"{name} trains in {', '.join(SHARDED_PRECISIONS)}, got precision={precision!r}."
        )
    if trainer.state.fn == TrainerFn.FITTING:
        check_batchnorm_sync(strategy)
    if averaged_copies(trainer):
        raise MisconfigurationException(
            "weight averaging callbacks keep a whole copy of the model, which cannot follow a sharded one. "
            f"Remove them under {name}, or use 'optim_ddp'."
        )
