"""A copy of a training module whose steps can be run for their loss alone."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_optim.depth.judge import Run
from lightning_optim.errors import FAILURES, first_line
from lightning_optim.modules import copy_module
from lightning_optim.target import lightning_class

__all__ = ["judging_copy", "run_of_step", "takes_index"]


def judging_copy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """Return a copy of a module in eval mode that shares its weights, knows the Trainer, and logs nothing.

    Metrics, counters and buffers are its own, so that what its steps note leaves no trace.
    """
    duplicate: Any = copy_module(pl_module, share_weights=True)
    for layer in duplicate.modules():
        if lightning_class(layer) is not None:
            vars(layer).update(_trainer=trainer, log=_ignored, log_dict=_ignored)
    kept: pl.LightningModule = duplicate
    return kept


def _ignored(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``self.log``."""


def run_of_step(trainer: pl.Trainer, batch: Any, batch_idx: int) -> Run:
    """Return what runs the training step of a copy with a batch, and returns its loss.

    Args:
        trainer: The running Trainer, whose precision counts.
        batch: The batch; each run gets a copy.
        batch_idx: Its index.
    """

    def run(root: nn.Module) -> float:
        device = trainer.strategy.root_device
        own = apply_to_collection(copy.deepcopy(batch), Tensor, lambda tensor: tensor.to(device))
        step: Any = root.training_step
        arguments = (own, batch_idx) if takes_index(step) else (own,)
        try:
            with trainer.precision_plugin.train_step_context():
                output = step(*arguments)
        except FAILURES as error:
            raise RuntimeError(
                f"the training step of {type(root).__name__} fails in eval mode and without gradients, with rows of a "
                f"training batch ({first_line(error).rstrip('.')}). DepthPruning judges blocks by its loss: take "
                "criterion='influence', which only calls the model, or 'last'."
            ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise RuntimeError(
                f"the training step of {type(root).__name__} returned {type(output).__name__} and no loss for a batch "
                "on which DepthPruning judges blocks. Take criterion='influence' or 'last'."
            )
        return float(loss.detach().float().mean())

    return run


def takes_index(step: Any) -> bool:
    """Whether Lightning would pass the batch's index: any second argument is taken for it."""
    named = inspect.signature(step).parameters.values()
    positional = [p for p in named if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in named)
