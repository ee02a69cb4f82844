"""Weights that make up for others: what rounding or pruning some of them costs, the others take over.

A layer computes ``W x``. With the sum of ``x xᵀ`` over its inputs (:class:`~lightning_optim.functional.statistics.
InputSecondMoment`) the squared error of its outputs is a quadratic function of W, whose Hessian ``H = 2 Σ x xᵀ`` all
rows share. Columns are settled from left to right; after each, the columns that are not settled yet take the step that
minimizes the error (the optimal brain surgeon's), which the Cholesky factor of H's inverse holds for all columns.
"""

from collections.abc import Callable
from math import floor

import torch
from torch import Tensor

from lightning_optim.functional.fake_quantize import grouped, integer_range, parse_weight_granularity, weight_scale
from lightning_optim.functional.group_scales import to_float16

__all__ = ["BLOCK", "inverse_factor", "output_error", "prune_columns", "round_columns", "settle_columns"]

BLOCK = 128
"""Columns whose updates are carried out one by one before the columns behind them get all at once."""

_DEPENDENT = 1e-9
"""Part of an input's energy that the inputs before it do not explain, below which it is noise of the sums."""

Settle = Callable[[int, Tensor], Tensor]
"""``settle(column, block) -> values``: the values of a column, given it and the rest of its block, up to date."""


def inverse_factor(moment: Tensor, damping: float = 0.01) -> Tensor:
    """Return the upper triangular U with ``UᵀU = H⁻¹``.

    Row i of U, divided by its diagonal, is how the columns behind i answer to an error in column i when those before it
    are settled.

    Args:
        moment: ``[n, n]``, the sum of ``x xᵀ``; an input that was always zero counts as independent of the others.
        damping: Fraction of the mean diagonal that is added to the diagonal, >= 0.

    Returns:
        ``[n, n]`` in float64 (float32 on devices without it).

    Raises:
        ValueError: If the moment is not finite, or singular without damping.

    References:
        Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        section 3.
    """
    hessian = moment.to(_precision(moment), copy=True)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the layer's inputs are not all finite numbers.")
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = float(diagonal.mean()) or 1.0
    diagonal.add_(damping * float(diagonal.mean()))
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed) or bool((lower.diagonal().square() < _DEPENDENT * hessian.diagonal()).any()):
        raise ValueError(
            f"the inputs of the layer are linearly dependent and damping={damping} is too little for them. Pass a "
            "larger `damping` (0.01 is usual), or more data."
        )
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def settle_columns(matrix: Tensor, factor: Tensor, settle: Settle, *, width: int = BLOCK) -> Tensor:
    """Settle the columns of a matrix from left to right; those that are not settled make up for those that are.

    Args:
        matrix: ``[rows, n]`` in the factor's dtype; not modified.
        factor: As :func:`inverse_factor` returns it.
        settle: Returns the values ``[rows]`` of a column. It gets the column's number and ``[rows, m]``: the column and
            what follows it in its block, as they are after the steps so far.
        width: Columns of a block; the result does not depend on it but for what ``settle`` sees.

    Returns:
        The settled matrix.
    """
    columns = matrix.t().contiguous().clone()  # a column's values side by side
    for start in range(0, len(columns), width):
        block = columns[start : start + width]
        stop = start + len(block)
        errors = torch.empty_like(block)
        for place in range(len(block)):
            column = start + place
            values = settle(column, block[place:].t())
            errors[place] = (block[place] - values) / factor[column, column]
            block[place + 1 :].addr_(factor[column, column + 1 : stop], errors[place], alpha=-1)
            block[place] = values
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return columns.t()


