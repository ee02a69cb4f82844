"""Fake quantization: numbers rounded to a few bits, with gradients that pass through the rounding.

Rounding is half to even, like ONNX's QuantizeLinear. Zero is always exact, so the zeros of a mask stay zero.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_optim.functional.group_scales import MOST_SEARCHED_BITS, least_squares_scale, to_float16

__all__ = [
    "LARGEST_BIAS",
    "affine_parameters",
    "dynamic_fake_quantize",
    "fake_quantize",
    "fake_quantize_bias",
    "fake_quantize_weight",
    "finer_units",
    "integer_range",
    "parse_weight_granularity",
    "straight_through",
    "symmetric_parameters",
    "symmetric_scale",
    "weight_scale",
]

FEWEST_BITS, MOST_BITS = 2, 8
LARGEST_BIAS = 2**30
"""Largest int32 bias; leaves as much room for the products that are added to it."""

SMALLEST_SCALE = 1e-12
"""Scale of an all-zero tensor, for which any positive scale is right."""


def integer_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and largest integer for a number of bits.

    Args:
        bits: 2 to 8.
        symmetric: ``(-(2^(b-1) - 1), 2^(b-1) - 1)`` for weights, else ``(0, 2^b - 1)`` for activations.

    Raises:
        ValueError: If ``bits`` is not a whole number in the range.

    Examples:
        >>> integer_range(8, symmetric=True), integer_range(8, symmetric=False), integer_range(2, symmetric=True)
        ((-127, 127), (0, 255), (-1, 1))
    """
    if type(bits) is not int or not FEWEST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"bits must be a whole number from {FEWEST_BITS} to {MOST_BITS}, got {bits!r}.")
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**bits - 1)


def parse_weight_granularity(text: str) -> tuple[str, int]:
    """Return what shares a scale, and the group size (0 for the others).

    Args:
        text: ``"per_tensor"``, ``"per_channel"`` (a row of dimension 0), or ``"per_group:32"`` (32 consecutive inputs
            of a row).

    Raises:
        ValueError: If it is none of these.

    Examples:
        >>> parse_weight_granularity("per_group:32")
        ('per_group', 32)
    """
    kind, _, size = str(text).partition(":")
    if text in ("per_tensor", "per_channel"):
        return text, 0
    if kind == "per_group" and size.isdecimal() and int(size) > 0:
        return kind, int(size)
    raise ValueError(
        f"weight granularity must be 'per_tensor', 'per_channel' or 'per_group:32' (32 inputs of a row share "
        f"a scale), got {text!r}."
    )


def symmetric_scale(weight: Tensor, bits: int = 8, granularity: str = "per_channel") -> Tensor:
    """Return the scales that map the largest magnitude to the largest integer.

    Args:
        weight: ``[out, in, ...]``, any float dtype.
        bits: 2 to 8.
        granularity: What shares a scale.

    Returns:
        float32 scales that broadcast over :func:`grouped` weights: ``[1, 1, 1]``, ``[out, 1, 1]`` or
        ``[out, groups, 1]``.

    References:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference".
    """
    _, top = integer_range(bits, symmetric=True)
    groups = grouped(weight.detach().float(), granularity).abs()
    shared = (0, 1, 2) if granularity == "per_tensor" else (2,)
    return groups.amax(shared, keepdim=True).clamp_min(SMALLEST_SCALE) / top


def weight_scale(weight: Tensor, bits: int = 8, granularity: str = "per_channel") -> Tensor:
    """Return the scales that a weight is rounded with.

    Groups have scales that are numbers of float16; with 4 bits or fewer they have the least squared rounding error (see
    :func:`~lightning_optim.functional.group_scales.least_squares_scale`) and may clip the largest weights. All others
    are those of :func:`symmetric_scale`.

    Args:
        weight: ``[out, in, ...]``, any float dtype.
        bits: 2 to 8.
        granularity: What shares a scale.

    Returns:
        As :func:`symmetric_scale`.
    """
    if not granularity.startswith("per_group"):
        return symmetric_scale(weight, bits, granularity)
    if bits > MOST_SEARCHED_BITS:
        return to_float16(symmetric_scale(weight, bits, granularity))
    integer_range(bits, symmetric=True)
    return least_squares_scale(grouped(weight.detach().float(), granularity), bits)


def grouped(weight: Tensor, granularity: str) -> Tensor:
    """View a weight as ``[out, groups, size]``; a short last group of a row is padded with zeros."""
    _, size = parse_weight_granularity(granularity)
    rows = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)
    if not size:
        return rows[:, None]
    padding = -rows.shape[1] % size
    padded = torch.nn.functional.pad(rows, (0, padding))
    return padded.view(len(padded), -1, size)


