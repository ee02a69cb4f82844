"""Assigns each rank the rows of every sharded weight that it scores.

A criterion may look at a whole weight, and the order of equal scores is that of one process. So each rank takes the
same number of rows of every weight: consecutive parts of the flat order, whatever the layout of the strategy. The
weights are gathered one at a time, which costs what a forward pass of fully sharded training does. Where a rank's
own part is such rows and the criterion looks at single weights, nothing is gathered.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.functional.thresholds import Scores, Shards, as_reader
from lightning_optim.sharding import full, is_dtensor, local, shard_like, wrap_like

__all__ = ["Division", "divide"]


class Division:
    """Every rank ranks everything: ordinary tensors, and units such as columns that cross the parts.

    Args:
        weights: Name -> weight, a DTensor where it is divided.
    """

    shards: Shards | None = None
    """For the functions that rank, which then take parts."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def read(self, tensor: Tensor) -> Tensor:
        """Return what the criterion sees of a weight, or of a statistic with its layout."""
        return full(tensor)

    def take(self, name: str, scores: Scores) -> Scores:
        """Return the scores that this rank ranks."""
        return scores

    def mask_of(self, name: str, held: Tensor) -> Tensor:
        """Return the mask of what this rank ranks, from that of the part that it holds."""
        weight = self._weights[name]
        return full(wrap_like(held.to(torch.uint8), weight)) != 0 if is_dtensor(weight) else held

    def give(self, name: str, mask: Tensor) -> Tensor:
        """Return the mask of the part that this rank holds."""
        return local(shard_like(mask, self._weights[name]))


class _EqualRows(Division):
    """Each rank ranks its rows of every weight."""

    def __init__(self, weights: Mapping[str, Tensor], strategy: Any) -> None:
        super().__init__(weights)
        self._strategy = strategy
        self._rank, self._world = strategy.global_rank, strategy.world_size
        self.shards = Shards(self._rank, self._world, self._sum)

    def _sum(self, counts: Tensor) -> Tensor:
        added: Tensor = self._strategy.reduce(counts.to(self._strategy.root_device), reduce_op="sum")
        return added.cpu()

    def _rows(self, name: str) -> tuple[int, int, int]:
        shape = self._weights[name].shape
        rows, width = (shape[0], shape[1:].numel()) if shape else (1, 1)
        return self._rank * rows // self._world, (self._rank + 1) * rows // self._world, width

    def take(self, name: str, scores: Scores) -> Scores:
        first, last, width = self._rows(name)
        part = as_reader(name, scores).read(first * width, last * width).clone()
        return part.view(last - first, *self._weights[name].shape[1:])

    def mask_of(self, name: str, held: Tensor) -> Tensor:
        first, last, _ = self._rows(name)
        return super().mask_of(name, held)[first:last]

    def give(self, name: str, mask: Tensor) -> Tensor:
        first, last, width = self._rows(name)
        whole = torch.zeros(self._weights[name].shape, dtype=torch.uint8, device=mask.device)
        whole.view(-1)[first * width : last * width] = mask.reshape(-1).to(torch.uint8)
        whole = self._strategy.reduce(whole, reduce_op="sum")
        return super().give(name, whole != 0)


class _OwnRows(_EqualRows):
    """The same where a rank's rows are what it holds."""

    def read(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def take(self, name: str, scores: Scores) -> Scores:
        return scores

    def mask_of(self, name: str, held: Tensor) -> Tensor:
        return held

    def give(self, name: str, mask: Tensor) -> Tensor:
        return mask


def divide(weights: Mapping[str, Tensor], strategy: Any, *, by_element: bool, by_row: bool) -> Division:
    """Return who ranks what.

    Args:
        weights: Name -> selected weight.
        strategy: The Trainer's.
        by_element: The criterion scores each weight by itself.
        by_row: What is removed together lies in one row (a single weight, n of m).
    """
    if not by_row or not any(is_dtensor(weight) for weight in weights.values()):
        return Division(weights)
    if by_element and all(_holds_its_rows(weight, strategy.world_size) for weight in weights.values()):
        return _OwnRows(weights, strategy)
    return _EqualRows(weights, strategy)


def _holds_its_rows(weight: Tensor, world_size: int) -> bool:
    """Whether the ranks hold consecutive rows in their order: fully sharded training without anything beside."""
    if not is_dtensor(weight) or weight.device_mesh.ndim != 1 or weight.device_mesh.size() != world_size:
        return False
    return weight.placements[0].is_shard(0)
