"""How many channels each group keeps, so that the groups together lose the fraction that is asked.

Channels leave in units: one channel of each block of a norm, whole heads, or down to a multiple. What one group cannot
lose because of that, another one loses, so the total misses the request by less than one unit.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Width", "asked_channels", "even_widths", "global_widths", "missed"]


@dataclass(frozen=True)
class Width:
    """Channels of one group.

    Attributes:
        dense: How many there were before any left.
        now: How many there are.
        unit: They are removed down to a multiple of this.
        least: No fewer are kept.
    """

    dense: int
    now: int
    unit: int = 1
    least: int = 1

    @property
    def gone(self) -> int:
        """How many left already."""
        return self.dense - self.now

    def next_step(self, kept: int) -> int:
        """Return how many channels leave next when ``kept`` are there; 0 at the floor.

        Examples:
            >>> Width(24, 24, unit=16, least=16).next_step(24), Width(24, 24, unit=16, least=16).next_step(16)
            (8, 0)
        """
        smaller = (kept - 1) // self.unit * self.unit
        return kept - smaller if smaller >= max(self.least, 1) else 0


def asked_channels(widths: Iterable[Width], ratio: float) -> int:
    """Return how many channels of all groups a ratio asks to be gone, rounded down."""
    return math.floor(ratio * sum(width.dense for width in widths) + 1e-9)


def missed(widths: Mapping[str, Width], kept: Mapping[str, int], ratio: float) -> int:
    """Return how many channels fewer are gone than a ratio asks; never negative."""
    gone = sum(width.dense - kept[name] for name, width in widths.items())
    return max(0, asked_channels(widths.values(), ratio) - gone)


def global_widths(
    widths: Mapping[str, Width], scores: Mapping[str, Tensor], ratio: float, *, most: float = 0.9, fill: bool = True
) -> dict[str, int]:
    """Return how many channels each group keeps when the units of all groups are ranked together.

    The unit with the lowest mean score leaves first, as long as it fits into what is asked.

    Args:
        widths: Group name -> its channels.
        scores: Group name -> scores of the channels that are there, ``[now]``, rising: the order in which they leave.
        ratio: Fraction of all dense channels to be gone, in [0, 1).
        most: No group loses more than this fraction of its dense channels: no layer is starved.
        fill: Go on with smaller units where one does not fit. Otherwise the rest waits for the next event, so that
            groups with small units do not bear what others are due: removals then nest as the ratio grows.

    Returns:
        Group name -> channels kept. More than asked never leave; fewer by less than one unit, floors aside.

    Examples:
        >>> widths = {"a": Width(4, 4), "b": Width(4, 4, unit=2)}
        >>> global_widths(widths, {"a": torch.tensor([1.0, 2, 8, 9]), "b": torch.tensor([3.0, 3, 4, 4])}, 0.5)
        {'a': 2, 'b': 2}
    """
    kept = {name: width.now for name, width in widths.items()}
    left = asked_channels(widths.values(), ratio) - sum(width.gone for width in widths.values())
    sums = {name: [0.0, *torch.cumsum(scores[name].double(), 0).tolist()] for name in widths}
    order = {name: index for index, name in enumerate(widths)}
    limits = {name: width.dense - math.floor(most * width.dense) for name, width in widths.items()}
    waiting: list[tuple[float, int, str, int]] = []

    def offer(name: str) -> None:
        """Put the group's next unit among those that wait."""
        step = widths[name].next_step(kept[name])
        if step and kept[name] - step >= limits[name]:
            first = widths[name].now - kept[name]
            mean = (sums[name][first + step] - sums[name][first]) / step
            heapq.heappush(waiting, (mean, order[name], name, step))

    for name in widths:
        offer(name)
    while waiting and left > 0:
        _, _, name, step = heapq.heappop(waiting)
        if step > left:
            if fill:
                continue
            break
        kept[name] -= step
        left -= step
        offer(name)
    return kept


def even_widths(widths: Mapping[str, Width], ratio: float) -> dict[str, int]:
    """Return how many channels each group keeps when every group loses the same fraction.

    Each group is within one unit of its share. Where units keep groups above it, those furthest behind lose one unit
    more, until the total is within one unit. Groups of equal widths and units stay equal as far as that allows.

    Args:
        widths: Group name -> its channels.
        ratio: Fraction of each group's dense channels to be gone, in [0, 1).

    Returns:
        Group name -> channels kept. More than asked in total never leave, unless a group was below its share before.

    Examples:
        >>> even_widths({"a": Width(32, 32, unit=16, least=16), "b": Width(32, 32, unit=16, least=16)}, 0.25)
        {'a': 16, 'b': 32}
    """
    kept = {name: _within_share(width, ratio) for name, width in widths.items()}
    left = asked_channels(widths.values(), ratio) - sum(width.dense - kept[name] for name, width in widths.items())
    alike: dict[Width, list[str]] = {}
    for name, width in widths.items():
        alike.setdefault(width, []).append(name)
    behind = {width: _units_behind(width, kept[names[0]], ratio) for width, names in alike.items()}
    waiting = sorted((width for width in alike if behind[width] > 0), key=lambda width: -behind[width])
    apart = []
    for width in waiting:
        step = width.next_step(kept[alike[width][0]])
        if step * len(alike[width]) > left:
            apart.append(width)
            continue
        for name in alike[width]:
            kept[name] -= step
            left -= step
    largest = max((width.unit for width in widths.values()), default=1)
    for name in (name for width in apart for name in alike[width]):
        step = widths[name].next_step(kept[name])
        if left >= largest and step <= left:
            kept[name] -= step
            left -= step
    return kept


def _within_share(width: Width, ratio: float) -> int:
    """Return the smallest width that loses no more than the share; what left already does not come back."""
    kept = width.now
    step = width.next_step(kept)
    while step and width.dense - kept + step <= ratio * width.dense + 1e-9:
        kept -= step
        step = width.next_step(kept)
    return kept


def _units_behind(width: Width, kept: int, ratio: float) -> float:
    """Return how far a group is above its share, in units; 0 at its floor."""
    step = width.next_step(kept)
    return (ratio * width.dense - (width.dense - kept)) / step if step else 0.0
