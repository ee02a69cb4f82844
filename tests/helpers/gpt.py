"""A small language model for the strategies: blocks that repeat, layers that tensor parallelism can divide."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

ROWS, LENGTH, VOCABULARY, GLOBAL_BATCH = 64, 8, 32, 8


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(self, x):
        rows, length, _ = x.shape
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).view(rows, length, -1, self.head_width).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed = Attention(width, heads), Feed(width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def data() -> TensorDataset:
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens, (tokens * 7 + 3) % VOCABULARY)


class Language(pl.LightningModule):
    """An ordinary LightningModule with its data; each data parallel rank takes every n-th row of the same order."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = GPT(width, layers, heads, tied)
        self.losses: list[float] = []

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train_loss", loss, sync_dist=True, on_epoch=True, on_step=False)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        loss = self.trainer.strategy.reduce(outputs["loss"].detach().float().clone(), reduce_op="mean")
        self.losses.append(float(loss))

    def _loss(self, batch):
        logits = self(batch[0])
        return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits.flatten(0, -2), batch[1].flatten()), sync_dist=True)
        self.log("val_acc", (logits.argmax(-1) == batch[1]).float().mean(), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)

    def _loader(self, shuffle: bool) -> DataLoader[Any]:
        words: dict[str, int] = {"num_replicas": 1, "rank": 0}
        if torch.distributed.is_initialized():
            words = self.trainer.strategy.distributed_sampler_kwargs
        sampler = DistributedSampler(data(), shuffle=shuffle, seed=1, **words)
        return DataLoader(data(), GLOBAL_BATCH // words["num_replicas"], sampler=sampler)

    def train_dataloader(self):
        return self._loader(shuffle=True)

    def val_dataloader(self):
        return self._loader(shuffle=False)

    test_dataloader = val_dataloader
