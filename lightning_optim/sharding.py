"""Tensors of which each process holds a part (DTensors): their parts, their wholes, and what may be counted.

Plain code on a DTensor can be wrong without an error: ``(w > t).sum().item()`` and ``torch.count_nonzero(w)`` count
the local part, ``numel()`` the whole. Everything here says which of the two it is. On ordinary tensors all functions
are the identity, so callers need not ask.
"""

import math
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "copies",
    "full",
    "is_dtensor",
    "is_sharded",
    "local",
    "own_class",
    "reshard",
    "set_class",
    "shard_like",
    "whole_state",
    "wrap_like",
]


def is_dtensor(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is one of which this process holds a part or a copy."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none, and masks ask at every step
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of the module is a DTensor."""
    return any(is_dtensor(parameter) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory; outside of autograd for a DTensor."""
    return tensor.to_local().detach() if is_dtensor(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor: a collective that every process of its mesh must join."""
    return tensor.full_tensor().detach() if is_dtensor(tensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds of ``like``, as a DTensor of its placements.

    Args:
        whole: The same on every process, of ``like``'s shape.
        like: The tensor whose placements count; an ordinary one returns ``whole`` on its device.
    """
    if not is_dtensor(like):
        return whole.to(like.device)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replicated = DTensor.from_local(whole.to(local(like).device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = replicated.redistribute(mesh, like.placements)
    return part


def wrap_like(part: Tensor, like: Tensor) -> Tensor:
    """Return a local part as a DTensor with the placements and the shape of ``like``."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def copies(tensor: Tensor, world_size: int) -> int:
    """Return how many processes hold the same part of a tensor: what a sum over all of them counts it."""
    if not is_dtensor(tensor):
        return world_size
    mesh = tensor.device_mesh
    whole = [placement.is_replicate() for placement in tensor.placements]  # of a 2-D layout no other says is_shard()
    return world_size // math.prod(size for size, copied in zip(mesh.shape, whole, strict=True) if not copied)


def reshard(module: nn.Module) -> None:
    """Free what is gathered: parts that were changed since are gathered anew when they are used."""
    for part in module.modules():
        if _is_fsdp(type(part)):
            part.reshard()  # type: ignore[operator]


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """Return a module's whole ``state_dict()`` on the CPU, gathered one tensor at a time.

    Args:
        module: All processes must ask.
        keep: Whether this process wants it; else the result is empty.
    """
    state: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        whole = full(value) if isinstance(value, Tensor) else value
        if keep:
            state[name] = whole.cpu() if isinstance(whole, Tensor) else whole
    return state


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class without the one that ``fully_shard`` puts before it."""
    return next(cls for cls in type(module).__mro__ if not _is_fsdp(cls))


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class of its own; the one that ``fully_shard`` puts before it stays.

    A step under DDP leaves the bound ``forward`` of the former class on the instance (Lightning's
    ``_ForwardRedirection`` sets it back as it read it), which would be called instead of the new one: it is removed.
    """
    divided, left = type(module), vars(module).get("forward")
    bound = getattr(left, "__func__", None) if getattr(left, "__self__", None) is module else None
    if bound is not None and any(vars(cls).get("forward") is bound for cls in divided.__mro__):
        del vars(module)["forward"]
    if _is_fsdp(divided):
        bases = tuple(cls if base is own_class(module) else base for base in divided.__bases__)
        module.__class__ = type(f"FSDP{cls.__name__}", bases, {"__deepcopy__": divided.__dict__.get("__deepcopy__")})
    else:
        module.__class__ = cls


def _is_fsdp(cls: type) -> bool:
    return any(
        base.__name__ == "FSDPModule" and base.__module__.startswith("torch.distributed") for base in cls.__mro__
    )
