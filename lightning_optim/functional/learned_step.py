"""Steps (scales) and zero points that are trained with the weights.

A parameter holds the logarithm of a step over where it began. So a step stays positive, an optimizer that normalizes
gradients (Adam) changes it by a fraction of itself whatever its size, and weight decay draws it back to where it began.
The gradient that the parameter gets is the paper's, divided by the step: one step of SGD moves the step by as much as
if it was the parameter itself.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_optim.functional.fake_quantize import SMALLEST_SCALE, grouped, integer_range, symmetric_scale

__all__ = ["first_step", "learned_fake_quantize", "learned_fake_quantize_weight", "learned_step", "learned_zero_point"]


def first_step(weight: Tensor, bits: int = 8, granularity: str = "per_channel") -> Tensor:
    """Return the steps that the training of a weight's steps begins with.

    They are ``2 mean|w| / sqrt(Q)``, Q the largest integer, but at most the step that clips nothing: with 8 bits the
    former is five times as large, with 4 and fewer it clips the largest weights.

    Args:
        weight: ``[out, in, ...]``, any float dtype.
        bits: 2 to 8.
        granularity: "per_channel" or "per_tensor".

    Returns:
        float32 steps ``[out]`` or ``[1]``.

    References:
        Esser et al. 2020, "Learned Step Size Quantization", section 2.1.
    """
    largest = symmetric_scale(weight, bits, granularity)
    groups = grouped(weight.detach().float(), granularity).abs()
    mean = groups.mean() if granularity == "per_tensor" else groups.mean(2, keepdim=True)
    _, top = integer_range(bits, symmetric=True)
    return torch.minimum(largest, 2 * mean / math.sqrt(top)).clamp_min(SMALLEST_SCALE).flatten()


def learned_step(log_step: Tensor, first: Tensor) -> Tensor:
    """Return ``first * exp(log_step)`` in float32; ``log_step`` gets the gradient of the step divided by the step.

    Args:
        log_step: The parameter, any shape and float dtype.
        first: Where the step began, of that shape.
    """
    step: Tensor = _Step.apply(log_step, first)  # type: ignore[no-untyped-call]
    return step


def learned_zero_point(offset: Tensor, first: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return a zero point, a whole number in float32, from the fraction of the range that it moved by.

    Args:
        offset: The parameter: how far the range moved, in units of its length; any shape.
        first: Where the zero point began, in ``[0, 2^bits - 1]``.
        step: The step.
        bits: 2 to 8.

    Returns:
        ``first + offset * (2^bits - 1)``, rounded and clipped, so that zero stays exact. One step of SGD moves the
        lower end of the range by as much as if it was the parameter itself. No gradient moves a zero point that is at
        an end beyond it.
    """
    zero_point: Tensor = _ZeroPoint.apply(offset, first, step, integer_range(bits, symmetric=False)[1])  # type: ignore[no-untyped-call]
    return zero_point


def learned_fake_quantize(
    x: Tensor, step: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int, gradient_scale: float
) -> Tensor:
    """Round to the values of the integers, with gradients for the step and the zero point too.

    The step's gradient is ``round(x / s) - x / s`` for what lies between the ends of the range, and the integer that it
    is clipped to for the rest; the zero point's is 0 between them and ``-s`` outside. Both are summed over what shares
    them and multiplied with ``gradient_scale``.

    Args:
        x: Any shape and float dtype.
        step: float32, broadcastable to ``x``.
        zero_point: Integer(s), in a float dtype if they are trained.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        gradient_scale: The paper's ``1 / sqrt(N * quant_max)``: N the weights that share a step, or the features of an
            activation.

    Returns:
        As :func:`~lightning_optim.functional.fake_quantize.fake_quantize`; the gradient of ``x`` is 1 between the ends
        of the range and 0 outside.

    References:
        Esser et al. 2020, "Learned Step Size Quantization" (steps); Bhalgat et al. 2020, "LSQ+: Improving low-bit
        quantization through learnable offsets and better initialization" (zero points).

    Examples:
        >>> x, step = torch.tensor([0.6, 5.0]), torch.tensor(1.0, requires_grad=True)
        >>> learned_fake_quantize(x, step, 0, -3, 3, 1.0).sum().backward()
        >>> step.grad  # (1 - 0.6) + 3
        tensor(3.4000)
    """
    zero = torch.as_tensor(zero_point, device=x.device)
    rounded: Tensor = _Learned.apply(x, step, zero, quant_min, quant_max, gradient_scale)  # type: ignore[no-untyped-call]
    return rounded


def learned_fake_quantize_weight(weight: Tensor, step: Tensor, bits: int, granularity: str) -> Tensor:
    """Fake-quantize a weight symmetrically with steps that are trained.

    Args:
        weight: ``[out, in, ...]``.
        step: ``[out]`` or ``[1]``, as :func:`first_step` returns them.
        bits: 2 to 8.
        granularity: "per_channel" or "per_tensor".

    Returns:
        A tensor of the shape and dtype of ``weight``.
    """
    low, high = integer_range(bits, symmetric=True)
    groups = grouped(weight, granularity)
    sharing = weight.numel() // max(step.numel(), 1)
    scale = 1 / math.sqrt(max(sharing, 1) * high)
    return learned_fake_quantize(groups, step.view(-1, 1, 1), 0, low, high, scale).reshape(weight.shape)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_step: Tensor, first: Tensor) -> Tensor:
        step = first * log_step.float().exp()
        ctx.save_for_backward(step)
        ctx.dtype = log_step.dtype
        return step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (step,) = ctx.saved_tensors
        return (gradient / step).to(ctx.dtype), None


class _ZeroPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, offset: Tensor, first: Tensor, step: Tensor, top: int) -> Tensor:
        moved = torch.round(first + offset.float() * top).clamp(0, top)
        ctx.save_for_backward(moved, step)
        ctx.top, ctx.dtype = top, offset.dtype
        return moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        moved, step = ctx.saved_tensors
        beyond = ((moved <= 0) & (gradient > 0)) | ((moved >= ctx.top) & (gradient < 0))
        passed = torch.where(beyond, 0.0, gradient) / (step.square() * ctx.top)
        return passed.to(ctx.dtype), None, None, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.bounds, ctx.gradient_scale = (quant_min, quant_max), gradient_scale
        integers = torch.div(x.float(), step).round_().add_(zero_point)
        return integers.clamp_(quant_min, quant_max).sub_(zero_point).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, step, zero_point = ctx.saved_tensors
        low, high = ctx.bounds
        scaled = x.float() / step
        integers = scaled.round() + zero_point
        inside = (scaled + zero_point > low) & (scaled + zero_point < high)
        wanted = gradient.float()
        of_x = torch.where(inside, wanted, 0.0).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_step = of_zero = None
        if ctx.needs_input_grad[1]:
            missed = torch.where(inside, integers - zero_point - scaled, integers.clamp(low, high) - zero_point)
            of_step = (wanted * missed).sum_to_size(step.shape) * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            shifted = torch.where(inside, 0.0, -step)
            of_zero = (wanted * shifted).sum_to_size(zero_point.shape) * ctx.gradient_scale
        return of_x, of_step, of_zero, None, None, None
