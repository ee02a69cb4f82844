"""Accuracy of digit readers whose layers become two of low rank: by criterion, at the event and after recovery.

A perceptron and a small vision transformer (``transformers.ViTModel``, built from its configuration) are trained; then
each row trains the trained net on for a few epochs, in the first of which its layers become two. Needs the extra
``test`` (transformers, scikit-learn).

    python benchmarks/low_rank.py --output benchmarks/low_rank_cpu_2026-11-30.md
"""

import argparse
import copy
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import transformers
from digits_runs import THREADS, splits
from quiet import prepare
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import LowRankFactorization

BATCH_SIZE = 64
EPOCHS, RECOVERY = 20, 6
EVENT = 15
CRITERIA = ("second_moment", "input_norm", "svd", "random")


class Perceptron(nn.Module):
    """Three hidden layers of 128."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 128, 128, 128)
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.layers(images)
        return logits


class Transformer(nn.Module):
    """A vision transformer on patches of 2x2."""

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            intermediate_size=2 * width,
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = transformers.ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.encoder(images).last_hidden_state[:, 0])
        return logits


class Reader(pl.LightningModule):
    """Trains a net by cross-entropy with AdamW and a constant learning rate."""

    def __init__(self, net: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.net, self.learning_rate = net, learning_rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


@dataclass(frozen=True)
class Row:
    """A row of the table: the arguments of the callback, or None for the net that trains on as it is."""

    name: str
    arguments: dict[str, Any] | None = None


@dataclass
class Results:
    """What the seeds gave."""

    parameters: list[float] = field(default_factory=list)
    at_event: list[float] = field(default_factory=list)
    at_end: list[float] = field(default_factory=list)


ROWS = (
    Row("trained on, whole"),
    *(Row(f"rank 1/{part}, {name}", {"rank": 1 / part, "criterion": name}) for part in (4, 8) for name in CRITERIA),
    *(Row(f"energy {energy}, second_moment", {"energy": energy}) for energy in (0.9, 0.99, 0.999)),
)
NETS: dict[str, Callable[[], nn.Module]] = {"perceptron": Perceptron, "transformer": Transformer}


def accuracy(net: nn.Module) -> float:
    """Return the test accuracy in percent."""
    images, labels = splits()["test"][:]
    training = net.training
    with torch.no_grad():
        correct = (net.eval()(images).argmax(1) == labels).float().mean()
    net.train(training)
    return 100 * float(correct)


class AtEvent(pl.Callback):
    """Measures the net right after the event."""

    def __init__(self, step: int) -> None:
        self.step, self.found = step, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look before the next step."""
        if trainer.global_step == self.step:
            self.found = accuracy(pl_module.net)


def fit(module: Reader, epochs: int, seed: int, *callbacks: pl.Callback) -> None:
    """Train with batches in an order that belongs to the seed."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(splits()["train"], BATCH_SIZE, shuffle=True, generator=generator)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader)


def measure(row: Row, dense: nn.Module, seed: int, results: Results) -> None:
    """Train a copy of the trained net on, with its layers made two."""
    module, look = Reader(copy.deepcopy(dense), 5e-4), AtEvent(EVENT)
    compression = [] if row.arguments is None else [LowRankFactorization(start=0, end=EVENT, **row.arguments)]
    fit(module, RECOVERY, seed + 100, *compression, look)
    results.parameters.append(float(sum(p.numel() for p in module.parameters())))
    results.at_event.append(look.found)
    results.at_end.append(accuracy(module.net))


def table(name: str, seeds: int) -> list[str]:
    """Train a net with every seed, and every row from it."""
    results = {row.name: Results() for row in ROWS}
    trained = []
    for seed in range(seeds):
        pl.seed_everything(seed, verbose=False)
        module = Reader(NETS[name]())
        fit(module, EPOCHS, seed)
        trained.append(accuracy(module.net))
        for row in ROWS:
            measure(row, module.net, seed, results[row.name])
    lines = [f"## {name.capitalize()} (trained: {spread(trained)})", ""]
    lines += ["| | parameters | accuracy at the event | after recovery |", "|---|---|---|---|"]
    for row in ROWS:
        found = results[row.name]
        numbers = f"{mean(found.parameters):,.0f}"
        lines.append(f"| {row.name} | {numbers} | {spread(found.at_event)} | {spread(found.at_end)} |")
    return [*lines, ""]


def spread(values: list[float]) -> str:
    """Write mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0.0:.2f}"


def introduction(seeds: int) -> str:
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, transformers {transformers.__version__}"
    return f"""# Digit readers whose layers become two of low rank

2026-11-30, {platform.machine()} CPU, one thread; {versions}.
`python benchmarks/low_rank.py --seeds {seeds}`

Nets trained for {EPOCHS} epochs of 958 scans go on for {RECOVERY} epochs, and after {EVENT} steps (one epoch) of them
their Linear layers, but for the last one, become two; the inputs of those steps are what the criteria see. Test
accuracy in percent on 719 scans (one is 0.14 points), mean ± standard deviation over {seeds} seeds. The rank is a
fraction of the smaller of a layer's inputs and outputs; a row of an energy leaves layers whole where two factors would
not be smaller.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file for what is printed at the end")
    args = parser.parse_args()
    prepare(threads=THREADS)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    lines = [introduction(args.seeds)]
    for name in NETS:
        lines += table(name, args.seeds)
    text = "\n".join(lines)
    print(text)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.output is not None:
        args.output.write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
