"""Accuracy of pruned digit classifiers: schedules, scopes and the random control, over seeds.

The net and the data of ``lightning_optim.demo``: every row is trained from scratch in the same way.

    python benchmarks/digits.py --output benchmarks/digits_cpu_2026-11-24.md
"""

import argparse
import platform
from pathlib import Path
from statistics import mean, stdev

import lightning
import torch
from digits_runs import EPOCHS, THREADS, Run, train
from quiet import prepare

from lightning_optim import WeightPruning

EVENTS = {"every_n_steps": 10}
ROWS = (
    Run("dense"),
    *(Run(f"cubic, global, {s:.0%}", lambda s=s: WeightPruning(s, **EVENTS)) for s in (0.8, 0.9, 0.95)),
    Run("2:4", lambda: WeightPruning(granularity="2:4", **EVENTS)),
    Run("cubic, per layer, 90%", lambda: WeightPruning(0.9, scope="layer", **EVENTS)),
    Run("cubic, per layer, 95%", lambda: WeightPruning(0.95, scope="layer", **EVENTS)),
    *(
        Run(f"cubic, global, 95%, {name}", lambda name=name: WeightPruning(0.95, criterion=name, **EVENTS))
        for name in ("lamp", "taylor", "wanda")
    ),
    Run("one shot early (10 %), 90%", lambda: WeightPruning(0.9, start=0.1, end=0.1)),
    Run("one shot late (90 %), 90%", lambda: WeightPruning(0.9, start=0.9, end=0.9)),
    *(
        Run(f"random, global, {s:.0%}", lambda s=s: WeightPruning(s, criterion="random", **EVENTS))
        for s in (0.8, 0.9, 0.95)
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args()
    prepare(threads=THREADS)
    lines = [
        f"""# Pruned digit readers

{platform.machine()} CPU; torch {torch.__version__}, lightning {lightning.__version__}.
`python benchmarks/digits.py --seeds {args.seeds} --output {args.output.name}`

A residual conv net of about 20 k weights, {EPOCHS} epochs of 958 scans, tested on 719 (one is 0.14 points). Test
accuracy in percent, mean ± standard deviation over {args.seeds} seeds. Differences below 1 point are noise.
""",
        "| | test accuracy | each seed |\n|---|---|---|",
    ]
    for row in ROWS:
        found = [100 * train(row, seed=seed)[1] for seed in range(args.seeds)]
        each = ", ".join(f"{value:.2f}" for value in found)
        lines.append(f"| {row.name} | {mean(found):.2f} ± {stdev(found):.2f} | {each} |")
    args.output.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
