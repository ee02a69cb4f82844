"""Low rank: the directions of a layer's inputs that its weight uses, most important first, and how many to keep.

A weight ``W`` of shape ``[out, in]`` becomes ``expand @ reduce`` with ``reduce`` ``[rank, in]`` and
``expand = W @ back`` ``[out, rank]``. A criterion ``criterion(weight, stats) -> Directions`` chooses ``reduce`` and
``back`` for every possible rank; their first ``rank`` rows and columns are those of a smaller one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_optim.functional.criteria import Statistics
from lightning_optim.registry import Registry

__all__ = [
    "LOW_RANK_CRITERIA",
    "Directions",
    "LowRankCriterion",
    "energy_kept",
    "input_norm",
    "largest_useful_rank",
    "random",
    "rank_for_energy",
    "second_moment",
    "svd",
]

DAMPING = 0.01
"""What is added to each input's second moment, as a fraction of their mean: inputs that were never seen still count."""


@dataclass(frozen=True)
class Directions:
    """The directions in which a weight ``[out, in]`` can be factorized, in float64; n is at most min(out, in).

    Attributes:
        reduce: ``[n, in]``.
        back: ``[in, n]``, with ``reduce @ back`` the identity. ``weight @ back[:, :r] @ reduce[:r]`` is the weight of
            rank r.
        energies: ``[n]``, >= 0: what each direction contributes to the squared norm of the layer's (weighted) output.
        total: Their sum, and what lies outside of the n directions.
    """

    reduce: Tensor
    back: Tensor
    energies: Tensor
    total: float


LowRankCriterion = Callable[[Tensor, Statistics], Directions]


def _try(criterion: LowRankCriterion) -> None:
    """Call a criterion that was given arguments, so that it rejects wrong ones at once."""
    ones = {"input_norm": torch.ones(1, 2), "input_second_moment": torch.eye(2)}
    criterion(torch.eye(2), Statistics(generator=torch.Generator(), **ones))


LOW_RANK_CRITERIA: Registry[LowRankCriterion] = Registry("low-rank criterion", trial=_try)


@LOW_RANK_CRITERIA.register("second_moment", needs=("input_second_moment",))
def second_moment(weight: Tensor, stats: Statistics, *, damping: float = DAMPING) -> Directions:
    """Return the directions that lose least of the layer's outputs on the inputs that were seen.

    With X the inputs and C = X Xᵀ, a square root S of C (S Sᵀ = C) and the singular value decomposition of W S, keeping
    the first r directions has the smallest ``||W X - W_r X||²`` of all weights of rank r; that loss is the sum of the
    squared singular values left out (plus what the damping adds).

    Args:
        weight: ``[out, in]``, any float dtype; not modified.
        stats: With ``input_second_moment``, ``[in, in]``; its scale does not matter.
        damping: Added to the diagonal of C, as a fraction of its mean, >= 0. With 0 an input that is a combination of
            others must not occur.

    Returns:
        The directions. Takes an eigendecomposition of ``[in, in]`` and a singular value decomposition of the weight,
        in float64.

    Raises:
        ValueError: If the second moment is missing, zero or not finite, or ``damping`` is negative.

    References:
        Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
        Compression" (with the symmetric eigendecomposition in place of Cholesky's); Chen et al. 2021, "DRONE:
        Data-aware Low-rank Compression for Large NLP Models".
    """
    moment = _usable(stats.input_second_moment, "input_second_moment", "second_moment", damping)
    mean = moment.diagonal().mean()
    values, vectors = torch.linalg.eigh(moment + damping * mean * torch.eye(len(moment)).to(moment))
    values = values.clamp(min=torch.finfo(torch.float64).eps * float(values[-1]))
    root = values.sqrt()
    weighted = svd(weight.double() @ (vectors * root), stats)
    return replace(weighted, reduce=weighted.reduce @ (vectors / root).T, back=(vectors * root) @ weighted.back)


