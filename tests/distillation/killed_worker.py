"""Fits with a cache and a teacher that kills the process in its Nth call: ``FILE TOP_K CALLS`` (0: never)."""

import os
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.utils.data import DataLoader

from helpers.distilled import Teacher, distilled, teacher
from helpers.models import data, trainer, val_loader
from lightning_optim.distillation import IndexedDataset

ROWS, BATCH = 64, 8


class Deadly(Teacher):
    calls, until = 0, 0

    def forward(self, x):
        type(self).calls += 1
        if self.calls == self.until:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def fit(path: Path, top_k: int | None, until: int) -> int:
    """Fit for an epoch, and return how often the teacher was called."""
    Deadly.calls, Deadly.until = 0, until
    module = distilled(of=teacher(Deadly), cache=path, cache_top_k=top_k)
    trainer(path.parent, max_epochs=1).fit(module, DataLoader(IndexedDataset(data(ROWS)), BATCH), val_loader())
    return Deadly.calls


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    fit(Path(sys.argv[1]), int(sys.argv[2]) or None, int(sys.argv[3]))
