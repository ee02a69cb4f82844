"""Masks: which weights stay (True keeps), for single weights, rows, columns, blocks and n:m groups.

:func:`global_masks` makes the masks of the lowest scores, :func:`keep_bits` and :func:`apply_masks` set the others to
zero in place, :func:`pack_mask` stores them at one bit per weight.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_optim.functional.thresholds import (
    ScoreReader,
    Scores,
    Shards,
    as_reader,
    keep_largest,
    nan_error,
    smallest,
)

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

Masks = dict[str, Tensor]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GROUPED_AT_ONCE = 1 << 20


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


def parse_granularity(text: str) -> "Granularity":
    """Return what is removed together.

    - ``"weight"``: single weights.
    - ``"row"``: all weights with the same index in dimension 0: those of an output neuron or filter.
    - ``"column"``: all weights with the same index in dimension 1: those that read an input feature or channel.
    - ``"RxC"`` such as ``"4x4"``: blocks of the matrix ``[out, in * kernel]``; those at its edges may be smaller.
    - ``"n:m"`` such as ``"2:4"``: n of each m consecutive weights in a row of ``[out, in * kernel]`` stay. For a
      convolution that is the order of ``torch.nn.functional.unfold``: input channel outermost, then kernel row, then
      kernel column. When the row is no multiple of m its last group is padded, the padding counts as removed first,
      and so ``min(n, its size)`` weights of it stay at the end.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is none of them.
    """
    if not isinstance(text, str):
        raise TypeError(f"granularity is a text such as '2:4', got {text!r}. In YAML it must be quoted: '2:4'.")
    for pattern, make in _FORMS:
        match = re.fullmatch(pattern, text)
        if match:
            return make(*map(int, match.groups()))
    raise ValueError(
        f"`granularity` must be 'weight', 'row', 'column', 'RxC' such as '4x4', or 'n:m' such as '2:4', got {text!r}."
    )


class Granularity(ABC):
    """What is removed together; ``str()`` gives the text it was parsed from."""

    @property
    def final_sparsity(self) -> float | None:
        """The sparsity that the granularity itself fixes (n:m), or None where it is free."""
        return None

    @abstractmethod
    def masks(
        self,
        readers: Mapping[str, ScoreReader],
        sparsity: float,
        kept: Mapping[str, Tensor],
        shards: Shards | None,
    ) -> Masks:
        """Return the masks as :func:`global_masks` does, for arguments that it has checked."""


@dataclass(frozen=True)
class _Weight(Granularity):
    def __str__(self) -> str:
        return "weight"

    def masks(
        self,
        readers: Mapping[str, ScoreReader],
        sparsity: float,
        kept: Mapping[str, Tensor],
        shards: Shards | None,
    ) -> Masks:
        number = sum(reader.shape.numel() for reader in readers.values())
        removed = sum(mask.numel() - _number_kept(mask) for mask in kept.values())
        if shards is not None:
            number, removed = shards.sum(torch.tensor([number, removed])).tolist()
        count = max(_round_half_up(sparsity * number), removed)
        scores = _with_removed(readers, kept)
        return keep_largest(scores, smallest(scores, count, shards=shards), shards=shards)


class _Units(Granularity):
    """Units of several weights that compete by their mean score."""

    _dimensions = 1

    def masks(
        self,
        readers: Mapping[str, ScoreReader],
        sparsity: float,
        kept: Mapping[str, Tensor],
        shards: Shards | None,
    ) -> Masks:
        if shards is not None:
            raise ValueError(f"granularity {str(self)!r} needs whole tensors, got shards. Gather the scores first.")
        units = [self._means_and_sizes(name, reader, kept.get(name)) for name, reader in readers.items()]
        means, sizes = (torch.cat(column) for column in zip(*units, strict=True))
        number = sum(reader.shape.numel() for reader in readers.values())
        removed = number - int(sizes.sum())
        keep = _keep_units(means, sizes, sparsity * number - removed)
        masks = {}
        parts = torch.split(keep, [len(mean) for mean, _ in units])
        for (name, reader), part in zip(readers.items(), parts, strict=True):
            mask = self._expand(part.to(reader.device), reader.shape)
            masks[name] = (mask & kept[name] if name in kept else mask).contiguous()
        return masks

    def _means_and_sizes(self, name: str, reader: ScoreReader, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return each unit's mean score and how many of its weights are there still, both on the CPU."""
        _check_dimensions(self, name, reader.shape, self._dimensions)
        scores = _finite(name, reader.read(0, reader.shape.numel())).view(reader.shape)
        everything = torch.ones_like(scores, dtype=torch.bool)
        if kept is not None:
            scores = scores.masked_fill(~kept, 0.0)
        means = self._sums(scores.double()) / self._sums(everything.long())
        return means.cpu(), self._sums((everything if kept is None else kept).long()).cpu()

    @abstractmethod
    def _sums(self, values: Tensor) -> Tensor:
        """Return the sum over each unit, ``[units]``."""

    @abstractmethod
    def _expand(self, unit_mask: Tensor, shape: torch.Size) -> Tensor:
        """Return the mask of the weights from ``[units]``."""


