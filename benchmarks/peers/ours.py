"""The package's own callbacks, beside which the peers stand, with their defaults but for the window.

Weights are pruned twice: at the ends of the epochs at which ModelPruning acts, and every 10 steps. Channels leave with
the optimizer's state kept, which is the default, and once with it emptied, as the peer's is. Rounding begins at the
epoch at which the peers swap their nets in; after training, the ranges are those of eight training batches. The
criterion is magnitude everywhere, as the peers' is.
"""

import copy
from pathlib import Path

import lightning.pytorch as pl
from task import AFTER, BOTH, DIGITS, END, START, STUDENT, Digits, Task, Variant, epoch_window, teacher_of, work
from torch import nn

from lightning_optim import (
    ChannelPruning,
    DistillationModule,
    QuantizationAwareTraining,
    WeightPruning,
    quantize_post_training,
)

TABLES = [nn.EmbeddingBag, nn.Linear]
"""Of the recommender all matrices are pruned, its tables too."""


def layers(task: Task) -> dict[str, object]:
    return {} if isinstance(task, Digits) else {"include": TABLES}


def pruning(sparsity: float, *, at_epoch_ends: bool) -> Variant:
    def callbacks(task: Task) -> list[WeightPruning]:
        if at_epoch_ends:
            steps, (first, last) = task.steps(), epoch_window(task)
            window = {"start": steps * first, "end": steps * last, "every_n_steps": steps}
        else:
            window = {"start": START, "end": END, "every_n_steps": 10}
        return [WeightPruning(sparsity, **window, **layers(task))]

    when = "events at the same epoch ends" if at_epoch_ends else "every 10 steps"
    tasks = BOTH if sparsity == 0.8 else DIGITS
    return Variant(f"ours {sparsity:.0%}, {when}", f"weight pruning, {sparsity:.0%}", callbacks, tasks=tasks)


def channels(optimizer_state: str) -> Variant:
    def callbacks(task: Task) -> list[ChannelPruning]:
        scope = "global" if isinstance(task, Digits) else "layer"
        words = {"events": 8, "start": START, "end": END, "scope": scope, "optimizer_state": optimizer_state}
        return [ChannelPruning(0.5, **words, **layers(task))]

    name = "ours 50%" if optimizer_state == "slice" else f'ours 50%, optimizer_state="{optimizer_state}"'
    return Variant(name, "channel pruning, 50%", callbacks)


def aware(bits: int) -> Variant:
    return Variant(
        f"ours {bits} bits",
        f"quantization-aware training, {bits}-bit weights",
        lambda task: [QuantizationAwareTraining(weight_bits=bits, start=task.epochs // 2 / task.epochs)],
        resumed_at=0.75,
        counted_from=0.55,
        tasks=BOTH if bits == 8 else DIGITS,
    )


def after(keep_float: str) -> Variant:
    def rounded(module: pl.LightningModule, task: Task) -> nn.Module:
        served = copy.deepcopy(task.served(module)).eval()
        return quantize_post_training(served, list(task.calibration()), progress_bar=False)

    def export(module: pl.LightningModule, task: Task, path: Path) -> None:
        task.export(rounded(module, task), path, keep_float=keep_float)

    name = "ours" if keep_float == "small" else f'ours, keep_float="{keep_float}"'
    return Variant(name, AFTER, deploy=rounded, export=export)


def taught(module: pl.LightningModule, task: Task, seed: int) -> DistillationModule:
    teacher = teacher_of(task, seed)
    return DistillationModule(module, teacher, loss="kd", alpha=0.9, temperature=4.0)


VARIANTS = [
    *(pruning(sparsity, at_epoch_ends=ends) for sparsity in (0.8, 0.9) for ends in (True, False)),
    channels("slice"),
    channels("reset"),
    aware(8),
    aware(4),
    after("small"),
    after("auto"),
    Variant(
        "ours kd",
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
