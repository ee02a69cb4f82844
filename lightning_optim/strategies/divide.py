"""Shards a module in units, each of which ``fully_shard`` gathers as a whole."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from lightning_optim.strategies.batchnorm import is_batchnorm
from lightning_optim.strategies.reads import Reads
from lightning_optim.strategies.units import NamedModules, Units, find_units
from lightning_optim.strategies.whole import groups_by_dtype, is_undivided, kept_whole

__all__ = [
    "Recomputed",
    "divide",
    "divide_frozen",
    "frozen_mesh",
    "recompute",
    "register_steps",
    "warn_of_short",
    "without_reduction",
]


def divide(
    module: nn.Module,
    units: NamedModules,
    mesh: Any,
    *,
    reshard: bool,
    types: tuple[torch.dtype, torch.dtype] | None,
    reshard_root: bool | None = None,
) -> NamedModules:
    """Shard a module's parameters over a mesh, in place.

    Args:
        module: The whole module. It becomes the root unit, which gathers the parameters of no other unit.
        units: Dotted names and modules, innermost first.
        mesh: One dimension, or (copies, shards).
        reshard: Whether to free a unit after its forward pass.
        types: Dtype in which parameters are gathered, and dtype in which gradients are summed; None keeps theirs.
        reshard_root: Whether to free the root after its forward pass; None: the backward pass does.

    Returns:
        The units without the root: ``units``, and layers inside them whose dtype differs.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    param_dtype, reduce_dtype = types or (None, None)
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)  # autocast does it
    whole = set(kept_whole(module).values())
    norms: list[nn.Module] = [part for part in module.modules() if is_batchnorm(part) and part.affine]
    if types is not None and norms:  # PyTorch's kernels want float32 there, beside bfloat16 inputs
        fully_shard(norms, mesh=mesh, reshard_after_forward=False)
    names = {part: name for name, part in module.named_modules()}
    divided: NamedModules = []
    for name, part in [*units, ("", module)]:
        after = reshard if part is not module else reshard_root
        for layers in groups_by_dtype(part, whole):
            fully_shard(layers, mesh=mesh, mp_policy=policy, ignored_params=whole, reshard_after_forward=reshard)
            divided += [(names[layer], layer) for layer in layers]
        if part is module or _has_parameters_left(part, whole):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole, reshard_after_forward=after)
            divided += [(name, part)] if part is not module else []
    return divided


def frozen_mesh(strategy: Any) -> Any | None:
    """Return the mesh over which a strategy divides a network that is only called, beside its module; None: whole.

    Args:
        strategy: The Trainer's, set up. OptimFSDP2 divides it where it frees units after their use.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if "OptimFSDP2" not in names or not (strategy.shard and strategy.reshard):
        return None
    mesh = strategy._data_mesh
    return mesh if mesh.size(-1) > 1 else None


def divide_frozen(network: nn.Module, mesh: Any) -> Units:
    """Shard a frozen network that is only called, in place; each unit is gathered while it computes, in its own dtype.

    Args:
        network: The whole network.
        mesh: One dimension, or (copies, shards).

    Returns:
        Its units.
    """
    units = find_units(network)
    reads = Reads.of(network)
    for name, part in divide(network, units.named, mesh, reshard=True, types=None, reshard_root=True):
        reads.watch(name, part, None)
    # inside of `forward`, where fully_shard's hooks are done: they read the shards themselves
    network.__dict__["forward"] = reads.in_step(network.forward)
    return units


def register_steps(
    module: nn.Module, steps: Iterable[str], around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Gather the root unit for these methods too: Lightning calls them instead of ``forward``.

    Args:
        module: The root unit.
        steps: Names of methods.
        around: Wraps a method; the result runs while the root is gathered.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    for step in steps:
        module.__dict__[step] = around(getattr(module, step))
        register_fsdp_forward_method(module, step)


class Recomputed:
    """Replaces a unit's forward by one that recomputes its activations in the backward pass."""

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's forward."""
        forward: Callable[..., Any] = type(self.unit).forward
        if not torch.is_grad_enabled():
            return forward(self.unit, *args, **kwargs)
        return recomputed(forward, self.unit, *args, use_reentrant=False, **kwargs)


def recompute(units: NamedModules) -> None:
    """Let units keep only their inputs, and recompute their activations in the backward pass."""
    for _, unit in units:
        if any(True for _ in unit.children()):
            unit.__dict__["forward"] = Recomputed(unit)


def warn_of_short(module: nn.Module, shards: int) -> None:
    """Warn of layers with fewer rows than shards: some devices hold nothing of them."""
    short = [name for name, p in module.named_parameters() if p.ndim and p.shape[0] < shards and p.numel() > shards]
    if short:
        rank_zero_warn(
            f"{short[0]} has {module.get_parameter(short[0]).shape[0]} rows for {shards} shards"
            f"{f', and {len(short) - 1} more such' if len(short) > 1 else ''}: some devices hold nothing of it."
        )


@contextmanager
def without_reduction(module: nn.Module) -> Generator[None, None, None]:
    """Leave gradients unreduced on each device while the block runs."""
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def _has_parameters_left(unit: nn.Module, whole: set[nn.Parameter]) -> bool:
    """Whether a unit holds a parameter to shard that no unit inside it holds."""
    return any(is_undivided(parameter) and parameter not in whole for parameter in unit.parameters())
