"""The distillation losses of one call of the student: which rows are compared, with which labels and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_optim.distillation.cached import CachedAnswers
from lightning_optim.distillation.heads import Answer, HeadAnswer, rows_of_answer
from lightning_optim.distillation.layout import Layout
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.objective import LogitLosses
from lightning_optim.distillation.positions import Rows, one_a_row
from lightning_optim.distillation.ramp import Ramps
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.functional.chunks import RowPlaces, chunk_rows, loss_by_chunks
from lightning_optim.functional.losses import TopK, over_top_k
from lightning_optim.functional.rows import rows_of
from lightning_optim.sharding import is_dtensor
from lightning_optim.target import ForwardInputs

__all__ = ["OF_LOGITS", "LogitComparison"]

OF_LOGITS = "kd/"
"""Before the name of a loss of logits, among the parts of the whole loss."""


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
        answers: Sequence[Answer] | CachedAnswers,
        inputs: ForwardInputs,
        item: Any,
        batch_idx: int,
        loss: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the weighted sum of the losses as ``"kd"``, and each as ``"kd/<name>"``.

        Args:
            logits: The student's, at least two dimensions.
            answers: The logits of each teacher; none if no loss needs a teacher. Or those in a cache.
            inputs: The arguments of the student's forward.
            item: The batch without its index.
            batch_idx: Its number.
            loss: The loss that the student computed from logits and labels, which tells whether it shifts the labels.
        """
        points, objective = self.points, self.points._objective
        needs_labels = "targets" in objective.needs
        class_dim = answers.class_dim if isinstance(answers, CachedAnswers) else None
        layout = Layout.of(points, logits, inputs, item, class_dim=class_dim)
        dim = layout.dim
        if not isinstance(answers, CachedAnswers):
            if dim != logits.ndim - 1:  # the classes of a Linear's output are last: it is another layout
                answers = [answer if isinstance(answer, Tensor) else answer.whole() for answer in answers]
            for answer in answers:
                self._check_shape(logits, answer, dim)
        rows = points._positions.read(
            logits, layout.labels, layout.mask, student=points.student, dim=dim, loss=loss, shifts=points.shift_labels
        )
        count, classes = rows.count(logits), logits.shape[dim]
        if not count:  # no position has a label: nothing to learn, and the mean of nothing is NaN
            return {"kd": rows.of(logits).float().sum()}
        arguments: dict[str, Any] = {"targets": _as_classes(rows.targets, item)} if needs_labels else {}
        if self.ramps.temperature is not None:
            arguments["temperature"] = self.ramps.temperature.value(self.ramps.step)
        taught: _Taught | _FromFile
        if isinstance(answers, CachedAnswers):
            taught = _FromFile(answers.rows(logits, layout, rows.keep, classes), rows)
        else:
            checks = logits.device.type == "cpu" or batch_idx % 50 == 0  # on others each check waits for the device
            taught = _Taught(self, answers, rows, checks)
        in_blocks = isinstance(taught, _FromFile) and isinstance(taught.stored, TopK)  # that loss works so by itself
        whole = in_blocks or is_dtensor(logits) or not self._by_rows
        size = count if whole else chunk_rows(self.chunk_size, count, classes)
        chosen = objective.of_classes(classes)
        if size < count:
            places = RowPlaces.of(logits, rows.dim, rows.keep)
            total, values = _by_chunks(chosen, logits, taught, places, size, arguments)
        else:
            values = points.kd_loss(*taught.all_rows(logits), **arguments)
            total = objective.total(values)
        self.compared_by = chosen.weights
        return {"kd": total, **{f"{OF_LOGITS}{name}": value.detach() for name, value in values.items()}}

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

    def all_rows(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the losses compare, ``[rows, classes]`` each: the student's rows, and the combined logits."""
        ours = self.rows.of(logits)
        if not self.answers or any(isinstance(answer, HeadAnswer) for answer in self.answers):
            return self.some_rows(ours, RowPlaces.of(logits, self.rows.dim, self.rows.keep), slice(None))
        own = [self.rows.of(one_a_row(answer)) for answer in self.answers if isinstance(answer, Tensor)]
        return ours, self.comparison.combined(own, checks=self.checks)

    def some_rows(self, ours: Tensor, places: RowPlaces, part: slice) -> tuple[Tensor, Tensor]:
        """Return the same of some rows; of losses that need no teacher, the student's logits twice."""
        if not self.answers:
            return ours, ours.detach()
        answers = [one_a_row(answer) if isinstance(answer, Tensor) else answer for answer in self.answers]
        own = [rows_of_answer(answer, places, part) for answer in answers]
        return ours, self.comparison.combined(own, checks=self.checks)


@dataclass(frozen=True, eq=False)
class _FromFile:
    """The same from a cache: logits ``[rows, classes]``, or k words of each row."""

    stored: Tensor | TopK
    rows: Rows

    def all_rows(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the losses compare: the student's rows and the teacher's, of all classes or k + 1."""
        if isinstance(self.stored, Tensor):
            return self.rows.of(logits), self.stored
        flat, keep = rows_of(logits, None, self.rows.dim), self.rows.keep
        counted = None if keep is None or bool(keep.all()) else keep.reshape(-1).nonzero().squeeze(-1)
        return over_top_k(flat, self.stored, rows=counted)

    def some_rows(self, ours: Tensor, places: RowPlaces, part: slice) -> tuple[Tensor, Tensor]:
        """Return the same of some rows, for all classes."""
        if isinstance(self.stored, Tensor):
            return ours, self.stored[part]
        return over_top_k(ours, self.stored.rows(part))


def _by_chunks(
    losses: LogitLosses,
    logits: Tensor,
    taught: _Taught | _FromFile,
    places: RowPlaces,
    size: int,
    arguments: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the losses, and each of them, compared ``size`` rows at a time."""
    count = len(places)
    targets: Any = arguments.get("targets")
    sliced = isinstance(targets, Tensor) and targets.ndim > 0 and len(targets) == count

    def compare(ours: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        pair = taught.some_rows(ours, places, part)
        own = {**arguments, "targets": targets[part]} if sliced else arguments
        shares = losses.shares(targets, part, count)
        values = {name: value * shares[name] for name, value in losses(*pair, **own).items()}
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
