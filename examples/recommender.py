"""Make a two-tower recommender small by one recipe, from its teacher to the verified int8 file, and measure each stage.

For each customer the net ranks the whole catalogue for the next basket. Run it with
``python examples/recommender.py --data PATH``, or with ``--synthetic`` where the file is not at hand. The last stage
alone, from YAML: ``recommender_teacher.yaml``, then ``recommender.yaml``.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from chain import Target, at_random, prepare, stages, target_notes, times_alone, write
from lightning_optim import Recipe, export_onnx
from lightning_optim.export.session import ExportedModel
from lightning_optim.report import ComparisonReport, compare
from ranking import ranking_metrics
from recommender_baselines import BASELINES
from recommender_data import CUTS, NextBasket, RetailData, Task, loader, relevant_and_seen
from recommender_model import RAGGED, Serving, TwoTower, padded

__all__ = ["LARGE", "SMALL", "TRAINER", "Tower", "fit", "judge", "main"]

RECIPE = "recommender"
THREADS = 1  # two threads save a third on an idle machine, and cost many times the time on a busy one
FAST_CUSTOMERS = 1000
COMPARED_BATCHES = 4  # of held-out customers, in PyTorch and in ONNX Runtime
TARGET = Target(smaller=25, faster=3, drop=0.003, metric="recall")
TRAINER: dict[str, Any] = {
    "max_epochs": 3,  # in a fourth, recall over all items falls again on the validation customers
    "gradient_clip_val": 5.0,
    "limit_val_batches": 0,  # nothing is chosen while it trains
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Tower:
    """Size of a tower, and the learning rate chosen for it on the validation customers."""

    width: int
    hidden: tuple[int, ...]
    learning_rate: float

    def build(self, items: int) -> TwoTower:
        return TwoTower(items, width=self.width, hidden=self.hidden, learning_rate=self.learning_rate)


LARGE = Tower(256, (1024, 1024), 5e-4)
SMALL = Tower(96, (128,), 1.5e-3)

TEACHER = "large"
SCRATCH = "small, from scratch"
DEPLOYED = "+ int8"
RANDOM = "the same, drawn at random"
SAME_SHAPE = "its shape, from scratch"


def fit(tower: Tower, data: RetailData, recipe: Recipe | None = None, teacher: TwoTower | None = None) -> TwoTower:
    """Train a tower: a plain Trainer, with the recipe's callbacks and a teacher where there is one."""
    pl.seed_everything(data.seed, verbose=False)
    model = tower.build(len(data.task.items))
    trainer = pl.Trainer(**TRAINER, callbacks=recipe.callbacks() if recipe else [])
    trainer.fit(recipe.wrap(model, teacher) if recipe else model, datamodule=data)
    return model


def train_all(data: RetailData, recipe: Recipe) -> dict[str, TwoTower]:
    """Train the teacher, the student at every stage, and the controls."""

    def train(name: str, tower: Tower, *options: Any) -> None:
        print(f"seed {data.seed}, training: {name}")
        towers[name] = fit(tower, data, *options)

    towers: dict[str, TwoTower] = {}
    train(TEACHER, LARGE)
    train(SCRATCH, SMALL)
    for name, part in stages(recipe).items():
        train(name, SMALL, part, towers[TEACHER])
    train(RANDOM, SMALL, at_random(recipe), towers[TEACHER])
    train(SAME_SHAPE, shape_of(towers[DEPLOYED]))
    return towers


def shape_of(model: TwoTower) -> Tower:
    """Return the tower that has this shape from the start."""
    hidden = [layer.out_features for layer in model.mlp if isinstance(layer, nn.Linear)]
    return Tower(hidden[-1], tuple(hidden[:-1]), SMALL.learning_rate)


def judge(model: nn.Module, task: Task) -> dict[str, float]:
    """Judge what a tower, or an exported file, ranks first for the customers of the evaluation."""
    model.eval()
    relevant, seen = relevant_and_seen(task.evaluation, len(task.items))
    arrange = dict if isinstance(model, TwoTower) else padded
    with torch.no_grad():
        batches = loader(task.evaluation, task.popularity, batch_size=64)
        scores = torch.cat([model(**arrange(batch["inputs"])) for batch in batches])
    return ranking_metrics(scores, relevant, seen)


def one_customer(task: Task) -> dict[str, Tensor]:
    """Return the inputs of one real customer, with a history of median length."""
    lengths = np.diff(task.evaluation.starts)
    median = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    return NextBasket(task.evaluation, task.popularity)[median]["inputs"]


def export_options(task: Task) -> dict[str, Any]:
    """Return what the exported files are verified on, and which of their dimensions are free."""
    batches = islice(loader(task.evaluation, task.popularity, batch_size=64), COMPARED_BATCHES)
    held_out = [padded(batch["inputs"]) for batch in batches]
    return {"inputs": held_out, "dynamic_dims": {name: {1: "entries"} for name in RAGGED}}


