"""Time and memory of the threshold and the masks of one pruning event.

From float32 weights to boolean masks of the 20 % largest magnitudes, for 1, 10 and 100 million weights in ten tensors,
on one thread:

- ``first event``: `global_masks` on dense weights;
- ``later event``: the same with the masks of the event before (75 % zeros), which must stay removed;
- ``torch.kthvalue`` and ``torch.sort`` on the concatenated magnitudes, then a comparison.

The methods take turns on the same weights, anew for each seed, so that a busy machine hits all alike: read the ratios.
The time of a later event includes nothing of the event before. Extra memory is how much the peak of the resident
memory rises over that before, in a process of its own; it includes the masks (one byte per weight).

    python benchmarks/threshold.py --output benchmarks/threshold_cpu_DATE.md
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from lightning_optim.functional import CRITERIA, Statistics, global_masks, scores_of

SPARSITY, EARLIER = 0.8, 0.75
TENSORS = 10
SIZES = (1_000_000, 10_000_000, 100_000_000)
Masks = dict[str, Tensor]


def weights_of(size: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(size // TENSORS, generator=generator) for i in range(TENSORS)}


def ours(weights: dict[str, Tensor], earlier: Masks | None) -> Masks:
    scores = {name: scores_of(CRITERIA["magnitude"], weight, Statistics()) for name, weight in weights.items()}
    return global_masks(scores, SPARSITY, previous=earlier)


def by_threshold(weights: dict[str, Tensor], find: Callable[[Tensor, int], Tensor]) -> Masks:
    scores = {name: weight.abs() for name, weight in weights.items()}
    together = torch.cat(list(scores.values()))
    threshold = find(together, round(SPARSITY * len(together)))
    return {name: score > threshold for name, score in scores.items()}


METHODS: dict[str, Callable[[dict[str, Tensor], Masks | None], Masks]] = {
    "first event": lambda weights, earlier: ours(weights, None),
    "later event": ours,
    "torch.kthvalue": lambda weights, _: by_threshold(weights, lambda scores, k: scores.kthvalue(k).values),
    "torch.sort": lambda weights, _: by_threshold(weights, lambda scores, k: scores.sort().values[k - 1]),
}


def check(masks: Masks, size: int, *, exact: bool) -> None:
    """Ours removes exactly k weights; a plain threshold also removes all that tie with it."""
    off = sum(int((~mask).sum()) for mask in masks.values()) - round(SPARSITY * size)
    assert 0 <= off <= (0 if exact else 50), off


def time_methods(size: int, seeds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each method, one pair per seed."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        weights = weights_of(size, seed)
        earlier = global_masks({name: weight.abs() for name, weight in weights.items()}, EARLIER)
        for name, method in METHODS.items():
            wall, cpu = time.perf_counter(), time.process_time()
            masks = method(weights, earlier)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            check(masks, size, exact=name.endswith("event"))
            del masks
    return seconds


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def print_extra_memory(name: str, size: int) -> None:
    small = weights_of(10_000, 0)
    METHODS[name](small, None)
    weights = weights_of(size, 0)
    earlier = global_masks(weights, EARLIER) if name == "later event" else None
    before = peak_bytes()
    METHODS[name](weights, earlier)
    print(peak_bytes() - before)


def extra_memory(name: str, size: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name, "--size", str(size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(size: int, seeds: int) -> list[str]:
    memory = {name: extra_memory(name, size) for name in METHODS}
    seconds = time_methods(size, seeds)
    result = []
    first_event = [cpu for _, cpu in seconds["first event"]]
    for name, pairs in seconds.items():
        wall, cpu = zip(*pairs, strict=True)
        ratio = mean(own / first for own, first in zip(cpu, first_event, strict=True))
        result.append(
            f"| {size // 1_000_000} M | {name} | {mean_std_ms(wall)} | {mean_std_ms(cpu)} | {ratio:.2f}x | "
            f"{memory[name] / 1e6:.1f} | {memory[name] / size:.2f} |"
        )
    return result


def mean_std_ms(seconds: tuple[float, ...]) -> str:
    return f"{mean(seconds) * 1e3:.1f} ± {stdev(seconds) * 1e3:.1f}"


def machine() -> str:
    flags = Path("/proc/cpuinfo").read_text()
    simd = "AVX-512 " if "avx512f" in flags else "AVX2 " if "avx2" in flags else ""
    return f"one thread of a {os.cpu_count()}-core {simd}{platform.machine()} server CPU"


def report(seeds: int) -> str:
    lines = [
        "# Threshold and mask of one pruning event",
        "",
        f"{date.today()}, {machine()}; Python {platform.python_version()}, torch {torch.__version__}. "
        f"Mean ± std over {seeds} seeds, methods in turn; global sparsity {SPARSITY:g} of float32 weights in {TENSORS} "
        f"tensors, a later event from {EARLIER:g}. Extra memory includes the masks, 1 byte per weight.",
        "",
        "Command: `python benchmarks/threshold.py`. The machine did other work at the same time, which lengthens the "
        "wall time and less so the CPU time; the methods take turns, so read the ratios (of CPU time, to a first "
        "event).",
        "",
        "| weights | method | wall time, ms | CPU time, ms | ratio | extra memory, MB | bytes per weight |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        lines += rows(size, seeds)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file to write; printed in any case")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print_extra_memory(arguments.memory_of, arguments.size)
        return
    text = report(arguments.seeds)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
