"""Granularities: which weights are removed together (single ones, rows, columns, blocks, n of m), and their masks."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_optim.functional.thresholds import ScoreReader, Shards, keep_largest, nan_error, smallest

__all__ = ["Granularity", "Masks", "number_kept", "parse_granularity"]

Masks = dict[str, Tensor]

_GROUPED_AT_ONCE = 1 << 20


def parse_granularity(text: str) -> "Granularity":
    """Return what is removed together.

    - ``"weight"``: single weights.
    - ``"row"``: all weights with the same index in dimension 0: those of an output neuron or filter.
    - ``"column"``: all weights with the same index in dimension 1: those that read an input feature or channel.
    - ``"RxC"`` such as ``"4x4"``: blocks of the matrix ``[out, in * kernel]``; those at its edges may be smaller.
    - ``"n:m"`` such as ``"2:4"``: n of each m consecutive inputs of an output stay; for a convolution m consecutive
      input channels at one place of the kernel, as sparse tensor cores read them (TensorRT, cuSPARSELt). When the
      number of inputs is no multiple of m, the last group is padded, the padding counts as removed first, and so
      ``min(n, its size)`` weights of it stay at the end; sparse kernels take no such layer
      (:meth:`Granularity.misfit`).
    - ``"n:m@unfold"``: the same along the rows of ``[out, in * kernel]``, the order of
      ``torch.nn.functional.unfold``: input channel outermost, then kernel row, then kernel column. It differs from
      ``"n:m"`` for kernels of more than one place only.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is none of them.
    """
    if not isinstance(text, str):
        raise TypeError(f"granularity must be a string such as '2:4', got {text!r}. In YAML it must be quoted: '2:4'.")
    for pattern, make in _FORMS:
        match = re.fullmatch(pattern, text)
        if match:
            return make(*map(int, match.groups()))
    raise ValueError(
        f"`granularity` must be 'weight', 'row', 'column', 'RxC' such as '4x4', 'n:m' such as '2:4', or 'n:m@unfold', "
        f"got {text!r}."
    )


class Granularity(ABC):
    """What is removed together; ``str()`` gives the text it was parsed from."""

    @property
    def final_sparsity(self) -> float | None:
        """The sparsity that the granularity itself fixes (n:m), or None where it is free."""
        return None

    def misfit(self, shape: torch.Size) -> str | None:
        """Return why kernels made for this granularity cannot take a weight of that shape, None where they can."""
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
        removed = sum(mask.numel() - number_kept(mask) for mask in kept.values())
        if shards is not None:
            number, removed = shards.sum(torch.tensor([number, removed])).tolist()
        count = max(_round_half_up(sparsity * number), removed)
        scores = _with_removed(readers, kept)
        return keep_largest(scores, smallest(scores, count, shards=shards), shards=shards)


class _Units(Granularity):
    """Units of several weights that compete by their mean score."""

    @property
    @abstractmethod
    def _dimensions(self) -> int:
        """Number of dimensions that a weight must have."""

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
class _Slices(_Units):
    """All weights with the same index in one dimension."""

    dimension: int

    def __str__(self) -> str:
        return ("row", "column")[self.dimension]

    @property
    def _dimensions(self) -> int:
        return self.dimension + 1

    def _sums(self, values: Tensor) -> Tensor:
        return values.movedim(self.dimension, 0).reshape(values.shape[self.dimension], -1).sum(1)

    def _expand(self, unit_mask: Tensor, shape: torch.Size) -> Tensor:
        sizes = [1] * len(shape)
        sizes[self.dimension] = -1
        return unit_mask.view(sizes).expand(shape)


@dataclass(frozen=True)
class _Block(_Units):
    rows: int
    columns: int

    @property
    def _dimensions(self) -> int:
        return 2

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
    """Groups along dimension 1, the inputs."""

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

    def misfit(self, shape: torch.Size) -> str | None:
        return f"{shape[1]} inputs, no multiple of {self.m}" if shape[1] % self.m else None

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
        width = reader.shape[1:].numel()
        first = 0
        for rows in torch.split(mask, max(_GROUPED_AT_ONCE // max(width, 1), 1)):
            scores = _finite(name, reader.read(first * width, (first + len(rows)) * width)).view_as(rows)
            if kept is not None:
                scores = _removed_first(scores, kept[first : first + len(rows)])
            lines = self._lines(scores)
            padded = pad(lines, (0, -lines.shape[-1] % self.m), value=-math.inf)
            ranks = _ranks(padded.reshape(*padded.shape[:-1], padded.shape[-1] // self.m, self.m))
            self._lines(rows).copy_((ranks >= removed).flatten(-2)[..., : lines.shape[-1]])
            first += len(rows)
        return mask if kept is None else (mask & kept).contiguous()

    def _lines(self, rows: Tensor) -> Tensor:
        """Return a view of ``[rows, in, *kernel]`` whose last dimension is the one that groups run along."""
        return rows.movedim(1, -1)


class _NofMAlongUnfold(_NofM):
    """Groups along input channel x kernel."""

    def __str__(self) -> str:
        return f"{super().__str__()}@unfold"

    def misfit(self, shape: torch.Size) -> str | None:
        return None  # the order is for software, which may pad

    def _lines(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), -1)


_FORMS: tuple[tuple[str, Callable[..., Granularity]], ...] = (
    ("weight", _Weight),
    ("row", partial(_Slices, 0)),
    ("column", partial(_Slices, 1)),
    (r"(\d+)x(\d+)", _Block),
    (r"(\d+):(\d+)", _NofM),
    (r"(\d+):(\d+)@unfold", _NofMAlongUnfold),
)


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


def number_kept(mask: Tensor) -> int:
    """Return how many weights a bool mask keeps."""
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
