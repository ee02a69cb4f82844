"""Customer-service messages for a Trainer: training and held-out sets, and their word pieces."""

from dataclasses import dataclass
from functools import cache

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from banking77 import Messages, find_folder, hold_out, keep_intents, read_messages
from intents_model import MessagePieces, loader
from lightning_optim.distillation import IndexedCollate, IndexedDataset
from synthetic_messages import generate_messages
from word_pieces import Vocabulary, find_minilm, learn_pieces, read_minilm

__all__ = ["HELD_OUT", "IntentsData", "IntentsTask", "numbered"]

HELD_OUT = ("test", "validation")
VALIDATION_SHARE = 0.1
EVALUATION_BATCH_SIZE = 128
FAST_TOPIC = "transfer"  # ten intents that are easily taken for one another


@dataclass(frozen=True)
class IntentsTask:
    """Training and evaluation messages.

    Attributes:
        train: Training messages.
        held_out: Held-out messages.
        vocabulary: Pieces that occur in the training messages.
        train_pieces: The training messages as numbers.
        held_out_pieces: The held-out messages as numbers.
    """

    train: Messages
    held_out: Messages
    vocabulary: Vocabulary
    train_pieces: MessagePieces
    held_out_pieces: MessagePieces

    @property
    def intents(self) -> int:
        """How many there are."""
        return len(self.train.intents)

    @property
    def one_message(self) -> Tensor:
        """A real message of median length, as a batch of one: what calls are timed with."""
        messages = self.held_out_pieces
        median = int(np.argsort(messages.lengths, kind="stable")[len(messages) // 2])
        return messages[median][0]

    def evaluation(self) -> DataLoader:
        """Return the evaluation messages, in batches of similar length."""
        return loader(self.held_out_pieces, batch_size=EVALUATION_BATCH_SIZE)


@cache
def load_task(path: str | None, held_out: str, synthetic: bool, fast: bool, minilm: bool) -> IntentsTask:
    """Return the task; files are read once."""
    train, test = generate_messages() if synthetic else read_messages(find_folder(path))
    if fast and not synthetic:
        kept = [place for place, intent in enumerate(train.intents) if FAST_TOPIC in intent]
        train, test = keep_intents(train, kept), keep_intents(test, kept)
    if held_out == "validation":
        train, test = hold_out(train, VALIDATION_SHARE)
    folder = find_minilm() if minilm and not synthetic else None
    vocabulary = read_minilm(folder, train.texts) if folder else learn_pieces(train.texts)
    pieces = [MessagePieces(vocabulary.encode(found.texts), found.labels) for found in (train, test)]
    return IntentsTask(train, test, vocabulary, *pieces)


def numbered(batches: DataLoader) -> DataLoader:
    """Return a loader of the same batches with the indices of their messages, for cached logits."""
    return DataLoader(
        IndexedDataset(batches.dataset),
        batch_sampler=batches.batch_sampler,
        collate_fn=IndexedCollate(batches.collate_fn),
    )


class IntentsData(pl.LightningDataModule):
    """Training and held-out messages.

    Args:
        path: The folder with Banking77's files; ``None`` is where ``find_folder`` looks.
        held_out: "test", the publisher's; or "validation", a tenth of the training messages, for choosing settings.
        synthetic: Use generated messages instead of the files.
        fast: Use only the intents about a transfer.
        minilm: Use MiniLM's pieces if its package is installed; otherwise they are learned from the messages.
        indexed: Add the indices of the messages to batches; only for a student that reads cached logits.
        batch_size: Messages in a batch.
        seed: Seed of shuffling, which has a generator of its own.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        held_out: str = "test",
        synthetic: bool = False,
        fast: bool = False,
        minilm: bool = True,
        indexed: bool = False,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if held_out not in HELD_OUT:
            raise ValueError(f"`held_out` must be one of {', '.join(HELD_OUT)}, got {held_out!r}.")
        self.source = (path, held_out, synthetic, fast, minilm)
        self.indexed = indexed
        self.batch_size = batch_size
        self.seed = seed

    @property
    def task(self) -> IntentsTask:
        """The task, read at first access."""
        return load_task(*self.source)

    def setup(self, stage: str) -> None:
        """Read the data before the Trainer asks for batches."""
        load_task(*self.source)

    def train_dataloader(self) -> DataLoader:
        """Return the training messages, shuffled by the seed."""
        batches = loader(self.task.train_pieces, batch_size=self.batch_size, shuffle_seed=self.seed)
        return numbered(batches) if self.indexed else batches

    def val_dataloader(self) -> DataLoader:
        """Return the messages held out."""
        return self.task.evaluation()

    def test_dataloader(self) -> DataLoader:
        """Return the messages held out."""
        return self.task.evaluation()
