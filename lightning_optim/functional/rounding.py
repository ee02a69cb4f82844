"""Roundings: how a trained weight becomes integers.

A rounding is a function ``rounding(weight, stats, bits, granularity) -> weight``. What it returns takes the place of
the weight, and the layer rounds that to the nearest as any other: a file needs no more than the weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_optim.functional.criteria import Statistics
from lightning_optim.functional.fake_quantize import fake_quantize_weight, weight_scale
from lightning_optim.functional.second_order import round_columns
from lightning_optim.registry import Registry

__all__ = ["ROUNDINGS", "Rounding", "gptq", "is_settled", "to_nearest"]

Rounding = Callable[..., Tensor]


def _try(rounding: Rounding) -> None:
    rounding(torch.ones(1, 1), Statistics(input_second_moment=torch.ones(1, 1)), 8, "per_channel")


ROUNDINGS: Registry[Rounding] = Registry("rounding", trial=_try)
"""Name -> rounding."""


@ROUNDINGS.register("round")
def to_nearest(weight: Tensor, stats: Statistics, bits: int, granularity: str) -> Tensor:
    """Each weight to the nearest integer: the weight as it is, since that is how layers round."""
    return weight


@ROUNDINGS.register("gptq", needs=("input_second_moment",))
def gptq(
    weight: Tensor,
    stats: Statistics,
    bits: int,
    granularity: str,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
) -> Tensor:
    """Weights one input after the other, where those that are not rounded yet make up for the error so far.

    Args:
        weight: ``[out, in, ...]``, any float dtype; not modified.
        stats: With ``input_second_moment``.
        bits: 2 to 8.
        granularity: What shares a scale.
        damping: Fraction of the mean diagonal that is added to the Hessian's diagonal, >= 0.
        activation_order: Round inputs in the order of their energy, largest first; helps where few inputs carry most.

    Returns:
        Integers times scales, in the shape and dtype of ``weight``; the largest of each scale's is the largest integer.

    Raises:
        TypeError: If ``damping`` is no number.
        ValueError: If ``damping`` is negative, or the inputs are not finite.

    References:
        Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
    """
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"`damping` must be a number >= 0, got {damping!r}.")
    if not 0.0 <= damping < float("inf"):
        raise ValueError(f"`damping` must be a number >= 0 (0.01 is usual), got {damping!r}.")
    if not isinstance(activation_order, bool):
        raise TypeError(f"`activation_order` must be True or False, got {activation_order!r}.")
    moment = stats.input_second_moment
    if moment is None:
        raise ValueError("gptq needs stats.input_second_moment, the sum of x xᵀ over the layer's inputs.")
    return round_columns(weight, moment, bits, granularity, damping=damping, activation_order=activation_order)


def is_settled(weight: Tensor, bits: int, granularity: str) -> bool:
    """Whether a weight is integers times the scales that are found in it, so that rounding it changes nothing.

    Args:
        weight: ``[out, in, ...]``.
        bits: 2 to 8.
        granularity: What shares a scale.
    """
    weight = weight.detach()
    step = float(weight_scale(weight, bits, granularity).amax())
    return torch.allclose(fake_quantize_weight(weight, bits, granularity), weight, rtol=0.01, atol=1e-3 * step)
