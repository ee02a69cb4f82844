"""Squares gathered between two events, for criteria that look at training."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optim.change import Changed
from lightning_optim.functional.criteria import Statistics
from lightning_optim.modules import CONVOLUTIONS
from lightning_optim.sharding import full
from lightning_optim.structured.removal import keep_channels
from lightning_optim.target import Weight

__all__ = [
    "GATHERED",
    "InputSquares",
    "Squares",
    "check_input_norms",
    "dense_gradient",
    "needs_of",
    "restore",
    "squared_inputs",
]

GATHERED = ("gradient", "input_norm")
"""Statistics that are gathered while the model trains, each in sums of its own."""


def dense_gradient(gradient: Tensor) -> Tensor:
    """Return a gradient in float32, dense also where a table's is sparse (and lists some rows twice)."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().float()


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

    def follow(self, changed: Changed, prefix: str = "") -> None:
        """Slice and rename the sums with their weights; those of removed weights are dropped.

        Args:
            changed: What became of the model's parameters.
            prefix: What precedes the names in the whole model.
        """
        sums, counts = self.sums, self.counts
        self.clear()
        for name, tensor in sums.items():
            successor, kept = changed.successor(prefix + name), changed.surviving(prefix + name)
            if successor is None:
                continue
            if kept is not None:  # norms of inputs broadcast to the weight
                tensor = keep_channels(tensor.expand(changed.before[prefix + name].shape), kept, successor[1].shape)
            now = successor[0].removeprefix(prefix)
            self.sums[now], self.counts[now] = tensor, counts[name]

    def to(self, devices: Mapping[str, torch.device]) -> None:
        """Move what was loaded to where the parameters are."""
        self.sums = {name: tensor.to(devices[name]) for name, tensor in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def needs_of(criterion: Any) -> tuple[str, ...]:
    """Return the statistics that a criterion asks for by its attribute ``needs``.

    Raises:
        TypeError: If ``needs`` is not a sequence of names.
        ValueError: If it names a statistic that there is not.
    """
    while isinstance(criterion, partial):
        criterion = criterion.func
    needs = getattr(criterion, "needs", ())
    if isinstance(needs, str) or not isinstance(needs, (tuple, list, set, frozenset)):
        raise TypeError(f"a criterion's `needs` must be a tuple of names such as ('gradient',), got {needs!r}.")
    known = tuple(Statistics.__dataclass_fields__)
    unknown = [name for name in needs if name not in known]
    if unknown:
        raise ValueError(
            f"a criterion's `needs` names {unknown[0]!r}, which nothing collects; known: {', '.join(known)}."
        )
    return tuple(needs)


def restore(squares: Mapping[str, Squares], state: Mapping[str, Any]) -> None:
    """Restore the sums of each statistic from its state by name.

    Files of 0.1 hold one state for all statistics: it is taken where one was gathered, and two of them lay in one sum.
    """
    if "sums" in state:
        state = dict.fromkeys(squares, state) if len(squares) == 1 else {}
    for statistic, gathered in squares.items():
        gathered.load_state_dict(state.get(statistic, {"sums": {}, "counts": {}}))


class InputSquares:
    """Forward pre-hook that adds up the squared inputs of one layer, per input feature."""

    def __init__(self, squares: Squares, name: str) -> None:
        self.squares = squares
        self.name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the inputs of a training call."""
        if layer.training:
            self.squares.add(self.name, squared_inputs(layer, full(args[0].detach()).float()))


def squared_inputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the summed squares of a layer's input per input feature, broadcastable to its weight.

    Args:
        layer: A Linear or Conv layer.
        inputs: Linear ``[..., in]``; Conv ``[batch, in, *space]`` (the batch dimension may be missing).

    Returns:
        Linear ``[1, in]``; Conv ``[1, in, 1, ...]``, or ``[out, in / groups, 1, ...]`` for grouped convolutions.
    """
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2).square().sum(0, keepdim=True) if inputs.ndim > 1 else inputs.square()[None]
    if not isinstance(layer, CONVOLUTIONS):
        raise TypeError(f"input norms are known for Linear and Conv layers, got {type(layer).__name__}.")
    space = layer.weight.ndim - 2
    channel = inputs.ndim - space - 1
    squares = inputs.square().sum([d for d in range(inputs.ndim) if d != channel])
    per_group = squares.view(layer.groups, layer.in_channels // layer.groups)
    per_output = per_group.repeat_interleave(layer.out_channels // layer.groups, 0) if layer.groups > 1 else per_group
    return per_output.reshape(*per_output.shape, *[1] * space)


def check_input_norms(weights: Mapping[str, Weight]) -> None:
    """Raise where the layer's inputs have no norm that belongs to its weights."""
    for name, weight in weights.items():
        if not isinstance(weight.layer, (nn.Linear, *CONVOLUTIONS)) or not name.endswith("weight"):
            raise MisconfigurationException(
                f"the criterion needs input norms, which are known for Linear and Conv weights; {name} belongs to a "
                f"{type(weight.layer).__name__}. Pass it in `exclude`, or take another criterion."
            )
