"""How large a batch may be: the noise scale over a run, and the loss at equal samples and equal steps.

On the digits of ``lightning_optim.demo`` and on the recommender of ``examples/recommender.py``: batches x1, x4 and x16,
with the learning rate as it is and scaled by the square root (both train with AdamW). At equal samples a larger batch
takes fewer steps; at equal steps it sees more samples. The noise scale is that of ``GradientNoiseScale`` in a run that
accumulates some of the smallest batches: the recommender's are ragged and cannot be split, and BatchNorm (in the net of
the digits) normalizes half a batch differently.

    python benchmarks/large_batches.py digits --output benchmarks/large_batches_digits_cpu_DATE.md
    python benchmarks/large_batches.py recommender --data PATH --output benchmarks/large_batches_recommender_cpu_DATE.md
"""

import argparse
import logging
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from lightning_optim import GradientNoiseScale, scale_learning_rate
from lightning_optim.demo import DigitsData, DigitsNet

TIMES = (1, 4, 16)
QUARTERS = (0.25, 0.5, 0.75, 1.0)
EVERY, SMOOTHING = 1, 0.95  # runs are short, and small batches far below the noise scale say little each


@dataclass(frozen=True)
class Problem:
    """A task: its smallest batch, the learning rate tuned for it, and epochs of that run."""

    name: str
    batch: int
    rate: float
    epochs: int
    accumulated: int
    model: Callable[[float], pl.LightningModule]
    data: Callable[[int, int], pl.LightningDataModule]
    judge: Callable[[pl.LightningModule, Any], tuple[float, float]]
    measures: tuple[str, str]


def digits() -> Problem:
    def judge(net: pl.LightningModule, data: Any) -> tuple[float, float]:
        images, labels = data.splits["test"][:]
        with torch.no_grad():
            logits = net.eval()(images)
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())

    return Problem(
        "digits",
        batch=16,
        rate=5e-3,
        epochs=6,
        accumulated=4,
        model=lambda rate: DigitsNet(learning_rate=rate),
        data=lambda batch, seed: DigitsData(batch, seed),
        judge=judge,
        measures=("test loss", "test accuracy"),
    )


def recommender(path: str | None, synthetic: bool, customers: int | None) -> Problem:
    from recommender import SMALL, Tower
    from recommender import judge as rank
    from recommender_data import RetailData, loader

    source = {"cut": "validation", "synthetic": synthetic, "customers": customers}
    items = len(RetailData(path, **source).task.items)

    def judge(model: pl.LightningModule, data: Any) -> tuple[float, float]:
        task = data.task
        with torch.no_grad():
            batches = list(loader(task.evaluation, task.popularity, batch_size=64))
            losses = [float(model.eval().training_step(batch, 0)) for batch in batches]
        return mean(losses), rank(model, task)["recall"]

    return Problem(
        "recommender",
        batch=32,
        rate=SMALL.learning_rate / 2**0.5,  # tuned for 64
        epochs=1,
        accumulated=2,
        model=lambda rate: Tower(SMALL.width, SMALL.hidden, rate).build(items),
        data=lambda batch, seed: RetailData(path, **source, batch_size=batch, seed=seed),
        judge=judge,
        measures=("loss", "recall"),
    )


class Curve(pl.Callback):
    """Notes the noise scale after each step."""

    def __init__(self, noise: GradientNoiseScale) -> None:
        self.noise, self.values = noise, []

    def on_train_batch_end(self, *args: Any) -> None:
        self.values.append(self.noise.noise_scale)

    def quarters(self) -> list[float | None]:
        return [self.values[int(share * len(self.values)) - 1] for share in QUARTERS]


def train(problem: Problem, seed: int, times: int, rule: str, epochs: int, callbacks: list[Any] | None = None) -> Any:
    """Train a row, and return its loss and its other measure."""
    pl.seed_everything(seed, verbose=False)
    batch = problem.batch * times
    rate = scale_learning_rate(problem.rate, batch_size=batch, base_batch_size=problem.batch, rule=rule)
    data = problem.data(batch // (problem.accumulated if callbacks else 1), seed)
    model = problem.model(rate)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accumulate_grad_batches=problem.accumulated if callbacks else 1,
        gradient_clip_val=5.0 if problem.name == "recommender" else None,
        callbacks=callbacks,
    )
    trainer.fit(model, datamodule=data)
    return problem.judge(model, data)


def noise_lines(problem: Problem, seeds: int) -> list[str]:
    curves = []
    for seed in range(seeds):
        noise = GradientNoiseScale(every_n_steps=EVERY, smoothing=SMOOTHING)
        curve = Curve(noise)
        train(problem, seed, problem.accumulated, "sqrt", problem.epochs, [noise, curve])
        curves.append(curve.quarters())
    lines = [f"| noise scale (samples) after | {' | '.join(f'{share:.0%}' for share in QUARTERS)} |"]
    lines.append("| --- |" + " --- |" * len(QUARTERS))
    for seed, found in enumerate(curves):
        cells = ("-" if value is None else f"{value:.0f}" for value in found)
        lines.append(f"| seed {seed} | {' | '.join(cells)} |")
    return lines


def batch_lines(problem: Problem, seeds: int) -> list[str]:
    lines = [
        f"| batch | at equal | learning rate | epochs | {problem.measures[0]} | {problem.measures[1]} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for times in TIMES:
        for equal, epochs in (("samples", problem.epochs), ("steps", problem.epochs * times)):
            for rule in ("none", "sqrt"):
                if times == 1 and (equal, rule) != ("samples", "none"):
                    continue
                found = [train(problem, seed, times, rule, epochs) for seed in range(seeds)]
                print(problem.name, times, equal, rule, found, flush=True)
                cells = [_cell([each[place] for each in found]) for place in range(2)]
                words = {"none": "as it is", "sqrt": "square root"}[rule]
                both = "both" if times == 1 else equal
                lines.append(f"| {problem.batch * times} | {both} | {words} | {epochs} | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=("digits", "recommender"))
    parser.add_argument("--data", metavar="PATH", help="the Online Retail file, or its folder")
    parser.add_argument("--synthetic", action="store_true", help="a generated shop in place of the file")
    parser.add_argument("--customers", type=int, help="of the recommender, only so many; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the tables; default the terminal")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    retail = (arguments.data, arguments.synthetic, arguments.customers)
    problem = digits() if arguments.problem == "digits" else recommender(*retail)
    words = " ".join(sys.argv[1:]).replace(str(arguments.data), "PATH")
    lines = [
        f"# Large batches: {problem.name}",
        "",
        f"{platform.machine()}, one thread; torch {torch.__version__}, lightning {lightning.__version__}.",
        f"`python benchmarks/large_batches.py {words}`",
        "",
        f"AdamW, {problem.epochs} epochs at a batch of {problem.batch} and a learning rate of {problem.rate:.2g}; "
        f"{arguments.seeds} seeds, mean ± standard deviation. The noise scale is measured in every step of "
        f"{problem.accumulated} accumulated batches and smoothed by {SMOOTHING}; a dash: the estimate of |G|² is not "
        "positive, so it cannot be told.",
        "",
        *noise_lines(problem, arguments.seeds),
        "",
        *batch_lines(problem, arguments.seeds),
    ]
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
