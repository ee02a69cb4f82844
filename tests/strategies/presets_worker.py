"""Trains under presets on gloo ranks and writes what each rank ended with: ``presets_worker.py OUT CASE...``.

A case is a function and the words after its name, ``plain/fsdp``; it returns runs by name. ``test_presets_run.py``
trains the same modules in one process.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from helpers.gpt import GPT, Language
from helpers.models import Files, data
from lightning_optim.sharding import full, is_sharded
from lightning_optim.strategies import OptimFSDP2, build, consolidate

EPOCHS = 2
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    **{
        name: lambda name=name, **words: build(f"optim_{name}", **words)
        for name in ("ddp", "ddp_static", "ddp_bf16", "ddp_fp16", "zero2", "fsdp", "tp", "2d")
    },
    "hsdp": lambda **words: OptimFSDP2(replicate=2, **words),
}


class Plain(Language):
    """SGD: what scales gradients shows in the weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Grouped(Language):
    """Parameter groups in another order than the parameters."""

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed[::-1], "weight_decay": 0.1}]
        return torch.optim.AdamW(groups, 3e-3)


class Manual(Language):
    """Two optimizers, of which one steps every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = self._loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(first, 0.5, "norm")
        for optimizer in (first, second)[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss}

    def configure_optimizers(self):
        blocks = self.net.blocks.parameters()
        rest = [*self.net.embedding.parameters(), *self.net.norm.parameters(), *self.net.head.parameters()]
        return torch.optim.Adam(blocks, 3e-3), torch.optim.SGD(rest, 0.1, momentum=0.9)


class Conditional(Plain):
    """One of its blocks takes part in every second step only."""

    def training_step(self, batch, batch_idx):
        blocks = list(self.net.blocks)[: 1 + batch_idx % 2]
        x = self.net.embedding(batch[0])
        for block in blocks:
            x = block(x)
        return F.cross_entropy(self.net.head(self.net.norm(x)).flatten(0, -2), batch[1].flatten())


class Made(Language):
    """Its layers are made in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(3)
            self.net = GPT(32, 2, 4)


class OnMeta(Made):
    """They are made without memory."""

    def configure_model(self):
        if self.net is None:
            with torch.device("meta"):
                self.net = GPT(32, 2, 4)


