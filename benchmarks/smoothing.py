"""Integers for activations of which one channel is much larger than the others: with its scale moved, and without.

A digit reader (a norm and three Linear layers, a gated product among them) is trained. Then one channel of the norm is
made larger, and the weights that read it smaller by the same factor: the float answers stay the same, as in language
models whose norms have such channels. It is quantized to 8 bits after training (static ranges of 960 scans).

    python benchmarks/smoothing.py --output benchmarks/smoothing_cpu_2026-11-30.md
"""

import argparse
import copy
import platform
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from digits_runs import splits
from quiet import prepare
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import quantize_post_training

WIDTH, EPOCHS = 48, 30
FACTORS = (1, 10, 100, 1000)
WAYS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "weights only": {"activation_bits": None},
    "weights and activations": {},
    "the same, smooth=True": {"smooth": True},
}


class Reader(nn.Module):
    """A digit reader with a norm and a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        y = self.norm(x)
        logits: Tensor = self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))
        return logits


def trained(seed: int) -> Reader:
    """Train a reader."""
    torch.manual_seed(seed)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(EPOCHS):
        for x, y in DataLoader(splits()["train"], 64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def with_a_large_channel(model: Reader, factor: float) -> Reader:
    """Return a copy with the same answers, one channel of whose norm is larger by a factor."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.norm.weight[5] *= factor
        model.norm.bias[5] *= factor
        for reader in (model.gate, model.up):
            reader.weight[:, 5] /= factor
    return model


def accuracy(model: nn.Module) -> float:
    """Return the test accuracy in percent."""
    x, y = splits()["test"].tensors
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    prepare(threads=1)
    warnings.simplefilter("ignore")
    dense = [trained(seed) for seed in range(arguments.seeds)]
    lines = [
        "# Integers where one channel of the activations is large",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU; torch {torch.__version__}.",
        f"`python benchmarks/smoothing.py --seeds {arguments.seeds} --output FILE`",
        "",
        f"{(__doc__ or '').split(chr(10) * 2)[1].replace(chr(10), ' ')}",
        f"Test accuracy in percent on 719 scans, mean ± standard deviation over {arguments.seeds} seeds.",
        "",
        f"| | {' | '.join(f'channel x {factor}' for factor in FACTORS)} |",
        f"|{' --- |' * (len(FACTORS) + 1)}",
    ]
    for name, options in WAYS.items():
        cells = []
        for factor in FACTORS:
            found = []
            for model in dense:
                copied = with_a_large_channel(model, factor)
                if options is not None:
                    batches = DataLoader(splits()["train"], 64)
                    quantize_post_training(copied, batches, progress_bar=False, **options)
                found.append(accuracy(copied))
            cells.append(f"{mean(found):.2f} ± {stdev(found):.2f}" if len(found) > 1 else f"{found[0]:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
