"""The distillation losses of one call of the student: which rows are compared, with which labels and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_optim.distillation.heads import Answer, HeadAnswer
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.objective import LogitLosses
from lightning_optim.distillation.positions import Rows, fitting_mask, one_a_row
from lightning_optim.distillation.ramp import Ramps
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.functional.chunks import RowPlaces, chunk_rows, loss_by_chunks
from lightning_optim.sharding import is_dtensor
from lightning_optim.target import ForwardInputs

__all__ = ["LogitComparison"]


@dataclass(eq=False)
class LogitComparison:
    """Compares the logits of a distillation's student with its teacher's."""

    points: SubclassPoints
    ramps: Ramps
    live: LiveTeacher
    chunk_size: int | str | None = None
    compared_by: dict[str, float] = field(default_factory=dict)
    """Losses of the last call, with their weights: the default depends on the number of classes."""

    def takes_rows(self, logits: Tensor) -> bool:
        """Whether teachers are asked for the rows that count, and not for all their logits.

        Args:
            logits: The student's.
        """
        if self.chunk_size is None or not self._by_rows or is_dtensor(logits):
            return False
        return logits.ndim > 2 or chunk_rows(self.chunk_size, len(logits), logits.shape[-1]) < len(logits)

    def losses(
        self,
        logits: Tensor,
        answers: Sequence[Answer],
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
        if dim != logits.ndim - 1:  # the classes of a Linear's output are last: it is another layout
            answers = [answer if isinstance(answer, Tensor) else answer.whole() for answer in answers]
        for answer in answers:
            self._check_shape(logits, answer, dim)
        rows = points._positions.read(
            logits, labels, mask, student=points.student, dim=dim, loss=loss, shifts=points.shift_labels
        )
        count, classes = rows.count(logits), logits.shape[dim]
        if not count:  # no position has a label: nothing to learn, and the mean of nothing is NaN
            return {"kd": rows.of(logits).float().sum()}
        arguments: dict[str, Any] = {"targets": _as_classes(rows.targets, item)} if needs_labels else {}
        if self.ramps.temperature is not None:
            arguments["temperature"] = self.ramps.temperature.value(self.ramps.step)
        checks = logits.device.type == "cpu" or batch_idx % 50 == 0  # on other devices each check waits for the device
        taught = _Taught(self, answers, rows, checks)
        size = chunk_rows(self.chunk_size, count, classes) if self._by_rows and not is_dtensor(logits) else count
        chosen = objective.of_classes(classes)
        if size < count:
            total, values = _by_chunks(chosen, logits, taught, size, arguments)
        else:
            ours = rows.of(logits)
            theirs = taught.all_rows(logits) if answers else ours.detach()
            values = points.kd_loss(ours, theirs, **arguments)
            total = objective.total(values)
        self.compared_by = chosen.weights
        parts = {f"kd/{name}": value.detach() for name, value in values.items()} if len(values) > 1 else {}
        return {"kd": total, **parts}

    @property
    def _by_rows(self) -> bool:
        """Whether rows may be compared some at a time: every loss is a mean over rows, and no subclass computes it."""
        return not (self.points._objective.over_batch or is_overridden("kd_loss", self.points, SubclassPoints))

    def _check_shape(self, student: Tensor, answer: Answer, dim: int) -> None:
        shape = list(one_a_row(answer).shape if isinstance(answer, Tensor) else answer.shape)
        if self.points.teacher_classes is not None and len(shape) == student.ndim:
            shape[dim] = len(self.points.teacher_classes)
        if student.shape != tuple(shape):
            raise ValueError(
                f"the student's logits are {tuple(student.shape)} and the teacher's {tuple(shape)}. If the teacher "
                "has other classes, pass the student's as `teacher_classes`; if its inputs differ, override "
                "`teacher_inputs(batch)`; if its output is nested, `get_logits(output)`."
            )

    def combined(self, rows: list[Tensor], *, checks: bool) -> Tensor:
        """Return the logits of all teachers combined, float32, for the student's classes.

        Args:
            rows: Those of each teacher, ``[n, classes]``.
            checks: Whether NaN is looked for.
        """
        combined = self.live.combine(rows, -1, one_logit=rows[0].shape[-1] == 1)
        if self.points.teacher_classes is not None:
            combined = combined[..., self.points.teacher_classes]
        if checks and bool(combined.isnan().any()):
            raise ValueError(
                "the teacher returns NaN. Check its weights and inputs; a half-precision teacher may overflow: pass it "
                "in float32, or `teacher_autocast=torch.bfloat16`."
            )
        return combined.float()


@dataclass(frozen=True, eq=False)
class _Taught:
    """What the teachers answer for the rows of one call."""

    comparison: LogitComparison
    answers: Sequence[Answer]
    rows: Rows
    checks: bool

    def all_rows(self, logits: Tensor) -> Tensor:
        """Return the combined logits of all rows, ``[rows, classes]``."""
        if any(isinstance(answer, HeadAnswer) for answer in self.answers):
            return self.some_rows(RowPlaces.of(logits, self.rows.dim, self.rows.keep), slice(None))
        own = [self.rows.of(one_a_row(answer)) for answer in self.answers if isinstance(answer, Tensor)]
        return self.comparison.combined(own, checks=self.checks)

    def some_rows(self, places: RowPlaces, part: slice) -> Tensor:
        """Return the combined logits of some rows."""
        own = [self._rows_of(answer, places, part) for answer in self.answers]
        return self.comparison.combined(own, checks=self.checks)

    @staticmethod
    def _rows_of(answer: Answer, places: RowPlaces, part: slice) -> Tensor:
        if isinstance(answer, Tensor):
            return places.take(one_a_row(answer), part)
        return answer.of(places.take(answer.hidden, part))


def _by_chunks(
    losses: LogitLosses, logits: Tensor, taught: _Taught, size: int, arguments: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the losses, and each of them, compared ``size`` rows at a time."""
    places = RowPlaces.of(logits, taught.rows.dim, taught.rows.keep)
    targets: Any = arguments.get("targets")
    count = len(places)
    sliced = isinstance(targets, Tensor) and targets.ndim > 0 and len(targets) == count

    def compare(ours: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            theirs = taught.some_rows(places, part) if taught.answers else ours.detach()
        own = {**arguments, "targets": targets[part]} if sliced else arguments
        shares = losses.shares(targets, part, count)
        values = {name: value * shares[name] for name, value in losses(ours, theirs, **own).items()}
        return losses.total(values), torch.stack([value.detach().float() for value in values.values()])

    total, sums = loss_by_chunks(logits, places, size, compare)
    return total, dict(zip(losses.functions, sums, strict=True))


def _as_classes(labels: Any, item: Any) -> Tensor:
    if labels is None:
        raise TypeError(f"no labels in a batch of type {type(item).__name__}. Override `targets(batch)`.")
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"the losses need labels as a tensor, one class per row, got {type(labels).__name__}. Override "
            "`targets(batch)`."
        )
    return labels
