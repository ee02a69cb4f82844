"""What a search finds on the recommender in a given time, beside a grid by hand and random search of the same time.

The small tower of ``examples/recommender.py`` on Online Retail with the validation cut, short runs (``--epochs``, on
``--customers`` customers), recall at 20 against the bits of the deployed model. All three spend the same wall time:

- the search: ``lightning_optim.search``, ``--trials`` trials; its time is the budget;
- the grid: recipes written by hand in the order in which one would try them, until the time is over;
- random search: the same space and proposals from Optuna's random sampler, until the time is over.

Hypervolume: the area that a front covers, of recall above half of the dense recall and bits below the dense bits, both
as fractions of the dense model's; larger is better.

    python benchmarks/search_recommender.py --data PATH --output benchmarks/search_recommender_cpu_DATE.md
    python benchmarks/search_recommender.py --synthetic --trials 4 --customers 200 --epochs 1 --seeds 1  # a smoke test
"""

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import lightning
import lightning.pytorch as pl
import optuna
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from chain import prepare
from lightning_optim import Recipe, search
from lightning_optim.measure.size import SIZES
from lightning_optim.report.figures import pareto_front
from lightning_optim.search.space import Space
from recommender import SMALL, THREADS, TRAINER, judge
from recommender_data import RetailData

LAYERS = ["torch.nn.EmbeddingBag", "torch.nn.Linear"]
SPACE: dict[str, Any] = {
    "channel_pruning": [
        None,
        {
            "pruning_ratio": (0.2, 0.8),
            "criterion": ["taylor", "magnitude"],
            "scope": "layer",
            "start": 0.1,
            "end": 0.35,
            "include": LAYERS,
        },
    ],
    "weight_pruning": [
        None,
        {
            "sparsity": (0.3, 0.8),
            "criterion": ["taylor", "magnitude"],
            "every_n_steps": 20,
            "start": 0.45,
            "end": 0.65,
            "include": LAYERS,
        },
    ],
    "quantization": {"weight_bits": [4, 8], "start": 0.75, "freeze": 0.9},
}


def grid() -> Iterator[Recipe]:
    """Yield recipes as one would write them by hand: the usual ratios, alone and together, 8 bits before 4."""
    for bits in (8, 4):
        for ratio in (None, 0.5, 0.25, 0.75):
            for sparsity in (None, 0.5, 0.75):
                channels = SPACE["channel_pruning"][1] | {"pruning_ratio": ratio, "criterion": "taylor"}
                weights = SPACE["weight_pruning"][1] | {"sparsity": sparsity, "criterion": "taylor"}
                yield Recipe(
                    channel_pruning=None if ratio is None else channels,
                    weight_pruning=None if sparsity is None else weights,
                    quantization=SPACE["quantization"] | {"weight_bits": bits},
                )


