"""Where a removal is tried: in the part of the model that holds all layers of a group, or in a larger one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_optim.progress import progress_bar
from lightning_optim.structured.check import SHAPE
from lightning_optim.structured.groups import ChannelGroup
from lightning_optim.structured.traced import TracedModel
from lightning_optim.structured.tracing import without_cache
from lightning_optim.target import ForwardInputs

__all__ = ["Judge", "refused_in_parts"]

Judge = Callable[[Sequence[str], str, nn.Module, ForwardInputs], Mapping[str, str]]
"""``judge(groups, part, module, received) -> reasons`` says which of some groups break a part, and why."""


def refused_in_parts(
    module: nn.Module,
    inputs: ForwardInputs,
    traced: TracedModel,
    groups: Mapping[str, ChannelGroup],
    judge: Judge,
    *,
    progress: bool = False,
) -> dict[str, str]:
    """Return the groups that break something, with the reasons.

    What leaves inside a part of the model concerns nothing outside of it, so each group is judged in the innermost
    part that holds all of its layers; the cost grows with the number of parts, and copies are of a part. A part may
    return something on the side whose shape follows the group (weights of attention); then the part around it is
    looked at, up to the whole model.

    Args:
        module: The model.
        inputs: What its forward receives.
        traced: Its trace with these inputs.
        groups: The groups by name.
        judge: Called for each call of a part with the groups that belong to it.
        progress: Show a progress bar on rank zero where it takes longer than two seconds.
    """
    around = {name: traced.around(group) for name, group in groups.items()}
    refused: dict[str, str] = {}
    left = list(groups)
    while left:
        by_part: dict[str, list[str]] = {}
        for name in left:
            by_part.setdefault(around[name][-1], []).append(name)
        found: dict[str, str] = {}

        with progress_bar("checking channels", len(by_part), shown=progress) as advance:

            def look(part: str, names: list[str], layer: nn.Module, received: ForwardInputs) -> None:
                found.update(judge([name for name in names if name not in found], part, layer, received))  # noqa: B023
                advance()

            whole = by_part.pop("", [])
            if by_part:
                parts = {part: partial(look, part, names) for part, names in by_part.items()}
                _look_at_parts(traced.copy, inputs, parts)
            if whole:
                look("", whole, module, inputs)
        left = [name for name, reason in found.items() if reason == SHAPE and len(around[name]) > 1]
        for name in left:
            around[name].pop()
        refused.update({name: reason for name, reason in found.items() if name not in left})
    return refused


def _look_at_parts(
    module: nn.Module,
    inputs: ForwardInputs,
    looks: Mapping[str, Callable[[nn.Module, ForwardInputs], None]],
) -> None:
    """Run a model once, and look at its parts with what they receive.

    Args:
        module: The model, or a copy of it that shares its weights; nothing is written to it.
        inputs: What its forward receives.
        looks: Name of a part -> called with it and what it receives, each time the part is called.
    """
    busy = False

    def enter(part: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if not busy:  # copies of a part have its hooks
            busy = True
            try:
                with torch.random.fork_rng(devices=[]):
                    looks[part](layer, ForwardInputs(args, kwargs))
            finally:
                busy = False

    handles = []
    for part in looks:
        layer = module.get_submodule(part)
        handles.append(layer.register_forward_pre_hook(partial(enter, part), with_kwargs=True))
    try:
        with without_cache(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
            inputs.call_each(module)
    finally:
        for handle in handles:
            handle.remove()
