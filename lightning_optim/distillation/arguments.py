"""Checks of a DistillationModule's arguments: students that can be distilled, and values in range."""

from typing import Any, cast

from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_optim.checks import check_count, check_path, listed
from lightning_optim.distillation.hooks import is_lightning
from lightning_optim.distillation.objective import LogitLosses
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.functional.losses import LOSSES
from lightning_optim.target import ForwardInputs

__all__ = [
    "SEVERAL",
    "apply_example",
    "check_cache",
    "check_chunk_size",
    "check_student",
    "classes_of",
    "optimizers_of",
]

SEVERAL = (
    "the student configures {} optimizers, and Lightning trains several only under manual optimization. Set "
    "self.automatic_optimization = False and step them in its training step, or give it one optimizer (with parameter "
    "groups for different learning rates)."
)


def check_student(student: Any, optimizer: Any, task_loss: Any) -> None:
    """Reject students that cannot be distilled, and arguments that a LightningModule brings itself."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"`student` must be a LightningModule or a module, got {student!r}.")
    if not is_lightning(student):
        return
    for name, value in (("optimizer", optimizer), ("task_loss", task_loss)):
        if value is not None:
            raise ValueError(f"`{name}` is for a plain module; {type(student).__name__} brings its own.")


def check_cache(cache: Any, top_k: Any, objective: LogitLosses, features: Any) -> None:
    """Check the file of a cache, and that the losses can be computed on what it holds."""
    if cache is not None:
        check_path("cache", cache)
        if features:
            raise ValueError(
                "`features` need the teacher's layers, so its logits need no `cache`. Pass one of the two."
            )
    if top_k is None:
        return
    check_count("cache_top_k", top_k)
    if cache is None:
        raise ValueError("`cache_top_k` is of a cache: pass its file too, cache='teacher.bin'.")
    if objective.not_on_top_k:
        known = ", ".join(sorted(name for name, loss in LOSSES.items() if getattr(loss, "top_k", False)))
        raise ValueError(
            f"`cache_top_k` keeps k classes of each row and the probability of the rest, and loss "
            f"{objective.not_on_top_k[0]!r} needs more than that. Losses that do with it: {known}, and a callable with "
            "the attribute `top_k = True`. Choose one, or leave out `cache_top_k`: then the logits of all classes are "
            "cached."
        )


def classes_of(places: Any) -> list[int]:
    """Return the indices of the teacher's outputs that are the student's classes."""
    classes = listed("teacher_classes", places, "places in the teacher's outputs")
    for place in classes:
        check_count("teacher_classes", place, 0)
    return classes


def check_chunk_size(points: SubclassPoints, size: Any) -> int | str | None:
    """Return the number of rows compared at a time, after a check that the losses can be.

    Args:
        points: The distillation module.
        size: What the user passed.
    """
    if size is None or size == "auto":
        return cast("str | None", size)
    if isinstance(size, str):
        raise ValueError(f"`chunk_size` must be a number of rows >= 1, 'auto' or None, got {size!r}.")
    check_count("chunk_size", size, 1)
    over_batch = points._objective.over_batch
    if over_batch:
        raise ValueError(
            f"loss {over_batch[0]!r} needs all rows of a batch at once, so `chunk_size={size}` cannot hold. Leave "
            "`chunk_size` out, or choose another loss; a loss of your own that is a mean of one value per row says so: "
            "`loss.by_rows = True`."
        )
    if is_overridden("kd_loss", points, SubclassPoints):
        raise ValueError(
            f"{type(points).__name__}.kd_loss gets all rows of a batch, so `chunk_size={size}` cannot hold. Leave "
            "`chunk_size` out, or pass your function as `loss`, with `by_rows = True` on it."
        )
    return int(size)


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
