"""The layout of GPTQ files: integers of at most 4 bits, eight in an int32, with a scale for each group of inputs.

Readers compute ``weight[o, i] = scales[g_idx[i], o] * (q[i, o] - (z[g_idx[i], o] + 1))``. Of eight consecutive values
the first is in the lowest four bits. ``q`` is packed along the inputs, ``z`` along the outputs, and ``z`` is stored
less one (version 1 of the layout, ``"checkpoint_format": "gptq"``).
"""

import torch
from torch import Tensor

__all__ = ["BITS", "gptq_misfit", "pack_gptq", "unpack_gptq"]

BITS = 4
"""Bits of an integer."""

PACKED = 32 // BITS
"""Integers in an int32."""

ZERO_POINT = 2 ** (BITS - 1)

LARGEST_STEP = 1e-3
"""Largest relative difference of a scale from its float16; below the smallest normal float16 it grows beyond that."""


def gptq_misfit(shape: torch.Size, group_size: int) -> str | None:
    """Return why a matrix of some shape has no place in the layout, None where it has.

    Args:
        shape: ``[out, in]``.
        group_size: Inputs that share a scale.
    """
    rows, columns = shape
    if columns % group_size:
        return f"its {columns} inputs are no multiple of the group of {group_size}"
    if rows % PACKED or columns % PACKED:
        return f"{rows} outputs and {columns} inputs must be multiples of {PACKED}, which one int32 holds"
    return None


def pack_gptq(integers: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Pack symmetric integers and their scales.

    Args:
        integers: ``[out, in]``, whole numbers from -8 to 7, any dtype.
        scales: ``[out, groups]``; groups are consecutive inputs of equal number.

    Returns:
        ``qweight`` int32 ``[in / 8, out]``, ``qzeros`` int32 ``[groups, out / 8]``, ``scales`` float16
        ``[groups, out]``, ``g_idx`` int32 ``[in]``.

    Raises:
        ValueError: If sizes do not fit (see :func:`gptq_misfit`), an integer is out of range, or a scale is no float16.

    Examples:
        >>> packed = pack_gptq(torch.arange(-8, 8).repeat(8, 1), torch.ones(8, 1))
        >>> f"{int(packed['qweight'][0, 0]) & 0xFFFFFFFF:08x}", f"{int(packed['qzeros'][0, 0]):x}"
        ('76543210', '77777777')
    """
    groups = scales.shape[1]
    misfit = gptq_misfit(integers.shape, integers.shape[1] // groups)
    if misfit is not None or integers.shape[1] % groups:
        raise ValueError(f"the matrix has no place in the GPTQ layout: {misfit or f'{groups} groups'}.")
    if integers.numel() and (int(integers.min()) < -ZERO_POINT or int(integers.max()) >= ZERO_POINT):
        raise ValueError(f"integers must be from {-ZERO_POINT} to {ZERO_POINT - 1}.")
    empty = (integers.reshape(len(integers), groups, -1) == 0).all(2)
    scales = torch.where(empty, 1.0, scales.float())  # of zeros any scale is right, and theirs is too small for float16
    half = scales.to(torch.float16)
    if not torch.allclose(half.float(), scales, rtol=LARGEST_STEP, atol=0.0):
        raise ValueError(
            f"scales from {float(scales.min()):.3g} to {float(scales.max()):.3g} do not fit into float16, which holds "
            "6e-5 to 65504."
        )
    columns = integers.shape[1]
    zeros = torch.full((groups, len(integers)), ZERO_POINT - 1)
    return {
        "qweight": _packed(integers.t().long() + ZERO_POINT, 0),
        "qzeros": _packed(zeros, 1),
        "scales": half.t().contiguous(),
        "g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
    }


def _packed(values: Tensor, dimension: int) -> Tensor:
    """Pack eight consecutive values of a dimension into one int32."""
    rows, columns = values.shape
    shape = (rows // PACKED, PACKED, columns) if dimension == 0 else (rows, columns // PACKED, PACKED)
    parts = values.cpu().reshape(shape).movedim(dimension + 1, -1)
    words = (parts << (BITS * torch.arange(PACKED))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_gptq(packed: dict[str, Tensor]) -> Tensor:
    """Return the weight ``[out, in]`` in float32 that a reader computes of a packed one.

    Args:
        packed: What :func:`pack_gptq` returns.
    """
    shifts = BITS * torch.arange(PACKED)
    q = (packed["qweight"].long()[:, None, :] >> shifts[None, :, None]) & (2**BITS - 1)
    z = (packed["qzeros"].long()[:, :, None] >> shifts) & (2**BITS - 1)
    groups = packed["g_idx"].long()
    integers = q.flatten(0, 1) - (z.flatten(1) + 1)[groups]
    weight: Tensor = (packed["scales"].float()[groups] * integers).t().contiguous()
    return weight
