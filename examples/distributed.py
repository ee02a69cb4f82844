"""Train and prune the recommender on several processes, under any strategy preset by name.

The same script runs on two processes of a CPU and on the GPUs of a machine:

    python examples/distributed.py --strategy optim_fsdp --devices 2
    torchrun --nproc-per-node 2 examples/distributed.py --strategy optim_fsdp --devices 2
    python examples/distributed.py --recommend --devices 2

It trains the small tower twice, dense and with 80 % of its weights pruned, and prints the recall of both, the memory of
each rank, and whether the ranks ended with the same model.
"""

import argparse
import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from chain import prepare
from lightning_optim import PerformanceScore, WeightPruning
from lightning_optim.report import Report
from lightning_optim.report.columns import Column, Row
from lightning_optim.sharding import local, whole_state
from lightning_optim.strategies import PRESETS, Recommendation, recommend
from recommender import FAST_CUSTOMERS, one_customer
from recommender_data import RetailData, Task, loader
from recommender_model import TwoTower

EPOCHS, FAST_EPOCHS = 3, 1
BATCH_SIZE = 64  # of all ranks together
ACCURACY = "val_new_recall"  # what P judges: over all items buying again hides what a net has lost
SIZE: dict[str, Any] = {"width": 64, "hidden": (128,), "learning_rate": 1.5e-3}
SPARSITY = 0.8
CPU_MEMORY_GB = 16.0
HELD = ("weights", "gradients", "optimizer")
AGREE = "ranks_agree"


class Tower(TwoTower):
    """The recommender, with metrics averaged over the ranks."""

    def log(self, name: str, value: Any, **words: Any) -> None:
        super().log(name, value, **{"sync_dist": True, **words})


class Counts(pl.Callback):
    """Logs the bytes of weights, gradients and optimizer on the rank that holds most, and whether the ranks agree.

    They are logged instead of stored, since callbacks of forked processes stay in those processes.
    """

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.gradients = size_of(parameter.grad for parameter in pl_module.parameters())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        held = (
            size_of(pl_module.parameters()),
            self.gradients,
            size_of(value for state in states for value in state.values()),
        )
        for name, count in zip(HELD, held, strict=True):
            pl_module.log(name, float(count), sync_dist=True, reduce_fx="max")
        own = torch.tensor(float(checksum(pl_module)), dtype=torch.float64, device=pl_module.device)
        least, most = (trainer.strategy.reduce(own.clone(), reduce_op=end) for end in ("min", "max"))
        pl_module.log(AGREE, float(least == most), sync_dist=True)


