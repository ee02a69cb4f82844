"""Statistics that criteria ask for besides the weights, each collected between two events by a small class.

A criterion names what it needs (``needs=("gradient",)``) and finds it as an attribute of its
:class:`~lightning_optim.functional.criteria.Statistics`. A new statistic is a class here, registered in
:data:`STATISTICS`; callbacks know no others and spell no names.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from lightning_optim.change import Changed, keep_channels
from lightning_optim.modules import CONVOLUTIONS, LINEARS, stores_inputs_first
from lightning_optim.registry import Registry
from lightning_optim.sharding import full, local

__all__ = ["STATISTICS", "Collector", "InputSecondMoment", "dense_gradient", "needs_of", "squared_inputs"]

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that saw different batches."""


class Collector:
    """Sums of one statistic by the name of the weight that it belongs to, and how many were added."""

    elementwise = False
    """Whether there is one number per weight: a process that holds a part of the weight collects that part, and a
    criterion may be computed piece by piece."""
    broadcasts = False
    """Whether it broadcasts to the weight as the layer stores it."""
    reads_inputs = False
    """Whether it is read by hooks on the layers (:meth:`attach`), in the batches that lead to an event."""
    title = ""
    """What it is, for error messages."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.inputs_first: set[str] = set()
        """Weights that their layers store as ``[in, out]``."""

    def __contains__(self, name: str) -> bool:
        return name in self.sums

    def problem(self, name: str, layer: nn.Module) -> str | None:
        """Return why it cannot be collected for a weight of a layer, None where it can."""
        return None

    def attach(self, name: str, layer: nn.Module) -> Any:
        """Register a hook that adds the inputs of a layer's training calls; returns its handle."""
        raise NotImplementedError

    def know(self, name: str, layer: nn.Module) -> None:
        """Remember how a layer stores its weight, before anything is collected, sliced or asked for."""
        if stores_inputs_first(layer, name.rpartition(".")[2]):
            self.inputs_first.add(name)

    def after_step(self, name: str, parameter: Tensor) -> None:
        """Look at a weight right after its optimizer stepped."""

    def value(self, name: str, total: Total) -> Tensor:
        """Return the statistic as the criterion gets it.

        Args:
            name: The weight.
            total: Sum over the processes that saw different batches; every process must ask.
        """
        raise NotImplementedError

    def add(self, name: str, values: Tensor) -> None:
        """Add float32 values; the first tensor is kept as it is and changed in place afterwards."""
        self.sums[name] = self.sums[name].add_(values) if name in self.sums else values
        self.counts[name] = self.counts.get(name, 0) + 1

    def clear(self) -> None:
        """Start over: an event has used what was collected."""
        self.sums, self.counts = {}, {}

    def follow(self, changed: Changed, prefix: str = "") -> None:
        """Slice and rename the sums with their weights; those of removed weights are dropped.

        Args:
            changed: What became of the model's parameters.
            prefix: What precedes the names in the whole model.
        """
        sums, counts, inputs_first = self.sums, self.counts, self.inputs_first
        self.clear()
        self.inputs_first = set()
        for name in inputs_first:
            if (successor := changed.successor(prefix + name)) is not None:
                self.inputs_first.add(successor[0].removeprefix(prefix))
        for name, tensor in sums.items():
            successor, kept = changed.successor(prefix + name), changed.surviving(prefix + name)
            if successor is None:
                continue
            now, parameter = successor
            now = now.removeprefix(prefix)
            before = changed.shape_before(prefix + name)
            self.sums[now] = tensor if kept is None else self._sliced(now, tensor, before, kept, parameter.shape)
            self.counts[now] = counts[name]

    def _sliced(self, name: str, sums: Tensor, before: torch.Size, kept: Tensor, shape: torch.Size) -> Tensor:
        """Return the sums of what survives of a weight; they broadcast to the weight."""
        return keep_channels(sums.expand(before), kept, shape)

    def to(self, devices: Mapping[str, torch.device]) -> None:
        """Move what was loaded to the devices of the weights."""
        self.sums = {name: tensor.to(devices[name]) for name, tensor in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


STATISTICS: Registry[type[Collector]] = Registry("statistic")


@STATISTICS.register("gradient")
class Gradient(Collector):
    """Root mean square of each weight's gradient over the steps since the last event, of the weight's shape.

    Processes hold the same averaged gradient, or the part that belongs to their part of the weight.
    """

    elementwise = broadcasts = True
    title = "gradient"

    def after_step(self, name: str, parameter: Tensor) -> None:
        """Add the squared gradient, if there is one."""
        if parameter.grad is not None:
            self.add(name, dense_gradient(local(parameter.grad)).square())

    def value(self, name: str, total: Total) -> Tensor:
        """Return the root of the mean square."""
        return (self.sums[name] / self.counts[name]).sqrt()


class _OfInputs(Collector):
    """A statistic of the inputs of Linear, Conv1D and Conv layers, over calls in training mode or with gradients."""

    reads_inputs = True

    def problem(self, name: str, layer: nn.Module) -> str | None:
        if isinstance(layer, (*LINEARS, *CONVOLUTIONS)) and name.endswith("weight"):
            return None
        return f"known for Linear, Conv1D and Conv weights; {name} belongs to a {type(layer).__name__}"

    def attach(self, name: str, layer: nn.Module) -> Any:
        self.know(name, layer)

        def add_inputs(layer: nn.Module, args: tuple[Any, ...]) -> None:
            # A model of `from_pretrained` trains in eval mode unless someone calls train(), which a Trainer does not.
            if layer.training or torch.is_grad_enabled():
                self.add(name, self.measure(layer, full(args[0].detach()).float()))

        return layer.register_forward_pre_hook(add_inputs)

    def measure(self, layer: Any, inputs: Tensor) -> Tensor:
        """Return what one call adds, in float32."""
        raise NotImplementedError


@STATISTICS.register("input_norm")
class InputNorm(_OfInputs):
    """L2 norm of each input feature, of a shape that broadcasts to the weight; see :func:`squared_inputs`."""

    broadcasts = True
    title = "norms of the layers' inputs"

    def measure(self, layer: Any, inputs: Tensor) -> Tensor:
        """Return the sums of squares, which broadcast to the weight as the layer stores it."""
        squares = squared_inputs(layer, inputs)
        return squares.t() if stores_inputs_first(layer, "weight") else squares

    def value(self, name: str, total: Total) -> Tensor:
        """Return the root of the sum of squares over all processes."""
        return total(self.sums[name].clone()).sqrt()


@STATISTICS.register("input_magnitude")
class InputMagnitude(_OfInputs):
    """Mean absolute value of each input feature over the places of a call, of a shape as :func:`squared_inputs`.

    Summed over the calls of a batch and over processes, averaged over batches: it ranks the features of layers that the
    same batches reach.
    """

    title = "magnitudes of the layers' inputs"

    def measure(self, layer: Any, inputs: Tensor) -> Tensor:
        """Return the mean over one call's places."""
        features = getattr(layer, "in_channels", inputs.shape[-1])
        return squared_inputs(layer, inputs.abs().sqrt()) * (features / max(inputs.numel(), 1))

    def value(self, name: str, total: Total) -> Tensor:
        """Return the mean over the calls."""
        return total(self.sums[name].clone()) / self.counts[name]


@STATISTICS.register("input_second_moment")
class InputSecondMoment(_OfInputs):
    """Sum of x xᵀ over the vectors x that the weight's rows multiply, ``[n, n]`` in float32.

    n is the number of inputs of a Linear or Conv1D, and input channels x kernel of a Conv1d or Conv2d, in the order of
    ``weight.flatten(1)``. It takes n² numbers per weight.
    """

    title = "second moments of the layers' inputs"

    def problem(self, name: str, layer: Any) -> str | None:
        """Return why it cannot be collected: it needs plain convolutions."""
        if not isinstance(layer, CONVOLUTIONS):
            return super().problem(name, layer)
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        if plain and not isinstance(layer, nn.Conv3d):
            return super().problem(name, layer)
        return (
            "known for Linear and Conv1D layers, and for Conv1d and Conv2d without groups, with zeros as padding, "
            f"given as a number; {name} belongs to {layer}"
        )

    def measure(self, layer: Any, inputs: Tensor) -> Tensor:
        """Return the sum of x xᵀ."""
        vectors = inputs.flatten(0, -2) if inputs.ndim > 1 else inputs[None]
        if isinstance(layer, CONVOLUTIONS):
            vectors = _patches(layer, inputs)
        with torch.autocast(inputs.device.type, enabled=False):  # hooks run inside the step's autocast
            return vectors.T @ vectors

    def value(self, name: str, total: Total) -> Tensor:
        """Return the sum over all processes."""
        return total(self.sums[name].clone())

    def _sliced(self, name: str, sums: Tensor, before: torch.Size, kept: Tensor, shape: torch.Size) -> Tensor:
        width = before[1:].numel()
        stay = kept.view(shape)[:, 0] // width if name in self.inputs_first else kept.view(shape)[0].flatten() % width
        stay = stay.to(sums.device)
        return sums[stay][:, stay]


def _patches(layer: Any, images: Tensor) -> Tensor:
    """Return what a Conv1d's or Conv2d's kernel multiplies at each place, ``[places, in * kernel]``."""
    space = layer.weight.ndim - 2
    if images.ndim == space + 1:
        images = images[None]
    one, none = (1,) * (2 - space), (0,) * (2 - space)
    places = unfold(
        images if space == 2 else images.unsqueeze(2),
        one + layer.kernel_size,
        dilation=one + layer.dilation,
        padding=none + layer.padding,
        stride=one + layer.stride,
    )
    return places.transpose(1, 2).flatten(0, 1)


def dense_gradient(gradient: Tensor) -> Tensor:
    """Return a gradient in float32, dense also where a table's is sparse (and lists some rows twice)."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().float()


def squared_inputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the summed squares of a layer's input per input feature, broadcastable to its weight.

    Args:
        layer: A Linear, Conv1D or Conv layer.
        inputs: Linear and Conv1D ``[..., in]``; Conv ``[batch, in, *space]`` (the batch dimension may be missing).

    Returns:
        Linear and Conv1D ``[1, in]``; Conv ``[1, in, 1, ...]``, or ``[out, in / groups, 1, ...]`` for grouped
        convolutions.
    """
    if isinstance(layer, LINEARS):
        return inputs.flatten(0, -2).square().sum(0, keepdim=True) if inputs.ndim > 1 else inputs.square()[None]
    if not isinstance(layer, CONVOLUTIONS):
        raise TypeError(f"input norms are known for Linear, Conv1D and Conv layers, got {type(layer).__name__}.")
    space = layer.weight.ndim - 2
    channel = inputs.ndim - space - 1
    squares = inputs.square().sum([d for d in range(inputs.ndim) if d != channel])
    per_group = squares.view(layer.groups, layer.in_channels // layer.groups)
    per_output = per_group.repeat_interleave(layer.out_channels // layer.groups, 0) if layer.groups > 1 else per_group
    return per_output.reshape(*per_output.shape, *[1] * space)


def needs_of(criterion: Any) -> tuple[str, ...]:
    """Return what a criterion asks for by its attribute ``needs``: names of statistics, or "generator".

    Raises:
        TypeError: If ``needs`` is not a sequence of names.
        ValueError: If it names a statistic that is not registered.
    """
    while isinstance(criterion, partial):
        criterion = criterion.func
    needs = getattr(criterion, "needs", ())
    if isinstance(needs, str) or not isinstance(needs, (tuple, list, set, frozenset)):
        raise TypeError(f"a criterion's `needs` must be a tuple of names such as ('gradient',), got {needs!r}.")
    known = (*STATISTICS, "generator")
    unknown = [name for name in needs if name not in known]
    if unknown:
        raise ValueError(
            f"a criterion's `needs` names {unknown[0]!r}, which nothing collects; known: {', '.join(known)}."
        )
    return tuple(needs)
