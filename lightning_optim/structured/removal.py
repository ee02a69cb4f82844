"""Removal: channels leave a live model, its optimizers and its averaged copies, or nothing changes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.checkpoint import inherit
from lightning_optim.structured.groups import Removal

__all__ = ["apply_removal", "keep_channels", "slice_optimizer"]


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
