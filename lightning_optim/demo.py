"""A small task without downloads: a residual net classifies scikit-learn's handwritten digits.

``lightning-optim demo`` and ``examples/digits.py`` train these classes. They are also useful to try the command line:
``lightning-optim fit --model lightning_optim.demo.DigitsNet --data lightning_optim.demo.DigitsData``.
"""

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["DigitsData", "DigitsNet"]

TRAINING_IMAGES = 958
TEST_IMAGES = 719
VALIDATION_IMAGES = 120
UNLABELED = -100


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(x + layers(x))``, of the shape of ``x`` ``[images, channels, height, width]``."""
        return F.relu(x + self.layers(x))


class DigitsNet(pl.LightningModule):
    """A small residual net for 8x8 images; an ordinary LightningModule that knows nothing of compression.

    Args:
        width: Channels of the first half; the second half has twice as many.
        learning_rate: Peak of the one-cycle schedule.
    """

    def __init__(self, width: int = 13, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            Residual(2 * width),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[images, 10]`` of scans ``[images, 1, 8, 8]`` with values in [0, 1]."""
        scores: Tensor = self.net(images)
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the labeled images; 0 without any."""
        images, labels = batch
        known, logits = labels != UNLABELED, self(images)
        return F.cross_entropy(logits[known], labels[known]) if known.any() else 0.0 * logits.sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``."""
        self._evaluate("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_acc``."""
        self._evaluate("test", batch)

    def _evaluate(self, name: str, batch: list[Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        metrics = {f"{name}_loss": F.cross_entropy(logits, labels), f"{name}_acc": accuracy}
        self.log_dict(metrics, batch_size=len(images), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW with a one-cycle learning rate."""
        rate = self.hparams["learning_rate"]
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DigitsData(pl.LightningDataModule):
    """The 1,797 scans of scikit-learn in a fixed split: 958 for training, 120 for validation, 719 for testing.

    Args:
        batch_size: Batch size in training.
        seed: Seed of the shuffling, and of the choice of labels.
        labels: Number of training scans that keep their label; None: all.
        unlabeled: Whether the other training scans are there, with the label -100. A teacher needs no label.

    Raises:
        ImportError: If scikit-learn is not installed; the message names the extra.
    """

    name = "scikit-learn's digits"

    def __init__(self, batch_size: int = 64, seed: int = 0, labels: int | None = None, unlabeled: bool = True) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.labels, self.unlabeled = labels, unlabeled

    @cached_property
    def splits(self) -> dict[str, TensorDataset]:
        """The scans and their labels: "train", "validation", "test"."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError(
                "the digits come with scikit-learn, which is not installed. Install it with: "
                'python -m pip install "lightning-optim[examples]"'
            ) from error
        images, labels = load_digits(return_X_y=True)
        rest, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, random_state=0, stratify=labels)
        train, validation = train_test_split(rest, test_size=VALIDATION_IMAGES, random_state=0, stratify=labels[rest])
        tensors = torch.from_numpy(images / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels)
        parts = {"train": train, "validation": validation, "test": test}
        splits = {name: TensorDataset(*(tensor[rows] for tensor in tensors)) for name, rows in parts.items()}
        if self.labels is not None:
            splits["train"] = self._with_few_labels(splits["train"], self.labels)
        return splits

    def _with_few_labels(self, scans: TensorDataset, number: int) -> TensorDataset:
        images, labels = scans.tensors
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))[:number]
        if not self.unlabeled:
            return TensorDataset(images[chosen], labels[chosen])
        hidden = torch.full_like(labels, UNLABELED)
        hidden[chosen] = labels[chosen]
        return TensorDataset(images, hidden)

    def as_many_epochs(self, epochs: int) -> int:
        """Return the number of epochs with at least as many steps as that many with all scans."""
        steps = epochs * -(-TRAINING_IMAGES // self.batch_size)
        return -(-steps // len(self.train_dataloader()))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training scans, shuffled by a generator of their own."""
        shuffled = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, generator=shuffled)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation scans, in one batch."""
        return DataLoader(self.splits["validation"], VALIDATION_IMAGES)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test scans, in one batch."""
        return DataLoader(self.splits["test"], TEST_IMAGES)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test scans without their labels, in one batch."""
        images: Any = self.splits["test"].tensors[0]
        return DataLoader(images, batch_size=TEST_IMAGES)
