"""CPU time of training steps in a Trainer, shared by the benchmarks of a technique's overhead."""

import time
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import lightning.pytorch as pl


class _Begins(pl.Callback):
    """Starts the clock; first in the list, so that all hooks of others are inside."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.at = time.thread_time()


class _Ends(pl.Callback):
    """Stops it; last in the list."""

    def __init__(self, begins: _Begins) -> None:
        self.begins, self.seconds = begins, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.thread_time() - self.begins.at)


def step_seconds(
    module: pl.LightningModule, loader: Iterable[Any], folder: str, callbacks: Sequence[pl.Callback] = (), skip: int = 4
) -> list[float]:
    """Train one epoch in a new Trainer, and return the CPU time of each step except the first ones."""
    begins = _Begins()
    ends = _Ends(begins)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[begins, *callbacks, ends],
        default_root_dir=folder,
    )
    trainer.fit(module, loader)
    return ends.seconds[skip:]


def faster(seconds: list[float]) -> float:
    """Return the mean of the faster steps, percentiles 5 to 40; other processes slow down the rest."""
    ordered = sorted(seconds)
    return fmean(ordered[len(ordered) * 5 // 100 : max(len(ordered) * 40 // 100, 1)])
