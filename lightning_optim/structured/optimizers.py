"""Optimizers follow a change of the model: they hold the new parameters, and the state of those that stay."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_optim._upstream import tree_leaves
from lightning_optim.change import Changed, Kept
from lightning_optim.optimizers import held_ids, nested
from lightning_optim.structured.removal import keep_channels

__all__ = ["check_optimizer", "follow_change", "is_flat", "slice_optimizer"]

_OWN = ("param_groups", "state", "defaults")
"""Where every optimizer keeps parameters."""


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that would go on with the old parameters.

    Args:
        optimizer: As the module gave it.

    Raises:
        ValueError: If it keeps parameters where nothing replaces them.
    """
    for each in nested(optimizer):
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
    """Whether an optimizer keeps one state for all parameters as one vector, so that it can only be reset."""
    return isinstance(optimizer, LBFGS)


def slice_optimizer(optimizer: Optimizer, kept: Kept, *, reset: bool = False) -> list[str]:
    """Replace parameters that lost entries in an optimizer; see :func:`follow_change`."""
    return follow_change(optimizer, Changed(kept), reset=reset)


def follow_change(optimizer: Optimizer, changed: Changed, *, reset: bool = False) -> list[str]:
    """Update the parameter groups and the state of an optimizer after a change of the model.

    Parameters that lost entries keep the state of the others. New parameters start without state, in the group of the
    layer that they belong to; those that were removed leave their group, and their state goes. A group that held its
    parameters in the model's order does so afterwards: ``configure_optimizers`` gives a resumed run the same order, by
    which PyTorch stores the state.

    Args:
        optimizer: It keeps its groups and their lists, so schedulers stay attached. Optimizers that it wraps follow.
        changed: What became of the model's parameters.
        reset: Forget the state of parameters that lost entries, instead of slicing it.

    Returns:
        What could not be sliced and was reset: the state of some parameters (a factored one), or a flat one as a whole.
    """
    optimizers = nested(optimizer)
    gone = {id(parameter) for parameter in (*changed.kept, *changed.removed)}
    joined = {id(neighbor) for neighbor in changed.added.values()}
    affected = [each for each in optimizers if held_ids(each) & (gone | joined)]
    lists = {id(group["params"]): group["params"] for each in affected for group in each.param_groups}
    for parameters in lists.values():  # wrapped optimizers may share them
        _update(parameters, changed)
    return [sentence for each in affected for sentence in _update_state(each, changed, reset)]


def _update(parameters: list[nn.Parameter], changed: Changed) -> None:
    """Bring one group's list up to date, in place: some optimizers (LBFGS) keep the list elsewhere too."""
    was_ordered = _is_ordered(parameters, changed.before.values())
    removed, followers = set(changed.removed), dict[nn.Parameter, list[nn.Parameter]]()
    for new, neighbor in changed.added.items():
        followers.setdefault(neighbor, []).append(new)
    updated: list[nn.Parameter] = []
    for old in parameters:
        if old not in removed:
            updated.append(changed.kept[old][0] if old in changed.kept else old)
        updated += followers.get(old, [])
    if was_ordered:
        places = {parameter: place for place, parameter in enumerate(dict.fromkeys(changed.after.values()))}
        updated.sort(key=places.__getitem__)
    parameters[:] = updated


def _is_ordered(parameters: Iterable[nn.Parameter], model: Iterable[nn.Parameter]) -> bool:
    """Whether all parameters belong to the model, and stand in its order."""
    places = {parameter: place for place, parameter in enumerate(dict.fromkeys(model))}
    found = [places.get(parameter, -1) for parameter in parameters]
    return found == sorted(found) and -1 not in found


def _update_state(optimizer: Any, changed: Changed, reset: bool) -> list[str]:
    """Slice the state of parameters that lost entries, and drop that of removed ones."""
    if is_flat(optimizer):
        _restart(optimizer)
        return [] if reset else ["LBFGS keeps one state for all parameters, which cannot be sliced; reset"]
    for parameter in changed.removed:
        optimizer.state.pop(parameter, None)
    lost = []
    for old, (new, indices) in changed.kept.items():
        state = optimizer.state.pop(old, None)
        if state is None or reset:
            continue
        if any(isinstance(v, Tensor) and v.ndim and v.shape != old.shape for v in state.values()):
            lost.append(f"the optimizer state of a {tuple(old.shape)} parameter cannot be sliced; reset")
            continue
        optimizer.state[new] = {
            key: keep_channels(value, indices, tuple(new.shape)) if isinstance(value, Tensor) and value.ndim else value
            for key, value in state.items()
        }
    return lost


def _restart(optimizer: LBFGS) -> None:
    """Restart LBFGS: its curvature describes vectors of the old length."""
    optimizer.state.clear()
    optimizer._params = optimizer.param_groups[0]["params"]
    optimizer._numel_cache = None
