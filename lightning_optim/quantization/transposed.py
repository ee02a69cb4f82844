"""Transposed convolutions with rounded weights, whose outputs lie in dimension 1 of the weight."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim.checkpoint import layer_class
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.rounded import rounded_weight

__all__ = [
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "kernels_as_rows",
    "rows_as_kernels",
]


def kernels_as_rows(weight: Tensor, groups: int) -> Tensor:
    """Return a transposed convolution's weight ``[in, out / groups, ...]`` as ``[out, in / groups, ...]``.

    Args:
        weight: The weight; a view of it is returned where there is one group.
        groups: Groups of the convolution. Output ``i`` of group ``g`` is row ``g * out / groups + i``.

    Examples:
        >>> import torch
        >>> kernels_as_rows(torch.zeros(4, 3, 5), groups=2).shape
        torch.Size([6, 2, 5])
    """
    return _swapped(weight, groups)


def rows_as_kernels(rows: Tensor, groups: int) -> Tensor:
    """Return the rows of :func:`kernels_as_rows` as the layer stores its weight."""
    return _swapped(rows, groups)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return parts.transpose(1, 2).flatten(0, 1)


class _QuantizedConvTranspose(QuantizedLayer):
    convolve: Callable[..., Tensor]
    stride: tuple[int, ...]
    padding: Any
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    _output_padding: Any

    def quantized_weight(self) -> Tensor:
        """Return the weight ``[in, out / groups, ...]``, rounded or not by phase: one scale per output by default."""
        weight = self._parameters["weight"]
        assert weight is not None  # noqa: S101 - every convolution has one
        if not self._rounds_weight or self.weight_bits is None:
            return weight
        rows = kernels_as_rows(weight, self.groups)
        return rows_as_kernels(rounded_weight(rows, self.weight_bits, self.weight_granularity), self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Compute the transposed convolution, as the float layer does."""
        if self.quantization_phase == "off" and self.output_phase == "off":
            plain: Tensor = super().forward(input, output_size)
            return plain
        weight = self.quantized_weight()
        x = input if self.quantization_phase == "off" else self.quantized_input(input)
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        bias = self.quantized_bias()
        y = type(self).convolve(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)
        return self.quantized_output(y)

    def _rows(self) -> Tensor:
        return kernels_as_rows(super()._rows(), self.groups)


@layer_class
class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """A ConvTranspose1d; one scale per output channel by default."""

    convolve = staticmethod(F.conv_transpose1d)


@layer_class
class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """A ConvTranspose2d; one scale per output channel by default."""

    convolve = staticmethod(F.conv_transpose2d)


@layer_class
class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """A ConvTranspose3d; one scale per output channel by default."""

    convolve = staticmethod(F.conv_transpose3d)
