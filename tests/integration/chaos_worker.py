"""One launch of a run that may be killed: ``chaos_worker.py FOLDER RESUME KILL``.

Trains by a recipe of all techniques, a teacher, the score and checkpoints of every epoch in FOLDER. RESUME is a
checkpoint or ``-``. KILL is ``-``, ``step:N`` (SIGKILL after N steps of this launch) or ``write:N`` (SIGKILL in the
middle of the N-th file that this launch writes).
"""

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.models import Classifier, Quiet, SeededByStep, new, train_loader, val_loader
from lightning_optim import Recipe

EPOCHS = 20
RECIPE = Recipe(
    channel_pruning={"pruning_ratio": 0.5, "events": 3, "criterion": "taylor", "scope": "layer"},
    weight_pruning={"sparsity": 0.5, "every_n_steps": 5, "criterion": "taylor"},
    quantization={"weight_bits": 4},
    distillation={"loss": "kd", "alpha": {"initial": 0.9, "final": 0.1}},
    score={"accuracy": "val_acc", "size": "bits", "max_drop": 0.9},
    checkpoint={"monitor": "val_loss", "mode": "min", "dirpath": "best", "enable_version_counter": False},
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfterSteps(pl.Callback):
    """Ends the process without a word in the middle of a batch."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_before_zero_grad(self, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            die()


def die_in_write(number: int) -> None:
    """End the process when half of the bytes of a file are written."""
    written: list[str] = []
    write = LocalFileOpener.write

    def half(opener: LocalFileOpener, content: bytes) -> int:
        if opener.path not in written:
            written.append(opener.path)
        if len(written) < number:
            return write(opener, content)
        write(opener, bytes(content)[: len(content) // 2])
        opener.f.flush()
        die()
        return 0

    LocalFileOpener.write = half


def main(folder: str, resume: str, kill: str) -> None:
    kind, _, number = kill.partition(":")
    if kind == "write":
        die_in_write(int(number))
    os.chdir(folder)
    torch.set_num_threads(1)
    module = RECIPE.wrap(new(Classifier, width=16, dropout=0.2), new(Quiet, width=32))
    every = ModelCheckpoint("files", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            SeededByStep(),
            *RECIPE.callbacks(),
            every,
            *([DieAfterSteps(int(number))] if kind == "step" else []),
        ],
    )
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=None if resume == "-" else resume)
    torch.save(module.state_dict(), Path("final.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