class ShardsItself(Made):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        super().configure_model()
        if not is_sharded(self.net):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.blocks[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Normed(pl.LightningModule):
    """A net with BatchNorm, a layer of fewer rows than shards, and torch's own encoder layers."""

    def __init__(self, lr: float = 0.05, rows: int = 3) -> None:
        super().__init__()
        self.lr, self.losses = lr, []
        self.net = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU())
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, rows)

    def forward(self, x):
        x = self.net(x)
        return self.head(self.encoder(x.view(-1, 2, 8)).flatten(1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[0][:, : self.head.out_features])

    on_train_batch_end = Language.on_train_batch_end

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        words = {"num_replicas": 1, "rank": 0}
        if dist.is_initialized():
            words = self.trainer.strategy.distributed_sampler_kwargs
        sampler = DistributedSampler(data(), shuffle=False, **words)
        return DataLoader(data(), 16 // words["num_replicas"], sampler=sampler)

    val_dataloader = train_dataloader


def new(module: Callable[..., pl.LightningModule], **words: Any) -> pl.LightningModule:
    torch.manual_seed(3)
    return module(**words)


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights and buffers, gathered."""
    return {name: full(value.detach()).clone() for name, value in module.state_dict().items()}


def fit(
    folder: Path,
    strategy: Any,
    module: pl.LightningModule | Callable[..., pl.LightningModule] = Language,
    *,
    files: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[pl.Trainer, pl.LightningModule]:
    """Train, and write ``<epoch>.ckpt`` if asked."""
    module = module if isinstance(module, pl.LightningModule) else new(module)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        max_epochs=options.pop("max_epochs", EPOCHS),
        callbacks=[Files(folder)] if files else [],
        logger=False,
        enable_checkpointing=files,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module


def ended(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    divided = is_sharded(module)
    return {
        "losses": list(module.losses),
        "weights": whole(module),
        "metrics": metrics,
        "step": trainer.global_step,
        "divided": divided,
    }


def plain(folder: Path, strategy: Callable[..., Any], module: Any = Language, **options: Any) -> dict[str, Any]:
    """Uninterrupted; validated, tested and trained further by the same trainer."""
    trainer, module = fit(folder, strategy(), module, files=True, **options)
    runs = {"straight": ended(trainer, module)}
    (validated,) = trainer.validate(module, verbose=False)
    (tested,) = trainer.test(module, verbose=False)
    (reread,) = trainer.test(module, verbose=False, ckpt_path=folder / "0.ckpt", weights_only=True)
    runs["evaluated"] = {"validated": validated, "tested": tested, "of the first file": reread}
    trainer, module = fit(folder, strategy(), type(module), **options)
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.fit(module)
    return {**runs, "fitted again": ended(trainer, module)}


def resumed(folder: Path, strategy: Callable[..., Any], module: Any = Language, file: str = "0.ckpt", **options: Any):
    """A new trainer and a new module."""
    return ended(*fit(folder, strategy(), module, ckpt_path=folder / file, **options))


def case_plain(folder: Path, name: str) -> dict[str, Any]:
    runs = plain(folder, STRATEGIES[name])
    return {**runs, "resumed": resumed(folder, STRATEGIES[name])}


def case_sharded(folder: Path, name: str) -> dict[str, Any]:
    """Folders; and one file made of the first, resumed under others."""

    def strategy() -> Strategy:
        return STRATEGIES[name](checkpoint="sharded")

    runs = {"straight": ended(*fit(folder, strategy(), files=True)), "resumed": resumed(folder, strategy)}
    if dist.get_rank() == 0:
        consolidate(folder / "0.ckpt", folder / "one.ckpt", progress=False)
    dist.barrier()
    runs["one file"] = resumed(folder, STRATEGIES[name], file="one.ckpt")
    runs["one file under ddp"] = resumed(folder, STRATEGIES["ddp"], file="one.ckpt")
    runs["under tp"] = resumed(folder, STRATEGIES["tp"])
    return runs


def case_across(folder: Path, first: str, second: str) -> dict[str, Any]:
    runs = {"straight": ended(*fit(folder, STRATEGIES[first](), files=True))}
    return {**runs, "resumed": resumed(folder, STRATEGIES[second])}


def case_clip(folder: Path, name: str, algorithm: str) -> dict[str, Any]:
    limit = {"norm": 0.3, "value": 0.005}[algorithm]
    words = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    return {"straight": ended(*fit(folder, STRATEGIES[name](), Plain, **words))}


def case_accumulate(folder: Path, name: str, unsharded: str) -> dict[str, Any]:
    strategy = STRATEGIES[name](accumulate_unsharded=unsharded == "unsharded")
    return {"straight": ended(*fit(folder, strategy, Plain, accumulate_grad_batches=2))}


def case_precision(folder: Path, name: str, precision: str) -> dict[str, Any]:
    runs = {"straight": ended(*fit(folder, STRATEGIES[name](), files=True, precision=precision))}
    return {**runs, "resumed": resumed(folder, STRATEGIES[name], precision=precision)}


def case_statistics(folder: Path, name: str, precision: str) -> dict[str, Any]:
    """BatchNorm, and torch's encoder layers, whose fast path runs in validation; beside DDP, with the same batches."""
    words = {"precision": precision}
    return {
        "straight": ended(*fit(folder, STRATEGIES[name](), Normed, **words)),
        "still": ended(*fit(folder, STRATEGIES[name](), new(Normed, lr=0.0), **words)),
        "ddp": ended(*fit(folder, STRATEGIES["ddp"](), Normed, **words)),
    }


def case_module(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """Modules that need care, by their class's name."""
    modules: dict[str, Any] = {each.__name__: each for each in (Conditional, Grouped, Manual, Made, ShardsItself)}
    modules["Tied"] = lambda: Language(tied=True)
    runs = {"straight": ended(*fit(folder, STRATEGIES[name](), modules[kind], files=True))}
    return {**runs, "resumed": resumed(folder, STRATEGIES[name], modules[kind])}


def case_meta(folder: Path) -> dict[str, Any]:
    """Layers without memory get values; or those of a file that another run wrote."""
    runs = {"straight": ended(*fit(folder, STRATEGIES["fsdp"](), Made, files=True))}
    runs["resumed"] = resumed(folder, STRATEGIES["fsdp"], OnMeta)
    return {**runs, "fresh": ended(*fit(folder, STRATEGIES["fsdp"](), OnMeta))}


def case_recomputed(folder: Path, name: str) -> dict[str, Any]:
    def strategy() -> Strategy:
        return STRATEGIES[name](activation_checkpointing=True)

    runs = {"straight": ended(*fit(folder, strategy(), files=True))}
    return {**runs, "resumed": resumed(folder, strategy)}


def case_groups(folder: Path) -> dict[str, Any]:
    """Resumed under another strategy: states follow their parameters, not the order."""
    runs = {"straight": ended(*fit(folder, STRATEGIES["fsdp"](), Grouped, files=True))}
    return {**runs, "resumed": resumed(folder, STRATEGIES["ddp"], Grouped)}


def case_short(folder: Path) -> dict[str, Any]:
    """A layer with fewer rows than there are shards; the warning that names it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = ended(*fit(folder, STRATEGIES["fsdp"](), new(Normed, rows=dist.get_world_size() - 1)))
    alike = ended(*fit(folder, STRATEGIES["ddp"](), new(Normed, rows=dist.get_world_size() - 1)))
    return {"straight": run, "ddp": alike, "warnings": [str(each.message) for each in caught]}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        kind, *words = case.split("/")
        folder = out / case.replace("/", "-")
        runs = globals()[f"case_{kind}"](folder, *words)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(runs, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
