"""From a requested ratio to the number of channels that each group keeps."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.functional.allocation import Width, asked_channels, even_widths, global_widths, missed
from lightning_optim.functional.channels import CHANNEL_CRITERIA, ChannelCriterion, rising_scores
from lightning_optim.functional.statistics import needs_of
from lightning_optim.structured.groups import ChannelGroup

__all__ = ["Allocation", "Pool", "Shortfall", "kept_channels", "one_pool", "shortfall"]


@dataclass(frozen=True)
class Allocation:
    """How channels are chosen: what both the callback and :func:`prune_channels` ask for."""

    criterion: ChannelCriterion
    reduction: Literal["mean", "sum", "max"] = "mean"
    scope: Literal["global", "layer"] = "global"
    round_to: int | None = None

    @classmethod
    def of(
        cls,
        criterion: str | ChannelCriterion,
        *,
        scope: Literal["global", "layer"],
        reduction: Literal["mean", "sum", "max"],
        round_to: int | None,
    ) -> "Allocation":
        """Read the user's words.

        Raises:
            ValueError: If one of them is unknown or out of range.
        """
        if scope not in ("global", "layer"):
            raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}.")
        if reduction not in ("mean", "sum", "max"):
            raise ValueError(f"`reduction` must be 'mean', 'sum' or 'max', got {reduction!r}.")
        if round_to is not None and (type(round_to) is not int or round_to < 1):
            raise ValueError(f"`round_to` must be a whole number >= 1 or None, got {round_to!r}.")
        return cls(CHANNEL_CRITERIA.resolve(criterion), reduction, scope, round_to)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the criterion asks for besides the weights."""
        return needs_of(self.criterion)

    def rounded(self, multiple: int) -> "Allocation":
        """Return the same with another multiple to keep."""
        return replace(self, round_to=multiple)


@dataclass(frozen=True)
class Pool:
    """Groups that make up for each other: together they lose one ratio.

    Attributes:
        ratio: Fraction of their dense channels to be gone.
        names: The groups.
        even: Whether each loses the same fraction; else their channels are ranked together.
    """

    ratio: float
    names: tuple[str, ...]
    even: bool


@dataclass(frozen=True)
class Shortfall:
    """Channels that were asked to be gone and are not.

    Attributes:
        asked: Channels that were to be gone, over all pools.
        channels: How many of them are not.
        exceeds: Whether a pool misses its ratio by more than one unit of one of its groups.
    """

    asked: int
    channels: int
    exceeds: bool

    def sentence(self) -> str:
        """Say what was asked, what was reached, why, and what to do."""
        return (
            f"asked {self.asked} channels gone, {self.asked - self.channels} are: groups are at their floor (a block, "
            "a multiple of round_to, that of equal blocks under scope='layer', two heads, or a tenth of the dense "
            "channels). Take more layers in, round to a smaller multiple, or ask for less."
        )


def one_pool(ratio: float, names: Iterable[str], allocation: Allocation) -> Pool:
    """Return all groups as one pool."""
    return Pool(ratio, tuple(names), even=allocation.scope == "layer")


def kept_channels(
    groups: Mapping[str, ChannelGroup],
    dense: Mapping[str, int],
    scores: Mapping[str, Tensor],
    pools: Sequence[Pool],
    allocation: Allocation,
    *,
    last: bool,
) -> dict[str, int]:
    """Return how many channels each group keeps.

    Args:
        groups: The groups as they are, by name.
        dense: Channels of each before anything left.
        scores: Importance of its channels, ``[channels]``.
        pools: What is asked.
        allocation: How it is spread.
        last: Whether no event follows that could remove what does not fit into this one.
    """
    kept = {name: group.channels for name, group in groups.items()}
    for pool in pools:
        ties = _ties(groups, pool.names, dense, even=pool.even)
        widths = {names[0]: _together(groups, dense, names, allocation.round_to) for names in ties}
        if pool.even:
            number = even_widths(widths, pool.ratio)
        else:
            rising = {names[0]: _rising_together(groups, scores, names) for names in ties}
            number = global_widths(widths, rising, pool.ratio, fill=last)
        kept |= {name: number[names[0]] // len(names) for names in ties for name in names}
    return kept


def _ties(
    groups: Mapping[str, ChannelGroup], names: Iterable[str], dense: Mapping[str, int], *, even: bool
) -> list[list[str]]:
    """Return the groups of which equally many channels stay, in lists.

    Those are groups whose channels one number counts; with ``even`` also those at the same place of equal blocks, for a
    configuration states one width for all blocks. They stay equal where ``round_to`` would let some lose more.
    """
    ties: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        group = groups[name]
        place = re.sub(r"\.\d+(?=\.)", ".*", f".{name}")
        alone = (place, dense[name], group.unit, group.blocks, group.multiple, group.least) if even else (name,)
        ties.setdefault((*((group.tie,) if group.tie else alone), group.channels), []).append(name)
    return list(ties.values())


def _together(
    groups: Mapping[str, ChannelGroup], dense: Mapping[str, int], names: Sequence[str], round_to: int | None
) -> Width:
    width = _width(groups[names[0]], dense[names[0]], round_to)
    number = len(names)
    return Width(width.dense * number, width.now * number, width.unit * number, width.least * number)


def _rising_together(groups: Mapping[str, ChannelGroup], scores: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the scores of tied groups in the order in which their channels leave, one of each at a time."""
    each = [rising_scores(scores[name], groups[name].blocks) for name in names]
    return torch.stack(each).mean(0).repeat_interleave(len(names))


def shortfall(
    groups: Mapping[str, ChannelGroup],
    dense: Mapping[str, int],
    kept: Mapping[str, int],
    pools: Sequence[Pool],
    round_to: int | None,
) -> Shortfall:
    """Compare what is gone with what was asked.

    Args:
        groups: The groups by name.
        dense: Channels of each before anything left.
        kept: Channels of each that are left.
        pools: What was asked.
        round_to: The multiple that was to be kept.
    """
    asked, channels, exceeds = 0, 0, False
    for pool in pools:
        widths = {name: _width(groups[name], dense[name], round_to) for name in pool.names}
        miss = missed(widths, kept, pool.ratio)
        asked += asked_channels(widths.values(), pool.ratio)
        channels += miss
        exceeds = exceeds or miss > max(width.unit for width in widths.values())
    return Shortfall(asked, channels, exceeds)


def _width(group: ChannelGroup, dense: int, round_to: int | None) -> Width:
    # heads keep their width, so there is nothing to round
    unit = group.unit * group.blocks if group.unit > 1 else lcm(group.blocks, round_to or 1, group.multiple)
    return Width(dense, group.channels, unit, max(unit, group.least))
