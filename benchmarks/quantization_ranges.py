"""Cost of folding the ranges of a step, in one process and pooled over two (gloo).

One reduction serves all layers of a model, so its cost hardly depends on their number. Wall time, median.

    python benchmarks/quantization_ranges.py > benchmarks/quantization_ranges_cpu_2026-11-25.md
"""

import os
import platform
import subprocess
import sys
import time
from statistics import median

import torch
from torch import Tensor, nn

from lightning_optim.quantization.scheme import QuantizationScheme
from lightning_optim.quantization.prepare import prepare, quantized_layers, set_phase
from lightning_optim.quantization.ranges import fold_ranges

LAYERS = (5, 20, 80)
OBSERVERS = ("moving_average", "histogram")
STEPS = 100


def pool(seen: Tensor, operation: str) -> Tensor:
    torch.distributed.all_reduce(seen, getattr(torch.distributed.ReduceOp, operation.upper()))
    return seen


def milliseconds(layers: int, observer: str, *, pooled: bool) -> float:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    prepare(net, [str(place) for place in range(layers)], QuantizationScheme(observer=observer))
    quantized = quantized_layers(net)
    set_phase(net, quantized, "observe")
    seen = torch.ones(next(iter(quantized.values())).input_statistic.numel())
    times = []
    for _ in range(STEPS):
        for layer in quantized.values():
            layer.seen_input = seen
        began = time.perf_counter()
        fold_ranges(quantized, pool if pooled else None)
        times.append(time.perf_counter() - began)
    return median(times[10:]) * 1e3


def worker() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rows = [
        (n, o, milliseconds(n, o, pooled=False), milliseconds(n, o, pooled=True)) for o in OBSERVERS for n in LAYERS
    ]
    if torch.distributed.get_rank() == 0:
        for layers, observer, alone, both in rows:
            print(f"| {observer} | {layers} | {alone:.2f} | {both:.2f} |")
    torch.distributed.destroy_process_group()


def main() -> None:
    print("# Folding the ranges of a step\n")
    print(f"{platform.machine()}, torch {torch.__version__}, gloo on one machine.")
    print("`python benchmarks/quantization_ranges.py`\n")
    print(
        "| observer | layers | one process, ms a step | two processes, ms a step |\n| --- | --- | --- | --- |",
        flush=True,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    worker() if "RANK" in os.environ else main()
