"""The training step of a distillation: the student's own step, plus the losses against the teacher."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distillation.cached import CachedAnswers, CachedTeacher
from lightning_optim.distillation.capture import Capture
from lightning_optim.distillation.heads import Answer
from lightning_optim.distillation.hooks import as_student, is_lightning
from lightning_optim.distillation.indexed import without_index
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.logits import LogitComparison
from lightning_optim.distillation.matching import FeatureMatching
from lightning_optim.distillation.positions import find_loss, one_a_row
from lightning_optim.distillation.ramp import Ramps
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.target import ForwardInputs, batch_inputs

__all__ = ["Step"]


@dataclass(eq=False)
class Step:
    """Runs the training steps of a distillation, and sums up what they log."""

    points: SubclassPoints
    ramps: Ramps
    live: LiveTeacher
    cached: CachedTeacher | None
    matching: FeatureMatching
    comparison: LogitComparison
    batches: int = 0
    """Batches in which the teacher was asked, over all runs."""
    _sums: dict[str, Tensor | float] = field(default_factory=dict)
    _rows: int = 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss asks for a teacher."""
        return bool(self.points.features) or not (self.points._objective.teacher_free or self.ramps.alpha.never)

    def run(self, batch: Any, batch_idx: int) -> Any:
        """Return the result of the student's own step, with the distillation losses added to its loss."""
        points, item = self.points, without_index(batch)
        alpha = self.ramps.alpha.value(points.global_step)
        distills = alpha > 0.0 or bool(points.features)
        names = [points.logits_from, *(feature.student for feature in points.features)] if distills else []
        with Capture(points.student, dict.fromkeys(names), trains=True) as captured:
            result = self._student_step(item, batch_idx, alpha)
            if result is None or not distills:
                return result
            calls = captured.calls[points.logits_from]
            if not calls:
                raise RuntimeError(self._never_called(captured.without_gradient))
            task = result["loss"] if isinstance(result, Mapping) else result
            parts = self._parts(captured, batch, batch_idx, alpha, task)
            self.batches += 1
            self._add_up({"task": task, **parts}, points.get_logits(calls[0][1]).shape[0])
        loss = self._total(task, parts, alpha)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _student_step(self, batch: Any, batch_idx: int, alpha: float) -> Any:
        student = self.points.student
        if is_lightning(student):
            count = len(inspect.signature(student.training_step).parameters)
            with as_student(student, "training_step"):
                return student.training_step(*(batch, batch_idx)[:count])
        output = batch_inputs(student, batch).call(student)
        if alpha == 1.0:  # labels do not count, so there may be none
            return self.points.get_logits(output).new_zeros(())
        return self.points.task_loss(output, batch)

    def _never_called(self, without_gradient: int) -> str:
        points, student = self.points, self.points.student
        names = [name for name, child in student.named_children() if any(True for _ in child.parameters())]
        called = f"its layer {points.logits_from!r}" if points.logits_from else "its own forward"
        how = " with gradients (calls under no_grad do not count)" if without_gradient else ""
        return (
            f"the training step of {type(student).__name__} never called {called}{how}, so its logits are not seen. "
            "Set `logits_from` to the layer whose output are the logits; the layers are "
            f"{', '.join(names) or 'none'}."
        )

    def _parts(self, captured: Capture, batch: Any, batch_idx: int, alpha: float, task: Tensor) -> dict[str, Tensor]:
        """Return the parts of the loss by metric name, each a mean over the calls of the student in this step."""
        calls, item = captured.calls[self.points.logits_from], without_index(batch)
        parts: dict[str, Tensor] = {}
        for number, (inputs, output) in enumerate(calls):
            self.matching.note_example(inputs)
            logits = one_a_row(self.points.get_logits(output)) if alpha > 0.0 else None
            answers, layers = self._answers(inputs, batch, logits)
            losses = self.matching.losses(captured, layers, number)
            if logits is not None:
                loss = find_loss(output)
                loss = task if loss is None and len(calls) == 1 else loss
                with torch.autocast(logits.device.type, enabled=False):
                    losses |= self.comparison.losses(logits, answers, inputs, item, batch_idx, loss)
            for name, value in losses.items():
                parts[name] = parts.get(name, 0.0) + value / len(calls)
        return parts

    def _answers(
        self, inputs: ForwardInputs, batch: Any, logits: Tensor | None
    ) -> tuple[list[Answer] | CachedAnswers, dict[str, Tensor]]:
        """Return what each teacher answers (or the cache of it), and the outputs of the layers that features name."""
        if self.cached is not None and self.cached.cache is not None:
            return self.cached.answers(inputs, batch), {}
        if not self.needs_teacher:
            return [], {}
        classes = None if logits is None or not self.comparison.takes_rows(logits) else logits.shape[-1]
        return self.live.ask(inputs, without_index(batch), classes=classes)

    def _total(self, task: Tensor, parts: Mapping[str, Tensor], alpha: float) -> Tensor:
        loss = task if alpha == 0.0 else (1.0 - alpha) * task
        if alpha == 1.0:  # labels do not count: without any, cross-entropy is NaN
            loss = torch.zeros_like(task)
        if alpha > 0.0:
            loss = loss + alpha * parts["kd"]
        for part in self.matching.weighted(parts):
            loss = loss + part
        return loss

    def _add_up(self, values: Mapping[str, Tensor], rows: int) -> None:
        """Add the parts up; they are logged once per epoch, because a ``self.log`` takes as long as a small step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + rows * value.detach().float()
        self._rows += rows

    def log_epoch(self) -> None:
        """Log the epoch's means of the parts of the loss."""
        if self._rows and not self.points.trainer.barebones:
            means = {f"distillation/{name}": total / self._rows for name, total in self._sums.items()}
            self.points.log_dict(means, sync_dist=True)
        self._sums, self._rows = {}, 0
