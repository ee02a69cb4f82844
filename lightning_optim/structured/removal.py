"""Removal: channels leave a live model, its optimizers and its averaged copies, or nothing changes."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.checkpoint import inherit
from lightning_optim.outputs import output_tensors
from lightning_optim.structured.groups import FAILURES, Removal, copy_for_tracing
from lightning_optim.target import ForwardInputs

__all__ = ["apply_removal", "damage", "keep_channels", "slice_optimizer"]

TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}
"""Difference that sums in another order (TF32 on CUDA) may make, as a fraction of the output's largest entry.

Float32 on a CPU stays below 1e-5; scrambled heads of a ViT-small made 9e-3.
"""


def keep_channels(tensor: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the surviving entries of a tensor.

    Args:
        tensor: Any shape.
        kept: Flat indices that survive, ``[n]``.
        shape: What they are viewed as; ``n`` entries.

    Returns:
        A new tensor of ``shape``, in channels_last where ``tensor`` was.
    """
    small = tensor.detach().reshape(-1)[kept.to(tensor.device)].view(shape)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.ndim)
    if wanted is not None and tensor.is_contiguous(memory_format=wanted) and not tensor.is_contiguous():
        return small.contiguous(memory_format=wanted)
    return small


def apply_removal(
    module: nn.Module, removal: Removal, before_change: Callable[[str, tuple[str, ...]], None] | None = None
) -> dict[nn.Parameter, tuple[nn.Parameter, Tensor]]:
    """Remove the channels from a module in place.

    Parameters that change are new; they keep ``requires_grad``, dtype, memory format, their Python attributes and
    hooks, their gradient (sliced), and stay shared where they were.

    Args:
        module: The module that was traced, or a copy of it.
        removal: What is left.
        before_change: Called with each layer's name and the attributes that change, before anything does.

    Returns:
        Old parameter -> (new parameter, surviving flat indices).
    """
    layers = {name.rpartition(".")[0] for name in removal.kept} | set(removal.attributes)
    if before_change is not None:
        for name in sorted(layers):
            before_change(name, tuple(removal.attributes.get(name, {})))
    replaced: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}
    done: set[tuple[nn.Module, str]] = set()
    for name, kept in removal.kept.items():
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if (layer, leaf) in done:  # one layer under two names
            continue
        done.add((layer, leaf))
        if leaf in layer._buffers:
            layer._buffers[leaf] = keep_channels(layer._buffers[leaf], kept, removal.shapes[name])  # type: ignore[arg-type]
            continue
        old: Any = layer._parameters[leaf]
        if old not in replaced:
            replaced[old] = (_smaller(old, kept, removal.shapes[name]), kept)
        layer._parameters[leaf] = replaced[old][0]
    for name, attributes in removal.attributes.items():
        for attribute, value in attributes.items():
            setattr(module.get_submodule(name), attribute, value)
    return replaced


def _smaller(old: nn.Parameter, kept: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    new = nn.Parameter(keep_channels(old, kept, shape), requires_grad=old.requires_grad)
    inherit(new, old)
    if old.grad is not None:
        new.grad = keep_channels(old.grad, kept, shape)
    return new


def slice_optimizer(
    optimizer: Optimizer, replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]], *, reset: bool = False
) -> list[tuple[int, ...]]:
    """Hand an optimizer the new parameters, in place of the old ones in their groups.

    Args:
        optimizer: It keeps its groups, so schedulers stay attached.
        replaced: From :func:`apply_removal`.
        reset: Forget the state of what changed, instead of slicing it.

    Returns:
        Shapes of the parameters whose state could not be sliced (a factored one) and was reset.
    """
    lost = []
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            if old not in replaced:
                continue
            new, kept = replaced[old]
            group["params"][position] = new
            state = optimizer.state.pop(old, None)
            if state is None or reset:
                continue
            if any(isinstance(v, Tensor) and v.ndim and v.shape != old.shape for v in state.values()):
                lost.append(tuple(old.shape))
                continue
            optimizer.state[new] = {
                key: keep_channels(value, kept, tuple(new.shape)) if isinstance(value, Tensor) and value.ndim else value
                for key, value in state.items()
            }
    return lost