def affine_parameters(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a range, widened to include zero.

    Args:
        low: Smallest value, any shape.
        high: Largest value, same shape.
        bits: 2 to 8.

    Returns:
        float32 scale, and int32 zero point in ``[0, 2^bits - 1]``, so that zero is exact.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference".

    Examples:
        >>> affine_parameters(torch.tensor(-1.0), torch.tensor(1.55), 8)
        (tensor(0.0100), tensor(100, dtype=torch.int32))
    """
    bottom, top = integer_range(bits, symmetric=False)
    low, high = low.float().clamp_max(0.0), high.float().clamp_min(0.0)
    scale = ((high - low) / (top - bottom)).clamp_min(SMALLEST_SCALE)
    zero_point = (bottom - torch.round(low / scale)).clamp(bottom, top).to(torch.int32)
    return scale, zero_point


def symmetric_parameters(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a range, widened to reach equally far to both sides of zero.

    Args:
        low: Smallest value, any shape.
        high: Largest value, same shape.
        bits: 2 to 8.

    Returns:
        float32 scale, and the int32 zero point ``2^(bits-1)``. Counted from there, integers have no zero point: with 8
        bits they are int8, -128 to 127, of which the range takes -127 to 127.

    References:
        Wu et al. 2020, "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
        section 3.1 (scale quantization).

    Examples:
        >>> symmetric_parameters(torch.tensor(-1.0), torch.tensor(1.27), 8)
        (tensor(0.0100), tensor(128, dtype=torch.int32))
    """
    _, top = integer_range(bits, symmetric=True)
    scale = (torch.maximum(-low.float(), high.float()) / top).clamp_min(SMALLEST_SCALE)
    return scale, torch.full_like(scale, top + 1, dtype=torch.int32)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
    """Round to the values of the integers, and pass gradients where nothing was clipped.

    Args:
        x: Any shape and float dtype.
        scale: float32, broadcastable to ``x``.
        zero_point: Integer(s), broadcastable to ``x``.
        quant_min: Smallest integer.
        quant_max: Largest integer.

    Returns:
        A tensor of the shape and dtype of ``x``, at most half a scale off inside the range. Applying it twice changes
        nothing. Its gradient is 1 inside the range and 0 outside (straight-through estimator).

    References:
        Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
    """
    rounded: Tensor = _StraightThrough.apply(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-untyped-call]
    return rounded


def dynamic_fake_quantize(x: Tensor, extremes: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Round to 8 bits with the range of the tensor itself, as ONNX's DynamicQuantizeLinear does.

    Args:
        x: Any shape and float dtype.
        extremes: Smallest and largest value of the whole tensor, if ``x`` is a part of it.

    Returns:
        A tensor of the shape and dtype of ``x``, at most half a scale off. The gradient passes through the rounding;
        the range counts as a constant.
    """
    if not x.numel():
        return x
    low, high = x.detach().float().aminmax() if extremes is None else extremes
    return fake_quantize(x, *affine_parameters(low, high), *integer_range(8, symmetric=False))


def fake_quantize_weight(
    weight: Tensor, bits: int = 8, granularity: str = "per_channel", *, largest: Tensor | None = None
) -> Tensor:
    """Fake-quantize a weight symmetrically with its own scales; zeros stay zero.

    No weight is clipped, but for groups of 4 bits and fewer (see :func:`weight_scale`).

    Args:
        weight: ``[out, in, ...]``.
        bits: 2 to 8.
        granularity: What shares a scale.
        largest: Largest magnitude of the whole tensor, if ``weight`` is a part of a tensor with one scale.

    Returns:
        A tensor of the shape and dtype of ``weight``; gradients pass unchanged (straight-through estimator).
    """
    rounded: Tensor = _RoundedWeight.apply(weight, bits, granularity, largest)  # type: ignore[no-untyped-call]
    return rounded


def fake_quantize_bias(bias: Tensor, unit: Tensor) -> Tensor:
    """Round a bias to whole multiples of a unit, as integer kernels add it to their int32 sums.

    Args:
        bias: ``[out]``.
        unit: Scale of the input times scale of the weight, ``[]`` or ``[out]``; where the bias would not fit into 31
            bits, it is wider.

    Returns:
        A tensor of the shape and dtype of ``bias``; gradients pass unchanged (straight-through estimator).
    """
    wide = bias.detach().double()
    step = torch.maximum(unit.double(), wide.abs() / LARGEST_BIAS)
    return straight_through(bias, (torch.round(wide / step) * step).to(bias.dtype))


def finer_units(bits: int) -> int:
    """Return by how much the integers of a weight are multiplied in an 8-bit container, where a bias is added to them.

    It is exact, and the bias counts in units of the scale, which is finer then. Fewer than 8 bits end at 64: two
    products with a uint8 fit into 16 bits, in which processors without VNNI add them.
    """
    return int(2 ** max(7 - bits, 0))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded`` with the gradient of ``x``, which has its shape."""
    passed: Tensor = _Passed.apply(x, rounded)  # type: ignore[no-untyped-call]
    return passed


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _RoundedWeight(torch.autograd.Function):
    """The gradient passes unchanged, also where a group's scale clips, and nothing is saved for it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, granularity: str, largest: Tensor | None) -> Tensor:
        groups = grouped(weight.float(), granularity)
        low, high = integer_range(bits, symmetric=True)
        if largest is None:
            scale = weight_scale(weight, bits, granularity)
        else:
            scale = largest.float().clamp_min(SMALLEST_SCALE) / high
        integers = torch.div(groups, scale).round_()
        if granularity.startswith("per_group"):
            integers.clamp_(low, high)
        rounded = integers.mul_(scale).flatten(1)
        numel = weight[0].numel() if weight.ndim > 1 else weight.numel()
        return rounded[:, :numel].reshape(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


class _StraightThrough(torch.autograd.Function):
    """Passes gradients where nothing was clipped.

    ``hardtanh_backward`` reads that from the float integers: creating and applying a bool mask takes six times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
        integers = torch.div(x.float(), scale).round_().add_(zero_point)
        ctx.save_for_backward(integers)
        ctx.bounds = quant_min - 0.5, quant_max + 0.5
        return integers.clamp(quant_min, quant_max).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (integers,) = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(gradient.to(integers.dtype), integers, *ctx.bounds)
        return inside.to(gradient.dtype), None, None, None, None
