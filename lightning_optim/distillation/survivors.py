"""Which channels of a feature survive when channels are removed from the student."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.distillation.capture import observe
from lightning_optim.distillation.features import channel_axis
from lightning_optim.modules import EMBEDDINGS, INPUTS_FIRST, LINEARS, copy_module
from lightning_optim.structured.groups import Removal
from lightning_optim.structured.removal import apply_removal
from lightning_optim.target import ForwardInputs

__all__ = ["surviving_channels"]

_LAST_AXIS = (*LINEARS, nn.LayerNorm, *EMBEDDINGS)


def surviving_channels(
    student: nn.Module, called: str, inputs: ForwardInputs, layers: Iterable[str], removal: Removal
) -> dict[str, Tensor]:
    """Return which channels of features survive a removal, for the features that lose some.

    They are found on a copy of the student: the channels that are removed from a layer are set to NaN. If NaN arrives
    in the feature channel by channel, these channels of the feature are removed too. Layers that mix channels turn
    everything into NaN.

    Args:
        student: The student before the removal.
        called: Name of its module that takes the inputs.
        inputs: The arguments of that module's forward.
        layers: Names of the features' layers.
        removal: What is kept of the student.

    Returns:
        Layer -> surviving channels, int64.

    Raises:
        ValueError: If a feature changes its width and its channels cannot be followed.
    """
    before, after = copy_module(student, rounded=False), copy_module(student, rounded=False)
    apply_removal(after, removal)
    names = list(layers)
    old = observe(before, before.get_submodule(called), inputs, names)
    new = observe(after, after.get_submodule(called), inputs, names)
    axes = {name: channel_axis(old[name]) for name in names}
    shrunk = [name for name in names if old[name].shape[axes[name]] != new[name].shape[axes[name]]]
    kept = {}
    for name in shrunk:
        width, left = old[name].shape[axes[name]], new[name].shape[axes[name]]
        channels = _follow(before, called, inputs, name, width, removal)
        if channels is None or len(channels) != left:
            raise ValueError(
                f"feature {name!r} shrinks from {width} to {left} channels, and which ones are kept is unknown. Choose "
                "a layer whose output is not concatenated or shuffled, a feature loss without projector ('rkd', "
                f"'similarity_preserving', 'attention_transfer'), or keep its channels: exclude=[{name!r}]."
            )
        kept[name] = channels
    return kept


def _follow(
    student: nn.Module, called: str, inputs: ForwardInputs, feature: str, width: int, removal: Removal
) -> Tensor | None:
    for name, removed, count in _removed_outputs(student, removal):
        if width % count:
            continue
        one = _tainted(student, called, inputs, feature, name, removed[:1])
        if int(one.sum()) != width // count:  # not reached, or mixed with others on the way
            continue
        return (~_tainted(student, called, inputs, feature, name, removed)).nonzero().flatten()
    return None


def _removed_outputs(student: nn.Module, removal: Removal) -> list[tuple[str, Tensor, int]]:
    """Return the layers that lose outputs: their name, the removed channels, and the number of channels before."""
    layers = {}
    for name, kept in removal.kept.items():
        owner, _, leaf = name.rpartition(".")
        layer = student.get_submodule(owner)
        parameter = layer._parameters.get(leaf)
        if parameter is None or leaf not in ("weight", "bias"):
            continue
        axis = 1 if isinstance(layer, INPUTS_FIRST) and leaf == "weight" else 0
        after = math.prod(parameter.shape[axis + 1 :])
        stay = kept.cpu() // after % parameter.shape[axis]
        removed = torch.ones(parameter.shape[axis], dtype=torch.bool)
        removed[stay] = False
        if removed.any():
            layers[owner] = (owner, removed.nonzero().flatten(), parameter.shape[axis])
    return list(layers.values())


def _tainted(
    student: nn.Module, called: str, inputs: ForwardInputs, feature: str, layer: str, channels: Tensor
) -> Tensor:
    """Return which channels of a feature become NaN when some channels of a layer are NaN."""
    source = student.get_submodule(layer)

    def taint(module: nn.Module, args: Any, output: Any) -> Any:
        axis = -1 if isinstance(module, _LAST_AXIS) else 1
        return output.index_fill(axis, channels.to(output.device), float("nan"))

    handle = source.register_forward_hook(taint)
    try:
        seen = observe(student, student.get_submodule(called), inputs, [feature])[feature]
    finally:
        handle.remove()
    axis = channel_axis(seen)
    return seen.isnan().any(dim=[d for d in range(seen.ndim) if d != axis]).cpu()
