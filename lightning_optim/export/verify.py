"""How far the answers of an exported file are from the module's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Comparison", "compare"]

MOST_DIFFERENCE = 0.05
"""Largest difference of outputs without classes, as a fraction of their range (which includes zero).

A value on the edge of two integers may be rounded either way; in a few layers that added up to 0.02 of the range.
"""

MOST_MEAN_DIFFERENCE = 0.02
"""Largest mean difference of any floating output, as a fraction of its range; values on edges stay far below."""


@dataclass(frozen=True)
class Comparison:
    """How far answers are from the module's.

    Attributes:
        max_difference: Largest absolute difference, over all floating outputs.
        mean_difference: Mean absolute difference, over all floating outputs.
        agreement: Fraction of rows with the same class; None for outputs without classes.
        rows: Number of rows compared.
        relative: Largest difference of the first output, as a fraction of its range, which includes zero.
        mean_relative: Mean difference as a fraction of the range, of the floating output where it is largest.
    """

    max_difference: float
    mean_difference: float
    agreement: float | None
    rows: int
    relative: float
    mean_relative: float

    def complaint(self, least_agreement: float) -> str | None:
        """Return what is wrong; None if the answers are close enough."""
        numbers = f"largest difference {self.max_difference:.3g}, mean {self.mean_difference:.3g}"
        if self.agreement is not None and not self.agreement >= least_agreement:
            return (
                f"the same class in {self.agreement:.2%} of {self.rows} rows (required: {least_agreement:.2%}; "
                f"{numbers})"
            )
        if self.agreement is None and not self.relative <= MOST_DIFFERENCE:
            return f"a difference of {self.relative:.3g} of the output's range (at most {MOST_DIFFERENCE}; {numbers})"
        if not self.mean_relative <= MOST_MEAN_DIFFERENCE:
            return (
                f"a mean difference of {self.mean_relative:.3g} of an output's range (at most {MOST_MEAN_DIFFERENCE}; "
                f"{numbers})"
            )
        return None


def compare(expected: Sequence[Sequence[Tensor]], got: Sequence[Sequence[Tensor]]) -> Comparison:
    """Compare the outputs of several calls.

    Args:
        expected: The module's outputs of each call.
        got: The engine's.
    """
    pairs = [
        [(call[place], answer[place]) for call, answer in zip(expected, got, strict=True)]
        for place, output in enumerate(expected[0])
        if output.is_floating_point()
    ]
    outputs = [_differences(pair) for pair in pairs]
    firsts = [(call[0], answer[0]) for call, answer in zip(expected, got, strict=True)]
    same = torch.cat([_same_class(left, right) for left, right in firsts])
    first = outputs[0] if outputs and firsts[0][0].is_floating_point() else (torch.zeros(1), 1.0)
    everything = torch.cat([differences for differences, _ in outputs] or [torch.zeros(1)])
    has_classes = _has_classes(firsts[0][0])
    return Comparison(
        float(everything.max()),
        float(everything.mean()),
        float(same.float().mean()) if has_classes else None,
        len(same) if has_classes else 0,
        float(first[0].max()) / first[1],
        max((float(differences.mean()) / span for differences, span in outputs), default=0.0),
    )


def _differences(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Return the absolute differences of an output over all calls, and its range, which includes zero."""
    expected = torch.cat([left.float().flatten() for left, _ in pairs])
    got = torch.cat([right.float().flatten() for _, right in pairs])
    differences = torch.where(expected == got, 0.0, (got - expected).abs())  # equal infinities differ by NaN
    finite = expected[expected.isfinite()]
    span = float(finite.max().clamp_min(0) - finite.min().clamp_max(0)) if len(finite) else 0.0
    return differences, span or 1.0


def _has_classes(output: Tensor) -> bool:
    return not output.is_floating_point() or (output.ndim > 1 and output.shape[-1] > 1)


def _same_class(left: Tensor, right: Tensor) -> Tensor:
    if not left.is_floating_point():
        return (left == right).flatten()
    if not _has_classes(left):
        return torch.ones(0, dtype=torch.bool)
    dimension = 1 if left.ndim > 3 else -1  # of images, [batch, classes, height, width]
    return (left.argmax(dimension) == right.argmax(dimension)).flatten()