@dataclass(frozen=True)
class _Row(_Units):
    def __str__(self) -> str:
        return "row"

    def _sums(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1).sum(1)

    def _expand(self, unit_mask: Tensor, shape: torch.Size) -> Tensor:
        return unit_mask.view(-1, *[1] * (len(shape) - 1)).expand(shape)


@dataclass(frozen=True)
class _Column(_Units):
    _dimensions = 2

    def __str__(self) -> str:
        return "column"

    def _sums(self, values: Tensor) -> Tensor:
        return values.transpose(0, 1).reshape(values.shape[1], -1).sum(1)

    def _expand(self, unit_mask: Tensor, shape: torch.Size) -> Tensor:
        return unit_mask.view(-1, *[1] * (len(shape) - 2)).expand(shape)


@dataclass(frozen=True)
class _Block(_Units):
    rows: int
    columns: int

    _dimensions = 2

    def __post_init__(self) -> None:
        if not (self.rows and self.columns):
            raise ValueError(f"a block must have at least one row and one column, got '{self}'.")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def _sums(self, values: Tensor) -> Tensor:
        matrix = values.flatten(1)
        height, width = matrix.shape
        padded = pad(matrix, (0, -width % self.columns, 0, -height % self.rows))
        blocks = padded.reshape(-(-height // self.rows), self.rows, -(-width // self.columns), self.columns)
        return blocks.sum((1, 3)).flatten()

    def _expand(self, unit_mask: Tensor, shape: torch.Size) -> Tensor:
        height, width = shape[0], math.prod(shape[1:])
        blocks = unit_mask.view(-(-height // self.rows), -(-width // self.columns))
        mask = blocks.repeat_interleave(self.rows, 0)[:height].repeat_interleave(self.columns, 1)[:, :width]
        return mask.reshape(shape)


@dataclass(frozen=True)
class _NofM(Granularity):
    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"granularity 'n:m' keeps n of each m weights, 1 <= n < m, got '{self}'. For 50 % zeros pass '2:4'."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def final_sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def masks(
        self,
        readers: Mapping[str, ScoreReader],
        sparsity: float,
        kept: Mapping[str, Tensor],
        shards: Shards | None,
    ) -> Masks:
        removed = min(_round_half_up(sparsity * self.m), self.m - self.n)
        return {name: self._mask(name, reader, removed, kept.get(name)) for name, reader in readers.items()}

    def _mask(self, name: str, reader: ScoreReader, removed: int, kept: Tensor | None) -> Tensor:
        _check_dimensions(self, name, reader.shape, 2)
        mask = torch.empty(reader.shape, dtype=torch.bool, device=reader.device)
        matrix = mask.view(len(mask), -1)
        width = matrix.shape[1]
        first = 0
        for rows in torch.split(matrix, max(_GROUPED_AT_ONCE // max(width, 1), 1)):
            scores = _finite(name, reader.read(first * width, (first + len(rows)) * width)).view_as(rows)
            if kept is not None:
                scores = _removed_first(scores, kept.reshape(matrix.shape)[first : first + len(rows)])
            padded = pad(scores, (0, -width % self.m), value=-math.inf)
            groups = padded.view(len(rows), -(-width // self.m), self.m)
            rows.copy_((_ranks(groups) >= removed).flatten(1)[:, :width])
            first += len(rows)
        return mask if kept is None else (mask & kept).contiguous()


_FORMS: tuple[tuple[str, Callable[..., Granularity]], ...] = (
    ("weight", _Weight),
    ("row", _Row),
    ("column", _Column),
    (r"(\d+)x(\d+)", _Block),
    (r"(\d+):(\d+)", _NofM),
)


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
    """Return the fraction of zeros over all masks together, 0.0 when there are none.

    Args:
        masks: bool tensors, True keeps.
    """
    kept, number = 0, 0
    for mask in masks:
        kept += _number_kept(mask)
        number += mask.numel()
    return (number - kept) / number if number else 0.0


@dataclass(frozen=True)
class _WithRemoved:
    """Scores in which the weights removed before come first of all."""

    scores: ScoreReader
    kept: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.scores.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.scores.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.scores.device

    def read(self, start: int, stop: int, step: int = 1) -> Tensor:
        return _removed_first(self.scores.read(start, stop, step).to(self.dtype), self.kept[start:stop:step])


def _with_removed(readers: Mapping[str, ScoreReader], kept: Mapping[str, Tensor]) -> dict[str, ScoreReader]:
    return {
        name: _WithRemoved(reader, kept[name].reshape(-1)) if name in kept else reader
        for name, reader in readers.items()
    }


def _removed_first(scores: Tensor, kept: Tensor) -> Tensor:
    """Put -inf where a weight is removed, and the lowest finite number where a weight that is kept has -inf."""
    # The minimum with +inf or -inf takes 45 ms per 100 M on one thread, from bool 90, and torch.where takes 370.
    limit = torch.empty_like(scores).copy_(kept.view(torch.uint8)).sub_(0.5).mul_(math.inf)
    return torch.minimum(scores.clamp(min=torch.finfo(scores.dtype).min), limit, out=limit)


def _finite(name: str, scores: Tensor) -> Tensor:
    """Return the scores in float32 at least, with the lowest finite number in place of -inf."""
    if scores.isnan().any():
        raise nan_error(repr(name))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.clamp(min=torch.finfo(scores.dtype).min)


def _keep_units(means: Tensor, sizes: Tensor, number: float) -> Tensor:
    """Remove units by rising mean until as near as possible to ``number`` weights are gone; bool ``[units]``."""
    order = torch.sort(means, stable=True).indices
    gone = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])
    keep = torch.ones(len(means), dtype=torch.bool)
    keep[order[: int((gone - number).abs().argmin())]] = False
    return keep


def _ranks(groups: Tensor) -> Tensor:
    """Return the place of each score in its group, ``[..., m]`` -> int16 of that shape; equal ones in their order.

    By comparing all pairs: for m = 4 five times faster than sorting, for m = 64 about as fast.
    """
    scores = groups.movedim(-1, 0).contiguous()
    ranks = torch.zeros_like(scores, dtype=torch.int16)
    for distance in range(1, len(scores)):
        later_is_lower = scores[distance:] < scores[:-distance]
        ranks[:-distance] += later_is_lower
        ranks[distance:] += ~later_is_lower
    return ranks.movedim(0, -1)


def _number_kept(mask: Tensor) -> int:
    # numpy counts 100 M in 3 ms, torch in 80.
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def _round_half_up(number: float) -> int:
    return math.floor(number + 0.5)


def _check_dimensions(granularity: Granularity, name: str, shape: torch.Size, least: int) -> None:
    if len(shape) < least:
        raise ValueError(
            f"granularity '{granularity}' needs weights of at least {least} dimensions, got {name!r} of shape "
            f"{tuple(shape)}. Exclude it."
        )


def _check_previous(name: str, mask: Tensor, reader: ScoreReader) -> None:
    if mask.dtype != torch.bool or mask.shape != reader.shape:
        raise ValueError(
            f"the previous mask of {name!r} must be bool of the shape {tuple(reader.shape)} of its scores, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
