"""The loss of the logits: one function or several with weights, on the rows that each of them can use."""

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
"""The default where a row has one logit, of which there is no softmax."""


@dataclass(frozen=True)
class LogitLosses:
    """Losses of logits by name, with their weights.

    Attributes:
        functions: The losses.
        weights: Of each.
        chosen: Whether the user named them; else one logit a row is compared by another default.
    """

    functions: dict[str, Loss]
    weights: dict[str, float]
    chosen: bool = True

    @classmethod
    def of(cls, given: Any) -> "LogitLosses":
        """Read a name, a callable, a mapping of them to weights, or None for the default.

        Raises:
            TypeError: If it is none of these.
            ValueError: If a name is unknown, a weight negative, or there is none.
        """
        if given is None:
            return cls({DEFAULT: LOSSES[DEFAULT]}, {DEFAULT: 1.0}, chosen=False)
        if not isinstance(given, Mapping):
            LOSSES.resolve(given)  # says what is accepted
            given = {given: 1.0}
        if not given:
            raise ValueError(f"`loss` names one loss at least; known: {', '.join(sorted(LOSSES))}.")
        functions, weights = {}, {}
        for loss, weight in given.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
                raise ValueError(f"the weight of loss {loss!r} must be a number >= 0, got {weight!r}.")
            function = LOSSES.resolve(loss)
            name = loss if isinstance(loss, str) else getattr(_unwrapped(function), "__name__", "loss")
            functions[name], weights[name] = function, float(weight)
        return cls(functions, weights)

    def of_classes(self, classes: int) -> "LogitLosses":
        """Return the losses that compare rows of a number of classes: the default depends on it."""
        if self.chosen or classes > 1:
            return self
        return LogitLosses({DEFAULT_OF_ONE: LOSSES[DEFAULT_OF_ONE]}, {DEFAULT_OF_ONE: 1.0}, chosen=False)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, **words: Any) -> dict[str, Tensor]:
        """Return each loss, unweighted; a loss gets those of the words that it takes and has not been given.

        A loss that needs labels is computed on the rows that have one, and is 0 where none has.
        """
        losses = self.of_classes(student_logits.shape[-1])
        targets = words.get("targets")
        labelled: Tensor | None = None
        if isinstance(targets, Tensor) and targets.shape == student_logits.shape[:1]:
            labelled = targets != IGNORED
        found = {}
        for name, function in losses.functions.items():
            own, rows = words, (student_logits, teacher_logits)
            if labelled is not None and "targets" in getattr(_unwrapped(function), "needs", ()):
                rows, own = (
                    (student_logits[labelled], teacher_logits[labelled]),
                    {**words, "targets": words["targets"][labelled]},
                )
                if not len(rows[0]):
                    found[name] = rows[0].float().sum()
                    continue
            found[name] = function(*rows, **_accepted(function, own))
        return found

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, float32; a loss that is not known here has weight 1."""
        return torch.stack([self.weights.get(name, 1.0) * value.float() for name, value in losses.items()]).sum()

    @property
    def needs(self) -> set[str]:
        """What the losses ask for besides the logits."""
        return {need for function in self.functions.values() for need in getattr(_unwrapped(function), "needs", ())}

    @property
    def binary(self) -> bool:
        """Whether every loss takes each logit for an answer of its own."""
        return all(getattr(_unwrapped(function), "binary", False) for function in self.functions.values())

    @property
    def elementwise(self) -> bool:
        """Whether every loss compares entry by entry, so that it does not matter which dimension holds the classes."""
        return all(getattr(_unwrapped(function), "elementwise", False) for function in self.functions.values())

    @property
    def teacher_free(self) -> bool:
        """Whether no loss looks at a teacher."""
        return all(getattr(_unwrapped(function), "teacher_free", False) for function in self.functions.values())


def _unwrapped(function: Any) -> Any:
    """Return the function in a ``functools.partial``."""
    return getattr(function, "func", function)


def _accepted(function: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    given = getattr(function, "keywords", {})
    return {w: value for w, value in words.items() if w in inspect.signature(function).parameters and w not in given}
