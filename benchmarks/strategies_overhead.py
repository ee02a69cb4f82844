"""Step time of the presets and of Lightning's own strategies, and cost of a pruning event under the presets.

Steps: two gloo processes of one thread train short fits in turns, in one process group: Lightning's DDPStrategy and
OptimDDP, Lightning's ModelParallelStrategy with a hand-written ``configure_model`` that shards the same units and
OptimFSDP2. A step's wall time is taken from the start of the batch to its end with all hooks in it; each figure is the
mean of the faster steps (the 5th to the 40th hundredth), the ratio is that of these figures, and in brackets stand the
quartiles of the ratios of single rounds.

Events: WeightPruning of 5.2 M weights to 80 % by one global threshold, in one process and in two; median of the events'
wall times, and the bytes of the whole tensors that went into collectives.

    python benchmarks/strategies_overhead.py > benchmarks/strategies_overhead_cpu_2026-11-25.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from step_clock import faster
from strategies_memory import load_worker
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import WeightPruning
from lightning_optim.sharding import is_dtensor
from lightning_optim.strategies import build
from lightning_optim.strategies.units import find_units

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from recommender import Tower
from recommender_data import TEST, Task, build_task, loader
from synthetic_retail import generate_purchases

SKIPPED = 6
"""Steps of a round that are not counted: DDP builds its buckets anew after the first."""
SHORT = 6
"""As many rounds more for the recommender, whose steps are short."""
GPT_BATCH, GPT_LENGTH = 16, 64
SMALL, BATCH_SIZE = Tower(64, (128,), 1.5e-3), 64
EVENTS, EVERY = 12, 2


# Steps.


class Begins(pl.Callback):
    """Starts the clock; first in the list, so that all hooks of others are inside."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.at = time.perf_counter()


class Ends(pl.Callback):
    """Stops it; last in the list. Measures wall time, which includes waiting for the other process."""

    def __init__(self, begins: Begins) -> None:
        self.begins, self.seconds = begins, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begins.at)


