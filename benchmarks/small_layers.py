"""Chains of small layers with integers against float, in ONNX Runtime: where integers begin to pay.

Each net repeats one layer four times with ReLUs between; weights are random, since they do not change the time. Its
int8 files (``keep_float="none"``: all integers; ``"small"``: the default) and its float file take turns, one thread.

    python benchmarks/small_layers.py --output benchmarks/small_layers_cpu_2026-12-01.md
"""

import argparse
import copy
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from quiet import prepare, vnni
from torch import Tensor, nn

from lightning_optim import export_onnx, quantize_post_training
from lightning_optim.export.latency import runtime_latencies
from lightning_optim.export.runtimes import load_runtime

ROWS = (1, 32)
CHANNELS, DEPTHWISE, WIDTHS = (8, 16, 24, 32, 64), (16, 64), (32, 64, 128, 256)
SIDE = 16


def chain(layer: Callable[[], nn.Module], *end: nn.Module) -> nn.Module:
    """Return four layers with ReLUs between, and what follows."""
    return nn.Sequential(*(part for _ in range(4) for part in (layer(), nn.ReLU())), *end).eval()


def convolutions(channels: int, groups: int = 1) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a chain of 3 x 3 convolutions, and the shape of a row."""
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    net = chain(lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=groups), *end)
    return net, (channels, SIDE, SIDE)


def matrices(width: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a chain of Linear layers, and the shape of a row."""
    return chain(lambda: nn.Linear(width, width), nn.Linear(width, 10)), (width,)


def measured(net: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Return the cells of a row: time over that of the float file, all integers and by default, at each batch size."""

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, *shape)

    rounded = quantize_post_training(copy.deepcopy(net), [draw(8), draw(8)], progress_bar=False)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.onnx" for name in ("float", "none", "small")]
        export_onnx(net, files[0], draw(2), verify=False)
        for file, keep in zip(files[1:], ("none", "small"), strict=True):
            export_onnx(rounded, file, draw(2), keep_float=keep, verify=False)
        loaded = [load_runtime(file, "onnxruntime") for file in files]
        times = runtime_latencies(loaded, [[draw(rows)] for rows in ROWS])
    return [f"{batch[place].ratio:.2f}" for place in (1, 2) for batch in times]


def main() -> None:
    """Measure every net and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    prepare(threads=1)
    nets = {f"3 x 3, {channels} channels": convolutions(channels) for channels in CHANNELS}
    nets |= {f"3 x 3 depthwise, {channels} channels": convolutions(channels, channels) for channels in DEPTHWISE}
    nets |= {f"matrices {width} x {width}": matrices(width) for width in WIDTHS}
    lines = [
        "# Small layers with integers",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread; torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}; the processor has {vnni()}.",
        f"`python benchmarks/small_layers.py --output {output}`",
        "",
        f"Time of a call over that of the float file, in turns; images of {SIDE} x {SIDE}.",
        "",
        "| | all integers, 1 row | 32 rows | by default, 1 row | 32 rows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (net, shape) in nets.items():
        lines.append(f"| {name} | {' | '.join(measured(net, shape))} |")
        print(lines[-1], flush=True)
        output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
