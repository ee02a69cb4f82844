"""Lightning's ModelPruning, at its best: the same cubic schedule over the same weights, without the lottery ticket.

``amount`` is asked once at the end of each epoch, and takes its fraction of the weights that are still there: so what
is passed is (s_now - s_before) / (1 - s_before). ``use_lottery_ticket_hypothesis`` is on by default and would set the
weights back to their first values at each pruning; it is switched off.
"""

from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from task import BOTH, DIGITS, Task, Variant, cubic, epoch_window, work


def amount(epoch: int, *, task: Task, sparsity: float) -> float:
    """Return the fraction of the remaining weights that goes at the end of an epoch."""
    first, last = epoch_window(task)
    before, now = (cubic((end - first) / (last - first), sparsity) for end in (epoch, epoch + 1))
    return max(0.0, (now - before) / (1 - before))


class Pruning(ModelPruning):
    """Prunes the weights that all others prune; ``filter_parameters_to_prune`` is where the docs say to choose."""

    def __init__(self, task: Task, sparsity: float, *, permanent: bool) -> None:
        super().__init__(
            "l1_unstructured",
            amount=partial(amount, task=task, sparsity=sparsity),
            use_lottery_ticket_hypothesis=False,
            make_pruning_permanent=permanent,
        )
        self.task = task

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._parameters_to_prune = self.task.prunable(pl_module)
        super().setup(trainer, pl_module, stage)


class Finished(pl.Callback):
    """Makes the pruning permanent at the end, where the callback was told not to in every checkpoint."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pruning = next(callback for callback in trainer.callbacks if isinstance(callback, ModelPruning))
        pruning.make_pruning_permanent(pl_module)


def with_masks(module: pl.LightningModule, task: Task, *, sparsity: float) -> list[pl.Callback]:
    """Give a fresh module the parametrization that the checkpoint has, before it is loaded."""
    from torch.nn.utils import prune

    for layer, name in task.prunable(module):
        prune.identity(layer, name)
    return [Pruning(task, sparsity, permanent=False), Finished()]


VARIANTS = [
    *(
        Variant(
            f"ModelPruning {sparsity:.0%}",
            f"weight pruning, {sparsity:.0%}",
            lambda task, sparsity=sparsity: [Pruning(task, sparsity, permanent=True)],
            tasks=BOTH if sparsity == 0.8 else DIGITS,
        )
        for sparsity in (0.8, 0.9)
    ),
    Variant(
        "ModelPruning 90%, make_pruning_permanent=False",
        "weight pruning, 90%",
        lambda task: [Pruning(task, 0.9, permanent=False), Finished()],
        by_hand={
            "prune.identity on every pruned weight before fit": lambda module, task, run: with_masks(
                module, task, sparsity=0.9
            )
        },
        tasks=DIGITS,
    ),
]


if __name__ == "__main__":
    work(VARIANTS)
