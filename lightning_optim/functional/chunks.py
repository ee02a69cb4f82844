"""A loss of logits, some rows at a time: neither it nor its gradient needs the memory of all rows at once.

A loss over a vocabulary keeps some six tensors of the logits' size for its gradient. Here the rows are compared in
chunks, and each chunk's gradient is computed with its value, so that only the gradient of the logits is whole, which
the backward pass needs in any case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGE", "RowPlaces", "chunk_rows", "loss_by_chunks"]

LARGE = 64_000_000
"""Bytes of one float32 tensor of all rows from which on ``"auto"`` compares them in chunks."""

_PARTS = 4
"""Chunks of ``"auto"`` have ``LARGE / _PARTS`` bytes: a loss keeps several tensors of that size at once."""

Compare = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def chunk_rows(size: int | str | None, rows: int, classes: int) -> int:
    """Return how many rows are compared at once.

    Args:
        size: A number >= 1; ``"auto"``: all below 64 MB of float32, else as many as 16 MB hold; None: all.
        rows: Number of rows.
        classes: Entries of a row.

    Examples:
        >>> chunk_rows("auto", 100, 1_000), chunk_rows("auto", 10_000, 10_000), chunk_rows(7, 100, 10)
        (100, 400, 7)
    """
    if size is None or rows == 0:
        return rows
    if size == "auto":
        bytes_of_row = 4 * classes
        return rows if rows * bytes_of_row < LARGE else max(LARGE // _PARTS // bytes_of_row, 1)
    return min(int(size), rows)


@dataclass(frozen=True)
class RowPlaces:
    """Where the rows that count are in logits, ``[rows, ..., classes]`` or ``[rows, classes, ...]``.

    Attributes:
        dim: The dimension that holds the classes.
        index: One tensor ``[n]`` per other dimension.
    """

    dim: int
    index: tuple[Tensor, ...]

    @classmethod
    def of(cls, logits: Tensor, dim: int, keep: Tensor | None = None) -> "RowPlaces":
        """Find the rows.

        Args:
            logits: At least two dimensions.
            dim: The dimension that holds the classes.
            keep: The positions that count, of the logits' shape without ``dim``; None: all.
        """
        if keep is None:
            shape = (*logits.shape[:dim], *logits.shape[dim + 1 :])
            keep = torch.ones((), dtype=torch.bool, device=logits.device).expand(shape)
        return cls(dim, keep.nonzero(as_tuple=True))

    def __len__(self) -> int:
        return len(self.index[0])

    def take(self, tensor: Tensor, part: slice) -> Tensor:
        """Return some of the rows of a tensor, ``[n, classes]``, as a copy."""
        return tensor.movedim(self.dim, -1)[self._at(part)]

    def put(self, tensor: Tensor, part: slice, rows: Tensor) -> None:
        """Write rows to their places in a tensor."""
        tensor.movedim(self.dim, -1)[self._at(part)] = rows.to(tensor.dtype)

    def _at(self, part: slice) -> tuple[Tensor, ...]:
        return tuple(index[part] for index in self.index)


def loss_by_chunks(logits: Tensor, places: RowPlaces, size: int, compare: Compare) -> tuple[Tensor, Tensor]:
    """Return a loss that is a sum over chunks of rows, and other sums that have no gradient.

    The gradient is computed with the value and kept, one tensor like the logits; there is no second derivative. Memory
    besides: what ``compare`` needs for ``size`` rows.

    Args:
        logits: The student's, any layout.
        places: The rows to compare, each once.
        size: Rows of a chunk.
        compare: ``(rows [n, classes], part) -> (share of the loss, shares of the other sums [k])``, called in order,
            with gradients enabled if the logits have one. ``part`` is the slice of ``places``.

    Returns:
        A float32 scalar and float32 ``[k]``. Both are sums of what ``compare`` returned.
    """
    learns = logits.requires_grad and torch.is_grad_enabled()
    total, sums = _LossByChunks.apply(logits, places, size, compare, learns)  # type: ignore[no-untyped-call]
    return total, sums


class _LossByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: RowPlaces, size: int, compare: Compare, learns: bool
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.zeros_like(logits) if learns else None
        totals, sums = [], []
        for start in range(0, len(places), size):
            part = slice(start, start + size)
            rows = places.take(logits, part).requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                total, others = compare(rows, part)
                scaled = total * len(places)  # the mean of many rows has gradients that half precision rounds to 0
            if gradient is not None:
                places.put(gradient, part, *torch.autograd.grad(scaled, rows))
            totals.append(total.detach().float())
            sums.append(others.detach().float())
        ctx.rows = len(places)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        values = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(values)
        return torch.stack(totals).sum(), values

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, of_sums: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "a loss compared in chunks of rows has no second derivative. Compare all rows at once: "
                "`chunk_size=None`."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * (of_total / ctx.rows), None, None, None, None