def random_recipes(seed: int) -> Iterator[Recipe]:
    """Yield what Optuna's random sampler proposes in the same space."""
    space = Space(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    while True:
        yield space.recipe(space.suggest(study.ask()))


class Task:
    """Data, training and judgement of one seed."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.seed, self.epochs = seed, arguments.epochs
        self.data = RetailData(
            arguments.data,
            cut="validation",
            synthetic=arguments.synthetic,
            customers=arguments.customers,
            seed=seed,
        )
        self.items = len(self.data.task.items)

    def make_module(self) -> pl.LightningModule:
        return SMALL.build(self.items)

    def make_trainer(self, callbacks: list[pl.Callback]) -> pl.Trainer:
        options = {**TRAINER, "max_epochs": self.epochs, "enable_progress_bar": False}
        return pl.Trainer(**options, callbacks=callbacks)

    def recall(self, model: torch.nn.Module) -> float:
        return judge(model, self.data.task)["recall"]

    def train(self, recipe: Recipe) -> tuple[float, float]:
        """Return bits and recall of a recipe, trained as a trial of the search is."""
        pl.seed_everything(self.seed, verbose=False)
        model = self.make_module()
        self.make_trainer(recipe.callbacks()).fit(model, datamodule=self.data)
        return SIZES["bits"](model), self.recall(model)


Points = list[tuple[float, float]]


def until(seconds: float, recipes: Iterator[Recipe], task: Task) -> Points:
    """Train recipes until the time is over; the last one may end a little later."""
    began, points = time.monotonic(), []
    for recipe in recipes:
        if time.monotonic() - began > seconds:
            break
        points.append(task.train(recipe))
    return points


def hypervolume(points: Points, dense: tuple[float, float]) -> float:
    """Return the area below the front, in [0, 1]: see the head of this file."""
    bits, recall = dense
    inside = [(b / bits, (r / recall - 0.5) / 0.5) for b, r in points if b <= bits and r > recall / 2]
    area, last = 0.0, 1.0
    for cost, value in reversed(pareto_front(inside)):
        area += (last - cost) * value
        last = cost
    return area


def run(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    task = Task(arguments, seed)
    began = time.monotonic()
    report = search(
        space=SPACE,
        make_module=task.make_module,
        make_trainer=task.make_trainer,
        evaluate=task.recall,
        objectives=("accuracy", "bits"),
        trials=arguments.trials,
        datamodule=task.data,
        seed=seed,
        progress=False,
        stop_early=False,  # nothing is validated while it trains
    )
    seconds = time.monotonic() - began
    dense = (report.trials[0].values["bits"], report.trials[0].values["accuracy"])
    found = {
        "search": [(t.values["bits"], t.values["accuracy"]) for t in report.trials[1:] if t.values],
        "grid by hand": until(seconds, grid(), task),
        "random": until(seconds, random_recipes(seed), task),
    }
    failed = sum(trial.state == "fail" for trial in report.trials)
    print(f"seed {seed}: {seconds:.0f} s, {failed} failed, " + ", ".join(f"{k} {len(v)}" for k, v in found.items()))
    return {"seconds": seconds, "dense": dense, "points": found, "best": report.chosen()}


def smallest(points: Points, recall: float) -> float | None:
    """Return the fewest bits with at least that recall."""
    return min((b for b, r in points if r >= recall), default=None)


def table(runs: list[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| | trials | on the front | hypervolume | each seed | bits at 99 % of the dense recall | at 95 % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in runs[0]["points"]:
        points = [each["points"][name] for each in runs]
        volumes = [hypervolume(each["points"][name], each["dense"]) for each in runs]
        cells = [
            ", ".join(str(len(each)) for each in points),
            ", ".join(str(len(pareto_front(each))) for each in points),
            f"{mean(volumes):.4f}",
            ", ".join(f"{volume:.4f}" for volume in volumes),
        ]
        for share in (0.99, 0.95):
            least = [smallest(each["points"][name], share * each["dense"][1]) for each in runs]
            shares = [None if b is None else b / each["dense"][0] for b, each in zip(least, runs, strict=True)]
            cells.append(", ".join("-" if share is None else f"{share:.3f}" for share in shares))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="the Online Retail file, or its folder")
    parser.add_argument("--synthetic", action="store_true", help="a generated shop in place of the file")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--customers", type=int, help="only so many; default all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(threads=THREADS, verbose=False)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    runs = [run(arguments, seed) for seed in range(arguments.seeds)]
    times = ", ".join(f"{each['seconds']:.0f} s" for each in runs)
    dense = ", ".join(f"recall {recall:.4f} at {bits:,.0f}" for bits, recall in (each["dense"] for each in runs))
    words = " ".join(sys.argv[1:]).replace(str(arguments.data), "PATH")
    lines = [
        "# A search, a grid by hand and random search, in the same time",
        "",
        f"{platform.machine()}, {THREADS} thread; torch {torch.__version__}, lightning {lightning.__version__}, optuna "
        f"{optuna.__version__}.",
        f"`python benchmarks/search_recommender.py {words}`",
        "",
        f"Small tower of the recommender, {arguments.epochs} epochs, recall at 20 on the validation cut against bits "
        f"over 32; {arguments.seeds} seeds. Each had the time of the search: {times} (the search's with its own "
        f"measuring; the dense model is one of its trials). Dense: {dense}. Hypervolume: the area below the front, "
        "of recall above half of the dense one and bits below the dense ones, as fractions; larger is better. Bits "
        "are fractions of the dense ones.",
        "",
        *table(runs),
    ]
    for seed, each in enumerate(runs):
        if each["best"] is not None:
            lines += ["", f"The recipe in the middle of the front, seed {seed}:", "", "```yaml"]
            lines += [each["best"].recipe.to_yaml().rstrip(), "```"]
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
