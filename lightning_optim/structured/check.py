"""The check: whether a removal breaks a model, tried on copies before anything is committed."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.errors import FAILURES, first_line
from lightning_optim.modules import copy_module
from lightning_optim.outputs import output_tensors
from lightning_optim.structured.absent import absent_entries, in_float64
from lightning_optim.structured.groups import Removal
from lightning_optim.structured.removal import apply_removal
from lightning_optim.structured.tracing import without_cache
from lightning_optim.target import ForwardInputs, map_inputs

__all__ = ["SHAPE", "Damage", "damage", "trusted"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Difference that sums in another order may make, as a fraction of the output's largest entry.

In float64 it stays below 1e-10; scrambled heads of a ViT-small made 9e-3. Only a model that float64 cannot compute is
compared in a smaller dtype.
"""


_HIDDEN = re.compile(r"hidden_states?$|model_output$")
"""Fields of an output of transformers that hold hidden states, of an encoder or of a part."""

SHAPE = "the output would change its shape"
"""Why a removal is refused in a part that may return more than the model uses."""


@dataclass(frozen=True)
class Damage:
    """What a removal would break.

    Attributes:
        reason: The sentence for the user.
        only_values: Whether the smaller model runs and only its outputs are wrong.
    """

    reason: str
    only_values: bool = False

    def __str__(self) -> str:
        return self.reason


def damage(module: nn.Module, inputs: ForwardInputs, removal: Removal) -> Damage | None:
    """Say what a removal would break, on copies; None when it breaks nothing.

    The model with the channels removed must give finite outputs of the same shapes, equal to those of the model with
    the same channels set to zero or, where a norm or a mean is taken over channels, to those of the model in which
    these channels do not count (:mod:`lightning_optim.structured.absent`). The copies have random weights: zeros, or
    branches that a small scale holds down, would hide the difference. They compute in float64, so that the verdict is
    the same on every machine. Costs a copy of the module in float64, what stays of it, and five or six forward passes.

    Args:
        module: The model as it is.
        inputs: What its forward receives.
        removal: What would be left.
    """
    whole, inputs, arithmetic, before = _with_random_weights(module, inputs)
    removed = copy_module(
        whole, rounded=False, share_weights=True
    )  # what leaves is cut off, the rest is not written to
    try:
        apply_removal(removed, removal)
        with arithmetic():
            after = _outputs(removed, inputs)
    except FAILURES as error:
        return Damage(f"the forward pass fails afterwards{_place(removed, error)} ({first_line(error, 120)})")
    if [t.shape for t in before] != [t.shape for t in after]:
        return Damage(SHAPE)
    if not all(bool(torch.isfinite(t).all()) for t in after):
        return Damage("the output would not be finite")
    difference = _least_difference(whole, inputs, removal, arithmetic, after)
    if difference is not None:
        return Damage(f"removing differs from setting to zero by {difference:.2g} of the output", only_values=True)
    if _breaks_training(whole, removed, inputs, arithmetic):  # moves BatchNorm's statistics, so it comes last
        return Damage("the forward pass of training fails afterwards (it calls a layer that evaluation does not)")
    return None


def _place(module: nn.Module, error: BaseException) -> str:
    """Return in which layer a forward pass failed: the innermost one that was running."""
    names = {layer: name for name, layer in module.named_modules()}
    innermost, trace = "", error.__traceback__
    while trace is not None:
        running = trace.tb_frame.f_locals.get("self")
        innermost = (names.get(running) if isinstance(running, nn.Module) else None) or innermost
        trace = trace.tb_next
    return f" in {innermost}" if innermost else ""


Arithmetic = Callable[[], AbstractContextManager[object]]


def _with_random_weights(
    module: nn.Module, inputs: ForwardInputs
) -> tuple[nn.Module, ForwardInputs, Arithmetic, list[Tensor]]:
    """Return a copy with random weights, its inputs, how it computes, and its outputs.

    It computes in float64, or in the module's own dtype where float64 fails; its weights are the module's own where
    the outputs of random ones are not finite.
    """
    ways = [(arithmetic, drawn) for arithmetic in (in_float64, nullcontext) for drawn in (True, False)]
    for arithmetic, drawn in ways:
        last = (arithmetic, drawn) == ways[-1]
        try:
            copy = copy_module(module, rounded=False)
            received = inputs
            if arithmetic is in_float64:
                copy, received = copy.double(), map_inputs(_double, inputs)
            if drawn:
                _draw_weights(copy)
            with arithmetic():
                outputs = _outputs(copy, received)
        except FAILURES:
            if last:
                raise
            continue
        if last or all(bool(torch.isfinite(output).all()) for output in outputs):
            break
    return copy, received, arithmetic, outputs


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _draw_weights(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator).to(parameter)
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.copy_(noise + 0.5 if parameter.ndim < 2 else (noise - 0.5) * (12 / fan_in) ** 0.5)


