"""The loss of the logits: one function or several with weights, and the rows they are computed on."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.functional.losses import LOSSES, Loss

__all__ = ["LogitLosses", "rows_of"]


@dataclass(frozen=True)
class LogitLosses:
    """Losses of logits by name, with their weights."""

    functions: dict[str, Loss]
    weights: dict[str, float]

    @classmethod
    def of(cls, given: Any) -> "LogitLosses":
        """Read a name, a callable, or a mapping of them to weights.

        Raises:
            TypeError: If it is none of these.
            ValueError: If a name is unknown, a weight negative, or there is none.
        """
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

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, **words: Any) -> dict[str, Tensor]:
        """Return each loss, unweighted; a loss gets those of the words that it takes and has not been given."""
        return {
            name: function(student_logits, teacher_logits, **_accepted(function, words))
            for name, function in self.functions.items()
        }

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, float32; a loss that is not known here has weight 1."""
        return torch.stack([self.weights.get(name, 1.0) * value.float() for name, value in losses.items()]).sum()

    @property
    def needs(self) -> set[str]:
        """What the losses ask for besides the logits."""
        return {need for function in self.functions.values() for need in getattr(_unwrapped(function), "needs", ())}

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


def rows_of(tensor: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return ``[rows, classes]``: a row a sample, or a position of a sequence that counts.

    Args:
        tensor: ``[rows]``, ``[rows, classes]`` or ``[rows, positions..., classes]``.
        keep: Which positions count, ``[rows, positions...]``; None: all.
    """
    if keep is not None:
        return tensor[keep]
    return tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor.flatten(0, -2)
