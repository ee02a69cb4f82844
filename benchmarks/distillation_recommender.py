"""Does the large two-tower recommender help to train the small one? Online Retail, next basket, over seeds.

The task and the training of ``examples/recommender.py``, up to the test cut; of the recipe the teacher alone. The
control is the small tower from scratch: as many epochs, the same weights at the start, the same batches.

    python benchmarks/distillation_recommender.py --data PATH --output benchmarks/distillation_recommender_cpu_DATE.md
"""

import argparse
import platform
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import lightning
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from chain import prepare
from lightning_optim import Recipe
from recommender import LARGE, THREADS, TRAINER, Tower, fit, judge
from recommender_data import RetailData

SMALL = Tower(64, (128,), 1.5e-3)
TAUGHT = Recipe(distillation={"alpha": 0.5, "temperature": 1.0})
METRICS = {"recall": "recall", "ndcg": "NDCG", "new_recall": "recall, new", "new_ndcg": "NDCG, new"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PATH", help="the Online Retail file, or its folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(threads=THREADS, verbose=False)
    task = RetailData(args.data).task
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(args.seeds):
        data = RetailData(args.data, seed=seed)
        large = fit(LARGE, data)
        towers = {
            "large (teacher)": large,
            "small, from scratch (control)": fit(SMALL, data),
            "small, taught by large": fit(SMALL, data, TAUGHT, large),
        }
        for name, tower in towers.items():
            for metric, value in judge(tower, task).items():
                found[name][metric].append(value)
    sizes = [sum(p.numel() for p in tower.build(len(task.items)).parameters()) for tower in (LARGE, SMALL)]
    lines = [
        "# A large recommender teaches a small one",
        "",
        f"{platform.machine()}, {THREADS} thread; torch {torch.__version__}, lightning {lightning.__version__}.",
        f"`python benchmarks/distillation_recommender.py --data PATH --seeds {args.seeds}`",
        "",
        f"Online Retail, next basket, metrics at 20 on {len(task.evaluation):,} test customers, {args.seeds} seeds, "
        f"mean ± standard deviation. Large {sizes[0]:,} parameters, small {sizes[1]:,}; "
        f"{TRAINER['max_epochs']} epochs. kd with T = 1 at weight .5.",
        "",
        f"| | {' | '.join(METRICS.values())} |",
        f"| --- |{' --- |' * len(METRICS)}",
    ]
    for name, metrics in found.items():
        cells = [f"{mean(metrics[m]):.4f} ± {stdev(metrics[m]) if args.seeds > 1 else 0:.4f}" for m in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
