"""A small convolutional net that classifies messages by intent, and its training batches.

An ordinary LightningModule of plain layers; it knows nothing of lightning_optim.
"""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from word_pieces import PADDING, UNKNOWN, VECTOR_LENGTH, narrow

__all__ = ["IntentsNet", "MessagePieces", "SimilarLengths", "loader"]

WARM_UP_STEPS = 30
LAST_RATE = 0.02  # of the learning rate, after the linear decay
CHUNK = 20  # batches that are sorted by length together


class IntentsNet(pl.LightningModule):
    """Embedding, one convolution, the maximum over time, two linear layers.

    ReLU and not GELU after the convolution: nothing is negative behind it, so the maximum over padding is 0 like that
    of a feature that is nowhere in the message, and integers need no zero point.

    Args:
        pieces: Size of the vocabulary.
        intents: Number of intents.
        width: Length of an embedding vector.
        channels: Channels of the convolution.
        hidden: Width of the second-last layer.
        dropout: Dropout of the embedding vectors, after the maximum and after the hidden layer.
        word_dropout: Fraction of the pieces that are replaced by unknown in training.
        label_smoothing: Probability that the loss spreads evenly over all intents.
        learning_rate: Learning rate of AdamW.
        embedding_rate: Factor of the embedding's learning rate; a random embedding needs more than 1.
        vectors: File of a tensor ``[pieces, any width]`` that initializes the embedding (its first principal components
            if it is wider). Not a hyperparameter: a checkpoint loads without it.
    """

    def __init__(
        self,
        pieces: int,
        intents: int,
        *,
        width: int = 256,
        channels: int = 256,
        hidden: int = 256,
        dropout: float = 0.3,
        word_dropout: float = 0.05,
        label_smoothing: float = 0.05,
        learning_rate: float = 3e-3,
        embedding_rate: float = 3.0,
        vectors: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="vectors")
        self.embedding = nn.Embedding(pieces, width, padding_idx=PADDING)
        self.convolution = nn.Conv1d(width, channels, 3, padding=1)
        self.hidden = nn.Linear(channels, hidden)
        self.intents = nn.Linear(hidden, intents)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=VECTOR_LENGTH / width**0.5)
        with torch.no_grad():
            if vectors is not None:
                self.embedding.weight.copy_(narrow(torch.load(vectors), width))
            self.embedding.weight[PADDING] = 0

    def forward(self, pieces: Tensor) -> Tensor:
        """Return logits ``[messages, intents]``.

        Args:
            pieces: Numbers of the pieces, ``[messages, length]``; ``PADDING`` after the end of a message. How much
                padding there is changes nothing.
        """
        vectors = self.dropout(self.embedding(pieces)).transpose(1, 2)
        features = F.relu(self.convolution(vectors)).masked_fill((pieces == PADDING).unsqueeze(1), 0.0)
        message = self.dropout(features.amax(2))
        return self.intents(self.dropout(F.relu(self.hidden(message))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pieces, labels = batch
        is_dropped = (torch.rand(pieces.shape, device=pieces.device) < self.hparams.word_dropout) & (pieces != PADDING)
        logits = self(pieces.masked_fill(is_dropped, UNKNOWN))
        return F.cross_entropy(logits, labels, label_smoothing=self.hparams.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        pieces, labels = batch
        accuracy = (self(pieces).argmax(1) == labels).float().mean()
        self.log(f"{name}_acc", accuracy, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        rate = self.hparams.learning_rate
        table = self.embedding.weight
        others = [parameter for parameter in self.parameters() if parameter is not table]
        optimizer = torch.optim.AdamW(
            [{"params": others}, {"params": [table], "lr": self.hparams.embedding_rate * rate}],
            lr=rate,
            weight_decay=1e-2,
            fused=True,
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / WARM_UP_STEPS) * max(LAST_RATE, 1 - step / steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MessagePieces(Dataset):
    """Makes whole batches at once: a ``DataLoader`` calls ``__getitems__`` with a batch of indices.

    Args:
        rows: Numbers of each message's pieces.
        labels: Intent of each message.
    """

    def __init__(self, rows: list[np.ndarray], labels: np.ndarray) -> None:
        self.rows = rows
        self.labels = torch.from_numpy(labels)
        self.lengths = np.array([len(row) for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return ``(pieces, labels)``, padded to the longest of these messages."""
        pieces = torch.full((len(indices), int(self.lengths[indices].max())), PADDING)
        for place, index in enumerate(indices):
            pieces[place, : self.lengths[index]] = torch.from_numpy(self.rows[index])
        return pieces, self.labels[indices]


class SimilarLengths(Sampler[list[int]]):
    """Batches of messages of similar length, so that little of a batch is padding.

    In training the messages are shuffled, sorted by length inside chunks of ``CHUNK`` batches, and the batches
    shuffled; else they are sorted by length once.

    Args:
        lengths: Lengths of all messages.
        batch_size: Messages in a batch; the last batch may be smaller.
        generator: Shuffles in every epoch; ``None`` does not shuffle.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, generator: np.random.Generator | None = None) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = (
            np.arange(len(self.lengths)) if self.generator is None else self.generator.permutation(len(self.lengths))
        )
        chunk = len(order) if self.generator is None else CHUNK * self.batch_size
        chunks = [order[start : start + chunk] for start in range(0, len(order), chunk)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in chunks])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if self.generator is not None:
            self.generator.shuffle(batches)
        return (batch.tolist() for batch in batches)


def _as_made(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Collate nothing: ``MessagePieces`` has already made the batch."""
    return batch


def loader(messages: MessagePieces, *, batch_size: int, shuffle_seed: int | None = None) -> DataLoader:
    """Return a loader of batches of similar length, shuffled if a seed is given."""
    generator = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
    sampler = SimilarLengths(messages.lengths, batch_size, generator)
    return DataLoader(messages, batch_sampler=sampler, collate_fn=_as_made)