def _least_difference(
    whole: nn.Module, inputs: ForwardInputs, removal: Removal, arithmetic: Arithmetic, after: list[Tensor]
) -> float | None:
    """Return how far removing is from not counting the channels; None where it is the same.

    Zeros need nothing of the operators; where a norm is taken over the channels, they must be absent.
    """
    differences = []
    for value, counted in ((0.0, nullcontext), (torch.nan, absent_entries)):
        _fill_removed(whole, removal, value)
        try:
            with arithmetic(), counted():
                pairs = list(zip(after, _outputs(whole, inputs), strict=True))
        except FAILURES:  # a matrix without inverse, say
            differences.append(1.0)
            continue
        if all(_difference(left, right) <= _tolerance(left) for left, right in pairs):
            _fill_removed(whole, removal, 0.0)
            return None
        differences.append(max(_difference(left, right) for left, right in pairs))
    return min(differences)


def _fill_removed(module: nn.Module, removal: Removal, value: float) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, kept in removal.kept.items():
            if name in parameters:
                flat = parameters[name].detach().reshape(-1)
                filled = torch.full_like(flat, value)
                filled[kept.to(flat.device)] = flat[kept.to(flat.device)]
                parameters[name].copy_(filled.view(parameters[name].shape))


def _breaks_training(whole: nn.Module, removed: nn.Module, inputs: ForwardInputs, arithmetic: Arithmetic) -> bool:
    """Tell whether the copies' forward passes in training mode, where they call other layers, come apart."""
    shapes = []
    for module in (whole, removed):
        module.train()
        try:
            with arithmetic():
                shapes.append([t.shape for t in _outputs(module, inputs)])
        except FAILURES:
            return module is removed  # one row and BatchNorm: then it cannot be told
        finally:
            module.eval()
    return shapes[0] != shapes[1]


def _outputs(module: nn.Module, inputs: ForwardInputs) -> list[Tensor]:
    with without_cache(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return output_tensors([_main_outputs(returned) for returned in inputs.call_each(module)])


def _main_outputs(returned: Any) -> Any:
    """Return an output without the hidden states on the side of logits: their width is the model's own affair."""
    if not isinstance(returned, Mapping) or not any(str(key).startswith("logits") for key in returned):
        return returned
    return {key: value for key, value in returned.items() if _HIDDEN.search(str(key)) is None}


def _difference(left: Tensor, right: Tensor) -> float:
    """Return the largest difference as a fraction of the largest entry; 0 or 1 where nothing can be divided."""
    if not left.is_floating_point() or left.numel() == 0:
        return 0.0 if torch.equal(left, right) else 1.0
    if not bool(torch.isfinite(right).all()):
        return 1.0
    left, right = left.double(), right.double()
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-6))


def _tolerance(output: Tensor) -> float:
    if not output.is_floating_point():
        return 0.0
    return TOLERANCE.get(output.dtype, 16 * torch.finfo(output.dtype).eps)


def trusted(groups: Iterable[str], breaks: Callable[[list[str]], Damage | None]) -> tuple[list[str], dict[str, str]]:
    """Find the groups that break something, by halving.

    Args:
        groups: Group names.
        breaks: Says what removing one channel of each of some groups breaks, None for nothing.

    Returns:
        The names that break nothing, and a reason for each that does.
    """
    names = list(groups)
    if not names:
        return [], {}
    problem = breaks(names)
    if problem is None:
        return names, {}
    if len(names) == 1:
        return [], {names[0]: problem.reason}
    half = len(names) // 2
    good, bad = trusted(names[:half], breaks)
    more_good, more_bad = trusted(names[half:], breaks)
    return good + more_good, {**bad, **more_bad}
