"""Criteria: how important each weight is.

A criterion is a function ``criterion(weight, stats) -> scores`` with scores of the weight's shape; higher is kept.
``stats`` holds just what the registration asks for with ``needs``.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_optim.functional.statistics import STATISTICS
from lightning_optim.registry import Registry

__all__ = [
    "CRITERIA",
    "STATISTICS",
    "Criterion",
    "LazyScores",
    "Statistics",
    "lamp",
    "magnitude",
    "parameter_generator",
    "random",
    "scores_of",
    "taylor",
    "wanda",
]


T = TypeVar("T")


class Statistics:
    """What a criterion may ask for besides the weight; what it does not ask for is None.

    Each statistic that is registered in :data:`STATISTICS` is an attribute: ``gradient`` (root mean square of each
    weight's gradient over the steps since the last event, of the weight's shape), ``input_norm`` (L2 norm of each input
    feature over the batches seen, of a shape that broadcasts to the weight: ``[in]`` for a Linear, ``[in, 1, 1]`` for a
    Conv2d without groups), ``input_second_moment`` (sum of x xᵀ over the inputs, ``[in, in]``).

    Args:
        generator: A CPU generator, see :func:`parameter_generator`.
        collected: The statistics by name.
    """

    def __init__(self, *, generator: torch.Generator | None = None, **collected: Tensor | None) -> None:
        unknown = [name for name in collected if name not in STATISTICS]
        if unknown:
            raise TypeError(f"unknown statistic {unknown[0]!r}; known: {', '.join(STATISTICS)}.")
        self.generator = generator
        self.collected = {name: tensor for name, tensor in collected.items() if tensor is not None}

    def __getattr__(self, name: str) -> Tensor | None:
        if name not in STATISTICS:
            raise AttributeError(f"there is no statistic {name!r}; known: {', '.join(STATISTICS)}.")
        return self.collected.get(name)

    @property
    def elementwise(self) -> bool:
        """Whether there is nothing but tensors with one number per weight."""
        return self.generator is None and all(STATISTICS[name].elementwise for name in self.collected)


Criterion = Callable[[Tensor, Statistics], Tensor]
CRITERIA: Registry[Criterion] = Registry("criterion")


def _elementwise(criterion: Criterion) -> Criterion:
    """Mark a criterion whose score of a weight depends on that weight and its own gradient alone.

    Such a criterion may be computed piece by piece (:func:`scores_of`).
    """
    criterion.elementwise = True  # type: ignore[attr-defined]
    return criterion


@CRITERIA.register("magnitude")
@_elementwise
def magnitude(weight: Tensor, stats: Statistics) -> Tensor:
    """Importance of each weight as its absolute value.

    Args:
        weight: ``[out, in, ...]``, any float dtype; not modified.
        stats: Not used.

    Returns:
        Scores of the same shape and dtype, >= 0; higher is kept. Costs one copy of ``weight``; :func:`scores_of`
        costs none.

    Raises:
        TypeError: If ``weight`` is not floating point.

    References:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    """
    return _floating(weight).abs()


@CRITERIA.register("random", needs=("generator",))
def random(weight: Tensor, stats: Statistics) -> Tensor:
    """The control: importance drawn uniformly from [0, 1), whatever the weight is.

    Drawn on the CPU in float32, so that every rank and every device gets the same numbers from the same generator.
    With a fresh :func:`parameter_generator` at each event the scores are the same each time and masks nest.

    Args:
        weight: ``[out, in, ...]``, any float dtype; only its shape and device are used.
        stats: With ``generator``.

    Returns:
        float32 scores of the same shape on the weight's device.

    Raises:
        TypeError: If ``weight`` is not floating point.
        ValueError: If ``stats.generator`` is missing.
    """
    _floating(weight)
    generator = _required(stats.generator, "generator", "random")
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)


@CRITERIA.register("taylor", needs=("gradient",))
@_elementwise
def taylor(weight: Tensor, stats: Statistics) -> Tensor:
    """First-order estimate of the change of the loss when a weight is removed: ``|w| * rms(gradient)``.

    The gradient statistic costs the callback one more tensor of the weight's size and one pass over it per step.

    Args:
        weight: ``[out, in, ...]``, any float dtype; not modified.
        stats: With ``gradient``, of the weight's shape.

    Returns:
        Scores of the same shape, >= 0, float32 at least.

    Raises:
        TypeError: If ``weight`` is not floating point.
        ValueError: If ``stats.gradient`` is missing or has another shape.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8: the square root of
        the expected ``(g * w)**2``.
    """
    _floating(weight)
    gradient = _required(stats.gradient, "gradient", "taylor")
    _check_shape("gradient", gradient, weight)
    return _at_least_float32(weight).abs() * _at_least_float32(gradient).abs()


@CRITERIA.register("wanda", needs=("input_norm",))
def wanda(weight: Tensor, stats: Statistics) -> Tensor:
    """Magnitude times the norm of the input that the weight multiplies: ``|w| * ||x||``.

    The paper compares weights within each output row, which is nearest to ``scope="layer"``.

    Args:
        weight: ``[out, in, ...]``, any float dtype; not modified.
        stats: With ``input_norm``, >= 0, of a shape that broadcasts to the weight's.

    Returns:
        Scores of the weight's shape, >= 0, float32 at least.

    Raises:
        TypeError: If ``weight`` is not floating point.
        ValueError: If ``stats.input_norm`` is missing or does not broadcast to the weight.

    References:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", equation 1.
    """
    _floating(weight)
    norm = _required(stats.input_norm, "input_norm", "wanda")
    if not _broadcasts_to(norm.shape, weight.shape):
        raise ValueError(
            f"criterion 'wanda' needs `stats.input_norm` of a shape that broadcasts to the weight's "
            f"{tuple(weight.shape)}, got {tuple(norm.shape)}. For a Conv2d pass [in, 1, 1]."
        )
    return _at_least_float32(weight).abs() * _at_least_float32(norm)


@CRITERIA.register("lamp")
def lamp(weight: Tensor, stats: Statistics) -> Tensor:
    """Magnitude made comparable between layers: ``w**2 / sum of v**2 over all v with |v| >= |w|`` in the same tensor.

    Use it with ``scope="global"``: inside one layer it ranks as magnitude does. The largest weight of each layer
    scores 1 (two equal largest ones 1/2 each), so that no layer is emptied first. Equal magnitudes get equal scores;
    a tensor of zeros scores 0. Costs a sort of the tensor and about six temporaries of its size.

    Args:
        weight: ``[out, in, ...]``, any float dtype; not modified.
        stats: Not used.

    Returns:
        Scores of the same shape in [0, 1], float32 at least; NaN where the tensor holds an infinity or NaN.

    Raises:
        TypeError: If ``weight`` is not floating point.

    References:
        Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", equation 4.
    """
    _floating(weight)
    if weight.numel() == 0:
        return _at_least_float32(weight)
    size = _at_least_float32(weight).abs().flatten()
    largest = size.max()
    # Relative to the largest weight no square underflows that could matter; the score does not change.
    ordered, order = torch.sort(torch.where(largest > 0, size / largest, size))
    squares = ordered.square()
    scores = torch.empty_like(size)
    scores[order] = squares / _sum_of_not_smaller(ordered, squares)
    return scores.view(weight.shape)


def _sum_of_not_smaller(ordered: Tensor, squares: Tensor) -> Tensor:
    """For each of the rising ``ordered``: the sum of ``squares`` from the first entry equal to it to the end."""
    # On the CPU since torch's cumulative sum of floats is not deterministic on CUDA; in float64 for its length.
    sums = squares.cpu().double().flip(0).cumsum(0).flip(0).to(squares)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=starts[1:])
    first = torch.arange(len(ordered), device=ordered.device).mul_(starts).cummax(0).values
    return sums[first].clamp_(min=torch.finfo(sums.dtype).tiny)


@dataclass(frozen=True)
class LazyScores:
    """Scores of one weight that are computed when they are read, piece by piece.

    The threshold reads scores two or three times in pieces that fit the cache; computing them anew costs less than
    writing a whole tensor of them (at 100 M weights: 20 ms against 180 ms and 400 MB). The weight must not change
    before the masks are made.

    Args:
        criterion: One that is ``elementwise``.
        weight: ``[n]``, contiguous.
        stats: What the criterion needs, elementwise statistics as ``[n]``.
        shape: Shape of the weight as the model has it.
    """

    criterion: Criterion
    weight: Tensor
    stats: Statistics
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scores."""
        return self.read(0, 0).dtype

    @property
    def device(self) -> torch.device:
        """Device of the scores."""
        return self.weight.device

    def read(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Return the scores ``start:stop:step`` of the flat order."""
        pieces = {name: tensor[start:stop:step] for name, tensor in self.stats.collected.items()}
        return self.criterion(self.weight[start:stop:step], Statistics(generator=None, **pieces))


def scores_of(criterion: Criterion, weight: Tensor, stats: Statistics) -> Tensor | LazyScores:
    """Return the scores of a weight, lazily where the criterion allows it.

    Args:
        criterion: A registered one or any callable of that signature; one with a true attribute ``elementwise`` must
            give the same scores for a flat piece of the weight with the same piece of each statistic that has the
            weight's shape. It is called with the whole weight where it gets other statistics.
        weight: ``[out, in, ...]``; may require grad; not modified.
        stats: What the criterion needs.

    Returns:
        A tensor of scores, or :class:`LazyScores`: ``masks`` and ``thresholds`` take both.

    Raises:
        TypeError: If ``weight`` is not floating point.
        ValueError: If a statistic is missing, or the scores have another shape than the weight.
    """
    weight = _floating(weight).detach()
    if getattr(criterion, "elementwise", False) and stats.elementwise:
        for name, tensor in stats.collected.items():
            _check_shape(name, tensor, weight)
        flat = {name: tensor.detach().reshape(-1) for name, tensor in stats.collected.items()}
        lazy = LazyScores(criterion, weight.reshape(-1), Statistics(generator=None, **flat), weight.shape)
        lazy.read(0, 0)  # a missing statistic raises here
        return lazy
    scores = criterion(weight, stats)
    if scores.shape != weight.shape:
        raise ValueError(
            f"a criterion must return scores of the weight's shape {tuple(weight.shape)}, got {tuple(scores.shape)}."
        )
    return scores


def parameter_generator(name: str, seed: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on a parameter's name and a seed alone.

    Args:
        name: The parameter's name in ``state_dict()``.
        seed: Another number gives an independent stream.

    Returns:
        A fresh generator; the same on every rank, in every process and under every ``PYTHONHASHSEED``.
    """
    text = f"{seed}:{name}".encode()
    return torch.Generator().manual_seed(zlib.crc32(text) << 32 | zlib.adler32(text))


def _floating(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        raise TypeError(f"a criterion scores floating-point weights, got {weight.dtype}. Leave integer tensors out.")
    return weight


def _required(value: T | None, name: str, criterion: str) -> T:
    if value is None:
        raise ValueError(f"criterion {criterion!r} needs `stats.{name}`, got None. Collect it before the event.")
    return value


def _check_shape(name: str, statistic: Tensor, weight: Tensor) -> None:
    if statistic.shape != weight.shape:
        raise ValueError(
            f"`stats.{name}` must have the weight's shape {tuple(weight.shape)}, got {tuple(statistic.shape)}."
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision has too few digits for products and sums of squares."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )
