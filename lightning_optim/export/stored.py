"""Weights, biases and activations as integers, which a converted module holds.

Two custom operators stand for ONNX's QuantizeLinear and DequantizeLinear. The exporter's translation of PyTorch's fake
quantization supports neither the symmetric range (-127, 127) nor int8 weights in the file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim.functional.fake_quantize import (
    affine_parameters,
    finer_units,
    grouped,
    integer_range,
    weight_scale,
)

__all__ = [
    "DynamicQuantizer",
    "Quantizer",
    "StoredBias",
    "StoredWeight",
    "dequantize",
    "expand",
    "quantize",
    "quantize_dynamically",
]


@torch.library.custom_op("lightning_optim::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``round(x / scale) + zero_point``, clipped to the zero point's type: ONNX's QuantizeLinear."""
    ends = torch.iinfo(zero_point.dtype)
    return (torch.round(x / scale) + zero_point).clamp(ends.min, ends.max).to(zero_point.dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("lightning_optim::dequantize", mutates_args=())
def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """Return ``(integers - zero_point) * scale`` as float32, ``axis`` -1 for one scale: ONNX's DequantizeLinear."""
    shape = [1] * integers.ndim
    if axis >= 0:
        shape[axis] = -1
    shifted = integers.float() if zero_point is None else integers.float() - zero_point.float().reshape(shape)
    return shifted * scale.reshape(shape)


@dequantize.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    return torch.empty_like(integers, dtype=torch.float32)


@torch.library.custom_op("lightning_optim::expand", mutates_args=())
def expand(integers: Tensor, scale: Tensor) -> Tensor:
    """Return ``integers * scale`` as float32; ``scale`` has the first dimensions of ``integers``, or none."""
    return integers.float() * scale.float().reshape(*scale.shape, *[1] * (integers.ndim - scale.ndim))


@expand.register_fake
def _(integers: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(integers, dtype=torch.float32)


@torch.library.custom_op("lightning_optim::quantize_dynamically", mutates_args=())
def quantize_dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x`` as uint8, scale and zero point, by the range of ``x`` itself: ONNX's DynamicQuantizeLinear."""
    scale, zero_point = affine_parameters(*x.aminmax())
    zero_point = zero_point.to(torch.uint8)
    return quantize(x, scale, zero_point), scale, zero_point


@quantize_dynamically.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


class DynamicQuantizer(nn.Module):
    """Rounds a tensor to uint8 and back, with the range of each call."""

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``."""
        rounded: Tensor = dequantize(*quantize_dynamically(x), -1)
        return rounded


class Quantizer(nn.Module):
    """Rounds a tensor to uint8, or to int8 without a zero point, and back.

    With fewer than 8 bits it clips between two roundings: the first belongs to the layer before, the second to the
    layer after, and both still run with integers.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.to(torch.uint8))
        low, high = integer_range(bits, symmetric=False)
        offset, step = int(zero_point), float(scale)
        self.bounds = None if bits == 8 else ((low - offset) * step, (high - offset) * step)

    def count_from_zero(self) -> None:
        """Round to int8 with the zero point 0 from now on; the zero point must be that of a symmetric range."""
        self.register_buffer("zero_point", (self.zero_point.to(torch.int16) - 128).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``."""
        rounded = self._round(x)
        return rounded if self.bounds is None else self._round(rounded.clamp(*self.bounds))

    def _round(self, x: Tensor) -> Tensor:
        rounded: Tensor = dequantize(quantize(x, self.scale, self.zero_point), self.scale, self.zero_point, -1)
        return rounded


class StoredWeight(nn.Module):
    """A weight as int8, with its scales: ``[]``, ``[out]``, or, in float16, ``[out, groups]``.

    Attributes:
        is_packed: Whether it is stored in fewer than 8 bits.
        multiplies: Whether engines multiply it as it is stored, without unpacking it first (see ``packed.py``).
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    is_packed = False
    multiplies = False

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        granularity: str,
        factor: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """Round a weight.

        Args:
            weight: ``[out, in, ...]``.
            bits: 2 to 8.
            granularity: What shares a scale.
            factor: ``[out]``, multiplies the rows after rounding, as a BatchNorm does.
            scales: Trained ones, ``[out, 1, 1]`` or ``[1, 1, 1]``; default those that the weight gives.
        """
        super().__init__()
        self.transposed, self.folded = False, factor is not None
        groups = grouped(weight.detach().float(), granularity)
        scale, (low, high) = scales, integer_range(bits, symmetric=True)
        if scale is None:
            scale = weight_scale(weight, bits, granularity)
        integers = torch.div(groups, scale).round().clamp(low, high)
        self.grouped = granularity.startswith("per_group")
        spare = 1 if self.grouped or self.is_packed else finer_units(bits)
        integers, scale = integers * spare, scale / spare
        if factor is not None:
            factor = factor.view(-1, 1, 1)
            integers, scale = integers * factor.sign(), (scale * factor.abs()).clamp_min(torch.finfo().tiny)
        self.shape = weight.shape
        if not self.grouped:
            integers = integers.reshape(self.shape)
        self.axis = 0 if scale.numel() > 1 or self.grouped else -1
        shape = scale.shape[:2] if self.grouped else scale.shape[:1] if self.axis == 0 else ()
        self._hold(integers, scale.reshape(shape))
        if self.grouped and factor is None:
            self.register_buffer("scale", self.scale.to(torch.float16))  # they are numbers of it

    def _hold(self, integers: Tensor, scale: Tensor) -> None:
        self.register_buffer("integers", integers.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int8))

    def make_room(self, largest: Tensor) -> None:
        """Widen the scales of rows whose bias would not fit into int32: their weights are tiny."""
        if bool((largest <= self.scale).all()):
            return
        wider = torch.maximum(self.scale.expand_as(largest), largest)
        shape = (-1, *[1] * (self.integers.ndim - 1))
        self._hold((self.integers * (self.scale / wider).view(shape)).round(), wider)
        self.axis = 0

    def transpose(self) -> None:
        """Store ``[in, out]``: engines have an integer kernel for a MatMul with a constant on its right."""
        self._hold(self.integers.t(), self.scale)
        self.axis = 1 if self.axis == 0 else -1
        self.transposed = True

    def rearrange(self, integers: Tensor, scale: Tensor) -> None:
        """Hold the integers in another order, for another operation: their outputs stay in dimension 0."""
        self._hold(integers, scale)
        self.shape = integers.shape

    def rows(self, index: Tensor) -> Tensor:
        """Look up rows of integers, then scale them: ``[...] -> [..., size]``."""
        rows, scales = self.unscaled(index)
        if scales is None:
            return rows
        return rows * (scales if scales.ndim == 0 else scales.unsqueeze(-1))

    def unscaled(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Look up rows and their scales (``[]`` or ``[...]``), which are None if several share a row: it is scaled."""
        stored = F.embedding(index, self.integers.flatten(1))
        rows = self._whole(stored.reshape(*index.shape, *self.integers.shape[1:]))
        if self.axis < 0:
            return rows, self.scale
        scale = self.scale[:, None] if self.scale.ndim == 1 else self.scale
        scales = F.embedding(index, scale).float()
        if not self.grouped:
            return rows, scales.squeeze(-1)
        return (rows * scales.unsqueeze(-1)).flatten(-2)[..., : self.shape[1]], None

    def _whole(self, integers: Tensor) -> Tensor:
        """Return stored integers as floats."""
        return integers.float()

    def matrix(self) -> Tensor:
        """Return the weight in its original shape, cast and scaled, for a product computed in float.

        Engines do that once, when the file is loaded. ONNX Runtime 1.32 turns a DequantizeLinear before a MatMul into
        one that rounds the activations too (differences of 0.05 instead of 1e-6), and repeats it in every call before a
        convolution (2.0x the time of float).
        """
        if self.grouped:
            whole: Tensor = self._expanded(self.integers).flatten(1)
            return whole[:, : self.shape[1:].numel()].reshape(self.shape)
        return self._expanded(self.integers.t() if self.transposed else self.integers)

    def _expanded(self, integers: Tensor) -> Tensor:
        """Scale whole rows; an operation of its own, because the exporter would compute products of constants."""
        expanded: Tensor = expand(integers, self.scale)
        return expanded

    def forward(self) -> Tensor:
        """Return the dequantized weight as stored, for an integer kernel."""
        if self.grouped:
            return self.matrix()
        weight: Tensor = dequantize(self.integers, self.scale, self.zero_point, self.axis)
        return weight


class StoredBias(nn.Module):
    """A bias as int32 in units of input scale times weight scale, as integer kernels add it."""

    integers: Tensor
    scale: Tensor

    def __init__(self, bias: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("integers", torch.round(bias.double() / scale.double()).to(torch.int32))
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        """Return the dequantized bias."""
        bias: Tensor = dequantize(self.integers, self.scale, None, 0 if self.scale.ndim else -1)
        return bias
