"""Importance of coupled channels, and which of them leave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.registry import Registry

__all__ = ["CHANNEL_CRITERIA", "ChannelCriterion", "Slices", "channels_to_remove", "group_scores", "rising_scores"]


_REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(0),
    "sum": lambda scores: scores.sum(0),
    "max": lambda scores: scores.amax(0),
}


@dataclass(frozen=True)
class Slices:
    """What one layer contributes to the importance of a group's channels.

    Attributes:
        weight: The layer's weights by channel of the group, ``[channels, entries]``.
        gradient: Root mean square of their gradients, of the same shape; None unless the criterion needs it.
        kind: ``"out"``, ``"in"`` or ``"norm"`` (scales of a norm layer, one entry a channel).
        generator: For the random criterion.
        input_magnitude: Mean absolute value of what the layer receives from each channel, ``[channels, entries]``; of
            layers that read the channels, None for others and unless the criterion needs it.
    """

    weight: Tensor
    kind: str
    gradient: Tensor | None = None
    generator: torch.Generator | None = None
    input_magnitude: Tensor | None = None


ChannelCriterion = Callable[[Slices], Tensor]
CHANNEL_CRITERIA: Registry[ChannelCriterion] = Registry("criterion")
"""``criterion(slices) -> [channels]``, higher is kept; a layer that has no say returns an empty tensor."""


@CHANNEL_CRITERIA.register("magnitude")
def magnitude(slices: Slices) -> Tensor:
    """L2 norm of each channel's weights in this layer; norm layers have no say.

    References:
        Li et al. 2017, "Pruning Filters for Efficient ConvNets"; Fang et al. 2023, "DepGraph".
    """
    if slices.kind == "norm":
        return slices.weight.new_empty(0)
    norms: Tensor = torch.linalg.vector_norm(slices.weight.float(), dim=1)
    return norms


@CHANNEL_CRITERIA.register("taylor", needs=("gradient",))
def taylor(slices: Slices) -> Tensor:
    """Sum over a channel's weights of |weight x root-mean-square gradient|.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning".
    """
    if slices.gradient is None:
        raise ValueError("the criterion taylor needs the gradient.")
    return (slices.weight.float() * slices.gradient.float()).abs().sum(1)


@CHANNEL_CRITERIA.register("activation", needs=("input_magnitude",))
def activation(slices: Slices) -> Tensor:
    """Mean absolute value of each channel where the next layers read it; layers that write it have no say.

    References:
        Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron).
    """
    if slices.kind != "in" or slices.input_magnitude is None:
        return slices.weight.new_empty(0)
    return slices.input_magnitude.float().mean(1)


@CHANNEL_CRITERIA.register("bn_scale")
def bn_scale(slices: Slices) -> Tensor:
    """Absolute scale of the norm layers; groups without one cannot be ranked by it.

    References:
        Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """
    return slices.weight.float().abs().sum(1) if slices.kind == "norm" else slices.weight.new_empty(0)


@CHANNEL_CRITERIA.register("random", needs=("generator",))
def random(slices: Slices) -> Tensor:
    """Uniform scores: the control."""
    if slices.generator is None:
        raise ValueError("the criterion random needs the generator.")
    return torch.rand(len(slices.weight), generator=slices.generator)


def group_scores(
    layers: Sequence[Slices], criterion: ChannelCriterion, reduction: Literal["mean", "sum", "max"] = "mean"
) -> Tensor:
    """Return the importance of each channel of a group.

    Args:
        layers: What each layer contributes.
        criterion: Scores the channels in one layer.
        reduction: How the layers' scores become one.

    Returns:
        ``[channels]``, divided by their mean so that groups of different layers can be ranked together.

    Raises:
        ValueError: If no layer has a say, or scores are not finite.
    """
    each = [score.cpu() for score in (criterion(slices) for slices in layers) if score.numel()]
    if not each:
        raise ValueError("no layer of the group can be scored by this criterion.")
    stacked = torch.stack(each)
    combined = _REDUCTIONS[reduction](stacked)
    if not bool(torch.isfinite(combined).all()):
        raise ValueError("its scores contain NaN or infinity.")
    return combined / combined.mean().clamp_min(1e-12)


def channels_to_remove(scores: Tensor, keep: int, blocks: int = 1) -> list[int]:
    """Return the lowest channels, the same relative ones from each block; equal scores leave in order.

    Args:
        scores: ``[channels]``.
        keep: How many stay; a multiple of ``blocks``.
        blocks: Equal blocks.
    """
    by_block = scores.view(blocks, -1)
    leaving = by_block.shape[1] - keep // blocks
    lowest = by_block.sum(0).sort(stable=True).indices[: max(leaving, 0)].tolist()
    return sorted(block * by_block.shape[1] + index for block in range(blocks) for index in lowest)


def rising_scores(scores: Tensor, blocks: int = 1) -> Tensor:
    """Return the scores in the order in which :func:`channels_to_remove` takes channels.

    Args:
        scores: ``[channels]``.
        blocks: Equal blocks that lose the same relative channels: each counts with the mean over the blocks.

    Returns:
        ``[channels]``, rising.
    """
    rising: Tensor = scores.view(blocks, -1).mean(0).sort().values.repeat_interleave(blocks)
    return rising
