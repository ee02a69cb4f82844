"""A structural change reaches everything in a run that holds the model's parameters."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optim.callbacks.windowed import mro_names
from lightning_optim.change import Change, Changed, apply_change
from lightning_optim.modules import is_compiled
from lightning_optim.sharding import is_sharded
from lightning_optim.structured.optimizers import follow_change, is_flat
from lightning_optim.structured.removal import ChannelRemoval
from lightning_optim.target import averaged_copies

__all__ = ["commit", "without_ddp"]


def commit(
    trainer: pl.Trainer, pl_module: pl.LightningModule, change: Change, *, who: str, reset: bool = False
) -> Changed:
    """Apply a change to the model of a running fit, its averaged copies and its optimizers.

    Optimizer state that cannot follow is reset, which is logged; that of all parameters at once is a warning.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule.
        change: The change.
        who: Label of the technique.
        reset: Whether parameters that lost entries lose their optimizer state too.

    Raises:
        RuntimeError: If the model is sharded; nothing is changed then.
    """
    if is_sharded(pl_module):
        raise RuntimeError(f"{type(trainer.strategy).__name__} shards the parameters, so none can be replaced now.")
    follow = _projectors(pl_module, change)
    with without_ddp(trainer):
        changed = apply_change(pl_module, change)
        follow(trainer)
        rename: Any = getattr(type(pl_module), "follow_layers", None)
        if rename is not None:  # a distillation module names layers of its student
            rename(pl_module, changed)
        for optimizer in trainer.optimizers:
            for sentence in follow_change(optimizer, changed, reset=reset):
                (rank_zero_warn if is_flat(optimizer) else rank_zero_info)(f"{who}: {sentence}.")
        for copy in averaged_copies(trainer):
            apply_change(copy, change)
        if is_compiled(pl_module):
            torch.compiler.reset()  # graphs of earlier shapes count towards its limit, beyond which it runs eager
    return changed


def _projectors(pl_module: pl.LightningModule, change: Change) -> Callable[[pl.Trainer], None]:
    """Ask a distillation module, before channels leave, how its projectors will follow."""
    ask: Any = getattr(pl_module, "follow_removal", None)
    if ask is None or not isinstance(change, ChannelRemoval):
        return lambda trainer: None
    target: nn.Module = pl_module.get_submodule(change.prefix.rstrip("."))
    answer: Callable[[pl.Trainer], None] = ask(target, change.removal)
    return answer


@contextmanager
def without_ddp(trainer: pl.Trainer) -> Iterator[None]:
    """Take DDP's wrapper off and wrap the model anew.

    DDP keeps buckets of the parameters it was built with, and hooks on them. The old wrapper is collected first: while
    it lives, its reducer's hooks stay on parameters that are not replaced, and each gradient is reduced twice.
    """
    wrapped = "DDPStrategy" in mro_names(trainer.strategy)
    if wrapped:
        trainer.strategy.model = trainer.strategy.lightning_module
        gc.collect()
    yield
    if wrapped:
        trainer.strategy.configure_ddp()  # type: ignore[attr-defined]
