"""Steps of layers that are trained (``observer="learned"``): the parameters of a layer, and when they are trained."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_optim.functional.fake_quantize import integer_range, straight_through
from lightning_optim.functional.learned_step import (
    first_step,
    learned_fake_quantize,
    learned_fake_quantize_weight,
    learned_step,
    learned_zero_point,
)
from lightning_optim.sharding import full, is_dtensor, local, shard_like, wrap_like

__all__ = [
    "FIRST",
    "INPUT_STEP",
    "OFFSET",
    "STEPS",
    "WEIGHT_STEP",
    "add_input_step",
    "add_weight_step",
    "begin_steps",
    "learned_range",
    "learned_weight",
    "learns",
    "remove_steps",
    "rounded_input",
    "set_trained",
    "steps_of",
    "weight_step",
]

WEIGHT_STEP, INPUT_STEP, OFFSET = "weight_log_step", "input_log_step", "input_offset"
STEPS = (WEIGHT_STEP, INPUT_STEP, OFFSET)
"""Parameters of a layer; each begins at zero."""

FIRST = "weight_first_step"
"""Buffer: the steps that a weight's began with. Those of an input are its observed scale and zero point."""


def add_weight_step(layer: nn.Module, rows: Tensor, granularity: str) -> None:
    """Give a layer the parameter and the buffer of its weight's steps, not trained yet."""
    size = 1 if granularity == "per_tensor" else rows.shape[0]
    if WEIGHT_STEP in layer._parameters and layer._parameters[WEIGHT_STEP].shape == (size,):  # type: ignore[union-attr]
        return
    layer.register_parameter(WEIGHT_STEP, _parameter(size, rows))
    layer.register_buffer(FIRST, torch.ones(size, dtype=torch.float32, device=rows.device))


def add_input_step(layer: nn.Module, like: Tensor, *, offset: bool = True) -> None:
    """Give a layer the parameters of its input's step and, with ``offset``, zero point, not trained yet."""
    for name in (INPUT_STEP, OFFSET) if offset else (INPUT_STEP,):
        if name not in layer._parameters:
            layer.register_parameter(name, _parameter(1, like))
    if not offset:
        remove_steps(layer, (OFFSET,))


def _parameter(size: int, like: Tensor) -> nn.Parameter:
    # fully_shard takes no 0-dim parameters, and one dtype per unit.
    return nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device), requires_grad=False)


def remove_steps(layer: nn.Module, names: Collection[str] = STEPS) -> None:
    """Remove what :func:`add_weight_step` and :func:`add_input_step` gave to a layer."""
    for name in names:
        layer._parameters.pop(name, None)
    if WEIGHT_STEP in names:
        layer._buffers.pop(FIRST, None)


def learns(layer: nn.Module, which: str) -> bool:
    """Whether a layer has trained steps for its "weight" or its "input"."""
    return f"{which}_log_step" in layer._parameters


def steps_of(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of steps by name."""
    return {
        f"{name}.{leaf}": parameter
        for name, layer in layers.items()
        for leaf in STEPS
        if (parameter := layer._parameters.get(leaf)) is not None
    }


def weight_step(layer: nn.Module) -> Tensor:
    """Return the steps of a layer's weight, ``[out]`` or ``[1]``, without gradient."""
    log_step = full(layer._parameters[WEIGHT_STEP].detach())  # type: ignore[union-attr]
    return learned_step(log_step, layer._buffers[FIRST])  # type: ignore[arg-type]


def learned_weight(layer: nn.Module, rows: Tensor, bits: int, granularity: str) -> Tensor:
    """Return a weight ``[out, in, ...]``, rounded with trained steps.

    A weight of which this process holds a part is rounded with the steps of the whole, which count as constants then:
    it is read outside of its layer.
    """
    if is_dtensor(rows):
        whole = learned_fake_quantize_weight(full(rows), weight_step(layer), bits, granularity)
        rounded = local(shard_like(whole, rows))
        return wrap_like(straight_through(rows.to_local(), rounded), rows)
    step = learned_step(layer._parameters[WEIGHT_STEP], layer._buffers[FIRST])  # type: ignore[arg-type]
    return learned_fake_quantize_weight(rows, step, bits, granularity)


def learned_range(layer: nn.Module, first: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the present scale ``[]`` and zero point (int32, ``[]``) of a layer's input, without gradient."""
    step = learned_step(full(layer._parameters[INPUT_STEP].detach()), first.reshape(1))  # type: ignore[union-attr]
    offset = layer._parameters.get(OFFSET)
    if offset is None:
        return step.reshape(()), zero_point
    zero = learned_zero_point(full(offset.detach()), zero_point.reshape(1), step, bits)
    return step.reshape(()), zero.to(torch.int32).reshape(())


def rounded_input(layer: nn.Module, x: Tensor, first: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return an input, rounded with a trained step and zero point.

    Args:
        layer: The layer.
        x: ``[rows, ...]``.
        first: The scale that was observed.
        zero_point: The zero point that was observed.
        bits: Bits of the input.
    """
    low, high = integer_range(bits, symmetric=False)
    log_step, offset = layer._parameters[INPUT_STEP], layer._parameters.get(OFFSET)
    assert log_step is not None  # noqa: S101 - the caller asked whether it learns
    step, zero = learned_step(log_step, first.reshape(1)), zero_point
    if offset is not None:
        zero = learned_zero_point(offset, zero_point.reshape(1), step.detach(), bits)
    features = x.shape[1:].numel() if x.ndim > 1 else x.numel()
    return learned_fake_quantize(x, step, zero, low, high, 1 / math.sqrt(max(features, 1) * high))


@torch.no_grad()
def begin_steps(layers: Iterable[nn.Module], rows: Callable[[nn.Module], tuple[Tensor, int, str]]) -> None:
    """Let the steps of weights begin where the weights are now; a collective if they are divided.

    Args:
        layers: The layers.
        rows: Returns a layer's weight ``[out, in, ...]``, its bits and its granularity.
    """
    for layer in layers:
        for name in STEPS:
            if name in layer._parameters:
                local(layer._parameters[name]).zero_()  # type: ignore[arg-type]
        if learns(layer, "weight"):
            weight, bits, granularity = rows(layer)
            layer._buffers[FIRST].copy_(first_step(full(weight), bits, granularity))  # type: ignore[union-attr]


def set_trained(layer: nn.Module, phase: str, *, trainable: bool) -> bool:
    """Let the steps of a layer be trained or not, and return whether anything changed.

    Those of the weight are trained in the phases that round, as the weight is, those of the input until ranges are
    frozen. Others have no gradient, so that no optimizer moves them.

    Args:
        layer: The layer.
        phase: Its phase.
        trainable: Whether its weight is trained.
    """
    changed = False
    for name in STEPS:
        parameter = layer._parameters.get(name)
        if parameter is None:
            continue
        wanted = trainable and phase in (("fake_quantize", "frozen") if name == WEIGHT_STEP else ("fake_quantize",))
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)
            changed = True
        if not wanted:
            parameter.grad = None
    return changed
