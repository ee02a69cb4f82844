"""Rows of logits: the dimension of the classes, the positions that count, and the label of each position.

A logit loss compares ``[rows, classes]``. Models give ``[rows, classes]``, ``[rows, positions..., classes]`` (language
models), ``[rows, classes, positions...]`` (segmentation, as ``F.cross_entropy`` takes it), or one logit per row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optim.functional.chunks import chunk_rows

__all__ = [
    "IGNORED",
    "class_dims",
    "labels_at",
    "labels_of_next",
    "rows_of",
    "task_cross_entropy",
    "tells_shift",
]

IGNORED = -100
"""The label of unlabeled rows: ``ignore_index`` of torch's cross-entropy."""

_CLOSE = 1e-4


def class_dims(logits: Sequence[int], labels: Sequence[int] | None) -> list[int]:
    """Return the dimensions that can hold the classes; none or several if the shapes do not decide.

    Args:
        logits: Shape of the logits, at least two dimensions.
        labels: Shape of the labels: one per position, with or without a dimension of size 1 for the classes; images may
            have a multiple of the logits' height and width. None: unknown.

    Returns:
        Those of 1 and the last dimension that fit. Without labels, three dimensions are ``[rows, positions, classes]``,
        and more are undecided.

    Examples:
        >>> class_dims((8, 5, 32, 32), (8, 32, 32)), class_dims((8, 32, 5), (8, 32)), class_dims((8, 5, 5), (8, 5))
        ([1], [2], [1, 2])
    """
    shape, last = tuple(logits), len(logits) - 1
    if last == 1:
        return [1]
    if labels is None:
        return [last] if last == 2 else []
    return [dim for dim in (1, last) if _fits(shape, tuple(labels), dim)]


def _fits(logits: tuple[int, ...], labels: tuple[int, ...], dim: int) -> bool:
    positions = (*logits[:dim], *logits[dim + 1 :])
    if labels in (positions, (*logits[:dim], 1, *logits[dim + 1 :])):
        return True
    return dim == 1 and _multiple(positions, labels) > 1


def _multiple(positions: tuple[int, ...], labels: tuple[int, ...]) -> int:
    """Return how many times finer than the logits the labels of an image are; 0 if they do not match."""
    if len(positions) != len(labels) or len(positions) < 3 or positions[0] != labels[0]:
        return 0
    factors = {fine / coarse for fine, coarse in zip(labels[1:], positions[1:], strict=True)}
    factor = factors.pop()
    return int(factor) if not factors and factor.is_integer() else 0


def labels_at(labels: Tensor, logits: Sequence[int], dim: int) -> Tensor:
    """Return one label per position, ``[rows, positions...]``; of finer labels the nearest.

    Args:
        labels: Labels that fit, see :func:`class_dims`.
        logits: Shape of the logits.
        dim: The dimension of the logits that holds the classes.
    """
    positions = (*logits[:dim], *logits[dim + 1 :])
    factor = _multiple(positions, tuple(labels.shape))
    if factor > 1:
        nearest = (slice(None), *[slice(factor // 2, None, factor)] * (len(positions) - 1))
        return labels[nearest]
    return labels.reshape(positions)


def labels_of_next(labels: Tensor) -> Tensor:
    """Return the label that each position of a causal language model predicts: the next one; the last has none.

    Args:
        labels: ``[rows, positions]``.

    Examples:
        >>> labels_of_next(torch.tensor([[5, 6, 7]])).tolist()
        [[6, 7, -100]]
    """
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


def tells_shift(logits: Tensor, labels: Tensor, loss: Tensor) -> bool | None:
    """Return whether a loss is the cross-entropy of each position with the next label (True) or its own (False).

    Args:
        logits: ``[rows, positions, classes]``.
        labels: ``[rows, positions]``, integers.
        loss: The scalar that the model or its step computed from them.

    Returns:
        None if it is neither (label smoothing, weights, added terms), or both.
    """
    with torch.no_grad():
        means = (_mean_cross_entropy(logits, own) for own in (labels, labels_of_next(labels)))
        near = [bool((value - loss.float()).abs() <= _CLOSE * (1.0 + loss.float().abs())) for value in means]
    return near[1] if near[0] != near[1] else None


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labeled positions; it keeps no tensor like the logits."""
    size = chunk_rows("auto", logits.shape[1], logits.shape[2])
    sums = [
        F.cross_entropy(some.float(), own, reduction="sum")
        for row, wanted in zip(logits, labels, strict=True)
        for some, own in zip(row.split(size), wanted.split(size), strict=True)
    ]
    return torch.stack(sums).sum() / (labels != IGNORED).sum()


def task_cross_entropy(logits: Tensor, labels: Tensor, dim: int) -> Tensor:
    """Return torch's cross-entropy over the dimension of the classes; the binary one if a row has one logit.

    Args:
        logits: ``[rows, ..., classes]`` or ``[rows, classes, ...]``, any float dtype.
        labels: One class per position, or probabilities of the logits' shape.
        dim: The dimension that holds the classes.

    Returns:
        A float32 scalar: the mean over labeled positions, NaN without any.
    """
    if logits.shape[dim] == 1:
        wanted = labels.reshape(-1)
        answer = logits.movedim(dim, -1).reshape(-1)[wanted != IGNORED]
        return F.binary_cross_entropy_with_logits(answer.float(), wanted[wanted != IGNORED].float())
    if labels.shape == logits.shape:
        labels = labels.movedim(dim, 1)
    return F.cross_entropy(logits.movedim(dim, 1).float(), labels)


def rows_of(tensor: Tensor, keep: Tensor | None = None, dim: int = -1) -> Tensor:
    """Return ``[rows, classes]``: one row per sample, or per position that counts.

    Args:
        tensor: ``[rows]``, ``[rows, classes]``, ``[rows, positions..., classes]`` or, with ``dim=1``,
            ``[rows, classes, positions...]``.
        keep: The positions that count, ``[rows, positions...]``; None: all.
        dim: The dimension that holds the classes.
    """
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(-1)
    tensor = tensor.movedim(dim, -1)
    return tensor.flatten(0, -2) if keep is None else tensor[keep]
