"""The distillation losses of one call of the student: which rows are compared, with which labels and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.positions import fitting_mask
from lightning_optim.distillation.ramp import Ramps
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.target import ForwardInputs

__all__ = ["LogitComparison"]


@dataclass(eq=False)
class LogitComparison:
    """Compares the logits of a distillation's student with its teacher's."""

    points: SubclassPoints
    ramps: Ramps
    live: LiveTeacher
    compared_by: dict[str, float] = field(default_factory=dict)
    """Losses of the last call, with their weights: the default depends on the number of classes."""

    def losses(
        self,
        logits: Tensor,
        answers: Sequence[Tensor],
        inputs: ForwardInputs,
        item: Any,
        batch_idx: int,
        loss: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the weighted sum of the losses as ``"kd"``; of several losses each as ``"kd/<name>"`` too.

        Args:
            logits: The student's, at least two dimensions.
            answers: The logits of each teacher; none if no loss needs a teacher.
            inputs: The arguments of the student's forward.
            item: The batch without its index.
            batch_idx: Its number.
            loss: The loss that the student computed from logits and labels, which tells whether it shifts the labels.
        """
        points, objective = self.points, self.points._objective
        needs_labels = "targets" in objective.needs
        labels = points._labels(item, inputs, asks=needs_labels or logits.ndim > 2)
        mask = points.padding_mask(item, inputs) if logits.ndim > 2 else None
        matters = not objective.elementwise
        dim = points._positions.dim_of(logits, labels, mask=mask, told=points.class_dim, matters=matters)
        if not is_overridden("padding_mask", points, SubclassPoints):
            mask = fitting_mask(mask, logits, labels, dim)
        teacher = self._teacher_logits(answers, dim, one_logit=logits.shape[dim] == 1) if answers else logits.detach()
        _check_answer(logits, teacher, batch_idx)
        rows = points._positions.read(
            logits, labels, mask, student=points.student, dim=dim, loss=loss, shifts=points.shift_labels
        )
        ours, theirs = rows.of(logits), rows.of(teacher)
        if not len(ours):  # no position has a label: nothing to learn, and the mean of nothing is NaN
            return {"kd": ours.float().sum()}
        arguments: dict[str, Any] = {"targets": _as_classes(rows.targets, item)} if needs_labels else {}
        if self.ramps.temperature is not None:
            arguments["temperature"] = self.ramps.temperature.value(points.global_step)
        losses = points.kd_loss(ours, theirs, **arguments)
        self.compared_by = objective.of_classes(ours.shape[-1]).weights
        parts = {f"kd/{name}": value.detach() for name, value in losses.items()} if len(losses) > 1 else {}
        return {"kd": objective.total(losses), **parts}

    def _teacher_logits(self, answers: Sequence[Tensor], dim: int, *, one_logit: bool) -> Tensor:
        """Return the logits of all teachers combined, for the student's classes."""
        combined = self.live.combine(answers, dim, one_logit=one_logit)
        if self.points.teacher_classes is not None:
            combined = combined.movedim(dim, -1)[..., self.points.teacher_classes].movedim(-1, dim)
        return combined.float()


def _check_answer(student: Tensor, teacher: Tensor, batch_idx: int) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}. If the teacher "
            "has other classes, pass the student's as `teacher_classes`; if its inputs differ, override "
            "`teacher_inputs(batch)`; if its output is nested, `get_logits(output)`."
        )
    checks = teacher.device.type == "cpu" or batch_idx % 50 == 0  # on other devices each check waits for the device
    if checks and bool(teacher.isnan().any()):
        raise ValueError(
            "the teacher returns NaN. Check its weights and inputs; a half-precision teacher may overflow: pass it in "
            "float32, or `teacher_autocast=torch.bfloat16`."
        )


def _as_classes(labels: Any, item: Any) -> Tensor:
    if labels is None:
        raise TypeError(f"no labels in a batch of type {type(item).__name__}. Override `targets(batch)`.")
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"the losses need labels as a tensor, one class per row, got {type(labels).__name__}. Override "
            "`targets(batch)`."
        )
    return labels
