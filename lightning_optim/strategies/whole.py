"""Parameters that cannot be sharded together with the others of their unit.

PyTorch's ``fully_shard`` accepts no 0-dim parameters (CLIP's ``logit_scale``) and only one dtype per unit (a float32
norm in a bfloat16 block raises at the first forward). So 0-dim parameters stay whole on every process, and layers whose
dtype differs are units of their own.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.sharding import is_dtensor, is_sharded

__all__ = [
    "average_gradients",
    "broadcast_from_first",
    "groups_by_dtype",
    "is_undivided",
    "kept_whole",
    "parameters_left_whole",
]


def kept_whole(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that stay whole, by name.

    These are 0-dim parameters and, in a layer that holds parameters of several dtypes, all but those of its most common
    dtype.
    """
    whole = {name: p for name, p in module.named_parameters() if p.ndim == 0 and not is_dtensor(p)}
    for name, layer in module.named_modules():
        own = {leaf: p for leaf, p in layer.named_parameters(name, recurse=False) if p.ndim and p.is_floating_point()}
        main = _main_dtype(own.values())
        whole |= {leaf: p for leaf, p in own.items() if p.dtype != main}
    return whole


def groups_by_dtype(part: nn.Module, whole: set[nn.Parameter]) -> list[list[nn.Module]]:
    """Return the layers of a unit whose dtype is not the unit's most common one, as a list per dtype.

    Args:
        part: The unit; parameters that are sharded already do not count.
        whole: Parameters that stay whole. The unit's own parameters of another dtype are added.
    """
    left = [p for p in part.parameters() if is_undivided(p) and p.is_floating_point() and p not in whole]
    main = _main_dtype(left)
    others = {id(p) for p in left if p.dtype != main}
    whole |= {p for p in part.parameters(recurse=False) if id(p) in others}
    groups: dict[torch.dtype, list[nn.Module]] = defaultdict(list)
    for layer in part.modules():
        own = [p for p in layer.parameters(recurse=False) if id(p) in others]
        if own and layer is not part:
            groups[own[0].dtype].append(layer)
    return list(groups.values())


def parameters_left_whole(module: nn.Module, mesh: Any) -> list[nn.Parameter]:
    """Return the parameters of a sharded module that every process holds whole, so that their gradients differ.

    Args:
        module: The root. A module that its own ``configure_model`` sharded has none: it reduces them itself.
        mesh: The mesh that it is sharded over.
    """
    from torch.distributed.fsdp import FSDPModule

    if mesh.size() == 1 or not is_sharded(module) or not isinstance(module, FSDPModule):
        return []
    return [parameter for parameter in module.parameters() if not is_dtensor(parameter)]


def is_undivided(parameter: Tensor) -> bool:
    """Whether ``fully_shard`` has not sharded a parameter; tensor parallelism may have split it."""
    return not is_dtensor(parameter) or parameter.device_mesh.mesh_dim_names == ("tensor_parallel",)


def _main_dtype(parameters: Iterable[Tensor]) -> torch.dtype | None:
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for parameter in parameters:
        sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def broadcast_from_first(parameters: Iterable[Tensor]) -> None:
    """Copy the values of rank 0 to all processes: parameters that are not sharded must start equal."""
    for parameter in parameters:
        if not parameter.is_meta:
            torch.distributed.broadcast(parameter.detach(), src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], mesh: Any) -> None:
    """Average the gradients of whole parameters over a mesh, in one collective per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype[parameter.grad.dtype].append(parameter.grad)
    for gradients in by_dtype.values():
        together = torch.cat([gradient.flatten() for gradient in gradients])
        for place in range(mesh.ndim):
            torch.distributed.all_reduce(together, group=mesh.get_group(place))
        together /= mesh.size()
        parts = torch.split(together, [gradient.numel() for gradient in gradients])
        torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list(parts))
