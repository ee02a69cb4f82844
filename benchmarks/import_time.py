"""Time of ``import lightning_optim``, compared with ``import lightning.pytorch``, which it includes.

    python benchmarks/import_time.py --output benchmarks/import_time_cpu_2026-11-29.md

Processes take turns; CPU seconds of each, best and median.
"""

import argparse
import platform
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

MODULES = ("lightning.pytorch", "lightning_optim")


def seconds(module: str) -> float:
    """Return the CPU seconds of a process that imports a module."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    args = parser.parse_args()
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for _ in range(args.rounds):
        for module in MODULES:
            times[module].append(seconds(module))
    base = median(times[MODULES[0]])
    lines = [
        "# Import time\n",
        f"2026-11-29, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}.",
        f"`python benchmarks/import_time.py --rounds {args.rounds}`\n",
        "CPU seconds of a new process, processes in turns.\n",
        "| | best | median | / lightning.pytorch |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| `import {module}` | {min(each):.2f} | {median(each):.2f} | {median(each) / base:.2f} |"
            for module, each in times.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
