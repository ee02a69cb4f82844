"""Overhead of pruning techniques on a training step and on a checkpoint.

A 10 M-parameter MLP, batch 256, on one thread. Every variant trains in a Lightning Trainer of its own; the variants
take turns, round after round in one run, and each one's figure is the smallest CPU time of a step (from the start of
the batch to its end, all hooks in it). Ratios are to the dense run.

    python benchmarks/step_cost.py > benchmarks/step_cost_cpu_2026-11-24.md
"""

import argparse
import io
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import WeightPruning

WIDTH, LAYERS, BATCH = 2236, 2, 256


class MLP(pl.LightningModule):
    """10 M weights in two hidden layers."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), 1e-4)
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class StepClock(pl.Callback):
    """CPU time of each step; the first callback, so that the work of all others is included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_):
        self.began = time.thread_time()

    def on_before_zero_grad(self, *_):
        pass


class StepClockEnd(pl.Callback):
    """Closes the clock; put last."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_):
        self.clock.seconds.append(time.thread_time() - self.clock.began)


def weight_pruning(module: MLP) -> list[pl.Callback]:
    return [WeightPruning(0.8, start=0, end=0, every_n_steps=10**6)]


def model_pruning(module: MLP) -> list[pl.Callback]:
    parameters = [(layer, "weight") for layer in module.net if isinstance(layer, nn.Linear)][:-1]
    callback = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=parameters,
        amount=0.8,
        use_lottery_ticket_hypothesis=False,
        apply_pruning=False,
    )
    callback.on_train_start = lambda *_: callback.apply_pruning(0.8)  # masks on from the first step, no event timed
    return [callback]


def torch_prune(module: MLP) -> list[pl.Callback]:
    for layer in [layer for layer in module.net if isinstance(layer, nn.Linear)][:-1]:
        prune.l1_unstructured(layer, "weight", 0.8)
    return []


VARIANTS: dict[str, Callable[[MLP], list[pl.Callback]]] = {
    "dense": lambda module: [],
    "lightning_optim.WeightPruning": weight_pruning,
    "lightning ModelPruning": model_pruning,
    "torch.nn.utils.prune": torch_prune,
}


def loader(steps: int) -> DataLoader:
    x = torch.randn(BATCH, WIDTH)
    return DataLoader(TensorDataset(x.repeat(steps, 1), torch.zeros(BATCH * steps, dtype=torch.long)), BATCH)


def run(variant: str, optimizer: str, steps: int, folder: Path) -> tuple[list[float], float, int]:
    """Return step times without the first two, seconds to save, and bytes of the file."""
    module, clock = MLP(optimizer), StepClock()
    callbacks = [clock, *VARIANTS[variant](module), StepClockEnd(clock)]
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(steps))
    path = folder / "file.ckpt"
    began = time.thread_time()
    trainer.save_checkpoint(path)
    return clock.seconds[2:], time.thread_time() - began, path.stat().st_size


def table(optimizer: str, rounds: int, steps: int) -> str:
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    saves: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in VARIANTS:
                seconds, save, sizes[name] = run(name, optimizer, steps, Path(folder))
                times[name] += seconds
                saves[name].append(save)
    out = io.StringIO()
    out.write(f"\n### {optimizer}\n\n| | step, ms | ratio | checkpoint, MB | ratio | save, ms | ratio |\n")
    out.write("|---|---|---|---|---|---|---|\n")
    for name in VARIANTS:
        step, save = min(times[name]), min(saves[name])
        out.write(
            f"| {name} | {step * 1e3:.1f} | {step / min(times['dense']):.3f} | {sizes[name] / 1e6:.1f} | "
            f"{sizes[name] / sizes['dense']:.3f} | {save * 1e3:.0f} | {save / min(saves['dense']):.2f} |\n"
        )
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("# Cost of a training step and of a checkpoint, with and without masks\n")
    print(f"{platform.machine()}, one thread; torch {torch.__version__}, lightning {lightning.__version__}.")
    print(f"`python benchmarks/step_cost.py --rounds {args.rounds} --steps {args.steps}`\n")
    print(
        "10 M-parameter MLP, batch 256, 80 % zeros, masks on, no event inside the timed steps. CPU time, minimum over"
    )
    print(f"{args.rounds * (args.steps - 2)} steps; the variants take turns.")
    for optimizer in ("sgd", "adam"):
        print(table(optimizer, args.rounds, args.steps))


if __name__ == "__main__":
    main()