def round_columns(
    weight: Tensor,
    moment: Tensor,
    bits: int,
    granularity: str,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
) -> Tensor:
    """Round a weight so that the error of the layer's outputs, rather than that of each weight, is small.

    Scales are those of :func:`~lightning_optim.functional.fake_quantize.weight_scale`: of the weight as it is, or for
    groups of the group's columns when the first of them is reached. The largest weight of a scale gets the largest
    integer, whatever is made up for by then, so that scales and integers are found again in what is returned. Zeros
    stay zero: they may be a mask's.

    Args:
        weight: ``[out, n]``, or ``[out, in, ...]`` with n inputs of a row in all; any float dtype.
        moment: ``[n, n]``, the sum of ``x xᵀ``.
        bits: 2 to 8.
        granularity: What shares a scale.
        damping: As for :func:`inverse_factor`.
        activation_order: Settle the columns in the order of their inputs' energy, largest first, instead of from left
            to right. Scales are then those of the weight as it is.

    Returns:
        A tensor of the shape and dtype of ``weight``: integers times scales.

    References:
        Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
    """
    rows = weight.detach().reshape(len(weight), -1)
    precision = _precision(moment)
    order = moment.diagonal().argsort(descending=True, stable=True) if activation_order else None
    grid = _Grid(rows, bits, granularity, order)
    matrix = rows.to(precision)
    if order is not None:
        matrix, moment = matrix[:, order], moment[order][:, order]
    size = grid.size if grid.size < matrix.shape[1] else 1
    width = max(BLOCK // size, 1) * size
    settled = settle_columns(matrix, inverse_factor(moment, damping), grid.settle, width=width)
    if order is not None:
        settled = settled[:, order.argsort()]
    return settled.to(weight.dtype).reshape(weight.shape)


class _Grid:
    """The values that a column may take: integers times scales, where the largest weight of a scale stays largest."""

    def __init__(self, rows: Tensor, bits: int, granularity: str, order: Tensor | None) -> None:
        self.top = integer_range(bits, symmetric=True)[1]
        self.size = parse_weight_granularity(granularity)[1] or rows.shape[1]
        self._bits, self._granularity = bits, granularity
        self._kept = rows != 0
        self._dtype = rows.dtype
        self._order = order
        self._dynamic = self.size < rows.shape[1] and order is None
        magnitudes = grouped(rows, granularity).abs()
        self._place = magnitudes.argmax(2)
        if granularity == "per_tensor":
            first = magnitudes.amax((1, 2)).argmax()
            self._place[torch.arange(len(rows), device=rows.device) != first] = -1
        self._scale, self._largest = (each.expand_as(self._place).clone() for each in self._scales(rows))

    def _scales(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales of rows, float32 ``[rows, groups]``, and the values of their largest integers.

        Those values are numbers of the weight's dtype from which the same scales are found again.
        """
        scale = weight_scale(rows, self._bits, self._granularity)[..., 0]
        if not self._granularity.startswith("per_group"):
            magnitudes = grouped(rows, self._granularity).abs()
            shared = (0, 1, 2) if self._granularity == "per_tensor" else (2,)
            return scale, magnitudes.float().amax(shared, keepdim=True)[..., 0]
        largest = (scale * self.top).to(self._dtype).float()
        return to_float16(largest / self.top), largest

    def settle(self, number: int, block: Tensor) -> Tensor:
        column = number if self._order is None else int(self._order[number])
        group, place = divmod(column, self.size)
        if self._dynamic and place == 0:
            now = block[:, : self.size] * self._kept[:, column : column + self.size]
            scale, largest = self._scales(now.float())
            self._scale[:, group], self._largest[:, group] = scale[:, 0], largest[:, 0]
            self._place[:, group] = now.abs().argmax(1)
        largest, scale = (each[:, group].to(block.dtype) for each in (self._largest, self._scale))
        values = block[:, 0]
        integers = torch.div(values, scale).round_().clamp_(-self.top, self.top)
        ends = torch.where(values < 0, -self.top, self.top).to(integers.dtype)
        integers = torch.where(self._place[:, group] == place, ends, integers)
        # The largest exactly, rather than the scale times the largest integer: it may differ in the last bit.
        on_grid = torch.where(integers.abs() == self.top, integers.sign() * largest, integers * scale)
        return on_grid * (self._kept[:, column] & (largest > 0))


def prune_columns(
    weight: Tensor,
    moment: Tensor,
    sparsity: float,
    *,
    keep: tuple[int, int] | None = None,
    damping: float = 0.01,
) -> Tensor:
    """Set weights to zero and let those that stay make up for them.

    Which weights of a row go is decided block by block (n:m: group by group), when those before are settled: those
    whose removal costs least, ``w² / U_ii²``. What is zero stays zero, and counts.

    Args:
        weight: ``[rows, n]``, any float dtype.
        moment: ``[n, n]``, the sum of ``x xᵀ``.
        sparsity: Fraction of zeros, in [0, 1). Reached within one weight, by the matrix as a whole.
        keep: ``(n, m)``: n of each m consecutive columns stay in every row, whatever ``sparsity`` is.
        damping: As for :func:`inverse_factor`.

    Returns:
        A tensor of the shape and dtype of ``weight``.

    References:
        Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
    """
    matrix = weight.detach().to(_precision(moment))
    factor = inverse_factor(moment, damping)
    kept = weight.detach() != 0
    costs = factor.diagonal().square()
    width = BLOCK if keep is None else max(BLOCK // keep[1], 1) * keep[1]
    group = width if keep is None else keep[1]

    def settle(column: int, block: Tensor) -> Tensor:
        if column % group == 0:
            here = slice(column, min(column + group, matrix.shape[1]))
            scores = block[:, : here.stop - column].square() / costs[here]
            scores.masked_fill_(~kept[:, here], -1.0)
            if keep is None:
                gone = floor(sparsity * len(matrix) * here.stop + 0.5) - int((~kept[:, :column]).sum())
                kept[:, here] &= _all_but(scores.reshape(1, -1), gone).view_as(scores)
            else:
                kept[:, here] &= _all_but(scores, scores.shape[1] - keep[0])
        return block[:, 0] * kept[:, column]

    settled = settle_columns(matrix, factor, settle, width=width)
    return settled.to(weight.dtype)


def _all_but(scores: Tensor, number: int) -> Tensor:
    """Return masks ``[rows, n]`` without the lowest scores of each row, equal ones in their order."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    if number > 0:
        mask.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :number], False)
    return mask


def output_error(before: Tensor, after: Tensor, moment: Tensor) -> float:
    """Return the squared error of a layer's outputs as a fraction of their squares, over the inputs of the moment.

    Args:
        before: ``[out, in, ...]``.
        after: What it became, same shape.
        moment: ``[n, n]``, the sum of ``x xᵀ``.
    """
    error, whole = (
        float((rows @ moment).mul_(rows).sum())
        for rows in (matrix.detach().reshape(len(matrix), -1).to(moment.dtype) for matrix in (before - after, before))
    )
    return max(error, 0.0) / whole if whole > 0 else 0.0


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
