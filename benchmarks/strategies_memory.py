"""Memory and traffic of the presets, counted on ranks and predicted by the cost model of `recommend`.

A GPT of 857 k parameters (4 blocks of width 128, 4 samples of 32 tokens per rank) takes two steps with Adam under each
preset, on gloo ranks of one thread. Held: the bytes of each rank's own weights, gradients and optimizer states; the
rank with most is shown. Sent: the bytes of the whole tensors that went into collectives in the second step (output of
an all-gather, input of a reduce-scatter or all-reduce), on rank 0. All per parameter; in brackets the cost model.

    python benchmarks/strategies_memory.py > benchmarks/strategies_memory_cpu_2026-11-25.md
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import torch

WORKER = Path(__file__).parents[1] / "tests" / "strategies" / "memory_worker.py"
CASES = {
    2: [
        *("optim_ddp/32-true", "optim_ddp_bf16/32-true", "optim_zero2/32-true", "optim_zero2/bf16-mixed"),
        *("optim_fsdp/32-true", "optim_fsdp/bf16-mixed", "optim_fsdp/bf16-true", "optim_tp/32-true"),
    ],
    4: [
        *("optim_ddp/32-true", "optim_zero2/bf16-mixed", "optim_fsdp/32-true", "optim_fsdp/bf16-mixed"),
        *("optim_hsdp/32-true", "optim_tp/32-true", "optim_2d/32-true"),
    ],
}


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker


def count(world: int) -> list[dict[str, Any]]:
    """Return the counts of each rank, by case."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*run, str(WORKER), folder, *CASES[world]]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world)]


def rows(worker: ModuleType, world: int) -> list[tuple[str, ...]]:
    ranks = count(world)
    parameters = sum(parameter.numel() for parameter in worker.GPT().parameters())
    found = []
    for case in CASES[world]:
        row = worker.predicted(case, world)
        expected: dict[str, float] = {}
        for each in row.collectives:
            expected[each.kind] = expected.get(each.kind, 0) + each.bytes
        held = ("weights", "gradients", "optimizer")
        most = {part: max(rank[case]["held"][part] for rank in ranks) for part in held}
        cells = [
            *(f"{most[part] / parameters:.3f} ({getattr(row.held, part) / parameters:.3f})" for part in held),
            *(
                f"{ranks[0][case]['sent'].get(kind, 0) / parameters:.3f} ({expected.get(kind, 0) / parameters:.3f})"
                if kind in expected or kind in ranks[0][case]["sent"]
                else ""
                for kind in ("all-gather", "reduce-scatter", "all-reduce")
            ),
        ]
        found.append((case.replace("/", ", "), *cells))
    return found


def main() -> None:
    worker = load_worker()
    print("# Bytes per parameter under each preset, counted and on paper\n")
    print(
        f"{platform.machine()}, gloo, ranks of one thread; torch {torch.__version__}, "
        f"lightning {lightning.__version__}.\n"
        "`python benchmarks/strategies_memory.py`\n\n"
        "A GPT of 857 k parameters, Adam. Held by the rank that holds most; sent: whole tensors of the collectives in "
        "a step. In brackets what the cost model says. Counts, not times: they are the same in every run.\n"
    )
    for world in CASES:
        print(f"## {world} devices\n")
        print("| preset, precision | weights | gradients | optimizer | all-gather | reduce-scatter | all-reduce |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for row in rows(worker, world):
            print(f"| {' | '.join(row)} |")
        print()
    print(
        "The all-reduce of optim_tp and optim_2d is of activations: it grows with the batch and not with the "
        "parameters. At 2 devices optim_tp splits 92 % of the parameters."
    )


if __name__ == "__main__":
    main()
