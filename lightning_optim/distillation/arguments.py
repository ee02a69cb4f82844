"""Checks of a DistillationModule's arguments: students that can be distilled, and values in range."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_optim.checks import check_count, listed
from lightning_optim.distillation.hooks import is_lightning
from lightning_optim.target import ForwardInputs

__all__ = ["SEVERAL", "apply_example", "check_student", "classes_of", "optimizers_of"]

SEVERAL = (
    "distillation adds one loss to one optimizer, and the student configures {}. Give it one optimizer (with parameter "
    "groups for different learning rates)."
)


def check_student(student: Any, optimizer: Any, task_loss: Any) -> None:
    """Reject students that cannot be distilled, and arguments that a LightningModule brings itself."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"`student` must be a LightningModule or a module, got {student!r}.")
    if not is_lightning(student):
        return
    if not student.automatic_optimization:
        raise MisconfigurationException(
            f"{type(student).__name__} optimizes manually: its step calls the optimizer itself, so no loss can be "
            "added. Use automatic optimization, or add a loss of `functional.losses` in its own step."
        )
    for name, value in (("optimizer", optimizer), ("task_loss", task_loss)):
        if value is not None:
            raise ValueError(f"`{name}` is for a plain module; {type(student).__name__} brings its own.")


def classes_of(places: Any) -> list[int]:
    """Return the indices of the teacher's outputs that are the student's classes."""
    classes = listed("teacher_classes", places, "places in the teacher's outputs")
    for place in classes:
        check_count("teacher_classes", place, 0)
    return classes


def optimizers_of(configured: Any) -> list[Any]:
    """Return the optimizers in what ``configure_optimizers`` returned."""
    if isinstance(configured, (tuple, list)):
        pair = len(configured) == 2 and isinstance(configured[0], (tuple, list))
        return list(configured[0] if pair else configured)
    return [configured]


def apply_example(inputs: ForwardInputs, like: Tensor | None) -> ForwardInputs:
    """Return example inputs on the device and in the precision of a module's parameters."""
    if like is None:
        return inputs

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    args, kwargs = apply_to_collection((inputs.args, inputs.kwargs or {}), Tensor, move)
    return ForwardInputs(args, kwargs)
