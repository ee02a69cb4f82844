"""Trains modules with parameters that units cannot hold, under sharded presets and DDP: ``outside_worker.py OUT``.

Each rank writes the losses and the weights that every run ended with.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optim.sharding import full
from lightning_optim.strategies import OptimDDP, build

ITEMS, WIDTH, ROWS = 120, 8, 48


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Base(pl.LightningModule):
    """Predicts the next item of a history."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, ITEMS)

    def encoded(self, history):
        return self.blocks(self.items(history).mean(1))

    def forward(self, history):
        return self.head(self.encoded(history))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(self.trainer.strategy.reduce(outputs["loss"].detach())))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randint(0, ITEMS, shape, generator=generator)  # noqa: E731
        data = TensorDataset(draw(ROWS, 5), draw(ROWS))
        words = self.trainer.strategy.distributed_sampler_kwargs
        return DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=False, **words))

    val_dataloader = train_dataloader


class ScoresByTable(Base):
    """The table is called, and its weight is read twice besides."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, history):
        state = self.encoded(history)
        return state @ self.items.weight.t() + 0.1 * F.linear(state, self.items.weight)


class EmbedsByHead(Base):
    """The head's weight is read before the head is called; the table is never called."""

    def forward(self, history):
        return self.head(self.blocks(F.embedding(history, self.head.weight).mean(1) + self.items.weight.mean(0)))


class ByHand(ScoresByTable):
    """Manual optimization, which leaves Lightning's ``manual_backward`` out (DDP needs it)."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.scale = nn.Parameter(torch.tensor(1.5))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]) * self.scale, batch[1])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if isinstance(self.trainer.strategy, OptimDDP):
            self.manual_backward(loss)
        else:
            loss.backward()
        optimizer.step()
        return {"loss": loss}


class Gained(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x) * self.gain


class Scaled(Base):
    """0-dim parameters, in units and in the root; each rank draws its own first value."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Gained(), Gained())
        own = torch.Generator().manual_seed(int(os.environ["RANK"]))
        self.scale = nn.Parameter(torch.rand((), generator=own))

    def encoded(self, history):
        return self.blocks(self.items(history).mean(1)) * self.scale.exp()


class MixedLayer(nn.Module):
    """One layer that holds two types itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64) * 0.3)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return (x.double() @ self.weight).float() * self.scale


class Typed(Base):
    """Norms in float64 within float32 blocks, and a layer of both."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = nn.Sequential(Cast(torch.float64), nn.LayerNorm(WIDTH).double(), Cast(torch.float32))
            block.mixed = MixedLayer()
            block.down = nn.Sequential(block.down, block.mixed)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


class Regularized(Base):
    """Reads a parameter inside a block, which is a unit."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.blocks[0].up.weight @ torch.ones(WIDTH)).sum()


def fit(
    make: type[Base], name: str, *, precision: Any = "32-true", options: Any = None, **words: Any
) -> dict[str, Any]:
    torch.manual_seed(3)
    module = make()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=build(f"optim_{name}", **words),
        max_epochs=2,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **(options or {}),
    )
    trainer.fit(module)
    weights = {key: full(value.detach()).clone() for key, value in module.state_dict().items()}
    return {"losses": module.losses, "weights": weights, "val_loss": float(trainer.callback_metrics["val_loss"])}


MAKES = (ScoresByTable, EmbedsByHead, ByHand, Scaled, Typed)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    for make in MAKES:
        for name in ("ddp", "fsdp", "zero2")[: 3 if make in MAKES[:2] else 2]:
            runs[f"{make.__name__} {name}"] = fit(make, name)
    clip = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    for name in ("ddp", "fsdp"):
        for make in (ScoresByTable, Scaled):
            runs[f"{make.__name__} clipped {name}"] = fit(make, name, options=clip)
        runs[f"ScoresByTable half {name}"] = fit(ScoresByTable, name, precision="bf16-mixed")
    runs["EmbedsByHead recomputed ddp"] = runs["EmbedsByHead ddp"]
    runs["EmbedsByHead recomputed fsdp"] = fit(EmbedsByHead, "fsdp", activation_checkpointing=True)
    try:
        fit(Regularized, "fsdp")
    except RuntimeError as error:
        runs["refused"] = str(error)
    torch.save(runs, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
