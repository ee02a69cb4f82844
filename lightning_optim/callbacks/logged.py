"""Metrics logged since a given moment: ``trainer.callback_metrics`` keeps the values of earlier epochs too."""

from typing import Any

from torch import Tensor

__all__ = ["MetricsSince"]


class MetricsSince:
    """The metrics logged since :meth:`begin` was called.

    Lightning fills ``callback_metrics`` with new tensors whenever it reads a loop's results, and never touches the
    entries of metrics that the loop did not log. A tensor that is still the same object was therefore logged earlier.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}

    def begin(self, trainer: Any) -> None:
        """Count only what is logged from now on."""
        self._before = dict(trainer.callback_metrics)

    def read(self, trainer: Any) -> dict[str, Tensor]:
        """Return the metrics logged since :meth:`begin`, by name."""
        return {name: x for name, x in trainer.callback_metrics.items() if self._before.get(name) is not x}

    def clear(self) -> None:
        """Drop the tensors that are held for the comparison."""
        self._before = {}
