"""Methods of pruning in one call that change the weights that stay, too.

A method is a function ``method(weight, stats, sparsity, granularity) -> weight`` of a weight ``[out, in, ...]``.
Criteria (:mod:`~lightning_optim.functional.criteria`) only say what leaves.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_optim.functional.criteria import Statistics
from lightning_optim.functional.granularity import Granularity, parse_granularity
from lightning_optim.functional.second_order import prune_columns
from lightning_optim.registry import Registry

__all__ = ["SPARSIFIERS", "Sparsifier", "sparsegpt"]

Sparsifier = Callable[..., Tensor]


def _try(method: Sparsifier) -> None:
    method(torch.ones(1, 2), Statistics(input_second_moment=torch.eye(2)), 0.5, parse_granularity("weight"))


SPARSIFIERS: Registry[Sparsifier] = Registry("pruning method", trial=_try)
"""Name -> method."""


@SPARSIFIERS.register("sparsegpt", needs=("input_second_moment",))
def sparsegpt(
    weight: Tensor, stats: Statistics, sparsity: float, granularity: Granularity, *, damping: float = 0.01
) -> Tensor:
    """Remove the weights whose removal costs least, and let the others make up for them.

    Args:
        weight: ``[out, in, ...]``, any float dtype; not modified.
        stats: With ``input_second_moment``.
        sparsity: Fraction of zeros, in [0, 1).
        granularity: ``"weight"``, ``"n:m"`` or ``"n:m@unfold"``, parsed.
        damping: Fraction of the mean diagonal that is added to the Hessian's diagonal, >= 0.

    Returns:
        A tensor of the shape and dtype of ``weight``; what is zero in ``weight`` stays zero.

    Raises:
        TypeError: If ``damping`` is no number.
        ValueError: If ``damping`` is negative, the granularity is another one, or the inputs are not finite.

    References:
        Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
    """
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"`damping` must be a number >= 0, got {damping!r}.")
    if not 0.0 <= damping < float("inf"):
        raise ValueError(f"`damping` must be a number >= 0 (0.01 is usual), got {damping!r}.")
    moment = stats.input_second_moment
    if moment is None:
        raise ValueError("sparsegpt needs stats.input_second_moment, the sum of x xᵀ over the layer's inputs.")
    form = re.fullmatch(r"weight|(\d+):(\d+)(@unfold)?", str(granularity))
    if form is None:
        raise ValueError(
            f"sparsegpt removes single weights ('weight') or n of each m ('2:4'), got granularity "
            f"{str(granularity)!r}. Pass one of these, or a criterion such as method='wanda'."
        )
    keep = None if form.group(1) is None else (int(form.group(1)), int(form.group(2)))
    rows = weight.detach().reshape(len(weight), -1)
    if keep is None or form.group(3) or weight.ndim == 2:
        return prune_columns(rows, moment, sparsity, keep=keep, damping=damping).view_as(weight)
    # The m inputs of a group are input channels at one place of the kernel: side by side they are its columns.
    order = torch.arange(rows.shape[1], device=rows.device).view(weight.shape[1:]).movedim(0, -1).flatten()
    pruned = prune_columns(rows[:, order], moment[order][:, order], sparsity, keep=keep, damping=damping)
    return pruned[:, order.argsort()].view_as(weight)
