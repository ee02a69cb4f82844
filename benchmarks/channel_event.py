"""Cost of one ChannelPruning event, in training steps, for models of 1, 10 and 100 M parameters.

Plain and residual nets, Adam, batch 32, one thread. Each case trains in a process of its own: a few dense steps, then
one event that removes half of the channels. Finding the groups happens once, when the training starts.

    python benchmarks/channel_event.py --output benchmarks/channel_event_cpu_2026-11-25.md
"""

import argparse
import gc
import json
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import ChannelPruning

BATCH, CLASSES, ROUNDS = 32, 10, 3
EVENT = 4  # the last step of a run
LAYERS, BLOCKS, SIDE = 4, 6, 4


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        first, second = convolutions
        self.layers = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


def mlp(width: int) -> tuple[nn.Module, Tensor]:
    """Return an MLP of four hidden layers of one width, and a batch for it."""
    hidden = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES)), torch.randn(BATCH, width)


def residual(width: int) -> tuple[nn.Module, Tensor]:
    """Return a residual net whose blocks share one group of channels, and images of 4x4 for it."""
    first = nn.Conv2d(3, width, 3, padding=1)
    blocks = [Residual(width) for _ in range(BLOCKS)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
    return nn.Sequential(first, *blocks, *head), torch.randn(BATCH, 3, SIDE, SIDE)


CASES: dict[str, tuple[Callable[[int], tuple[nn.Module, Tensor]], int, int]] = {
    "MLP, 1 M": (mlp, 499, 5),
    "MLP, 10 M": (mlp, 1580, 5),
    "MLP, 100 M": (mlp, 4999, 3),
    "residual conv net, 1 M": (residual, 96, 5),
    "residual conv net, 10 M": (residual, 304, 3),
    "residual conv net, 100 M": (residual, 962, 1),
}
"""What makes the model, its width, and how many rounds are run."""


class Module(pl.LightningModule):
    """Classifies random data."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-4)


class StepClock(pl.Callback):
    """CPU time of the steps before the event."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.thread_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx < EVENT - 1:
            self.seconds.append(time.thread_time() - self._began)


class TimedPruning(ChannelPruning):
    """ChannelPruning that measures the CPU time of its start and its event."""

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, fresh: bool) -> None:
        began = time.thread_time()
        super().start(trainer, pl_module, fresh=fresh)
        self.start_cpu = time.thread_time() - began

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        began = time.thread_time()
        super().apply_event(trainer, pl_module)
        self.event_cpu = time.thread_time() - began


def peak_memory() -> int:
    """Return the largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_once(name: str, *, check: bool) -> dict[str, float]:
    """Train a case; return seconds of the start, a step and the event."""
    gc.collect()  # Trainer and module hold each other: the last round's memory would count
    torch.manual_seed(0)
    make, width, _ = CASES[name]
    net, inputs = make(width)
    parameters = sum(p.numel() for p in net.parameters())
    clock = StepClock()
    pruning = TimedPruning(0.5, start=EVENT, end=EVENT, example_inputs=inputs[:2], check=check)
    trainer = pl.Trainer(
        max_steps=EVENT,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, pruning],
    )
    batches = inputs.repeat(EVENT, *[1] * (inputs.ndim - 1)), torch.zeros(BATCH * EVENT, dtype=torch.long)
    trainer.fit(Module(net), DataLoader(TensorDataset(*batches), BATCH))
    return {
        "parameters": parameters,
        "left": sum(p.numel() for p in net.parameters()) / parameters,
        "step": min(clock.seconds),
        "start": pruning.start_cpu,
        "event": pruning.event_cpu,
    }


def run_case(name: str) -> list[dict[str, float]]:
    """Return the minimum of each figure over the rounds, and the peak memory, without and with the check."""
    before, found = peak_memory(), []
    for check in (False, True):
        rounds = [run_once(name, check=check) for _ in range(CASES[name][2])]
        smallest = {key: min(each[key] for each in rounds) for key in rounds[0]}
        found.append(smallest | {"memory": peak_memory() - before})
    return found


def in_own_process(name: str) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--case", name]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: list[dict[str, float]] = json.loads(answer.splitlines()[-1])
    return found


def row_of(name: str, check: str, found: dict[str, float], smaller: dict[str, float] | None) -> str:
    """Write a row; ``smaller`` is the model a tenth as large."""
    cells = [
        name,
        check,
        f"{found['parameters']:,.0f}",
        f"{found['left']:.0%}",
        f"{found['step'] * 1e3:,.1f}",
        f"{found['event'] * 1e3:,.0f}",
        f"{found['event'] / found['step']:.1f}",
        f"{found['event'] / smaller['event']:.1f}" if smaller else "",
        f"{found['start'] / found['step']:.1f}",
        f"{found['memory'] / 1e6:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "model",
    "check",
    "parameters",
    "left",
    "step, ms",
    "event, ms",
    "event, steps",
    "growth",
    "start, steps",
    "peak, MB",
)


def introduction() -> str:
    return f"""# What one ChannelPruning event costs

2026-11-24, {platform.machine()} CPU, one thread; torch {torch.__version__}, lightning {lightning.__version__}.
`python benchmarks/channel_event.py`

Adam, batch {BATCH}; the MLPs have {LAYERS} hidden layers, the residual nets {2 * BLOCKS + 1} convolutions on images of
{SIDE}x{SIDE}. One event that removes half of the channels of each group: in CPU time, and in steps of the dense model
(the fastest of those before it). "Check" is `check=True`, the default: the event is tried on copies first. "Growth" is
the event's time against the model a tenth as large. "Start" is finding the groups, once per fit (with the check: trying
each). "Peak" is the process's memory beyond that before the model was made; weights, gradients and Adam's state are 16
bytes a parameter. The smallest of {min(c[2] for c in CASES.values())} to {max(c[2] for c in CASES.values())} rounds. At
100 M half of an event and more is the system handing out new pages of memory, whose price varied threefold.
"""


def report() -> str:
    lines = [introduction(), f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    smaller: dict[tuple[str, str], dict[str, float]] = {}
    for name in CASES:
        family = name.rpartition(",")[0]
        for check, found in zip(("no", "yes"), in_own_process(name), strict=True):
            lines.append(row_of(name, check, found, smaller.get((family, check))))
            smaller[family, check] = found
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.case:
        print(json.dumps(run_case(args.case)))
        return
    text = report()
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
