"""Chooses the integers of trained weights, layer by layer, and writes their values in the weights' place.

A quantized layer finds scales and integers in its weight; so do checkpoints and exported files, which know of nothing
else.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.functional.criteria import Statistics
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.functional.rounding import ROUNDINGS, Rounding, is_settled, to_nearest
from lightning_optim.functional.second_order import output_error
from lightning_optim.functional.statistics import STATISTICS, needs_of
from lightning_optim.layerwise import change_layer_by_layer
from lightning_optim.modules import EMBEDDINGS, RECURRENT, TRANSPOSED, Experts
from lightning_optim.quantization.attention import QuantizedOutProjection
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.prepare import set_phase
from lightning_optim.quantization.rows import rows_of
from lightning_optim.tables import by_reason
from lightning_optim.target import ForwardInputs

__all__ = ["Settled", "check_method", "needs_inputs", "settle_weights"]


@dataclass
class Settled:
    """What became of the weights.

    Attributes:
        errors: By layer the squared error of its outputs as a fraction of their squares, over the batches: by rounding
            to the nearest, and by the method.
        plainly: Layers that are rounded to the nearest after all, and why.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    plainly: dict[str, str] = field(default_factory=dict)
    _before: dict[str, Tensor] = field(default_factory=dict)

    def remember(self, name: str, weight: Tensor) -> None:
        """Keep a weight as it is now, on the CPU."""
        self._before[name] = weight.detach().to("cpu", copy=True)

    def undo(self, model: nn.Module) -> None:
        """Give the layers the weights that were remembered."""
        for name, weight in self._before.items():
            parameter: Any = model.get_submodule(name)._parameters["weight"]
            parameter.data.copy_(weight)

    def __str__(self) -> str:
        if not self.errors and not self.plainly:
            return ""
        reasons = "; ".join(f"{names}: {reason}" for names, reason in by_reason(self.plainly))
        left = f"; rounded to the nearest: {reasons}" if reasons else ""
        if not self.errors:
            return f"post-training quantization: no layer's inputs were read{left}."
        number = len(self.errors)
        nearest, reached = (sum(pair[i] for pair in self.errors.values()) / number for i in (0, 1))
        return (
            f"post-training quantization: mean squared error of the outputs of {number} layers {reached:.2e} of their "
            f"squares ({nearest:.2e} by rounding to the nearest){left}."
        )


def check_method(method: Any) -> Rounding:
    """Return the rounding of a name, ``{name: arguments}``, or a callable as it is.

    Raises:
        ValueError: If it is unknown, or needs what is not collected without training.
    """
    rounding = ROUNDINGS.resolve(method)
    for name in needs_of(rounding):
        if name not in STATISTICS or not STATISTICS[name].reads_inputs:
            known = ", ".join(sorted(key for key in STATISTICS if STATISTICS[key].reads_inputs))
            raise ValueError(f"`method` needs {name!r}; quantization without training collects {known}.")
    return rounding


def needs_inputs(rounding: Rounding) -> bool:
    """Whether a rounding reads the inputs of the layers."""
    return bool(needs_of(rounding))


def settle_weights(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    rounding: Rounding,
    calls: Sequence[ForwardInputs],
    settled: Settled,
    *,
    shown: bool,
) -> None:
    """Give prepared layers, in the order in which they are called, the weights that the rounding chooses.

    Args:
        model: The whole model.
        layers: The prepared layers by name. Tables and experts round from now on, the others are off.
        rounding: Chooses the integers.
        calls: What forward receives; not used by a rounding that reads no inputs.
        settled: Filled in.
        shown: Whether a progress bar is shown.

    Raises:
        ValueError: If the rounding returns other values than integers times the scales found in them.
    """
    if rounding is to_nearest:
        return
    needs = needs_of(rounding)
    holders = _holders(model)
    chosen: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        reason = _why_plainly(name, layer, holders, needs)
        if reason is None:
            chosen[name] = layer
        elif layer.weight_bits is not None:
            settled.plainly[name] = reason
    rounds_at_once = (*EMBEDDINGS, Experts)
    set_phase(model, layers, "off")
    set_phase(model, {name: each for name, each in layers.items() if isinstance(each, rounds_at_once)}, "frozen")

    def change(name: str, statistics: dict[str, Tensor]) -> None:
        layer = layers[name]
        weight: Any = layer._parameters["weight"]
        settled.remember(name, weight)
        with torch.no_grad():
            errors = _settle(name, layer, rows_of(layer, "weight", weight)[0], rounding, statistics)
        if errors is not None:
            settled.errors[name] = errors

    if needs:
        missed = change_layer_by_layer(model, chosen, calls, needs, change, title="rounding", shown=shown)
        settled.plainly |= dict.fromkeys(missed, "no batch reaches it")
    else:
        for name in chosen:
            change(name, {})


def _settle(
    name: str, layer: QuantizedLayer, matrix: Tensor, rounding: Rounding, statistics: dict[str, Tensor]
) -> tuple[float, float] | None:
    """Round a matrix ``[out, in, ...]`` in place; returns its errors where the inputs' second moments are known."""
    bits, granularity = layer.weight_bits or 8, layer.weight_granularity
    try:
        chosen = rounding(matrix.detach(), Statistics(generator=None, **statistics), bits, granularity)
    except ValueError as error:
        raise ValueError(f"{name} cannot be rounded: {error}") from error
    if chosen.shape != matrix.shape or not is_settled(chosen, bits, granularity):
        raise ValueError(
            f"the rounding of {name} must return integers times scales in the shape {tuple(matrix.shape)}, with the "
            f"largest integer of {bits} bits for each scale: layers find the scales in what it returns."
        )
    moment = statistics.get("input_second_moment")
    errors = None
    if moment is not None:
        nearest = fake_quantize_weight(matrix.detach(), bits, granularity)
        errors = (output_error(matrix, nearest, moment), output_error(matrix, chosen, moment))
    matrix.copy_(chosen)
    return errors


def _why_plainly(
    name: str, layer: QuantizedLayer, holders: Mapping[int, set[int]], needs: Collection[str]
) -> str | None:
    """Return why a layer is rounded to the nearest; None if its rounding is chosen."""
    if isinstance(layer, EMBEDDINGS):
        return "a table, whose rows are looked up"
    if isinstance(layer, Experts):
        return "experts, which compute their inputs inside"
    if isinstance(layer, nn.MultiheadAttention | QuantizedOutProjection):
        return "inside of nn.MultiheadAttention"
    if isinstance(layer, RECURRENT):
        return "a recurrent layer, which reads its own outputs"
    if isinstance(layer, TRANSPOSED) and layer.groups > 1:
        return "a transposed convolution with groups"
    if layer.weight_bits is None:
        return "it has no weight to round"
    if len(holders[id(layer._parameters["weight"])]) > 1:
        return "other layers share its weight"
    problems = (STATISTICS[statistic]().problem(f"{name}.weight", layer) for statistic in needs)
    return next((f"its inputs are {problem}" for problem in problems if problem is not None), None)


def _holders(model: nn.Module) -> dict[int, set[int]]:
    """Return the layers that hold each parameter, both by their identity."""
    holders: dict[int, set[int]] = {}
    for layer in model.modules():
        for parameter in layer._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(layer))
    return holders
