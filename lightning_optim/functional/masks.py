"""Masks: which weights stay (True keeps), for single weights, rows, columns, blocks and n:m groups.

:func:`global_masks` makes the masks of the lowest scores, :func:`keep_bits` and :func:`apply_masks` set the others to
zero in place, :func:`pack_mask` stores them at one bit per weight.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_optim.functional.granularity import Granularity, Masks, number_kept, parse_granularity
from lightning_optim.functional.thresholds import ScoreReader, Scores, Shards, as_reader

__all__ = [
    "Granularity",
    "apply_masks",
    "global_masks",
    "keep_bits",
    "pack_mask",
    "parse_granularity",
    "sparsity_of",
    "unpack_mask",
]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def global_masks(
    scores: Mapping[str, Scores],
    sparsity: float,
    granularity: "str | Granularity" = "weight",
    *,
    previous: Mapping[str, Tensor] | None = None,
    shards: Shards | None = None,
) -> Masks:
    """Return the masks that remove the lowest scores of all tensors together.

    One threshold per layer is the same call with one entry. How many weights go, of ``n`` in all tensors together:

    - ``"weight"``: ``floor(sparsity * n + 0.5)``, exactly.
    - ``"row"``, ``"column"``, ``"RxC"``: whole units in the order of their mean score, as many as bring the number of
      zeros nearest to ``sparsity * n`` (the fewer, when two are as near): at most half a unit off.
    - ``"n:m"``: of each group ``floor(sparsity * m + 0.5)`` but never more than ``m - n``. A group that is padded
      loses that many less the padding. Groups do not compete with each other.

    Equal scores are removed in the order of the tensors and their flat order. For fixed scores the masks nest as
    ``sparsity`` grows.

    Args:
        scores: Name -> scores of the weight's shape, higher is kept; tensors or what
            :func:`~lightning_optim.functional.criteria.scores_of` returns. -inf counts as the lowest finite number.
        sparsity: Fraction of zero weights, in [0, 1).
        granularity: What is removed together, see :func:`parse_granularity`.
        previous: Name -> the mask before. What it removed stays removed, whatever the scores are now, and counts; if
            that is more than is asked, nothing else goes. A unit's mean score takes its removed weights as 0. A
            tensor without one was dense.
        shards: The other processes when each holds a part of every tensor (``"weight"``), or whole rows (``"n:m"``).

    Returns:
        Name -> new contiguous bool tensor of the scores' shape on their device.

    Raises:
        TypeError: If scores are not floating point.
        ValueError: If ``sparsity`` or ``granularity`` is not one; ``scores`` is empty; scores contain NaN; a tensor has
            too few dimensions for the granularity; ``previous`` has other shapes; or units are sharded.

    Examples:
        >>> scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 4.0]]), "b": torch.tensor([[2.0, 0.5]])}
        >>> global_masks(scores, 0.5)
        {'a': tensor([[ True, False],
                [False,  True]]), 'b': tensor([[ True, False]])}
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"`sparsity` must be a fraction in [0, 1), got {sparsity}. For 80 % zeros pass 0.8.")
    if isinstance(granularity, str):
        granularity = parse_granularity(granularity)
    if not scores:
        raise ValueError("there are no scores, so there is nothing to remove. Select at least one weight.")
    readers = {name: as_reader(name, tensor) for name, tensor in scores.items()}
    kept = {name: mask for name, mask in (previous or {}).items() if name in readers}
    for name, mask in kept.items():
        _check_previous(name, mask, readers[name])
    return granularity.masks(readers, sparsity, kept, shards)


def pack_mask(mask: Tensor) -> Tensor:
    """Return a mask at one bit per weight.

    Args:
        mask: bool of any shape, on any device.

    Returns:
        uint8 ``[ceil(n / 8)]`` on the CPU; the first weight is the lowest bit.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be bool, got {mask.dtype}.")
    return torch.from_numpy(np.packbits(mask.detach().cpu().reshape(-1).numpy(), bitorder="little"))


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask that :func:`pack_mask` packed, bool of the given shape on the CPU.

    Raises:
        ValueError: If the shape does not fit the number of bytes.
    """
    number = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-number // 8),):
        raise ValueError(
            f"a mask of shape {tuple(shape)} is packed in {-(-number // 8)} bytes (uint8), got {packed.dtype} of shape "
            f"{tuple(packed.shape)}: it belongs to another tensor."
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=number, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(tuple(shape))


def keep_bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as the integers that :func:`apply_masks` wants: all bits set where True, none where False.

    Args:
        mask: bool of any shape.
        dtype: Floating-point dtype of the weight.

    Returns:
        Integers as wide as ``dtype``, of the mask's shape and memory format. They take as much memory as the weight.

    Raises:
        TypeError: If ``mask`` is not bool or ``dtype`` not a floating-point dtype of 2, 4 or 8 bytes.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be bool, got {mask.dtype}.")
    if not dtype.is_floating_point or dtype.itemsize not in _INTEGERS:
        raise TypeError(f"masks apply to float16, bfloat16, float32 and float64 weights, got {dtype}.")
    return mask.to(_INTEGERS[dtype.itemsize]).neg_()


def apply_masks(weights: Iterable[Tensor], keeps: Iterable[Tensor]) -> None:
    """Set the removed weights to +0.0, in place and outside of autograd.

    What a removed weight was does not matter: NaN, infinity and negative numbers become +0.0 too. Per 10 M float32
    weights on one thread 2.6 ms, against 24 ms for multiplying by a bool mask. Quickest where ``keep`` has the
    memory format of its weight.

    Args:
        weights: Tensors or parameters of any memory format.
        keeps: For each one what :func:`keep_bits` returned for its dtype, of its shape and on its device.
    """
    for weight, keep in zip(weights, keeps, strict=True):
        weight.detach().view(keep.dtype).bitwise_and_(keep)


def sparsity_of(masks: Iterable[Tensor]) -> float:
    """Deprecated: the fraction of zeros over all masks together, 0.0 without any."""
    warnings.warn(
        "`sparsity_of` is deprecated since 0.2 and will be removed in 0.4. Take, for example, "
        "1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks).",
        FutureWarning,
        stacklevel=2,
    )
    kept, number = 0, 0
    for mask in masks:
        kept += number_kept(mask)
        number += mask.numel()
    return (number - kept) / number if number else 0.0


def _check_previous(name: str, mask: Tensor, reader: ScoreReader) -> None:
    if mask.dtype != torch.bool or mask.shape != reader.shape:
        raise ValueError(
            f"the previous mask of {name!r} must be bool of the shape {tuple(reader.shape)} of its scores, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
