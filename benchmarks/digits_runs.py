"""Shared by the benchmarks on digits: training the demo's net with one callback."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
from torch.utils.data import TensorDataset

from lightning_optim import CompressedCheckpoint
from lightning_optim.demo import DigitsData, DigitsNet

__all__ = ["BATCH_SIZE", "EPOCHS", "SMALL_WIDTH", "TEST_IMAGES", "THREADS", "Run", "Scans", "splits", "train"]

TEST_IMAGES = 719
BATCH_SIZE = 64
WIDTH = 13
SMALL_WIDTH = 7  # about the parameters of the net without half of its channels
EPOCHS = 20
Scans = dict[str, TensorDataset]
THREADS = 1  # two threads save 10 % on such a small net, and cost ten times as much on a busy machine


@dataclass(frozen=True)
class Run:
    """A row: its name, the factory of its callback, and the initial width of the net."""

    name: str
    compression: Callable[[], pl.Callback] | None = None
    width: int = WIDTH


def splits() -> Scans:
    """Return the scans to train on, to validate and to test."""
    return DigitsData().splits


def train(run: Run, *, seed: int, epochs: int = EPOCHS) -> tuple[DigitsNet, float]:
    """Train a row, keep its best epoch by validation loss, and return the net with its test accuracy."""
    pl.seed_everything(seed, verbose=False)
    model, data = DigitsNet(run.width), DigitsData(BATCH_SIZE, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_model_summary=False,
            callbacks=[
                *([run.compression()] if run.compression else []),
                CompressedCheckpoint(dirpath=folder, monitor="val_loss", mode="min"),
            ],
        )
        trainer.fit(model, datamodule=data)
        (tested,) = trainer.test(model, data.test_dataloader(), ckpt_path="best", verbose=False)
    return model, tested["test_acc"]
