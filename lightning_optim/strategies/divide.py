"""How a module is divided into the units that ``fully_shard`` gathers together."""

from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from lightning_optim._upstream import BatchNorm
from lightning_optim.strategies.units import NamedModules
from lightning_optim.strategies.whole import groups_by_dtype, is_undivided, kept_whole

__all__ = ["Recomputed", "divide", "has_own_statistics", "register_steps"]


def divide(
    module: nn.Module,
    units: NamedModules,
    mesh: Any,
    *,
    reshard: bool,
    types: tuple[torch.dtype, torch.dtype] | None,
) -> NamedModules:
    """Divide a module's parameters over a mesh, in place.

    Args:
        module: The whole, which becomes the root unit and gathers what no unit holds.
        units: Dotted names and modules, innermost first.
        mesh: One dimension, or (copies, shards).
        reshard: Free a unit after its forward pass.
        types: In which parameters are gathered, and in which gradients are added up; None keeps theirs.

    Returns:
        The modules that are units now, without the root: ``units`` and the layers of another dtype inside them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    param_dtype, reduce_dtype = types or (None, None)
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)  # autocast does it
    whole = set(kept_whole(module).values())
    norms: list[nn.Module] = [part for part in module.modules() if _is_batchnorm(part) and part.affine]
    if types is not None and norms:  # PyTorch's kernels want float32 there, beside bfloat16 inputs
        fully_shard(norms, mesh=mesh, reshard_after_forward=False)
    names = {part: name for name, part in module.named_modules()}
    divided: NamedModules = []
    for name, part in [*units, ("", module)]:
        after = reshard if part is not module else None
        for layers in groups_by_dtype(part, whole):
            fully_shard(layers, mesh=mesh, mp_policy=policy, ignored_params=whole, reshard_after_forward=reshard)
            divided += [(names[layer], layer) for layer in layers]
        if part is module or _has_parameters_left(part, whole):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole, reshard_after_forward=after)
            divided += [(name, part)] if part is not module else []
    return divided


def register_steps(
    module: nn.Module, steps: Iterable[str], around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Gather the root for each of these methods too: Lightning calls them instead of ``forward``.

    Args:
        module: The root unit.
        steps: Names of methods.
        around: Wraps a method; what it returns runs while the root is gathered.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    for step in steps:
        module.__dict__[step] = around(getattr(module, step))
        register_fsdp_forward_method(module, step)


class Recomputed:
    """Stands in for a unit's forward: its activations are computed again in the backward pass."""

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's forward."""
        forward: Callable[..., Any] = type(self.unit).forward
        if not torch.is_grad_enabled():
            return forward(self.unit, *args, **kwargs)
        return recomputed(forward, self.unit, *args, use_reentrant=False, **kwargs)


def has_own_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm whose running statistics no collective keeps equal."""
    own = _is_batchnorm(module) and not isinstance(module, nn.SyncBatchNorm)
    return own and module.running_mean is not None


def _is_batchnorm(module: nn.Module) -> TypeGuard[BatchNorm]:
    return isinstance(module, BatchNorm)


def _has_parameters_left(unit: nn.Module, whole: set[nn.Parameter]) -> bool:
    """Whether a unit holds a parameter that no unit inside it took already, and that is to be divided."""
    return any(is_undivided(parameter) and parameter not in whole for parameter in unit.parameters())
