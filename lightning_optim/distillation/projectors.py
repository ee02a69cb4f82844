"""Projectors: learned maps from a student's features to the teacher's width."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.distillation.features import channel_axis
from lightning_optim.functional.criteria import parameter_generator
from lightning_optim.structured.optimizers import slice_optimizer
from lightning_optim.structured.removal import keep_channels

__all__ = ["Projectors", "new_projector", "projector_like"]


class Projectors(nn.ModuleDict):
    """Projectors by the position of their feature; loading a file gives them the file's sizes."""

    def put(self, name: str, projector: nn.Module) -> None:
        """Add a copy of a projector."""
        weight: Any = projector.weight
        self[name] = projector_like(weight.shape).to(weight)
        self[name].load_state_dict(projector.state_dict())

    def conform(self, weights: Mapping[str, Tensor], device: torch.device, dtype: Any) -> None:
        """Take the sizes in a checkpoint's ``state_dict`` if they differ; the values are loaded afterwards."""
        for full, value in weights.items():
            if not full.startswith("projectors.") or not full.endswith(".weight"):
                continue
            name = full.split(".")[1]
            present: Any = self[name].weight if name in self else None
            if present is None or present.shape != value.shape:
                self[name] = projector_like(value.shape).to(device, dtype)

    def keep_inputs(self, name: str, kept: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Remove inputs of a projector, and of its optimizer state.

        Args:
            name: Its name.
            kept: The inputs to keep, int64.
            optimizers: The optimizers that may hold its weight.
        """
        layer: Any = self[name]
        old = layer.weight
        flat = torch.arange(old.numel()).view(old.shape)[:, kept].flatten()
        shape = (old.shape[0], len(kept), *old.shape[2:])
        new = nn.Parameter(keep_channels(old, flat, shape), requires_grad=old.requires_grad)
        if old.grad is not None:
            new.grad = keep_channels(old.grad, flat, shape)
        layer.weight = new
        setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(kept))
        for optimizer in optimizers:
            slice_optimizer(optimizer, {old: (new, flat)})


def new_projector(student: Tensor, teacher: Tensor, name: str) -> nn.Module:
    """Return a projection from a student's feature to the teacher's width, initialized from ``name`` alone.

    Args:
        student: The student's feature: ``[rows, width]``, ``[rows, positions, width]`` or an image.
        teacher: The teacher's feature.
        name: Seeds the weights, so that they are the same on every rank and the global generator is not used.

    Raises:
        ValueError: If the features differ in their number of dimensions.
    """
    if student.ndim != teacher.ndim or student.ndim not in (2, 3, 4):
        raise ValueError(
            f"feature {name!r}: a projector takes [rows, width], [rows, positions, width] or images on both sides, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. Choose layers of the same kind, or loss 'rkd' or "
            "'similarity_preserving'."
        )
    widths = (teacher.shape[channel_axis(teacher)], student.shape[channel_axis(student)])
    projector = projector_like((*widths, 1, 1) if student.ndim == 4 else widths)
    generator = parameter_generator(name)
    with torch.no_grad():
        for parameter in projector.parameters():  # torch's own default: uniform in +-1/sqrt(inputs)
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * drawn - 1) / math.sqrt(widths[1]))
    return projector.to(device=student.device, dtype=student.dtype)


def projector_like(shape: Sequence[int]) -> nn.Module:
    """Return a projector with uninitialized weights of a shape: ``[out, in]`` or ``[out, in, 1, 1]``."""
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], 1, device="meta").to_empty(device="cpu")
    return nn.Linear(shape[1], shape[0], device="meta").to_empty(device="cpu")