@LOW_RANK_CRITERIA.register("input_norm", needs=("input_norm",))
def input_norm(weight: Tensor, stats: Statistics, *, damping: float = DAMPING) -> Directions:
    """Return the directions with each input weighted by its norm: cheaper statistics, blind to correlated inputs.

    Args:
        weight: ``[out, in]``, any float dtype; not modified.
        stats: With ``input_norm``, whose entries are those of one input each.
        damping: Added to the squared norms, as a fraction of their mean, >= 0.

    Raises:
        ValueError: If the norms are missing, zero or not finite, or ``damping`` is negative.

    References:
        Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models".
    """
    squares = _usable(stats.input_norm, "input_norm", "input_norm", damping).flatten().square()
    root = (squares + damping * squares.mean()).sqrt()
    root = root.clamp(min=torch.finfo(torch.float64).eps * float(root.max()))
    weighted = svd(weight.double() * root, stats)
    return replace(weighted, reduce=weighted.reduce / root, back=weighted.back * root[:, None])


@LOW_RANK_CRITERIA.register("svd")
def svd(weight: Tensor, stats: Statistics) -> Directions:
    """Return the singular vectors of the weight itself: all inputs count alike.

    Both factors get the root of each singular value. Directions whose singular value is zero are left out.

    Args:
        weight: ``[out, in]``, any float dtype; not modified.
        stats: Not used.

    References:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    weight = weight.double()
    _, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    tiny = max(weight.shape) * torch.finfo(torch.float64).eps * sigma[:1]
    number = int((sigma > tiny).sum())
    energies, scale, right = sigma[:number].square(), sigma[:number].sqrt(), right[:number]
    return Directions(scale[:, None] * right, right.T / scale, energies, float(energies.sum()))


@LOW_RANK_CRITERIA.register("random", needs=("generator",))
def random(weight: Tensor, stats: Statistics) -> Directions:
    """The control: orthogonal directions drawn at random, whatever weight and inputs are.

    Args:
        weight: ``[out, in]``, any float dtype; not modified.
        stats: With ``generator``, a CPU generator.

    Raises:
        ValueError: If the generator is missing.
    """
    if stats.generator is None:
        raise ValueError("the low-rank criterion 'random' needs the statistic `generator`, which is missing.")
    weight = weight.double()
    inputs = weight.shape[1]
    drawn = torch.randn(inputs, min(weight.shape), generator=stats.generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn)[0].to(weight.device)
    return Directions(basis.T.contiguous(), basis, (weight @ basis).square().sum(0), float(weight.square().sum()))


def _usable(statistic: Tensor | None, name: str, criterion: str, damping: float) -> Tensor:
    if damping < 0:
        raise ValueError(f"`damping` must be >= 0, got {damping!r}.")
    if statistic is None:
        raise ValueError(f"the low-rank criterion {criterion!r} needs the statistic `{name}`, which is missing.")
    if not bool(torch.isfinite(statistic).all()):
        raise ValueError("the layer's inputs were not finite.")
    if not bool(statistic.any()):
        raise ValueError("the layer's inputs were all zero.")
    return statistic.double()


def rank_for_energy(directions: Directions, energy: float) -> int:
    """Return the smallest rank that keeps a fraction of the energy, in (0, 1]; at least 1.

    Examples:
        >>> found = svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), Statistics())
        >>> [round(float(e), 6) for e in found.energies]
        [9.0, 4.0, 1.0]
        >>> [rank_for_energy(found, energy) for energy in (0.6, 0.9, 1.0)]
        [1, 2, 3]
    """
    wanted = energy * directions.total * (1 - 1e-9)
    return min(int((directions.energies.cumsum(0) < wanted).sum()) + 1, len(directions.energies))


def energy_kept(directions: Directions, rank: int) -> float:
    """Return the fraction of the energy that the first ``rank`` directions keep, in [0, 1]."""
    return float(directions.energies[:rank].sum()) / directions.total if directions.total else 0.0


def largest_useful_rank(outputs: int, inputs: int) -> int:
    """Return the largest rank at which two factors hold fewer numbers than one weight; 0 where there is none.

    Examples:
        >>> largest_useful_rank(16, 16), largest_useful_rank(4, 1)
        (7, 0)
    """
    return (outputs * inputs - 1) // (outputs + inputs)
