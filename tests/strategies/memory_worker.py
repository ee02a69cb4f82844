"""Counts what presets hold and send on gloo ranks in a step of a small GPT each: ``memory_worker.py OUT CASE...``.

A case is ``preset/precision`` or ``preset/precision/tied``. Each rank writes ``rank<n>.json``: per case the bytes of
its weights, gradients and optimizer states, and of the tensors that went into collectives in the second step.
"""

import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.strategies.presets import PRESETS
from lightning_optim.strategies.recommend import Row, recommend

WIDTH, DEPTH, VOCABULARY, LENGTH, BATCH = 128, 4, 256, 32, 4


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH, head: int = 32) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.head).transpose(1, 2) for layer in layers)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, head: int = 32, hidden: int = 4 * WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, head)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(pl.LightningModule):
    """857 k parameters; 824 k where the head shares the embedding's, which then stay in the root."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def predicted(case: str, world: int) -> Row:
    """Return the cost model's row of a case."""
    name, precision, *tied = case.split("/")
    name = "optim_ddp" if name == "optim_ddp_static" else name
    asked = {"precision": precision, "memory_gb": 1, "batch_size": BATCH, "tokens_per_sample": LENGTH}
    return recommend(GPT(bool(tied)), devices=world, replicate=2, **asked).row(name)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors: Any) -> int:
    return sum(local(tensor).numel() * local(tensor).element_size() for tensor in tensors)


class Traffic(TorchDispatchMode):
    """Adds up the whole tensors of the collectives, also those that DDP's reducer calls from C++."""

    KINDS = {
        "allreduce_": ("all-reduce", lambda args: args[0]),
        "_allgather_base_": ("all-gather", lambda args: args[:1]),  # its output
        "_reduce_scatter_base_": ("reduce-scatter", lambda args: args[1:2]),  # its input
        "all_reduce": ("all-reduce", lambda args: args[:1]),
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # let it fall apart into local tensors and collectives
        if func.namespace in ("c10d", "_c10d_functional"):
            kind, tensors = self.KINDS.get(func.__name__.partition(".")[0], (None, None))
            if kind is not None:
                self.bytes[kind] += size(tensors(args))
                self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


class Counted(pl.Callback):
    """Counts in the second step: DDP builds its buckets after the first."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.traffic = Traffic()
            self.traffic.__enter__()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = size(parameter.grad for parameter in pl_module.parameters())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.traffic.__exit__(None, None, None)
            (optimizer,) = trainer.optimizers
            states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
            self.weights, self.optimizer = size(pl_module.parameters()), size(states)

    def results(self) -> dict[str, Any]:
        held = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        return {"held": held, "sent": dict(self.traffic.bytes), "calls": dict(self.traffic.calls)}


def count(case: str, world: int, folder: Path) -> dict[str, Any]:
    name, precision, *tied = case.split("/")
    counted = Counted()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=PRESETS[name].build(**predicted(case, world).options),
        precision=precision,
        max_epochs=1,
        limit_train_batches=2,
        callbacks=[counted],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    ids = torch.randint(VOCABULARY, (2 * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    trainer.fit(GPT(bool(tied)), DataLoader(TensorDataset(ids), BATCH))
    return counted.results()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    world = int(os.environ["WORLD_SIZE"])
    results = {case: count(case, world, out) for case in cases}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
