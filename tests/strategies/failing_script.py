"""A user's script: ``failing_script.py FOLDER STRATEGY none|raise|kill|hang``; the second rank fails in epoch 2."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.gpt import Language
from lightning_optim import WeightPruning
from lightning_optim.sharding import whole_state
from lightning_optim.strategies import build


class Fails(Language):
    how = "none"
    first_epoch: int | None = None

    def on_train_batch_start(self, batch, batch_idx):
        if self.first_epoch is None:
            self.first_epoch = self.current_epoch
        if self.global_rank != 1 or self.current_epoch != 2:
            return
        if self.how == "raise":
            raise ValueError("the second rank fails")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(1000)


class Keeps(pl.Callback):
    """Write the whole weights while the processes are together: a forked one does not come back with its module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        state = whole_state(pl_module, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            torch.save({"weights": state, "first epoch": pl_module.first_epoch}, self.folder / "weights.pt")


def main() -> None:
    folder, strategy, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    folder.mkdir(parents=True, exist_ok=True)
    atexit.register(lambda: sys.stdout.write(f"group left: {torch.distributed.is_initialized()}\n"))  # runs last
    torch.set_num_threads(1)
    torch.manual_seed(3)
    module = Fails()
    module.how = how
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=build(strategy, timeout_s=20 if how == "hang" else 120),
        max_epochs=3,
        callbacks=[
            ModelCheckpoint(folder, filename="saved", save_last=True, enable_version_counter=False),
            WeightPruning(0.5, start=2, end=20, every_n_steps=3),
            Keeps(folder),
        ],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, ckpt_path="last", weights_only=True)


if __name__ == "__main__":
    main()
