"""Squares gathered between two events, for criteria that look at training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.structured.removal import keep_channels

__all__ = ["Squares"]


class Squares:
    """Sums of squares by name, and how many were added: root mean squares of gradients, norms of inputs."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.sums

    def add(self, name: str, squares: Tensor) -> None:
        """Add float32 squares, which are kept as they are the first time."""
        self.sums[name] = self.sums[name].add_(squares) if name in self.sums else squares
        self.counts[name] = self.counts.get(name, 0) + 1

    def root_mean(self, name: str) -> Tensor:
        """Return the root of the mean square."""
        return (self.sums[name] / self.counts[name]).sqrt()

    def clear(self) -> None:
        """Forget everything: an event has used it."""
        self.sums, self.counts = {}, {}

    def keep(self, name: str, indices: Tensor, shape: tuple[int, ...]) -> None:
        """Follow channels that left."""
        if name in self.sums:
            self.sums[name] = keep_channels(self.sums[name], indices, shape)

    def to(self, devices: Mapping[str, torch.device]) -> None:
        """Move what was loaded to where the parameters are."""
        self.sums = {name: tensor.to(devices[name]) for name, tensor in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
