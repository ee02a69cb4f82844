"""Accuracy of digit readers whose channels shrink before they are removed, right after the cut and after recovery.

A residual convolutional net (that of ``lightning_optim.demo``) and a small vision transformer
(``transformers.ViTModel``, built from its configuration) are trained; then each row trains the trained net on, and
removes half of its channels. Needs the extra ``test`` (transformers, scikit-learn).

    python benchmarks/regularization.py --output benchmarks/regularization_cpu_2026-11-30.md
"""

import argparse
import copy
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import transformers
from digits_runs import THREADS, WIDTH, splits
from quiet import prepare
from torch import nn
from torch.utils.data import DataLoader

from lightning_optim import ChannelPruning
from lightning_optim.demo import DigitsNet
from low_rank import BATCH_SIZE, Reader, Transformer, accuracy, spread

EPOCHS, AFTER, STEPS_PER_EPOCH = 15, 6, 15
START, CUT = 1, 45
EVENTS = 4
RATIO = 0.5
STRENGTHS = {"growing": (1.0, 3.0, 5.0), "group_lasso": (1.0, 2.0, 4.0)}


SHORT = ("trained on, whole", "none", f"none, cut at step {START}", "growing 3", "group_lasso 1", "group_lasso 4")


def convolutional() -> nn.Module:
    """Return the demo's residual net."""
    net: nn.Module = DigitsNet(WIDTH).net
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual convolutional net": convolutional,
    "transformer": partial(Transformer, 48, 2),
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: What it is called.
        arguments: Arguments of the callback; None for the net that trains on as it is.
        coupled: Whether the penalty's gradient is added to the loss's, instead of a step of its own.
    """

    name: str
    arguments: dict[str, Any] | None = None
    coupled: bool = False


def rows(name: str) -> list[Row]:
    """Return the rows of a net's table: fewer for the slower one."""
    once = {"events": 1}
    found = [Row("trained on, whole"), Row("none", once), Row("none, at random", {**once, "criterion": "random"})]
    found.append(Row(f"none, cut at step {START}", {**once, "end": START}))
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:
            found.append(Row(f"{kind} {strength:g}", {**once, "regularization": kind, "strength": strength}))
    growing = {"regularization": "growing", "strength": 3.0}
    found.append(Row("growing 3, at random", {**once, **growing, "criterion": "random"}))
    found.append(Row("growing 3, in the gradient", {**once, **growing}, coupled=True))
    several = {"events": EVENTS}
    found += [Row("none", several), Row("growing 3", {**several, **growing})]
    if name == "transformer":
        found = [row for row in found if row.name in SHORT and (row.arguments or once)["events"] == 1]
    return found


@dataclass(frozen=True)
class Result:
    """What one seed gave."""

    norm: float
    at_cut: float
    at_end: float


class AtCut(pl.Callback):
    """Measures the net right after the last event."""

    def __init__(self) -> None:
        self.step, self.found = CUT, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look before the next step."""
        if trainer.global_step == self.step:
            self.found = accuracy(pl_module.net)


class AsGradient(ChannelPruning):
    """The same penalties as terms of the gradient, as the papers add them: an adaptive optimizer rescales them."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Add what the step would subtract, divided by the learning rate."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        before = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        held = {id(parameter) for parameter in pl_module.parameters()}
        self._shrinking.after_step(self._target, 0, held, self.window.step)
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    parameter.grad += (before[name] - parameter) / optimizer.param_groups[0]["lr"]
                parameter.copy_(before[name])

    def after_step(self, optimizer: Any) -> None:
        """Nothing shrinks after the step."""


def fit(module: Reader, epochs: int, seed: int, *callbacks: pl.Callback) -> pl.Trainer:
    """Train with batches in an order that belongs to the seed."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(splits()["train"], BATCH_SIZE, shuffle=True, generator=generator)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader)
    return trainer


def measure(row: Row, dense: nn.Module, seed: int) -> Result:
    """Train a copy of the trained net on, with half of its channels removed."""
    pl.seed_everything(seed, verbose=False)
    module, look = Reader(copy.deepcopy(dense), 5e-4), AtCut()
    pruning: list[pl.Callback] = []
    if row.arguments is not None:
        cls = AsGradient if row.coupled else ChannelPruning
        example = {"example_inputs": splits()["test"][:2][0], "module": "net"}
        arguments = {"start": START, "end": CUT, "scope": "layer", **example, **row.arguments}
        pruning, look.step = [cls(RATIO, **arguments)], arguments["end"]
    trainer = fit(module, AFTER, seed + 100, *pruning, look)
    norm = float(trainer.callback_metrics.get("channels/leaving_norm", float("nan")))
    return Result(norm, look.found, accuracy(module.net))


def results_of(name: str, seed: int) -> list[Result]:
    """Train a net with a seed, and every row from it; the first result is that of the trained net."""
    pl.seed_everything(seed, verbose=False)
    module = Reader(NETS[name]())
    fit(module, EPOCHS, seed)
    return [Result(0.0, 0.0, accuracy(module.net)), *(measure(row, module.net, seed) for row in rows(name))]


def table(name: str, results: list[list[Result]]) -> list[str]:
    """Write a net's table from the results of each seed."""
    trained, *found = zip(*results, strict=True)
    lines = [f"## {name.capitalize()} (trained: {spread([each.at_end for each in trained])})", ""]
    lines += ["| | events | norm of what leaves | accuracy at the cut | after recovery |", "|---|---|---|---|---|"]
    for row, each in zip(rows(name), found, strict=True):
        norm = "" if isnan(each[0].norm) else f"{mean(result.norm for result in each):.2f}"
        events = "" if row.arguments is None else str(row.arguments["events"])
        at_cut, at_end = spread([result.at_cut for result in each]), spread([result.at_end for result in each])
        lines.append(f"| {row.name} | {events} | {norm} | {at_cut} | {at_end} |")
    return [*lines, ""]


def introduction(seeds: int) -> str:
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, transformers {transformers.__version__}"
    steps = AFTER * STEPS_PER_EPOCH
    return f"""# Digit readers whose channels shrink before they are removed

{time.strftime("%Y-%m-%d")}, {platform.machine()} CPU, one thread; {versions}.
`python benchmarks/regularization.py --seeds {seeds}`

Nets trained for {EPOCHS} epochs of 958 scans go on for {AFTER} epochs ({steps} steps, AdamW, learning rate 5e-4).
Half of the channels of each layer leave (`scope="layer"`): in one cut at step {CUT}, or in {EVENTS} events until then,
the last of which removes little (the schedule is cubic). Test accuracy in percent on 719 scans (one is 0.14 points),
mean ± standard deviation over {seeds} seeds: right after the (last) cut, and after the rest of the steps. "Norm" is
that of the channels that leave in the last cut, as a fraction of the mean of their groups. "At random": the channels
are drawn by the names of their layers. "In the gradient": the same penalty is added to the gradient, as the papers do
with SGD. The control "cut at step {START}" has no time to shrink, and all steps to recover.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file for what is printed at the end")
    arguments = parser.parse_args()
    prepare(threads=THREADS)
    warnings.simplefilter("ignore")
    began = time.process_time()
    lines = [introduction(arguments.seeds)]
    for name in NETS:
        lines += table(name, [results_of(name, seed) for seed in range(arguments.seeds)])
    text = "\n".join(lines)
    print(text)
    print(f"{time.process_time() - began:.0f} s of CPU time")
    if arguments.output is not None:
        arguments.output.write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
