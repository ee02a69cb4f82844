"""Parameters that fully sharded training cannot divide with the others of their unit.

PyTorch's ``fully_shard`` takes no 0-dim parameters (CLIP's ``logit_scale``), and parameters of one type in one unit
(a float32 norm in a bfloat16 block is refused at the first forward). So the former stay whole on every process, and
the latter are divided in units of their own.
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

    Those without dimensions; and where one layer holds parameters of several types itself, all but those of the type
    of which it holds most.
    """
    whole = {name: p for name, p in module.named_parameters() if p.ndim == 0 and not is_dtensor(p)}
    for name, layer in module.named_modules():
        own = {leaf: p for leaf, p in layer.named_parameters(name, recurse=False) if p.ndim and p.is_floating_point()}
        main = _main_dtype(own.values())
        whole |= {leaf: p for leaf, p in own.items() if p.dtype != main}
    return whole


def groups_by_dtype(part: nn.Module, whole: set[nn.Parameter]) -> list[list[nn.Module]]:
    """Return the layers of a unit whose parameters are of another type than most of it, a list per type.

    Args:
        part: The unit; parameters that are divided already do not count.
        whole: Parameters that stay whole. What the unit itself holds of another type joins them.
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
    """Return those that every process holds whole and trains by its own batches, where the rest is divided.

    Args:
        module: The root; one whose own ``configure_model`` divided it takes care of them itself.
        mesh: The mesh that it is divided over.
    """
    from torch.distributed.fsdp import FSDPModule

    if mesh.size() == 1 or not is_sharded(module) or not isinstance(module, FSDPModule):
        return []
    return [parameter for parameter in module.parameters() if not is_dtensor(parameter)]


def is_undivided(parameter: Tensor) -> bool:
    """Whether ``fully_shard`` has not taken a parameter; tensor parallelism may have split it."""
    return not is_dtensor(parameter) or parameter.device_mesh.mesh_dim_names == ("tensor_parallel",)


def _main_dtype(parameters: Iterable[Tensor]) -> torch.dtype | None:
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for parameter in parameters:
        sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def broadcast_from_first(parameters: Iterable[Tensor]) -> None:
    """Give all processes the values of the first: what is not divided must begin equal."""
    for parameter in parameters:
        if not parameter.is_meta:
            torch.distributed.broadcast(parameter.detach(), src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], mesh: Any) -> None:
    """Average the gradients of whole parameters over the processes of a mesh, in one collective per type."""
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
