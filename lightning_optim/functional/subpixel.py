"""A transposed convolution as a plain one: each place of the stride is a channel, which a reordering puts in its place.

Engines have integer kernels for convolutions, and none for transposed ones. Output place ``m * stride + r`` of a
transposed convolution reads the taps ``r, r + stride, ...`` of its kernel, so a convolution with ``stride`` times the
channels and ``ceil(kernel / stride)`` taps computes all of them, with the same products.

References:
    Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?", arXiv 1609.07009.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["arrange_places", "place_padding", "subpixel_kernel", "subpixel_vector"]


def subpixel_kernel(rows: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return the kernel of the plain convolution.

    Args:
        rows: ``[out, in / groups, *kernel]``, a transposed convolution's weight with its outputs first.
        groups: Groups of the convolution.
        stride: For each dimension of the kernel.
        dilation: For each dimension of the kernel; the places between two taps become zeros.

    Returns:
        ``[out * places, in / groups, *taps]``, where ``places`` is the product of the strides: in each group the
        outputs of the first place, then those of the second.
    """
    dims = len(stride)
    for dim, step in enumerate(dilation, 2):
        if step > 1:
            rows = pad(rows.unsqueeze(dim + 1), _last(dims + 1 - dim, step - 1)).flatten(dim, dim + 1)
            rows = rows.narrow(dim, 0, rows.shape[dim] - step + 1)
    missing = [-size % step for size, step in zip(rows.shape[2:], stride, strict=True)]
    rows = pad(rows, [side for size in reversed(missing) for side in (0, size)])
    for dim, step in enumerate(stride):
        rows = _split(rows, 2 + 2 * dim, step).flip(2 + 2 * dim)
    taps, places = range(3, 3 + 2 * dims, 2), range(4, 4 + 2 * dims, 2)
    rows = _split(rows, 0, rows.shape[0] // groups).permute(0, *places, 1, 2, *taps)
    return rows.flatten(0, dims + 1).contiguous()


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """Split a dimension into ``[..., parts, size, ...]``."""
    return x.reshape(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])


def _last(dim_from_end: int, size: int) -> list[int]:
    """Return what ``pad`` takes to put ``size`` zeros at the end of one dimension, counted from the last."""
    return [0, 0] * dim_from_end + [0, size]


def subpixel_vector(values: Tensor, groups: int, places: int) -> Tensor:
    """Return a value per output ``[out]`` as one per channel of the plain convolution, ``[out * places]``."""
    return values.view(groups, 1, -1).expand(-1, places, -1).flatten()


def place_padding(kernel: int, stride: int, padding: int, dilation: int, output_padding: int) -> tuple[int, int, int]:
    """Return how the plain convolution is padded in one dimension, and what of its result is cut.

    Args:
        kernel: Size of the transposed convolution's kernel.
        stride: Its stride.
        padding: Its padding.
        dilation: Its dilation.
        output_padding: Its output padding.

    Returns:
        The padding on both sides, the places that are cut at the beginning, and those at the end.

    Examples:
        >>> place_padding(2, 2, 0, 1, 0), place_padding(4, 2, 1, 1, 0)
        ((0, 0, 0), (1, 1, 1))
    """
    kernel = (kernel - 1) * dilation + 1
    taps = -(-kernel // stride)
    sides = max(0, taps - 1 - padding // stride, -(-(kernel + output_padding - padding) // stride) - 1)
    start = padding + stride * (sides - taps + 1)
    end = stride * (2 * sides - taps + 2) + 2 * padding - kernel - output_padding - start
    return sides, start, end


def arrange_places(y: Tensor, groups: int, stride: Sequence[int]) -> Tensor:
    """Put the channels of the plain convolution in their places.

    The channels are moved last, where engines have them anyway, so that runs of them are copied.

    Args:
        y: ``[batch, out * places, *sizes]``.
        groups: Groups of the convolution.
        stride: For each dimension.

    Returns:
        ``[batch, out, *sizes * stride]``.
    """
    dims = len(stride)
    if max(stride) == 1:
        return y
    sizes = y.shape[2:]
    last = y.permute(0, *range(2, dims + 2), 1).reshape(y.shape[0], *sizes, groups, *stride, -1)
    order = [each for dim in range(dims) for each in (1 + dim, 2 + dims + dim)]
    placed = last.permute(0, *order, 1 + dims, 2 + 2 * dims)
    grown = placed.reshape(y.shape[0], *(size * step for size, step in zip(sizes, stride, strict=True)), -1)
    return grown.permute(0, dims + 1, *range(1, dims + 1))
