"""Small nets of the kinds that are exported, quantized on random data."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_optim.modules import without_fast_path
from lightning_optim.quantization.calibrate import quantize_post_training


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.short = nn.Identity()
        if width != out:
            self.short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class ResNet(nn.Module):
    """Convolutions with BatchNorm (some with negative weights) and residual additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Branches(nn.Module):
    """An output that two convolutions read, circular padding, groups, concatenation, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.right = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(16, 8, 3, padding="same", groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        return self.head(F.max_pool2d(F.relu(self.last(x)), 2).mean((2, 3)))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.histories = nn.EmbeddingBag(4000, 32, mode="mean", padding_idx=0)
        self.items = nn.Embedding(6000, 32)
        self.user_tower = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.item_tower = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, history, item):
        return (self.user_tower(self.histories(history)) * self.item_tower(self.items(item))).sum(-1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(500, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 7)

    def forward(self, ids):
        return self.head(self.encoder(self.words(ids)).mean(1))


class TextConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(500, 32)
        self.conv1 = nn.Conv1d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.conv2 = nn.Conv1d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 7)

    def forward(self, ids):
        x = F.relu(self.norm(self.conv1(self.words(ids).transpose(1, 2))))
        return self.head(F.relu(self.conv2(x)).amax(-1))


class Tied(nn.Module):
    """A weight in two layers, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 32)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.inner(F.relu(self.inner(self.words(ids)))))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=500,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            num_labels=7,
        )
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def images(rows: int = 32):
    return torch.randn(rows, 3, 12, 12)


def sentences(rows: int = 32):
    return torch.randint(0, 300, (rows, 10))


def histories(rows: int = 64):
    history = torch.randint(1, 4000, (rows, 12))
    history[:, 8:] *= torch.randint(0, 2, (rows, 4))
    return history, torch.randint(0, 6000, (rows,))


def tokens(rows: int = 32):
    mask = torch.ones(rows, 10, dtype=torch.long)
    mask[:, 8:] = 0
    return {"input_ids": sentences(rows), "attention_mask": mask}


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "residual": (ResNet, images),
    "branches": (Branches, images),
    "recommender": (TwoTowers, histories),
    "encoder": (Encoder, sentences),
    "text convolution": (TextConv, sentences),
    "tied": (Tied, sentences),
    "bert": (bert, tokens),
    "mlp": (mlp, lambda rows=32: torch.randn(rows, 12)),
}


def scramble_norms(module: nn.Module) -> None:
    """Give BatchNorms statistics and weights of both signs, as after training."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.uniform_(layer.weight, -1, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.3, 1)


def quantized(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """Return a net in training mode, quantized, and inputs it has seen."""
    make, inputs = NETS[name]
    module = make()
    scramble_norms(module)
    batches = [inputs(), inputs()]
    with without_fast_path():  # which would hide an encoder's layers from the calibration
        return quantize_post_training(module, batches, progress_bar=False, **options), batches[0]
