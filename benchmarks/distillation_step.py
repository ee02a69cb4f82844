"""Cost of a teacher in a training step: live, in two sizes, and with cached logits; and cost of the cache.

A student MLP and teachers of about 5 and 20 times its parameters, 77 classes, batch 64, one thread. Every variant
trains in a Trainer of its own; the variants take turns, and each one's figure is the mean of its faster steps (the 5th
to the 40th hundredth) in CPU time. Ratios are to the student alone.

    python benchmarks/distillation_step.py > benchmarks/distillation_step_cpu_2026-11-25.md
"""

import argparse
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from step_clock import faster, step_seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import DistillationModule, IndexedDataset

FEATURES, CLASSES, BATCH = 384, 77, 64
WIDTHS = {"student": 1408, "teacher, 5 times": 3408, "teacher, 20 times": 7024}


class Net(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-4)


def seconds_with(cache: Path, teacher: Net, data: TensorDataset, folder: str) -> float:
    began = time.perf_counter()
    module = DistillationModule(Net(WIDTHS["student"]), teacher, cache=cache)
    step_seconds(module, DataLoader(IndexedDataset(data), BATCH), folder)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5_000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(args.rows, FEATURES), torch.randint(0, CLASSES, (args.rows,)))
    teachers = {name: Net(width) for name, width in WIDTHS.items() if name != "student"}
    largest = teachers["teacher, 20 times"]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "logits"
        for _ in range(args.rounds):
            variants = {
                "student alone": (Net(WIDTHS["student"]), data),
                **{
                    f"{name}, live": (DistillationModule(Net(WIDTHS["student"]), t), data)
                    for name, t in teachers.items()
                },
                "20 times, cached": (
                    DistillationModule(Net(WIDTHS["student"]), largest, cache=cache),
                    IndexedDataset(data),
                ),
            }
            for name, (module, dataset) in variants.items():
                times.setdefault(name, []).extend(step_seconds(module, DataLoader(dataset, BATCH), folder))
        size = sum(os.path.getsize(path) for path in Path(folder).glob("logits*"))
        built = seconds_with(Path(folder) / "again", largest, data, folder)  # builds the file
        built -= seconds_with(Path(folder) / "again", largest, data, folder)  # reads it
    sizes = ", ".join(f"{name} {sum(p.numel() for p in Net(width).parameters()):,}" for name, width in WIDTHS.items())
    print("# Cost of a training step with a teacher\n")
    print(f"{platform.machine()}, one thread; torch {torch.__version__}, lightning {lightning.__version__}.")
    print(f"`python benchmarks/distillation_step.py --rounds {args.rounds} --rows {args.rows}`\n")
    print(f"Parameters: {sizes}. Batch {BATCH}, kd, CPU time.\n\n| | step, ms | ratio |\n| --- | --- | --- |")
    alone = faster(times["student alone"])
    for name, seconds in times.items():
        print(f"| {name} | {faster(seconds) * 1e3:.2f} | {faster(seconds) / alone:.2f} |")
    print(f"\nThe cache of {args.rows:,} x {CLASSES} logits: {size / 1e6:.2f} MB, built in {built:.1f} s.")


if __name__ == "__main__":
    main()
