"""The ratio of channels that reaches a goal of a running fit: rank 0 finds it, all use it."""

from collections.abc import Callable, Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_optim import checkpoint
from lightning_optim.modules import copy_module
from lightning_optim.structured.goal import Goal, smallest_ratio
from lightning_optim.structured.live import LiveChannels

__all__ = ["dense_copy", "ratio_for"]


def dense_copy(whole: nn.Module, prefix: str) -> nn.Module:
    """Return a copy of a part with the structure of the user's class: what a latency is compared with.

    Args:
        whole: The LightningModule.
        prefix: What the names of the part begin with.
    """
    duplicate = copy_module(whole, rounded=False)
    checkpoint.conform(duplicate, checkpoint.EMPTY)
    return duplicate.get_submodule(prefix.rstrip("."))


def ratio_for(
    trainer: pl.Trainer,
    live: LiveChannels,
    goal: Goal,
    due: float,
    statistics: Mapping[str, Mapping[str, Tensor]],
    *,
    dense: Callable[[], nn.Module],
    last: bool,
    strict: bool,
    who: str,
) -> tuple[float, float]:
    """Return the smallest ratio that leaves at most a fraction of the goal's figure, and the fraction it leaves.

    Args:
        trainer: The running Trainer.
        live: The groups.
        goal: The figure.
        due: What may be left of it now.
        statistics: What the criterion needs.
        dense: Makes the dense model, which a latency is compared with.
        last: Whether no event follows.
        strict: Raise where the last event cannot reach the goal; else warn.
        who: Label of the technique.

    Raises:
        RuntimeError: If it cannot be reached at the last event.
    """

    def fraction_at(ratio: float) -> float:
        event = live.plan(ratio, statistics, last=last)
        return live.fraction_after(event, goal, dense)

    found: tuple[float, float] = (0.0, 0.0)
    if trainer.is_global_zero:
        found = smallest_ratio(fraction_at, due)
    ratio, reached = trainer.strategy.broadcast(found, src=0) if trainer.world_size > 1 else found
    if last and reached > due:
        smallest, left = ", ".join(live.report.groups), ", ".join(live.report.left_out) or "none"
        sentence = (
            f"{who}: asked {goal.figure} at {due:.2%} of the dense model's, reached {reached:.2%}. What "
            f"stops it: {smallest} are at their smallest; left alone are {left}."
        )
        if strict:
            raise RuntimeError(sentence + " Ask for more, take more layers in, or pass strict=False.")
        rank_zero_warn(sentence)
    return ratio, reached