def measure(towers: Mapping[str, TwoTower], task: Task) -> ComparisonReport:
    """Measure every tower as it is deployed: exported, with padded customers; and add what needs no net."""
    report = compare(
        {name: Serving(model) for name, model in towers.items()},
        padded(one_customer(task)),
        evaluate=lambda model: judge(model, task),
        batch_size=None,
        engines=["onnxruntime", "torch"],
        size="bits",
        export=export_options(task),
        accuracy="recall",
        controls=[SCRATCH, RANDOM, SAME_SHAPE],
        progress_bar=False,
    )
    relevant, seen = relevant_and_seen(task.evaluation, len(task.items))
    for name, scores in BASELINES.items():
        report.add_row(name, **ranking_metrics(torch.from_numpy(scores(task)), relevant, seen))
    return report


def deploy(model: TwoTower, task: Task, path: Path) -> ExportedModel:
    """Write a tower's file as it is deployed, and open it."""
    export_onnx(Serving(model), path, padded(one_customer(task)), **export_options(task))
    return ExportedModel(path)


def describe(report: ComparisonReport, data: RetailData, source: str) -> None:
    """Give the report its title and the sentences that say how to read it."""
    task, cut = data.task, CUTS[data.cut][0]
    relevant, seen = relevant_and_seen(task.evaluation, len(task.items))
    again = (relevant & seen).sum() / relevant.sum()
    report.title = f"Next-basket recommender on {source}: from a large tower to a small int8 file"
    report.summary = (
        f"{len(task.train):,} baskets before {cut:%Y-%m-%d}; for each of {len(task.evaluation):,} customers all "
        f"{len(task.items):,} items are ranked for the first basket after it, from what was known before. Metrics are "
        "those of the first 20; 'new' leaves out what the customer had bought before."
    )
    report.notes += [
        f"{again:.0%} of the target items had been bought before by the same customer, so repeat purchases are a "
        "strong baseline over all items; a net's loss shows among the new ones.",
        "Rows from 'distilled' on are one student, distilled from the large tower and trained by the recipe "
        f"{RECIPE!r}, with one more technique each, in the same number of steps. 'Drawn at random' is the whole recipe "
        "with random channels and weights.",
        "A smaller tower from scratch is the control of the teacher: on this data bigger is not better, so the large "
        "tower is a fair teacher but not a fair baseline.",
        "Exported towers take customers padded to one length, since engines have no ragged bags. Zeros take as much of "
        "the file as other numbers.",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="the Online Retail file (.xlsx, .csv, .csv.gz), or its folder")
    parser.add_argument("--synthetic", action="store_true", help="a generated shop in place of the file")
    parser.add_argument("--fast", action="store_true", help=f"only {FAST_CUSTOMERS:,} customers")
    parser.add_argument("--cut", choices=CUTS, default="test", help="validation: a month earlier, for choosing")
    parser.add_argument("--recipe", default=RECIPE, help="a recipe's name, or its YAML file")
    parser.add_argument("--seeds", type=int, default=1, help="train every row with this many seeds")
    parser.add_argument("--report", default="reports/recommender", metavar="DIR", help="where report and file go")
    parser.add_argument("--verbose", action="store_true", help="print the logs of the Trainer and the callbacks")
    arguments = parser.parse_args(argv)
    if arguments.synthetic and arguments.data:
        parser.error("--data and --synthetic exclude each other")
    return arguments


def main(argv: Sequence[str] | None = None) -> ComparisonReport:
    """Train, measure, print and write the report; return it."""
    arguments = parse(argv)
    prepare(threads=THREADS, verbose=arguments.verbose)
    recipe = Recipe.load(arguments.recipe)
    folder = Path(arguments.report)
    folder.mkdir(parents=True, exist_ok=True)
    reports = []
    for seed in range(arguments.seeds):
        data = RetailData(
            arguments.data,
            cut=arguments.cut,
            synthetic=arguments.synthetic,
            customers=FAST_CUSTOMERS if arguments.fast and not arguments.synthetic else None,
            seed=seed,
        )
        towers = train_all(data, recipe)
        reports.append(measure(towers, data.task))
    report = ComparisonReport.mean(reports)
    describe(report, data, "a generated shop" if arguments.synthetic else "Online Retail")
    file = deploy(towers[DEPLOYED], data.task, folder / "recommender.onnx")
    found = judge(file, data.task)
    report.notes.append(
        f"recommender.onnx is the deployed file of the last seed: in ONNX Runtime itself it reaches a recall of "
        f"{found['recall']:.4f}, of {found['new_recall']:.4f} among new items."
    )
    if not arguments.synthetic and not arguments.fast:
        deploy(towers[TEACHER], data.task, folder / "teacher.onnx")
        times = times_alone([folder / "recommender.onnx", folder / "teacher.onnx"], padded(one_customer(data.task)))
        report.notes += target_notes(report, DEPLOYED, TARGET, times)
    write(report, folder)
    return report


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from problem
