"""Customer-service messages as token ids, for a language model that continues them.

No labels are used: the model learns to write what customers write.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from banking77 import find_folder, read_messages
from lightning_optim.distillation import IndexedCollate, IndexedDataset
from synthetic_messages import generate_messages

__all__ = ["AssistantData", "Texts", "collate", "encode"]

TEMPLATE = "<|im_start|>{}<|im_end|>"
LONGEST = 48  # tokens; one message of a hundred is longer
IGNORED = -100

Batch = dict[str, Tensor]


class Texts(Dataset[list[int]]):
    """Messages as token ids."""

    def __init__(self, ids: Sequence[list[int]]) -> None:
        self.ids = list(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[index]


class Grouped(Sampler[int]):
    """Messages of about equal length one after the other, so that little of a batch is padding.

    An epoch is a part of the messages; all come before one comes again. The order depends on the seed and the epoch
    alone, so a run that is resumed after an epoch finds it again.

    Args:
        lengths: Tokens of each message.
        batch_size: Messages in a batch.
        batches: Of an epoch.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, batches: int, seed: int) -> None:
        self.lengths, self.batch_size, self.batches, self.seed, self.epoch = lengths, batch_size, batches, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the part of an epoch; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        samples, size = len(self.lengths), self.batches * self.batch_size
        places = range(self.epoch * size, (self.epoch + 1) * size)
        chosen = [self._order(samples, place // samples)[place % samples] for place in places]
        chosen.sort(key=self.lengths.__getitem__)
        for batch in self._order(self.batches, self.epoch):
            yield from chosen[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _order(self, count: int, time: int) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + time)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order


def collate(chosen: Sequence[list[int]]) -> Batch:
    """Return token ids, mask and labels of some messages, ``[messages, longest]``; padding has the label -100."""
    longest = max(map(len, chosen))
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(chosen):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of messages, each between the two tokens that begin and end a message."""
    return [tokenizer(TEMPLATE.format(text.strip()))["input_ids"][:LONGEST] for text in texts]


@cache
def read_texts(path: str | None, *, synthetic: bool) -> tuple[list[str], list[str]]:
    """Return the messages to train on and those held out, each in an order drawn once."""
    found = generate_messages() if synthetic else read_messages(find_folder(path))
    texts = []
    for messages in found:
        order = torch.randperm(len(messages), generator=torch.Generator().manual_seed(0)).tolist()
        texts.append([messages.texts[place] for place in order])
    return texts[0], texts[1]


class AssistantData(pl.LightningDataModule):
    """Messages to train on and messages held out.

    Args:
        tokenizer: A Hugging Face folder with a tokenizer.
        path: The folder with Banking77's files; ``None`` is where ``find_folder`` looks.
        synthetic: Use generated messages instead of the files.
        messages: Number of messages to train on.
        held_out: Number of messages that are held out.
        indexed: Add the indices of the messages to batches; only for a student that reads cached logits.
        batch_size: Messages in a batch.
        epoch_steps: Batches in an epoch, which is a part of the messages: a run can go on after each.
        seed: Seed of the order.
    """

    def __init__(
        self,
        tokenizer: str,
        path: str | None = None,
        *,
        synthetic: bool = False,
        messages: int = 1600,
        held_out: int = 256,
        indexed: bool = False,
        batch_size: int = 8,
        epoch_steps: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.path, self.synthetic = path, synthetic
        self.sizes = (messages, held_out)
        self.indexed = indexed
        self.batch_size, self.epoch_steps = batch_size, epoch_steps
        self.seed = seed
        self.texts: list[Texts] = []

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the messages, once."""
        from transformers import AutoTokenizer

        if self.texts:
            return
        tokenizer = AutoTokenizer.from_pretrained(Path(self.tokenizer), local_files_only=True)
        found = read_texts(self.path, synthetic=self.synthetic)
        self.texts = [Texts(encode(tokenizer, texts[:size])) for texts, size in zip(found, self.sizes, strict=True)]

    def train_dataloader(self) -> DataLoader:
        """Return the training messages of an epoch."""
        texts = self.texts[0]
        return DataLoader(
            IndexedDataset(texts) if self.indexed else texts,
            batch_size=self.batch_size,
            sampler=Grouped(list(map(len, texts.ids)), self.batch_size, self.epoch_steps, self.seed),
            collate_fn=IndexedCollate(collate) if self.indexed else collate,
        )

    def val_dataloader(self) -> DataLoader:
        """Return the messages held out."""
        return DataLoader(self.texts[1], batch_size=2 * self.batch_size, collate_fn=collate)
