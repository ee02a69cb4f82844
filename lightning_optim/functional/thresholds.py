"""Thresholds: the exact k smallest of many tensors of scores, in little memory and across processes.

Floating-point numbers of one sign are ordered as their bits are. So a count of the upper 16 bits (65,536 bins) finds
the bin that holds the k-th smallest score, and a count of the next 16 bits inside that bin finds its value; float64
takes two digits more. Counts of shards add up, which makes the same code right when each process holds a part.

Counting everything costs 220 ms for 100 M scores on one thread, comparing them 60 ms. So from a million scores on, a
sample says between which two bins the k-th one lies, one comparison counts what is below and collects the two or
three per cent between, and only those are counted digit by digit. When the sample misleads, or most scores are equal,
everything is counted: the answer is exact either way. See ``benchmarks/threshold.py``.

numpy compares and selects on the CPU, since torch's boolean results are four to nine times slower there (comparing 65
against 7 ms, selecting 146 against 20 ms per 100 M).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cut", "ScoreReader", "Scores", "Shards", "as_reader", "keep_largest", "nan_error", "smallest"]

# Scores per piece: what fits the caches of a CPU core, and few kernel launches elsewhere.
_PIECE_ON_CPU = 1 << 18
_PIECE_ELSEWHERE = 1 << 24
_SAMPLE_FROM = 1 << 20
_SAMPLE_SIZE = 1 << 16
_MOST_BETWEEN = 1 / 16
_DIGIT_BITS = 16
_BINS = 1 << _DIGIT_BITS


class ScoreReader(Protocol):
    """Scores that are read piece by piece, such as :class:`~lightning_optim.functional.criteria.LazyScores`."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scores."""

    @property
    def device(self) -> torch.device:
        """Device of the scores."""

    def read(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Return the scores ``start:stop:step`` of the flat order, ``[n]``."""


Scores: TypeAlias = Tensor | ScoreReader


@dataclass(frozen=True)
class Shards:
    """The processes that each hold a part of every tensor: consecutive slices of the flat order, in rank order.

    Args:
        rank: This process.
        world_size: Number of processes.
        sum: Returns the sum over all processes of an int64 CPU tensor; it is called equally often on each.
    """

    rank: int
    world_size: int
    sum: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """Where the k smallest scores end.

    Args:
        value: The k-th smallest score (the smallest one for k = 0; NaN where there are no scores).
        below: How many scores are smaller. All of them are among the k smallest.
        ties: How many of the scores equal to ``value`` are among the k smallest: the first ones, by the order of the
            tensors and their flat order. ``below + ties`` is k.
        equal: How many scores are equal to ``value``.
        dtype: float32 or float64: what the scores are compared in.
    """

    value: float
    below: int
    ties: int
    equal: int
    dtype: torch.dtype


def smallest(scores: Mapping[str, Scores], count: int, *, shards: Shards | None = None) -> Cut:
    """Find the ``count`` smallest of all scores together, exactly.

    Args:
        scores: Name -> scores of any shape and float dtype. They are compared as float32, or as float64 if any of
            them is; -0.0 equals 0.0; infinities are allowed.
        count: How many, of all processes together.
        shards: The other processes, when each holds a part. All get the same answer.

    Returns:
        The cut. Extra memory is a few pieces of 256 Ki scores, and the two or three per cent of the scores that lie
        near the cut.

    Raises:
        TypeError: If scores are not floating point.
        ValueError: If scores contain NaN, or ``count`` is not between 0 and their number.

    Examples:
        >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([2.0, 9.0])}
        >>> cut = smallest(scores, 2)
        >>> cut.value, cut.below, cut.ties, cut.equal
        (2.0, 1, 1, 2)
        >>> keep_largest(scores, cut)
        {'a': tensor([ True, False, False]), 'b': tensor([True, True])}
    """
    search = _Search({name: as_reader(name, tensor) for name, tensor in scores.items()}, shards)
    total = search.total()
    if not 0 <= count <= total:
        raise ValueError(f"`count` must be between 0 and the number of scores, {total}, got {count}.")
    if total == 0:
        return Cut(math.nan, 0, 0, 0, search.dtype)
    rank = max(count, 1)
    cut = search.near_sample(rank, total) if total >= _SAMPLE_FROM else None
    if cut is None:
        cut = search.everywhere(rank)
    return cut if count else Cut(cut.value, 0, 0, cut.equal, cut.dtype)


def keep_largest(scores: Mapping[str, Scores], cut: Cut, *, shards: Shards | None = None) -> dict[str, Tensor]:
    """Return boolean masks that are False exactly for the scores that the cut counts among the smallest.

    Args:
        scores: The scores that the cut was found for, unchanged.
        cut: From :func:`smallest`.
        shards: As for :func:`smallest`.

    Returns:
        Name -> contiguous bool tensor of the scores' shape on their device; True keeps.
    """
    readers = {name: as_reader(name, tensor) for name, tensor in scores.items()}
    quotas = None if shards is None else _quotas(readers, cut, shards)
    left, masks = cut.ties, {}
    for name, reader in readers.items():
        masks[name], removed = _mask(reader, cut, left if quotas is None else quotas[name])
        left -= removed
    return masks


def as_reader(name: str, scores: Scores) -> ScoreReader:
    """Return scores as a reader of them; ``name`` is for the error text.

    Raises:
        TypeError: If they are not floating point.
    """
    if not scores.dtype.is_floating_point:
        raise TypeError(f"the scores of {name!r} must be floating point, got {scores.dtype}.")
    return _TensorReader(scores.detach().reshape(-1), scores.shape) if isinstance(scores, Tensor) else scores


def nan_error(where: str) -> ValueError:
    """Return the error to raise where scores contain NaN."""
    return ValueError(
        f"the scores of {where} contain NaN, so none of them is the smallest. Look for a weight, gradient or input "
        "that diverged."
    )


@dataclass(frozen=True)
class _TensorReader:
    flat: Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def read(self, start: int, stop: int, step: int = 1) -> Tensor:
        return self.flat[start:stop:step]


def _pieces(reader: ScoreReader, step: int = 1) -> Iterator[Tensor]:
    """Yield every ``step``-th score of a reader in flat order."""
    length = reader.shape.numel()
    size = step * _piece_size(reader.device)
    return (reader.read(start, min(start + size, length), step) for start in range(0, length, size))


def _piece_size(device: torch.device) -> int:
    return _PIECE_ON_CPU if device.type == "cpu" else _PIECE_ELSEWHERE


class _Search:
    """The search for the k-th smallest score: what all of its steps share.

    Args:
        readers: Name -> scores.
        shards: The other processes, if any.
    """

    def __init__(self, readers: Mapping[str, ScoreReader], shards: Shards | None) -> None:
        self._readers = readers
        self._shards = shards
        doubles = any(reader.dtype == torch.float64 for reader in readers.values())
        self.dtype = torch.float64 if doubles else torch.float32
        self._bits_dtype = torch.int64 if doubles else torch.int32
        self._top_shift = torch.finfo(self.dtype).bits - _DIGIT_BITS

    def total(self) -> int:
        """Return the number of scores of all processes."""
        return int(self._sum(torch.tensor([sum(reader.shape.numel() for reader in self._readers.values())])))

    def everywhere(self, count: int) -> Cut:
        """Find the ``count``-th smallest by counting the digits of all scores."""
        return self._radix(list(self._readers.values()), count)

    def near_sample(self, count: int, total: int) -> Cut | None:
        """Find the ``count``-th smallest between the bins that a sample names; None if it is not there.

        One thread takes 9 ms for 3 M scores and 71 ms for 30 M, where :meth:`everywhere` takes 14 and 178; the masks
        take another 2 and 34.
        """
        bounds = self._sampled_bounds(count, total)
        if bounds is None:
            return None
        below, between = self._split(*bounds, total)
        below, number_between = self._sum(torch.tensor([below, len(between)])).tolist()
        if not below < count <= below + number_between:
            return None
        cut = self._radix([_TensorReader(between, between.shape)], count - below)
        return Cut(cut.value, cut.below + below, cut.ties, cut.equal, cut.dtype)

    def _radix(self, readers: list[ScoreReader], count: int) -> Cut:
        shift = self._top_shift
        counts = self._count_digits(readers, shift)
        self._check_no_nan(counts)
        digit, below = _locate(counts, _TOP_ORDER, count)
        prefix = _signed(digit)
        order = _FALLING if prefix < 0 else _RISING
        while shift:
            shift -= _DIGIT_BITS
            counts = self._count_digits(readers, shift, prefix)
            digit, smaller = _locate(counts, order, count - below)
            below += smaller
            prefix = prefix << _DIGIT_BITS | digit
        return Cut(self._number(prefix), below, count - below, int(counts[digit]), self.dtype)

    def _sampled_bounds(self, count: int, total: int) -> tuple[float, float] | None:
        """Return two numbers that have the ``count``-th smallest between them but for one case in a million."""
        step = total // _SAMPLE_SIZE | 1  # odd, so that it meets all columns of a matrix
        counts = self._count_digits(self._readers.values(), self._top_shift, step=step)
        sampled, rank = int(counts.sum()), count / total
        margin = 5 * math.sqrt(sampled * rank * (1 - rank)) + 8
        first = max(math.floor(sampled * rank - margin), 1)
        last = min(math.ceil(sampled * rank + margin), sampled)
        (low, before), (high, before_high) = (_locate(counts, _TOP_ORDER, place) for place in (first, last))
        lowest = self._edge(low, upper=False)
        if math.isnan(lowest):  # the bin of -inf: weights removed before, perhaps most of all; they count as below
            lowest, before = torch.finfo(self.dtype).min, before + int(counts[low])
        if before_high + int(counts[high]) - before > _MOST_BETWEEN * sampled:
            return None
        return lowest, self._edge(high, upper=True)

    def _split(self, low: float, high: float, total: int) -> tuple[int, Tensor]:
        """Count the scores below ``low`` and collect those neither below it nor above ``high``, on the CPU.

        When they would be too many, all ``total`` are said to be below, which no search can use.
        """
        # One buffer: small results kept among temporaries make the heap grow by a piece each time, and fresh pages
        # are dear (310 ms per 100 M scores instead of 110). Pages of the buffer that are not reached cost nothing.
        local = sum(reader.shape.numel() for reader in self._readers.values())
        between = torch.empty(math.ceil(2 * _MOST_BETWEEN * local), dtype=self.dtype)
        below, filled = 0, 0
        for piece in (piece for reader in self._readers.values() for piece in _pieces(reader)):
            number, rest = _split_piece(piece.to(self.dtype), low, high)
            below += number
            if filled + len(rest) > len(between):
                return total, between[:0]
            between[filled : filled + len(rest)] = rest
            filled += len(rest)
        return below, between[:filled]

    def _count_digits(
        self, readers: Iterable[ScoreReader], shift: int, prefix: int | None = None, step: int = 1
    ) -> Tensor:
        """Count the digits above ``shift``, where ``prefix`` is the part above them, over all processes.

        Returns:
            int64 ``[65536]`` on the CPU.
        """
        counts = torch.zeros(_BINS, dtype=torch.int64)
        for bits in self._packed(readers, step):
            chosen = bits if prefix is None else _with_prefix(bits, shift + _DIGIT_BITS, prefix)
            digits = (chosen >> shift).bitwise_and_(_BINS - 1)
            counts += torch.bincount(digits, minlength=_BINS).cpu()
        return self._sum(counts)

    def _packed(self, readers: Iterable[ScoreReader], step: int) -> Iterator[Tensor]:
        """Yield the bits of all scores in pieces, each valid until the next; small tensors share one.

        A count costs 65,536 steps however few there are to count.
        """
        by_device: dict[torch.device, list[ScoreReader]] = {}
        for reader in readers:
            by_device.setdefault(reader.device, []).append(reader)
        for device, group in by_device.items():
            length = min(_piece_size(device), sum(-(-reader.shape.numel() // step) for reader in group))
            buffer = torch.empty(length, dtype=self.dtype, device=device)
            filled = 0
            for piece in (piece for reader in group for piece in _pieces(reader, step)):
                for part in (piece[: length - filled], piece[length - filled :]):
                    # Adding zero makes -0.0 into 0.0 and NaN quiet, so that its upper bits tell it from infinity.
                    torch.add(part, 0.0, out=buffer[filled : filled + len(part)])
                    filled += len(part)
                    if filled == length:
                        yield buffer.view(self._bits_dtype)
                        filled = 0
            if filled:
                yield buffer[:filled].view(self._bits_dtype)

    def _edge(self, digit: int, *, upper: bool) -> float:
        """Return the largest or smallest number of a bin; NaN in the bins of infinity, which bounds nothing."""
        lower_bits = (1 << self._top_shift) - 1 if upper == (_signed(digit) >= 0) else 0
        return self._number(_signed(digit) << self._top_shift | lower_bits)

    def _number(self, bits: int) -> float:
        return float(torch.tensor(bits, dtype=self._bits_dtype).view(self.dtype))

    def _sum(self, counts: Tensor) -> Tensor:
        return counts if self._shards is None else self._shards.sum(counts)

    def _check_no_nan(self, counts: Tensor) -> None:
        infinity = int(torch.tensor(math.inf, dtype=self.dtype).view(self._bits_dtype)) >> self._top_shift
        half = _BINS // 2
        number = int(counts[infinity + 1 : half].sum() + counts[infinity + half + 1 :].sum())
        if not number:
            return
        names = [name for name, reader in self._readers.items() if any(p.isnan().any() for p in _pieces(reader))]
        raise nan_error(", ".join(map(repr, names)) or "a tensor on another process")


_RISING = torch.arange(_BINS)
_FALLING = _RISING.flip(0)
# By value: numbers with the sign bit first, the largest bits (-inf) foremost, then those without.
_TOP_ORDER = torch.cat([_FALLING[: _BINS // 2], _RISING[: _BINS // 2]])


def _locate(counts: Tensor, order: Tensor, count: int) -> tuple[int, int]:
    """Return the digit that holds the ``count``-th smallest, and how many have a smaller digit."""
    ordered = counts[order]
    cumulative = ordered.cumsum(0)
    position = int(torch.searchsorted(cumulative, count))
    return int(order[position]), int(cumulative[position] - ordered[position])


def _signed(digit: int) -> int:
    """The uppermost digit as the signed number that its bits are."""
    return digit - _BINS if digit >= _BINS // 2 else digit


def _in_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _with_prefix(bits: Tensor, shift: int, prefix: int) -> Tensor:
    high = bits >> shift
    if _in_numpy(bits):
        return torch.from_numpy(bits.numpy()[high.numpy() == prefix])
    return bits[high == prefix]


def _split_piece(scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many are below ``low``, and which are neither below it nor above ``high`` (NaN is neither)."""
    if _in_numpy(scores):
        values = scores.numpy()
        below, above = values < low, values > high
        return int(np.count_nonzero(below)), torch.from_numpy(values[~(below | above)])
    smaller = scores < low
    return int(smaller.sum()), scores[~(smaller | (scores > high))]


