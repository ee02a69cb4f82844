"""Scores and masks of weights that a layer does not store as ``[out, in, ...]``: Conv1D, and experts.

A criterion and a granularity see each matrix as ``[out, in]``; masks have the shape that the layer stores.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_optim.functional.criteria import Criterion, Statistics, scores_of
from lightning_optim.functional.granularity import Granularity, Masks
from lightning_optim.functional.masks import global_masks
from lightning_optim.functional.statistics import STATISTICS
from lightning_optim.functional.thresholds import Scores, Shards, as_reader
from lightning_optim.target import Weight

__all__ = ["masks_by_matrix", "ranks_matrices", "scores_by_matrix"]


def ranks_matrices(weights: Mapping[str, Weight], granularity: Granularity, scope: str) -> bool:
    """Whether weights have to be taken apart into matrices to be ranked.

    Single weights compete in any order; with ``scope="layer"`` they compete within their matrix.
    """
    if str(granularity) == "weight":
        return scope == "layer" and any(len(weight.shapes) > 1 for weight in weights.values())
    return not all(weight.is_plain for weight in weights.values())


def scores_by_matrix(
    criterion: Criterion,
    weight: Weight,
    tensor: Tensor,
    statistics: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> Tensor:
    """Return the scores of a weight, in its shape, from a criterion that sees one matrix after the other.

    Args:
        criterion: As :func:`~lightning_optim.functional.criteria.scores_of` takes it.
        weight: The selected weight.
        tensor: Its values, whole.
        statistics: What the criterion needs; those that broadcast to the weight do so as it is stored.
        generator: Draws for one matrix after the other, if the criterion is random.
    """
    matrices = weight.matrices(tensor)
    views = {
        name: weight.matrices(value.expand(tensor.shape)) if STATISTICS[name].broadcasts else [value] * len(matrices)
        for name, value in statistics.items()
    }
    parts = [
        scores_of(criterion, matrix, Statistics(generator=generator, **{name: each[i] for name, each in views.items()}))
        for i, matrix in enumerate(matrices)
    ]
    return _joined(weight, [_whole(part) for part in parts])


def masks_by_matrix(
    scores: Mapping[str, Scores],
    weights: Mapping[str, Weight],
    sparsity: float,
    granularity: Granularity,
    *,
    previous: Mapping[str, Tensor],
    each: bool,
    shards: Shards | None = None,
) -> Masks:
    """Return masks as :func:`~lightning_optim.functional.masks.global_masks` does, of weights taken apart.

    Args:
        scores: Name -> scores in the weight's shape, whole.
        weights: The selected weights by name.
        sparsity: Fraction of zeros.
        granularity: What is removed together.
        previous: Name -> the mask before.
        each: Whether each matrix is ranked by itself; else all together.
        shards: None: matrices are ranked whole.
    """
    if shards is not None:
        raise ValueError("matrices are ranked whole, got shards. Gather the scores first.")
    places = {name: [f"{name}[{i}]" for i in range(len(weights[name].shapes))] for name in scores}
    apart: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    for name, those in scores.items():
        apart |= zip(places[name], weights[name].matrices(_whole(those)), strict=True)
        if name in previous:
            before |= zip(places[name], weights[name].matrices(previous[name]), strict=True)
    groups = [[place] for place in apart] if each else [list(apart)]
    masks: Masks = {}
    for group in groups:
        kept = {place: before[place] for place in group if place in before}
        masks |= global_masks({place: apart[place] for place in group}, sparsity, granularity, previous=kept or None)
    return {name: _joined(weights[name], [masks[place] for place in those]) for name, those in places.items()}


def _whole(scores: Scores) -> Tensor:
    return as_reader("the weight", scores).read(0, scores.shape.numel()).view(scores.shape)


def _joined(weight: Weight, parts: list[Tensor]) -> Tensor:
    """Return a tensor of the weight's shape from those of its matrices."""
    whole = torch.empty(weight.parameter.shape, dtype=parts[0].dtype, device=parts[0].device)
    for view, part in zip(weight.matrices(whole), parts, strict=True):
        view.copy_(part)
    return whole
