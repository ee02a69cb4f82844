"""Optimizers follow the model: they hold the new parameters, and the state of what survives."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_optim._upstream import tree_leaves
from lightning_optim.structured.removal import keep_channels

__all__ = ["check_optimizer", "is_flat", "slice_optimizer"]

_OWN = ("param_groups", "state", "defaults")
"""Where every optimizer keeps parameters."""


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that would go on with the old parameters.

    Args:
        optimizer: As the module gave it.

    Raises:
        ValueError: If it keeps parameters where nothing replaces them.
    """
    for each in _with_inner(optimizer):
        if is_flat(each):
            continue
        for name, value in vars(each).items():
            if name not in _OWN and any(isinstance(leaf, nn.Parameter) for leaf in tree_leaves(value)):
                raise ValueError(
                    f"{type(each).__name__} keeps parameters in `{name}`, besides its param_groups: it would go on "
                    "with those from before the removal. Take an optimizer that reads its param_groups, such as "
                    "torch.optim.AdamW, or prune before training: prune_channels(...)."
                )


def is_flat(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer's state is about all parameters in one vector, so that it can only be reset."""
    return isinstance(optimizer, LBFGS)


def slice_optimizer(
    optimizer: Optimizer, replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]], *, reset: bool = False
) -> list[str]:
    """Hand an optimizer the new parameters, in place of the old ones in their groups.

    Args:
        optimizer: It keeps its groups, so schedulers stay attached. Optimizers that it wraps follow.
        replaced: From :func:`apply_removal`.
        reset: Forget the state of what changed, instead of slicing it.

    Returns:
        What could not be sliced and was reset: the state of some parameters (a factored one), or a flat one as a whole.
    """
    return [sentence for each in _with_inner(optimizer) for sentence in _slice(each, replaced, reset)]


def _slice(
    optimizer: Optimizer, replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]], reset: bool
) -> list[str]:
    lost = []
    changed = False
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            if old not in replaced:
                continue
            changed = True
            new, kept = replaced[old]
            group["params"][position] = new
            state = optimizer.state.pop(old, None)
            if state is None or reset or is_flat(optimizer):
                continue
            if any(isinstance(v, Tensor) and v.ndim and v.shape != old.shape for v in state.values()):
                lost.append(f"the optimizer state of a {tuple(old.shape)} parameter cannot be sliced; reset")
                continue
            optimizer.state[new] = {
                key: keep_channels(value, kept, tuple(new.shape)) if isinstance(value, Tensor) and value.ndim else value
                for key, value in state.items()
            }
    if changed and isinstance(optimizer, LBFGS):
        _restart(optimizer)
        if not reset:
            lost.append("LBFGS keeps one state for all parameters, which cannot be sliced; reset")
    return lost


def _restart(optimizer: LBFGS) -> None:
    """Let LBFGS begin anew: its curvature is about vectors of the old length."""
    optimizer.state.clear()
    optimizer._params = optimizer.param_groups[0]["params"]
    optimizer._numel_cache = None


def _with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and those that it wraps."""
    seen: list[Any] = []
    waiting = [optimizer]
    while waiting:
        each = waiting.pop()
        if any(each is other for other in seen):
            continue
        seen.append(each)
        yield each
        waiting += [value for value in vars(each).values() if isinstance(value, Optimizer)]