def _mask(reader: ScoreReader, cut: Cut, quota: int) -> tuple[Tensor, int]:
    """Keep what is above the cut, and what is equal to it but for the first ``quota`` such; say how many were."""
    mask = torch.empty(reader.shape.numel(), dtype=torch.bool, device=reader.device)
    start, left = 0, quota
    for piece in _pieces(reader):
        scores, part = piece.to(cut.dtype), mask[start : start + len(piece)]
        if _in_numpy(scores):
            np.greater_equal(scores.numpy(), cut.value, out=part.numpy())
        else:
            torch.ge(scores, cut.value, out=part)
        if left:
            equal = _positions(scores, cut.value)[:left]
            part[equal] = False
            left -= len(equal)
        start += len(piece)
    return mask.view(reader.shape), quota - left


def _positions(scores: Tensor, value: float) -> Tensor:
    if _in_numpy(scores):
        return torch.from_numpy(np.flatnonzero(scores.numpy() == value))
    return (scores == value).nonzero().view(-1)


def _quotas(readers: Mapping[str, ScoreReader], cut: Cut, shards: Shards) -> dict[str, int]:
    """How many of its equal scores each tensor loses on this process: the order is by tensor, then by rank."""
    counts = torch.zeros(len(readers), shards.world_size, dtype=torch.int64)
    for row, reader in zip(counts, readers.values(), strict=True):
        row[shards.rank] = sum(len(_positions(piece.to(cut.dtype), cut.value)) for piece in _pieces(reader))
    counts = shards.sum(counts)
    before = (counts.flatten().cumsum(0).view_as(counts) - counts)[:, shards.rank]
    return dict(zip(readers, torch.clamp(cut.ties - before, min=0).tolist(), strict=True))
