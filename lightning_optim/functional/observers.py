"""Observers: how the range of an activation is computed from batches.

An observer keeps one statistic per watched tensor. Its summary of a batch is pooled over the micro-batches of a step
and over ranks by one reduction ("max" or "sum") and then folded into the statistic. So any number of watched tensors
needs one small all-reduce per step, and every rank ends with the same range.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_optim.functional.fake_quantize import integer_range
from lightning_optim.registry import Registry

__all__ = ["OBSERVERS", "Histogram", "Learned", "MinMax", "MovingAverage", "Observer", "Percentile"]


class Observer:
    """Base class of the observers; classes are registered, and they have no state of their own.

    Attributes:
        size: Number of entries in the statistic.
        reduction: How the summaries of several batches or ranks are pooled.
        settles: Whether the range is computed only when observing ends, because it costs too much for every batch.
        learns: Whether training goes on from the range as it changes the weights.
    """

    size: int
    reduction: Literal["max", "sum"]
    settles = False
    learns = False

    @staticmethod
    def see(x: Tensor) -> Tensor:
        """Return the summary of a batch, float32 ``[size]``; ``x`` is detached, of any shape, not empty."""
        raise NotImplementedError

    @staticmethod
    def fold(statistic: Tensor, seen: Tensor, batches: Tensor) -> Tensor:
        """Return the new statistics.

        Args:
            statistic: ``[tensors, size]``, zeros where nothing was folded yet.
            seen: Pooled summaries, of the same shape.
            batches: Integers ``[tensors]``: how often each was folded before.
        """
        raise NotImplementedError

    @staticmethod
    def range_of(statistic: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Return smallest and largest value, each ``[tensors]``, of statistics ``[tensors, size]``."""
        raise NotImplementedError

    @staticmethod
    def magnitudes(statistic: Tensor) -> Tensor:
        """Return the statistics of the absolute values, for a symmetric range; by default those of the values."""
        return statistic


OBSERVERS: Registry[type[Observer]] = Registry("observer")
"""Name -> observer class."""


class _Extremes(Observer):
    """Keeps ``(-smallest, largest)``, so that both pool by their maximum."""

    size = 2
    reduction = "max"

    @staticmethod
    def see(x: Tensor) -> Tensor:
        low, high = torch.aminmax(x)
        return torch.stack([-low, high]).float()

    @staticmethod
    def range_of(statistic: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return -statistic[:, 0], statistic[:, 1]

    @staticmethod
    def magnitudes(statistic: Tensor) -> Tensor:
        largest = statistic.amax(1)
        return torch.stack([torch.zeros_like(largest), largest], 1)


@OBSERVERS.register("min_max")
class MinMax(_Extremes):
    """The smallest and largest value ever seen: nothing is clipped, and one outlier widens the range forever."""

    @staticmethod
    def fold(statistic: Tensor, seen: Tensor, batches: Tensor) -> Tensor:
        """Return the extremes of both."""
        return torch.where(batches[:, None] > 0, torch.maximum(statistic, seen), seen)


@OBSERVERS.register("moving_average")
class MovingAverage(_Extremes):
    """Exponential moving average of each batch's extremes; over the first 100 batches the plain mean.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", section 3.1.
    """

    MOMENTUM = 0.99

    @staticmethod
    def fold(statistic: Tensor, seen: Tensor, batches: Tensor) -> Tensor:
        """Return the new average."""
        momentum = (batches / (batches + 1)).clamp_max(MovingAverage.MOMENTUM)[:, None]
        return momentum * statistic + (1 - momentum) * seen


@OBSERVERS.register("histogram")
class Histogram(Observer):
    """Counts of magnitudes in logarithmic bins; the range is the one with the least squared error.

    It clips rare outliers if that reduces the error. Observing costs a logarithm and a count of every activation, and
    finding the range some milliseconds per tensor, once. Bins are fixed (16 per octave, from 2^-64 to 2^64, for each
    sign, and one for zero), so that counts of batches and ranks add up.

    References:
        Zhao et al. 2019, "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting"
        (clipping by mean squared error).
    """

    PER_OCTAVE, OCTAVES = 16, 128
    BINS = PER_OCTAVE * OCTAVES
    size = 2 * BINS + 1
    reduction = "sum"
    settles = True
    ROUNDS = 2

    @staticmethod
    def see(x: Tensor) -> Tensor:
        """Return the counts: negative magnitudes first, then positive ones, then zeros."""
        flat = x.flatten().float()
        if not torch.isfinite(flat).all():
            return flat.new_full((Histogram.size,), torch.nan)
        octave = torch.log2(flat.abs()) + Histogram.OCTAVES // 2
        bins = (octave * Histogram.PER_OCTAVE).floor_().clamp_(0, Histogram.BINS - 1).to(torch.int64)
        bins = torch.where(flat > 0, bins + Histogram.BINS, bins)
        bins = torch.where(flat == 0, 2 * Histogram.BINS, bins)
        return torch.bincount(bins, minlength=Histogram.size).float()

    @staticmethod
    def fold(statistic: Tensor, seen: Tensor, batches: Tensor) -> Tensor:
        """Return the sums."""
        return statistic + seen

    @staticmethod
    def range_of(statistic: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Return the ranges with the least squared error, searched alternately for each end."""
        ranges = [_least_error(counts, bits) for counts in statistic]
        return torch.stack([low for low, _ in ranges]), torch.stack([high for _, high in ranges])

    @staticmethod
    def magnitudes(statistic: Tensor) -> Tensor:
        """Return the counts with those of negative values among the positive ones."""
        negative, positive, zeros = statistic.tensor_split((Histogram.BINS, 2 * Histogram.BINS), 1)
        return torch.cat([torch.zeros_like(negative), negative + positive, zeros], 1)


@OBSERVERS.register("percentile")
class Percentile(Histogram):
    """The range that holds 99.99 % of the magnitudes: outliers beyond are clipped, whatever the number of bits.

    The percentile is that of the magnitudes of both signs and of zeros together, rounded up to the edge of a bin (4.4 %
    at most), and no end lies beyond what was seen there. Costs what :class:`Histogram` costs to observe, and less to
    find the range.

    References:
        Wu et al. 2020, "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
        section 4.1 (percentile calibration).
    """

    CLIPPED = 1e-4

    @staticmethod
    def range_of(statistic: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Return the range in which all but ``CLIPPED`` of the counted magnitudes are."""
        ends = [_percentile(counts, Percentile.CLIPPED) for counts in statistic]
        return torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])


