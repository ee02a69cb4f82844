"""A search in a process of its own: one of two on a storage, one that is killed, or the ranks of one run."""

import json
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import search

SPACE = {"weight_pruning": {"sparsity": (0.1, 0.9), "start": 0.1, "end": 0.6, "criterion": ["magnitude", "random"]}}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def dataset(rows=160):
    made = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=made)
    return TensorDataset(x, (x @ torch.randn(8, 3, generator=made)).argmax(1))


def accuracy(model):
    x, labels = dataset().tensors
    return float((model(x).argmax(1) == labels).float().mean())


def make_trainer(callbacks, **options):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {**dict.fromkeys(quiet, False), "accelerator": "cpu", "max_epochs": 3, **options}
    return pl.Trainer(callbacks=callbacks, **options)


def run(storage=None, *, trainer=make_trainer, **options):
    words = {
        "space": SPACE,
        "make_module": Net,
        "evaluate": accuracy,
        "objectives": ("accuracy", "nonzero"),
        "train_dataloaders": DataLoader(dataset(), 32, shuffle=True),
        "val_dataloaders": DataLoader(dataset(), 160),
        "progress": False,
        "stop_early": False,
    }
    return search(storage=storage, make_trainer=trainer, **{**words, **options})


class Kill(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder):
    """Kill this process in the middle of its fourth trial."""
    made = 0

    def trainer(callbacks):
        nonlocal made
        made += 1
        return make_trainer([*callbacks, *([Kill()] if made == 4 else [])])

    run(f"sqlite:///{folder}/study.db", trainer=trainer, trials=6)


def shared(folder):
    """Take part in a study that another process takes part in too."""
    Path(folder, f"here{os.environ['RANK']}").touch()
    while len(list(Path(folder).glob("here*"))) < 2:  # begin together
        pass
    rank = os.environ.pop("RANK")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = 0  # these are two processes, not two ranks
    ran = 0

    def trainer(callbacks):
        nonlocal ran
        ran += 1
        return make_trainer(callbacks)

    report = run(f"sqlite:///{folder}/study.db", trainer=trainer, trials=8)
    Path(folder, f"ran{rank}.json").write_text(json.dumps({"ran": ran, "seen": len(report.trials)}))


def ranks(folder):
    """Train each trial on both ranks; one of them raises."""
    recipes = []

    class Note(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            if len(recipes) == 3:
                raise ValueError("third trial is bad")

    def trainer(callbacks):
        arguments = [getattr(callback, "recipe", None) for callback in callbacks]
        recipes.append([recipe["weight_pruning"]["sparsity"] for recipe in arguments if recipe])
        return make_trainer([*callbacks, Note()], strategy="ddp", devices=2)

    report = run(trainer=trainer, trials=4, stop_early=True, n_startup=1)
    facts = {"recipes": recipes, "report": report.as_plain()}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    {"killed": killed, "shared": shared, "ranks": ranks}[sys.argv[1]](sys.argv[2])