def size_of(tensors: Iterable[Any]) -> int:
    """Return the bytes of the shards that this process holds."""
    parts = [local(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def checksum(module: pl.LightningModule) -> int:
    """Return a checksum of the whole weights, gathered if they are sharded."""
    total = 0
    for value in whole_state(module, keep=True).values():
        total = zlib.crc32(value.contiguous().numpy().tobytes(), total)
    return total


def fit(
    name: str, task: Task, callbacks: Sequence[pl.Callback], strategy: Strategy | str, arguments: argparse.Namespace
) -> Row:
    """Train the small tower under a strategy and return what was logged; nothing here knows which strategy it is."""
    pl.seed_everything(arguments.seed, verbose=False)
    batch_size = max(BATCH_SIZE // arguments.devices, 1)  # of a rank: together they take the batch of one process
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="auto",
        devices=arguments.devices,
        max_epochs=FAST_EPOCHS if arguments.fast else EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=5.0,
        callbacks=[*callbacks, Counts()],
    )
    trainer.fit(
        build(task),
        loader(task.train, task.popularity, batch_size=batch_size, train=True, seed=arguments.seed),
        loader(task.evaluation, task.popularity, batch_size=batch_size),
    )
    logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
    return {"name": name, "kind": "pruned" if "pruning/sparsity" in logged else "dense", **logged}


def build(task: Task) -> Tower:
    return Tower(len(task.items), **SIZE)


def score(task: Task) -> PerformanceScore:
    return PerformanceScore(ACCURACY, size="nonzero", example_inputs=one_customer(task))


def zeros() -> WeightPruning:
    return WeightPruning(SPARSITY, criterion="taylor", include=[nn.EmbeddingBag, nn.Linear], every_n_steps=20)


def ask(task: Task, arguments: argparse.Namespace) -> Recommendation:
    """Rank the presets for this model on these devices; without a GPU those of the cost model's default are assumed."""
    return recommend(
        build(task),
        devices=arguments.devices,
        memory_gb=None if torch.cuda.is_available() else CPU_MEMORY_GB,
        batch_size=max(BATCH_SIZE // arguments.devices, 1),
        tokens_per_sample=1,  # a layer sees one row per customer
        precision="32-true",
        optimizer="AdamW",
    )


def build_report(rows: list[Row], words: str, arguments: argparse.Namespace) -> Report:
    """Arrange the rows as a table."""

    def kilobytes(name: str) -> Column:
        return Column(name, f"{name}, kB per rank", lambda row: f"{row[name] / 1e3:,.0f}")

    return Report(
        title=f"Recommender on {words}, ranks: {arguments.devices}",
        summary=f"Trained dense, and with {SPARSITY:.0%} of tables and matrices set to zero on the way.",
        columns=[
            Column("name", "model"),
            Column("val_recall", "recall", "{:.4f}"),
            Column(ACCURACY, "recall, new", "{:.4f}"),
            Column("pruning/sparsity", "zeros of selected", "{:.4f}"),
            Column("P/unguarded", "P", "{:.3f}"),
            *map(kilobytes, HELD),
            Column(AGREE, "ranks agree", lambda row: "yes" if row[AGREE] == 1 else "NO"),
        ],
        rows=rows,
        notes=[
            "Bytes are those of the rank that holds most: its shards of weights, gradients and optimizer states. Ranks "
            "agree if the checksum of the whole weights is the same on each.",
            "A validation set that does not divide evenly over the ranks counts some customers twice.",
        ],
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategy",
        default="optim_ddp",
        choices=PRESETS,
        metavar="NAME",
        help=f"one of {', '.join(PRESETS)}. optim_single needs --devices 1, optim_hsdp several nodes; optim_tp and "
        "optim_2d reject this model: a Dropout between its Linear layers leaves no pair to split",
    )
    parser.add_argument("--devices", type=int, default=2, help="processes on a CPU, or GPUs (default 2)")
    parser.add_argument("--recommend", action="store_true", help="print recommend()'s table and use its strategy")
    parser.add_argument("--data", metavar="PATH", help="the Online Retail file (.xlsx, .csv, .csv.gz), or its folder")
    parser.add_argument("--synthetic", action="store_true", help="a generated shop instead of the file")
    parser.add_argument("--fast", action="store_true", help=f"fewer customers, {FAST_EPOCHS} epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print the logs of the Trainer and the callbacks")
    arguments = parser.parse_args(argv)
    if arguments.synthetic and arguments.data:
        parser.error("--data and --synthetic exclude each other")
    return arguments


@rank_zero_only
def say(text: Any) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Train both towers and print the table; return its rows."""
    arguments = parse(argv)
    prepare(threads=1, verbose=arguments.verbose)
    customers = FAST_CUSTOMERS if arguments.fast and not arguments.synthetic else None
    task = RetailData(arguments.data, cut="validation", synthetic=arguments.synthetic, customers=customers).task
    name = arguments.strategy
    strategies: list[Strategy | str] = [name, name]
    if arguments.recommend:
        found = ask(task, arguments)
        say(found)
        strategies = [found.strategy(), found.strategy()]  # an object belongs to one Trainer
        name, arguments.devices = found.rows[0].preset, found.rows[0].layout.devices
        say(f"\nusing {name} on {arguments.devices}\n")
    started = int(os.environ.get("LOCAL_WORLD_SIZE", arguments.devices))
    if started != arguments.devices:
        raise ValueError(
            f"torchrun started {started} processes, but {name} runs on {arguments.devices}: start as many."
        )
    rows = [
        fit("dense", task, [score(task)], strategies[0], arguments),
        fit(f"{SPARSITY:.0%} zeros", task, [zeros(), score(task)], strategies[1], arguments),
    ]
    words = f"{'a generated shop' if arguments.synthetic else 'Online Retail'} under {name}"
    rank_zero_only(build_report(rows, words, arguments).print)()
    return rows


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError, MisconfigurationException) as problem:
        raise SystemExit(f"error: {problem}" if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 1) from problem
