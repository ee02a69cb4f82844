"""The loss of the logits: one function or several with weights, each on the rows that it can use."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.functional.losses import LOSSES, Loss
from lightning_optim.functional.rows import IGNORED

__all__ = ["LogitLosses"]

DEFAULT = "kd"
DEFAULT_OF_ONE = "bce"
"""The default if a row has one logit, which has no softmax."""
BY_ROWS = "by_rows"
"""The mark of a loss that is a mean of one value per row."""


@dataclass(frozen=True)
class LogitLosses:
    """Losses of logits by name, with their weights.

    Attributes:
        functions: Name -> loss.
        weights: Name -> weight.
        chosen: Whether the user named them; otherwise rows of one logit have another default.
    """

    functions: dict[str, Loss]
    weights: dict[str, float]
    chosen: bool = True

    @classmethod
    def of(cls, loss: Any) -> "LogitLosses":
        """Read a name, a callable, a mapping of them to weights, or None for the default.

        Raises:
            TypeError: If it is none of these.
            ValueError: If a name is unknown, a weight negative, or there is none.
        """
        if loss is None:
            return cls({DEFAULT: LOSSES[DEFAULT]}, {DEFAULT: 1.0}, chosen=False)
        if not isinstance(loss, Mapping):
            LOSSES.resolve(loss)  # its error says what is accepted
            loss = {loss: 1.0}
        if not loss:
            raise ValueError(f"`loss` must name at least one loss; known: {', '.join(sorted(LOSSES))}.")
        functions, weights = {}, {}
        for single, weight in loss.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
                raise ValueError(f"the weight of loss {single!r} must be a number >= 0, got {weight!r}.")
            function = LOSSES.resolve(single)
            name = single if isinstance(single, str) else getattr(_unwrapped(function), "__name__", "loss")
            functions[name], weights[name] = function, float(weight)
        return cls(functions, weights)

    def of_classes(self, classes: int) -> "LogitLosses":
        """Return the losses for rows with a number of classes: the default depends on it."""
        if self.chosen or classes > 1:
            return self
        return LogitLosses({DEFAULT_OF_ONE: LOSSES[DEFAULT_OF_ONE]}, {DEFAULT_OF_ONE: 1.0}, chosen=False)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, **arguments: Any) -> dict[str, Tensor]:
        """Return each loss, unweighted; a loss gets the arguments that it takes and that are not bound already.

        A loss that needs labels is computed on the labeled rows, and is 0 if there are none.
        """
        losses = self.of_classes(student_logits.shape[-1])
        targets = arguments.get("targets")
        labeled: Tensor | None = None
        if isinstance(targets, Tensor) and targets.shape == student_logits.shape[:1]:
            labeled = targets != IGNORED
        values = {}
        for name, function in losses.functions.items():
            own, rows = arguments, (student_logits, teacher_logits)
            if labeled is not None and _needs_labels(function):
                rows = (student_logits[labeled], teacher_logits[labeled])
                own = {**arguments, "targets": arguments["targets"][labeled]}
                if not len(rows[0]):
                    values[name] = rows[0].float().sum()
                    continue
            values[name] = function(*rows, **_accepted(function, own))
        return values

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, float32; an unknown loss has weight 1."""
        return torch.stack([self.weights.get(name, 1.0) * value.float() for name, value in losses.items()]).sum()

    def shares(self, targets: Any, part: slice, rows: int) -> dict[str, Tensor | float]:
        """Return the weight of a part of the rows in the mean of each loss: losses with labels count labeled rows.

        Args:
            targets: Labels of all rows; None: none.
            part: Which rows.
            rows: Number of all rows.
        """
        of_rows = len(range(*part.indices(rows))) / rows
        labeled: Tensor | float = of_rows
        if isinstance(targets, Tensor) and targets.shape == (rows,):
            counts = targets != IGNORED
            labeled = counts[part].sum() / counts.sum().clamp_min(1)
        return {name: labeled if _needs_labels(function) else of_rows for name, function in self.functions.items()}

    @property
    def needs(self) -> set[str]:
        """What the losses need besides the logits."""
        return {need for function in self.functions.values() for need in getattr(_unwrapped(function), "needs", ())}

    @property
    def binary(self) -> bool:
        """Whether every loss takes each logit as an answer of its own."""
        return self._all("binary")

    @property
    def elementwise(self) -> bool:
        """Whether every loss compares entry by entry, so that the dimension of the classes does not matter."""
        return self._all("elementwise")

    @property
    def over_batch(self) -> list[str]:
        """Names of the losses that may compare rows with each other, so that they need all rows at once."""
        return [name for name, function in self.functions.items() if not getattr(_unwrapped(function), BY_ROWS, False)]

    @property
    def teacher_free(self) -> bool:
        """Whether no loss uses a teacher."""
        return self._all("teacher_free")

    @property
    def not_on_top_k(self) -> list[str]:
        """The losses that need the logits of all classes: not computed on k words and the rest."""
        return [
            name
            for name, function in self.functions.items()
            if not getattr(_unwrapped(function), "top_k", False) or "top_k" in getattr(function, "keywords", {})
        ]

    def _all(self, mark: str) -> bool:
        return all(getattr(_unwrapped(function), mark, False) for function in self.functions.values())


def _needs_labels(function: Any) -> bool:
    return "targets" in getattr(_unwrapped(function), "needs", ())


def _unwrapped(function: Any) -> Any:
    """Return the function in a ``functools.partial``."""
    return getattr(function, "func", function)


def _accepted(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function takes and that no ``functools.partial`` has bound."""
    wanted = inspect.signature(function).parameters.keys() - getattr(function, "keywords", {}).keys()
    return {name: value for name, value in arguments.items() if name in wanted}
