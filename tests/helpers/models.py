"""Small LightningModules, data and Trainers that tests share."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

ROWS, FEATURES, CLASSES = 64, 12, 3


class Classifier(pl.LightningModule):
    """An ordinary LightningModule: it knows nothing of this package."""

    def __init__(self, width: int = 16, dropout: float = 0.0, optimizer: str = "adam") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("test_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        if self.hparams.optimizer == "sgd":
            optimizer: Any = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        else:
            optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


class Quiet(Classifier):
    """The same without ``self.log`` in its training step, which Lightning 2.6 cannot compile."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Residual(nn.Module):
    """A block that knows its number."""

    def __init__(self, width: int, dropout: float, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.down(self.up(self.norm(x)).relu()))


class Stacked(Classifier):
    """The same with a stack of blocks between its layers."""

    def __init__(self, width: int = 16, dropout: float = 0.0, optimizer: str = "adam", blocks: int = 4) -> None:
        super().__init__(width, dropout, optimizer)
        net = self.net
        del self.net  # its last layer stays the last of all
        self.blocks = nn.ModuleList(Residual(width, dropout, number) for number in range(blocks))
        self.net = net

    def forward(self, x):
        for layer in self.net[:4]:
            x = layer(x)
        for block in self.blocks:
            x = block(x)
        for layer in self.net[4:]:
            x = layer(x)
        return x


class ConvNet(Classifier):
    """The same with convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)),
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        )


class EpochSampler(Sampler):
    """Shuffles by epoch, and nothing else: what Lightning resumes bit for bit."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())

    def __len__(self) -> int:
        return self.rows


class StepsTwo:
    """Put before a LightningModule: it optimizes manually, and steps its two optimizers once a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss


class SeededByStep(pl.Callback):
    """Dropout that a resumed run repeats: seeds from the step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


def data(rows: int = ROWS) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, FEATURES, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + 0.1 * torch.randn(rows, CLASSES, generator=generator)).argmax(1))


def train_loader(batch_size: int = 8, rows: int = ROWS) -> DataLoader:
    return DataLoader(data(rows), batch_size, sampler=EpochSampler(rows))


def val_loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(data(), batch_size)


def trainer(tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet CPU Trainer; without a checkpoint callback unless one is given."""
    has_checkpoint = any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks)
    if not options.get("barebones"):
        options = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": has_checkpoint,
            "num_sanity_val_steps": 0,
            **options,
        }
    options.setdefault("max_epochs", 3)
    return pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **options,
    )


def fit(tmp_path: Path, module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path=None, val=True, **options: Any):
    """Train on the shared data and return the Trainer."""
    torch.manual_seed(0)
    run = trainer(tmp_path, *callbacks, **options)
    run.fit(module, train_loader(), val_loader() if val else None, ckpt_path=ckpt_path)
    return run


def new(cls: type = Classifier, **init: Any):
    """A module with fixed initial weights."""
    torch.manual_seed(3)
    return cls(**init)


def assert_same_state(left: Any, right: Any) -> None:
    """Two modules (or state dicts) are equal bit for bit."""
    left = left.state_dict() if isinstance(left, nn.Module) else left
    right = right.state_dict() if isinstance(right, nn.Module) else right
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Files(pl.callbacks.Checkpoint):
    """Write ``<epoch>.ckpt`` at the end of every epoch (and ``step<n>.ckpt`` every n steps); has no state."""

    def __init__(self, folder: Path, every_n_steps: int = 0) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


class Stream(IterableDataset):
    """The same rows without a length."""

    def __iter__(self):
        return iter(data())


class ResumableLoader:
    """A loader with a place that is saved, as StatefulDataLoader has."""

    def __init__(self):
        self.batches = list(DataLoader(data(), 8))
        self.at = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.at %= len(self.batches)
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]