@OBSERVERS.register("learned")
class Learned(Histogram):
    """The range with the least squared error, from which steps and zero points are trained once rounding begins.

    The steps of weights are trained too (see :mod:`~lightning_optim.functional.learned_step`). Ranges of outputs and
    of operands of functions stay as they were observed.

    References:
        Esser et al. 2020, "Learned Step Size Quantization"; Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization
        through learnable offsets and better initialization".
    """

    learns = True


def _percentile(counts: Tensor, clipped: float) -> tuple[Tensor, Tensor]:
    if torch.isnan(counts).any():
        return counts.new_full((), -torch.inf), counts.new_full((), torch.inf)
    _, edges = _bins(counts.device)
    negative, positive = counts[:-1].view(2, -1)
    beyond = (negative + positive).double().flip(0).cumsum(0).flip(0)  # magnitudes in a bin and in those above
    inside = beyond > clipped * counts.double().sum()
    bound = edges[inside.nonzero()[-1, 0]] if bool(inside.any()) else edges.new_zeros(())
    low, high = (torch.minimum(bound, _outermost(side, edges)) for side in (negative, positive))
    return -low, high


def _bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the centres and upper edges of the bins of one sign, in float32."""
    steps = torch.arange(Histogram.BINS, dtype=torch.float32, device=device)
    centres, edges = ((steps + place) / Histogram.PER_OCTAVE - Histogram.OCTAVES // 2 for place in (0.5, 1))
    return torch.exp2(centres), torch.exp2(edges)


def _least_error(counts: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    centres, edges = _bins(counts.device)
    negative, positive = counts[:-1].view(2, -1)
    bounds = [_outermost(side, edges) for side in (negative, positive)]
    if torch.isnan(counts).any():
        return counts.new_full((), -torch.inf), counts.new_full((), torch.inf)
    levels = integer_range(bits, symmetric=False)[1]
    for _ in range(Histogram.ROUNDS):
        for which, side in enumerate((positive, negative)):
            end = 1 - which
            if side.any():
                bounds[end] = _best_bound(side, centres, edges, (negative, positive)[which], bounds[which], levels)
    return -bounds[0], bounds[1]


def _outermost(counts: Tensor, edges: Tensor) -> Tensor:
    used = counts.nonzero()
    return edges[used[-1, 0]] if len(used) else edges.new_zeros(())


def _best_bound(
    counts: Tensor, centres: Tensor, edges: Tensor, other_counts: Tensor, other: Tensor, levels: int
) -> Tensor:
    """Return the bound of one side, among the bins' edges, that gives the least error with the other side's bound."""
    used = counts.nonzero()[:, 0]
    candidates = edges[int(used[0]) : int(used[-1]) + 1]
    scale = ((candidates + other) / levels)[:, None]
    error = _squared_error(centres, candidates[:, None], scale) @ counts
    error += _squared_error(centres, other.expand(len(candidates), 1), scale) @ other_counts
    return candidates[error.argmin()]


def _squared_error(x: Tensor, bound: Tensor, scale: Tensor) -> Tensor:
    """Return the expected squared error of magnitudes ``x``: clipped, rounded to zero, or rounded."""
    rounded = torch.where(x < scale / 2, x.square(), (scale.square() / 12).expand(len(scale), len(x)))
    return torch.where(x > bound, (x - bound).square() + scale.square() / 12, rounded)
