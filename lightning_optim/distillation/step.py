"""The training step of a distillation: the student's own step, plus the losses against the teacher."""

import inspect
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_optim.checks import check_count
from lightning_optim.distillation.by_hand import ManualBackward
from lightning_optim.distillation.cached import CachedAnswers, CachedTeacher
from lightning_optim.distillation.capture import Capture
from lightning_optim.distillation.heads import Answer
from lightning_optim.distillation.hooks import as_student, is_lightning
from lightning_optim.distillation.indexed import without_index
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.logits import OF_LOGITS, LogitComparison
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
    _unstepped: int = 0
    """Batches since an optimizer stepped, under manual optimization."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss asks for a teacher."""
        return bool(self.points.features) or not (self.points._objective.teacher_free or self.ramps.alpha.never)

    def run(self, batch: Any, batch_idx: int) -> Any:
        """Return the result of the student's own step, with the distillation losses added to its loss."""
        points, item = self.points, without_index(batch)
        if is_lightning(points.student) and not points.student.automatic_optimization:
            return self._run_by_hand(batch, batch_idx)
        self.ramps.step = points.global_step
        alpha = self.ramps.alpha.value(self.ramps.step)
        names = self._names(alpha)
        with Capture(points.student, names, trains=True) as captured:
            result = self._student_step(item, batch_idx, alpha)
            if result is None or not names:
                return result
            task = result["loss"] if isinstance(result, Mapping) else result
            loss = self._taught(task, captured, batch, batch_idx, alpha)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _names(self, alpha: float) -> dict[str, None]:
        """Return the student's layers that are looked at; none if nothing is distilled."""
        points = self.points
        distills = alpha > 0.0 or bool(points.features)
        return dict.fromkeys([points.logits_from, *(each.student for each in points.features)] if distills else [])

    def _run_by_hand(self, batch: Any, batch_idx: int) -> Any:
        """Run the step of a student that optimizes manually: it decides when, we add to the loss it gives."""
        points, alpha = self.points, self.ramps.alpha.value(self.ramps.step)
        names = self._names(alpha)
        seen: list[Capture] = []

        def taught(task: Tensor) -> Tensor:
            divisor = self._divisor(batch_idx)
            return self._taught(task, seen[0], batch, batch_idx, alpha, divisor=divisor, used=backward.used)

        which = points.taught_backward
        if which is not None:
            check_count("taught_backward", which, 0)
        backward = ManualBackward(
            points.student, taught, batch_idx=batch_idx, which=which, optimizers=points.trainer.optimizers
        )
        with (
            backward if names else nullcontext(),
            Capture(points.student, names, trains=True, watch=backward.watch) as captured,
        ):
            seen.append(captured)
            before = points.global_step
            result = self._student_step(without_index(batch), batch_idx, alpha)
        if names:
            backward.check()
        if backward.stepped or points.global_step > before:
            self.ramps.step += 1
            self._unstepped = 0
        return result

    def _divisor(self, batch_idx: int) -> int:
        """Return by how many batches the student divides its loss.

        Raises:
            MisconfigurationException: If it accumulates batches, and nothing says whether it divides.
        """
        divisor = self.points.accumulated_batches
        if divisor is not None:
            check_count("accumulated_batches", divisor)
        self._unstepped += 1
        if divisor is None and self._unstepped > 1:
            raise MisconfigurationException(
                f"no optimizer stepped between two batches of {type(self.points.student).__name__} (batch {batch_idx} "
                "is the second), so its step accumulates gradients. The teacher's loss must be divided as it divides "
                "its own: set module.accumulated_batches to the number of batches, or to 1 if it does not divide."
            )
        return 1 if divisor is None else divisor

    def _taught(
        self,
        task: Tensor,
        captured: Capture,
        batch: Any,
        batch_idx: int,
        alpha: float,
        *,
        divisor: int = 1,
        used: Collection[int] = (),
    ) -> Tensor:
        """Return the student's loss with the teacher's.

        Args:
            task: The student's.
            captured: What it did.
            batch: The batch, with its index.
            batch_idx: Its number.
            alpha: The weight of the distillation.
            divisor: By what the student divided its loss.
            used: Numbers of its calls that do not count.
        """
        calls = captured.calls[self.points.logits_from]
        calls = [call for number, call in enumerate(calls) if number not in used]
        if not calls:
            raise RuntimeError(self._never_called(captured.without_gradient))
        parts = self._parts(captured, batch, batch_idx, alpha, task, used)
        self.batches += 1
        self._add_up({"task": task * divisor, **parts}, self.points.get_logits(calls[0][1]).shape[0])
        return self._total(task, parts, alpha, divisor)

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

    def _parts(
        self, captured: Capture, batch: Any, batch_idx: int, alpha: float, task: Tensor, used: Collection[int] = ()
    ) -> dict[str, Tensor]:
        """Return the parts of the loss by metric name, each a mean over the calls of the student in this step."""
        item = without_index(batch)
        calls = {n: call for n, call in enumerate(captured.calls[self.points.logits_from]) if n not in used}
        parts: dict[str, Tensor] = {}
        for number, (inputs, output) in calls.items():
            self.matching.note_example(inputs)
            logits = one_a_row(self.points.get_logits(output)) if alpha > 0.0 else None
            answers, layers = self._answers(inputs, batch, logits)
            loss = find_loss(output)
            loss = task if loss is None and len(calls) == 1 else loss
            losses = self.matching.losses(captured, layers, number, item, loss)
            if logits is not None:
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

    def _total(self, task: Tensor, parts: Mapping[str, Tensor], alpha: float, divisor: int = 1) -> Tensor:
        loss = task if alpha == 0.0 else (1.0 - alpha) * task
        if alpha == 1.0:  # labels do not count: without any, cross-entropy is NaN
            loss = torch.zeros_like(task)
        if alpha > 0.0:
            loss = loss + alpha * parts["kd"] / divisor
        for part in self.matching.weighted(parts):
            loss = loss + part / divisor
        return loss

    def _add_up(self, values: Mapping[str, Tensor], rows: int) -> None:
        """Add the parts up; they are logged once per epoch, because a ``self.log`` takes as long as a small step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + rows * value.detach().float()
        self._rows += rows

    def log_epoch(self) -> None:
        """Log the epoch's means of the parts of the loss."""
        self._unstepped = 0  # batches that an epoch leaves over are the student's matter
        if self._rows and not self.points.trainer.barebones:
            means = {name: total / self._rows for name, total in self._sums.items()}
            losses = {
                name.removeprefix(OF_LOGITS): value for name, value in means.items() if name.startswith(OF_LOGITS)
            }
            if len(losses) == 1:
                means = {name: value for name, value in means.items() if not name.startswith(OF_LOGITS)}
            means = {**losses, **means}  # "kd" is the sum of all of them, until 0.4
            self.points.log_dict({f"distillation/{name}": value for name, value in means.items()}, sync_dist=True)
        self._sums, self._rows = {}, 0
