"""torchdistill's KDLoss, and nothing else of it, in a LightningModule written by hand.

``alpha`` is the weight of the cross-entropy there; given with it, the other part is multiplied by T squared. The
teacher is held in a list, in eval mode and without gradients, so that optimizer and checkpoint do not see it.
"""

import lightning.pytorch as pl
import torch
from task import DIGITS, STUDENT, Task, Variant, teacher_of, work
from torch import Tensor
from torchdistill.losses.mid_level import KDLoss


class Taught(pl.LightningModule):
    def __init__(self, student: pl.LightningModule, teacher: pl.LightningModule) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.loss = KDLoss("net", "output", "net", "output", temperature=4.0, alpha=0.1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            taught = self._teacher[0](images)
        return self.loss({"net": {"output": self.student(images)}}, {"net": {"output": taught}}, labels)

    def configure_optimizers(self) -> object:
        self.student.trainer = self.trainer  # whose schedule asks for the number of steps
        return self.student.configure_optimizers()


def taught(module: pl.LightningModule, task: Task, seed: int) -> Taught:
    return Taught(module, teacher_of(task, seed))


VARIANTS = [
    Variant(
        "torchdistill KDLoss",
        "distillation",
        wrap=taught,
        deploy=lambda module, task: module.student.eval(),
        export=lambda module, task, path: task.export(module.student, path),
        baseline=STUDENT,
        tasks=DIGITS,
    ),
]


if __name__ == "__main__":
    work(VARIANTS)
