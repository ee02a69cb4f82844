"""Shrinking channels before they are removed: penalties on coupled channels, and the step that each asks for.

A channel's weights in all layers that lose it are one vector, a *unit*. A penalty acts on the units' norms, so its step
multiplies each unit by one factor. The factors are computed from the norms; :func:`scale_units` applies them.

The steps are decoupled from the gradient of the loss, as AdamW's weight decay is: they are not rescaled by an adaptive
optimizer, clipped with the gradients, or scaled by a loss scaler. Their size has no unit: ``amount`` is relative to the
weights themselves, so it fits any layer, learning rate and length of the run.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.registry import Registry

__all__ = [
    "REGULARIZATIONS",
    "GroupLasso",
    "Growing",
    "Regularization",
    "entries_of_units",
    "scale_units",
    "unit_norms",
]


class Regularization:
    """How channels shrink before they are removed.

    A subclass is registered in :data:`REGULARIZATIONS`.
    """

    strength: ClassVar[float]
    """The default strength."""
    chooses: ClassVar[bool]
    """Whether it acts on the channels that the next event removes, from event to event; else on all channels, over the
    whole window."""
    reads_norms: ClassVar[bool] = True
    """Whether its factors depend on the norms."""

    def passed(self, progress: float) -> float:
        """Return how much of the strength has acted by then.

        Args:
            progress: Fraction of the way to the next event, or through the window, in [0, 1].

        Returns:
            From 0 at 0 to 1 at 1, never falling.
        """
        raise NotImplementedError

    def penalty(self, norms: Tensor, leaving: Tensor) -> Tensor:
        """Return the penalty whose gradient, times a small amount, :meth:`factors` subtracts.

        Args:
            norms: L2 norms of a group's units, ``[units]``.
            leaving: Which of them are to be removed, bool, ``[units]``.

        Returns:
            A scalar.
        """
        raise NotImplementedError

    def factors(self, norms: Tensor, leaving: Tensor, amount: float) -> Tensor:
        """Return what the units are multiplied by.

        Args:
            norms: L2 norms of a group's units, ``[units]``.
            leaving: Which of them are to be removed, bool, ``[units]``.
            amount: Size of the step, >= 0: the strength times the part of :meth:`passed` since the last step.

        Returns:
            ``[units]``, each in [0, 1], of the norms' dtype.
        """
        raise NotImplementedError


REGULARIZATIONS: Registry[type[Regularization]] = Registry("regularization")


@REGULARIZATIONS.register("group_lasso")
class GroupLasso(Regularization):
    """The weighted sum of the units' norms: units shrink by a length, not by a factor, so small ones reach zero.

    The penalty of a group is ``m * sum_k g_k |w_k|``. The mean norm m makes the strength mean the same in every layer.
    The weights g_k fall from 1 for the smallest unit to 1/16 for the largest: the norms of a trained group lie close to
    each other, and equal weights would shrink all of its units alike. Both count as constants. The step is the exact
    (proximal) one, which sets units to zero: ``w_k <- w_k * max(0, 1 - amount * m * g_k / |w_k|)``.

    References:
        Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks", equations 2 and 3; Yuan and Lin 2006,
        "Model selection and estimation in regression with grouped variables" (the step); Fang et al. 2023, "DepGraph:
        Towards Any Structural Pruning", section 3.3 (the weights, with alpha = 4).
    """

    strength = 1.0
    chooses = False

    def passed(self, progress: float) -> float:
        """Return the progress: the penalty is constant."""
        return progress

    def penalty(self, norms: Tensor, leaving: Tensor) -> Tensor:
        """Return the weighted sum of the norms."""
        return (self._lengths(norms.detach()) * norms).sum()

    def factors(self, norms: Tensor, leaving: Tensor, amount: float) -> Tensor:
        """Return what soft thresholding leaves of each unit."""
        thresholds = amount * self._lengths(norms)
        return (1.0 - thresholds / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0.0)

    def _lengths(self, norms: Tensor) -> Tensor:
        """Return by how much each norm falls in a step of amount 1."""
        low, high = norms.min(), norms.max()
        place = (norms - low) / (high - low).clamp_min(torch.finfo(norms.dtype).tiny)
        return norms.mean() * torch.exp2(-4.0 * place)


@REGULARIZATIONS.register("growing")
class Growing(Regularization):
    """A squared penalty, on the units that are to be removed alone, which grows from event to event.

    The penalty of a group is ``lambda / 2 * sum_k |w_k|^2`` over these units. Lambda rises linearly from 0 after an
    event to its largest value at the next, so ``progress ** 2`` of the strength has acted on the way. The step is the
    exact solution of ``dw/dt = -lambda w``: ``w_k <- w_k * exp(-amount)``. Without gradients a unit arrives at the
    event with ``exp(-strength)`` of its weights.

    The paper raises lambda by a constant every few iterations up to a ceiling; here the way to the event is what it
    rises over.

    References:
        Wang et al. 2021, "Neural Pruning via Growing Regularization" (GReg-1, equations 2 to 4).
    """

    strength = 3.0
    chooses = True
    reads_norms = False

    def passed(self, progress: float) -> float:
        """Return the square of the progress: the penalty rises linearly."""
        return progress * progress

    def penalty(self, norms: Tensor, leaving: Tensor) -> Tensor:
        """Return half of the sum of the squared norms of the units that are to be removed."""
        return 0.5 * norms[leaving].square().sum()

    def factors(self, norms: Tensor, leaving: Tensor, amount: float) -> Tensor:
        """Return ``exp(-amount)`` for the units that are to be removed, 1 for others."""
        decay = torch.full_like(norms, -amount).exp_()
        return torch.where(leaving, decay, torch.ones_like(norms))


def entries_of_units(units: Tensor, number: int) -> Tensor:
    """Return which indices of a dimension belong to each unit.

    Args:
        units: Units of each index, ``[width, n]``, int64; ``number`` where an index has fewer than n.
        number: How many units there are.

    Returns:
        ``[number, m]``, int64; ``width`` where a unit has fewer than m indices.
    """
    width = len(units)
    index = torch.arange(width, device=units.device)[:, None].expand_as(units)
    known = units < number
    unit, index = units[known], index[known]
    order = torch.argsort(unit, stable=True)
    unit, index = unit[order], index[order]
    counts = torch.bincount(unit, minlength=number)
    first = counts.cumsum(0) - counts
    found = torch.full((number, int(counts.max())), width, dtype=torch.long, device=units.device)
    found[unit, torch.arange(len(unit), device=units.device) - first[unit]] = index
    return found


def unit_norms(tensors: Sequence[Tensor], dims: Sequence[int], entries: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each unit over all tensors that hold a part of it.

    Args:
        tensors: Parameters, ``[..., width, ...]``; at least one.
        dims: The dimension of each that counts its channels.
        entries: What :func:`entries_of_units` returned for each.

    Returns:
        ``[units]``, float32 at least. Deterministic on every device: sums run over gathered rows.
    """
    squares: list[Tensor] = []
    doubles = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if doubles else torch.float32
    for tensor, dim, index in zip(tensors, dims, entries, strict=True):
        others = [d for d in range(tensor.ndim) if d != dim % tensor.ndim]
        # with no dimension left to sum over, torch would sum over all
        norms = torch.linalg.vector_norm(tensor, dim=others, dtype=dtype) if others else tensor.to(dtype)
        squares.append(torch.cat([norms.square(), norms.new_zeros(1)])[index].sum(1))
    return torch.stack(squares).sum(0).sqrt()


def scale_units(tensor: Tensor, dim: int, units: Tensor, factors: Tensor) -> None:
    """Multiply a tensor by the factor of the unit that each index of a dimension belongs to, in place.

    Args:
        tensor: ``[..., width, ...]``.
        dim: The dimension that counts its channels.
        units: Units of each index, ``[width, n]``, int64; the number of units where an index has fewer than n. An index
            that leaves with any of several units is scaled by the smallest of their factors.
        factors: ``[units]``.
    """
    each = torch.cat([factors, factors.new_ones(1)])[units].amin(1)
    shape = [1] * tensor.ndim
    shape[dim] = -1
    tensor.mul_(each.to(tensor.dtype).view(shape))