def damage(module: nn.Module, inputs: ForwardInputs, removal: Removal, *, exact: bool) -> str | None:
    """Say what a removal would break, on copies; None when it breaks nothing.

    The model with the channels removed must give outputs of the same shapes, finite, and (unless that cannot be told)
    equal to those of the model with the same channels set to zero; a norm over the channels is then taken over those
    that stay. The copies have random weights: zeros, or branches that a small scale holds down, would hide the
    difference. Costs three copies of the model and five forward passes.

    Args:
        module: The model as it is.
        inputs: What its forward receives.
        removal: What would be left.
        exact: Whether the outputs must be equal.
    """
    masked, before = _with_random_weights(module, inputs)
    removed = copy_for_tracing(masked, rounded=False)
    try:
        apply_removal(removed, removal)
        after = _outputs(removed, inputs)
    except FAILURES as error:
        return f"the forward pass fails afterwards ({(str(error).splitlines() or [''])[0][:120]})"
    if [t.shape for t in before] != [t.shape for t in after]:
        return "the output would change its shape"
    if not all(bool(torch.isfinite(t).all()) for t in after):
        return "the output would not be finite"
    if exact:
        _zero_removed(masked, removal)
        for left, right in zip(after, _outputs(masked, inputs), strict=True):
            difference = _difference(left, right)
            if difference > _tolerance(left):
                return f"removing differs from setting to zero by {difference:.2g} of the output"
    whole = copy_for_tracing(module, rounded=False)  # training moves BatchNorm's statistics, so it comes last
    if _breaks_training(whole, removed, inputs):
        return "the forward pass of training fails afterwards (it calls a layer that evaluation does not)"
    return None


def _with_random_weights(module: nn.Module, inputs: ForwardInputs) -> tuple[nn.Module, list[Tensor]]:
    """Return a copy with random weights and its outputs; the model's own weights where those are not finite."""
    copy = copy_for_tracing(module, rounded=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator).to(parameter)
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.copy_(noise + 0.5 if parameter.ndim < 2 else (noise - 0.5) * (12 / fan_in) ** 0.5)
    outputs = _outputs(copy, inputs)
    if all(bool(torch.isfinite(output).all()) for output in outputs):
        return copy, outputs
    copy = copy_for_tracing(module, rounded=False)
    return copy, _outputs(copy, inputs)


def _breaks_training(whole: nn.Module, removed: nn.Module, inputs: ForwardInputs) -> bool:
    """Tell whether the copies' forward passes in training mode, where they call other layers, come apart."""
    shapes = []
    for module in (whole, removed):
        module.train()
        try:
            shapes.append([t.shape for t in _outputs(module, inputs)])
        except FAILURES:
            return module is removed  # one row and BatchNorm: then it cannot be told
        finally:
            module.eval()
    return shapes[0] != shapes[1]


def _outputs(module: nn.Module, inputs: ForwardInputs) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return output_tensors(inputs.call(module))


def _zero_removed(module: nn.Module, removal: Removal) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, kept in removal.kept.items():
            if name in parameters:
                flat = parameters[name].detach().reshape(-1)
                small = torch.zeros_like(flat)
                small[kept.to(flat.device)] = flat[kept.to(flat.device)]
                parameters[name].copy_(small.view(parameters[name].shape))
    for name, kept in removal.kept.items():
        owner, _, leaf = name.rpartition(".")
        layer: Any = module.get_submodule(owner)
        if leaf == "weight" and type(layer) in _NORM_DIM:
            layer.forward = partial(_norm_over, layer, kept.to(layer.weight.device))


_NORM_DIM = {nn.LayerNorm: -1, nn.GroupNorm: 1}


def _norm_over(layer: Any, kept: Tensor, inputs: Tensor) -> Tensor:
    """Norm over the channels that stay; the others are zero."""
    dim = _NORM_DIM[type(layer)]
    small = inputs.index_select(dim, kept)
    weight, bias = layer.weight[kept], None if layer.bias is None else layer.bias[kept]
    if isinstance(layer, nn.LayerNorm):
        small = F.layer_norm(small, (len(kept),), weight, bias, layer.eps)
    else:
        small = F.group_norm(small, layer.num_groups, weight, bias, layer.eps)
    return torch.zeros_like(inputs).index_copy(dim, kept, small)


def _difference(left: Tensor, right: Tensor) -> float:
    """Return the largest difference as a fraction of the largest entry; 0 or 1 where nothing can be divided."""
    if not left.is_floating_point() or left.numel() == 0:
        return 0.0 if torch.equal(left, right) else 1.0
    left, right = left.double(), right.double()
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-6))


def _tolerance(output: Tensor) -> float:
    if not output.is_floating_point():
        return 0.0
    return max(TOLERANCE.get(output.device.type, 2e-3), 16 * torch.finfo(output.dtype).eps)


def trusted(groups: Iterable[str], breaks: Callable[[list[str]], str | None]) -> tuple[list[str], dict[str, str]]:
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
        return [], {names[0]: problem}
    half = len(names) // 2
    good, bad = trusted(names[:half], breaks)
    more_good, more_bad = trusted(names[half:], breaks)
    return good + more_good, {**bad, **more_bad}
