"""A goal in a measured figure, and the ratio that reaches it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["FIGURES", "Goal", "smallest_ratio"]

FIGURES = ("parameters", "macs", "latency")
MOST = 0.95
"""No more than this fraction of the channels is tried."""
HALVINGS = 7


@dataclass(frozen=True)
class Goal:
    """At most a fraction of the dense model's figure."""

    figure: str
    fraction: float

    @classmethod
    def of(cls, target: Mapping[str, float]) -> "Goal":
        """Read what the user wrote.

        Raises:
            TypeError: If it is no dict.
            ValueError: If it has not one known figure with a fraction in (0, 1).
        """
        if not isinstance(target, Mapping):
            raise TypeError(f"`target` must be a dict such as {{'macs': 0.5}}, got {target!r}.")
        if len(target) != 1 or next(iter(target)) not in FIGURES:
            raise ValueError(f"`target` must have one key of {', '.join(FIGURES)}, got {dict(target)!r}.")
        ((figure, fraction),) = target.items()
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0.0 < fraction < 1.0:
            raise ValueError(f"`target` is a fraction in (0, 1) of the dense model's {figure}, got {fraction!r}.")
        return cls(figure, float(fraction))


def smallest_ratio(fraction_at: Callable[[float], float], due: float) -> tuple[float, float]:
    """Return the smallest ratio of channels whose removal leaves at most ``due`` of a figure, by halving.

    Args:
        fraction_at: Figure, as a fraction of the dense one, at a ratio; falls as the ratio grows.
        due: What may be left.

    Returns:
        The ratio and the fraction it leaves; the largest ratio that is tried when none is enough.

    Examples:
        >>> smallest_ratio(lambda ratio: (1 - ratio) ** 2, 0.25)
        (0.50468..., 0.24533...)
    """
    left = fraction_at(0.0)
    if left <= due:
        return 0.0, left
    low, high = 0.0, MOST
    left = fraction_at(high)
    if left > due:
        return high, left
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = fraction_at(middle)
        if tried <= due:
            high, left = middle, tried
        else:
            low = middle
    return high, left
