"""Variation of P for an unchanged model, and the time that PerformanceScore adds to an epoch.

python benchmarks/score_cost.py > benchmarks/score_cost_cpu_2026-11-24.md
"""

import argparse
import os
import platform
import time
import warnings

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import PerformanceScore


class Frozen(pl.LightningModule):
    """Trains with learning rate 0, so that P differs between epochs only by the noise of the clock."""

    def __init__(self, net: nn.Module, *shape: int) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def mlp() -> Frozen:
    return Frozen(
        nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)), 256
    )


def conv() -> Frozen:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return Frozen(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)), 3, 32, 32)


def transformer() -> Frozen:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return Frozen(nn.Sequential(nn.TransformerEncoder(layer, 3), nn.Flatten(), nn.Linear(32 * 128, 10)), 32, 128)


MODELS = {"MLP 1.3 M": mlp, "conv net": conv, "transformer": transformer}


class Clock(pl.callbacks.Checkpoint):
    """Records scores, epoch times, and the time of PerformanceScore, the callback before it."""

    def __init__(self, score: PerformanceScore) -> None:
        self.scores, self.epochs, self.costs = [], [], []
        inner = score.on_train_epoch_end

        def timed(trainer, pl_module):
            began = time.perf_counter()
            inner(trainer, pl_module)
            self.costs.append(time.perf_counter() - began)

        score.on_train_epoch_end = timed

    def on_train_epoch_start(self, trainer, pl_module):
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(time.perf_counter() - self.began)
        self.scores.append(float(trainer.callback_metrics["P"]))


def run(module: Frozen, epochs: int, seconds: float) -> Clock:
    score = PerformanceScore(weights={"size": 0.4, "inference_time": 0.6})
    clock = Clock(score)
    x = torch.randn(32, *module.shape)
    began = time.perf_counter()
    F.cross_entropy(module(x), torch.zeros(32, dtype=torch.long)).backward()
    batches = max(4, int(seconds / (time.perf_counter() - began)))
    data = TensorDataset(x.repeat(batches, *[1] * len(module.shape)), torch.zeros(32 * batches, dtype=torch.long))
    pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[score, clock],
        num_sanity_val_steps=0,
    ).fit(module, DataLoader(data, 32), DataLoader(TensorDataset(x, torch.zeros(32, dtype=torch.long)), 32))
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of an epoch")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        f"""# PerformanceScore on a model that does not change

{platform.machine()}, one thread; torch {torch.__version__}, lightning {lightning.__version__}.
`python benchmarks/score_cost.py --epochs {args.epochs} --seconds {args.seconds:g}`
Load average when it began: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.

Weights 0.4 size, 0.6 inference time. Spread: standard deviation of P over mean P. Cost: the callback's wall time at an
epoch's end over the epoch.
"""
    )
    print("| model | P, each epoch | spread | epoch, s | cost |\n|---|---|---|---|---|")
    for name, build in MODELS.items():
        clock = run(build(), args.epochs, args.seconds)
        scores, epochs = torch.tensor(clock.scores), torch.tensor(clock.epochs)
        each = ", ".join(f"{value:.3f}" for value in clock.scores)
        cost = float((torch.tensor(clock.costs) / epochs).mean())
        spread = float(scores.std() / scores.mean())
        print(f"| {name} | {each} | {spread:.2%} | {float(epochs.mean()):.1f} | {cost:.2%} |", flush=True)


if __name__ == "__main__":
    main()