def gpt() -> tuple[pl.LightningModule, Any]:
    worker = load_worker()
    rows = torch.randint(worker.VOCABULARY, (4096, GPT_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return worker.GPT(), DataLoader(TensorDataset(rows), GPT_BATCH)


@cache
def shop() -> Task:
    return build_task(generate_purchases(), *TEST)


def recommender() -> tuple[pl.LightningModule, Any]:
    task = shop()
    return SMALL.build(len(task.items)), loader(task.train, task.popularity, batch_size=BATCH_SIZE, train=True)


MODELS: dict[str, Callable[[], tuple[pl.LightningModule, Any]]] = {
    f"GPT, 857 k parameters, {GPT_BATCH} x {GPT_LENGTH} tokens per process": gpt,
    f"two-tower recommender, 81 k parameters, {BATCH_SIZE} customers per process": recommender,
}


def by_hand(module: pl.LightningModule) -> pl.LightningModule:
    """Give a module the ``configure_model`` that ModelParallelStrategy wants."""

    def configure_model() -> None:
        if any(is_dtensor(parameter) for parameter in module.parameters()):
            return
        mesh = module.device_mesh["data_parallel"]
        for _, unit in find_units(module).named:
            fully_shard(unit, mesh=mesh)
        fully_shard(module, mesh=mesh)

    module.configure_model = configure_model
    return module


Variant = tuple[Callable[[], Strategy], Callable[[pl.LightningModule], pl.LightningModule]]
VARIANTS: dict[str, Variant] = {
    "Lightning's DDPStrategy": (DDPStrategy, lambda module: module),
    "OptimDDP": (lambda: build("optim_ddp"), lambda module: module),
    "Lightning's ModelParallelStrategy, by hand": (
        lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        by_hand,
    ),
    "OptimFSDP2": (lambda: build("optim_fsdp"), lambda module: module),
}
PEERS = {"OptimDDP": "Lightning's DDPStrategy", "OptimFSDP2": "Lightning's ModelParallelStrategy, by hand"}


def fit(
    module: pl.LightningModule, data: Iterable[Any], strategy: Any, callbacks: Sequence[pl.Callback], **words: Any
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **words,
    )
    trainer.fit(module, data)


def time_steps(rounds: int, steps: int) -> dict[str, dict[str, list[list[float]]]]:
    """Return per model and variant the steps of each round."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for model, make in MODELS.items():
        turns = rounds * SHORT if make is recommender else rounds
        times: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
        names = list(VARIANTS)
        for turn in range(turns):
            for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
                torch.manual_seed(0)
                strategy, prepare = VARIANTS[name]
                module, data = make()
                begins = Begins()
                ends = Ends(begins)
                fit(prepare(module), data, strategy(), [begins, ends], devices=2, limit_train_batches=steps)
                times[name].append(ends.seconds[SKIPPED:])
        found[model] = times
    return found


# Events.


class Traffic(TorchDispatchMode):
    """Sums the sizes of the collectives' full tensors: outputs, or inputs of those that scatter."""

    KINDS = {
        "allreduce_": lambda args, out: args[0],
        "all_reduce": lambda args, out: args[:1],
        "all_gather_into_tensor": lambda args, out: [out],
        "_allgather_base_": lambda args, out: args[:1],
        "broadcast_": lambda args, out: args[0],
    }
    SILENT = ("wait_tensor", "barrier", "monitored_barrier_", "_wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_dtensor_type(each) for each in types):
            return NotImplemented  # DTensor then dispatches local operations and collectives
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in self.SILENT:
            self.bytes[name] += sum(each.numel() * each.element_size() for each in self.KINDS[name](args, out))
        return out


def is_dtensor_type(kind: type) -> bool:
    return kind.__name__ == "DTensor"


class Timed(WeightPruning):
    """Records the time of each event, and the traffic of one of them."""

    def __init__(self, **words: Any) -> None:
        super().__init__(0.8, start=1, end=EVENTS * EVERY, every_n_steps=EVERY, **words)
        self.seconds: list[float] = []
        self.sent: dict[str, int] = {}

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.barrier()
        if len(self.seconds) == EVENTS // 2:  # not timed: the count costs time of its own
            with Traffic() as traffic:
                super().apply_event(trainer, pl_module)
            self.sent = dict(traffic.bytes)
            self.seconds.append(float("nan"))
            return
        began = time.perf_counter()
        super().apply_event(trainer, pl_module)
        trainer.strategy.barrier()
        self.seconds.append(time.perf_counter() - began)


class Wide(pl.LightningModule):
    """Five layers of 1024 x 1024 between two that are left alone."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(5) for layer in (nn.Linear(1024, 1024, bias=False), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(1024, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


CRITERIA = ("magnitude", "wanda")


def time_events(world: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return per preset and criterion the seconds of the events and the bytes that one of them sent."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for preset in ("optim_single",) if world == 1 else ("optim_ddp", "optim_fsdp"):
            for criterion in CRITERIA:
                torch.manual_seed(0)
                rows = 8 * (EVENTS + 2) * EVERY * world
                data = TensorDataset(torch.randn(rows, 1024), torch.zeros(rows, dtype=torch.long))
                pruning = Timed(criterion=criterion)
                fit(Wide(), DataLoader(data, 8), preset, [pruning], devices=world)
                one = found.setdefault(f"{preset}/{criterion}", {"seconds": [], "sent": pruning.sent})
                one["seconds"] += [each for each in pruning.seconds[2:] if each == each]
    return found


# The two launches, and the tables.


def work(out: str, args: argparse.Namespace) -> None:
    """Run as one of the processes; rank 0 writes what it measured."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    results = {
        "steps": time_steps(args.rounds, args.steps) if world > 1 else {},
        "events": time_events(world, args.rounds),
    }
    if int(os.environ.get("RANK", 0)) == 0:
        Path(out).write_text(json.dumps(results))


def launch(world: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        run = [sys.executable]
        if world > 1:
            run += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command = [*run, __file__, "--out", str(out), "--rounds", str(args.rounds), "--steps", str(args.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return dict(json.loads(out.read_text()))


def step_table(times: dict[str, list[list[float]]]) -> str:
    lines = ["| | step, ms | ratio |", "| --- | --- | --- |"]
    pooled = {name: faster([each for one in rounds for each in one]) for name, rounds in times.items()}
    for name, rounds in times.items():
        peer = PEERS.get(name)
        ratio = "1.00"
        if peer:
            each = sorted(faster(own) / faster(other) for own, other in zip(rounds, times[peer], strict=True))
            low, high = each[len(each) // 4], each[-1 - len(each) // 4]
            ratio = f"{pooled[name] / pooled[peer]:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {name} | {pooled[name] * 1e3:.2f} | {ratio} |")
    return "\n".join(lines)


def event_table(found: dict[str, Any]) -> str:
    lines = ["| preset, processes | criterion | event, ms | sent, MB | of these |", "| --- | --- | --- | --- | --- |"]
    for criterion in CRITERIA:
        for preset, processes in (("optim_single", 1), ("optim_ddp", 2), ("optim_fsdp", 2)):
            one = found[f"{preset}/{criterion}"]
            kinds = ", ".join(f"{name.strip('_')} {bytes_ / 1e6:.3f}" for name, bytes_ in one["sent"].items())
            milliseconds, sent = 1e3 * median(one["seconds"]), sum(one["sent"].values()) / 1e6
            lines.append(f"| {preset}, {processes} | {criterion} | {milliseconds:.0f} | {sent:.3f} | {kinds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        work(args.out, args)
        return
    alone, together = launch(1, args), launch(2, args)
    print("# What strategies cost beside Lightning's own, and a pruning event under them\n")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, gloo, processes of one thread; torch {torch.__version__}, "
        f"lightning {lightning.__version__}.\n"
        f"`python benchmarks/strategies_overhead.py --rounds {args.rounds} --steps {args.steps}`\n"
    )
    print(
        "Two processes, Adam (AdamW for the recommender), 32-true. Wall time of a step with all hooks, "
        f"mean of the faster of {args.rounds} rounds of at most {args.steps - SKIPPED} ({args.rounds * SHORT} for "
        "the recommender); the variants take turns in one process group. In brackets the ratios of single rounds, the "
        "middle half.\n"
    )
    for model, times in together["steps"].items():
        print(f"### {model}\n\n{step_table(times)}\n")
    print(
        "## A pruning event\n\n"
        "WeightPruning, 5.2 M weights in five layers, one global threshold, gradual to 80 %; median of the events of "
        f"{args.rounds} runs, wall time from a barrier to a barrier. Sent: whole tensors of the collectives in one "
        "event, per process.\n"
    )
    print(event_table({**alone["events"], **together["events"]}))


if __name__ == "__main__":
    main()
