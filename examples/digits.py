"""The whole chain on handwritten digits: one recipe distills a large net into a small one, prunes and quantizes it.

The large net has seen all labels; the small one is trained with a hundred of them and the other scans unlabeled.

The 1,797 scans come with scikit-learn; nothing is downloaded. Run it with ``python examples/digits.py``. Net and data
are ``lightning_optim.demo``'s: an ordinary LightningModule and LightningDataModule.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl

from chain import at_random, prepare, stages, write
from lightning_optim import ComparisonReport, Recipe, ReportCallback, compare, export_onnx
from lightning_optim.demo import DigitsData, DigitsNet

RECIPE = Recipe(
    description="All techniques in one run, for a net of a few thousand weights.",
    channel_pruning={"pruning_ratio": 0.4, "events": 4},
    weight_pruning={"sparsity": 0.5, "every_n_steps": 10},
    quantization=True,
    distillation={"loss": "kd", "alpha": 0.5},
    score={"accuracy": "val_acc", "size": "bits", "min_accuracy": 0.95},
)
TEACHER_WIDTH = 26
LABELS = 100
WIDTH = 13
EPOCHS = 12
FAST_EPOCHS = 6
THREADS = 1  # the nets are too small for more: two threads save a tenth, and cost tenfold on a busy machine

TEACHER = "large, the teacher"
SCRATCH = "small, from scratch"
DEPLOYED = "+ int8"
RANDOM = "the same, drawn at random"
SAME_SIZE = "its size, from scratch"


def fit(
    width: int,
    data: DigitsData,
    recipe: Recipe | None = None,
    teacher: DigitsNet | None = None,
    *,
    epochs: int,
    callbacks: Sequence[pl.Callback] = (),
) -> DigitsNet:
    """Train a net with a plain Trainer, the recipe's callbacks and the teacher, if any."""
    pl.seed_everything(data.seed, verbose=False)
    model, recipe = DigitsNet(width), recipe or Recipe()
    trainer = pl.Trainer(
        max_epochs=data.as_many_epochs(epochs),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[*recipe.callbacks(), *callbacks],
    )
    trainer.fit(recipe.wrap(model, teacher), datamodule=data)
    return model.eval()


def train_all(data: DigitsData, epochs: int, folder: Path) -> dict[str, DigitsNet]:
    """Train the teacher, the student at every stage of the recipe, and the controls."""

    def train(name: str, width: int, data: DigitsData, *options: object, **words: object) -> None:
        print(f"seed {data.seed}, training: {name}")
        nets[name] = fit(width, data, *options, epochs=epochs, **words)

    nets: dict[str, DigitsNet] = {}
    few, labeled = (DigitsData(seed=data.seed, labels=LABELS, unlabeled=others) for others in (True, False))
    train(TEACHER, TEACHER_WIDTH, data)
    train(SCRATCH, WIDTH, labeled)
    for name, part in stages(RECIPE).items():
        page = [ReportCallback(folder / "run", title="Digits: the run of the whole recipe")] if name == DEPLOYED else []
        train(name, WIDTH, few, part, nets[TEACHER], callbacks=page)
    train(RANDOM, WIDTH, few, at_random(RECIPE), nets[TEACHER])
    train(SAME_SIZE, width_of_size(count(nets[DEPLOYED])), labeled)
    return nets


def count(model: DigitsNet) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def width_of_size(parameters: int) -> int:
    """Return the width whose net has about as many parameters."""
    return min(range(3, WIDTH), key=lambda width: abs(count(DigitsNet(width)) - parameters))


def measure(nets: Mapping[str, DigitsNet], data: DigitsData) -> ComparisonReport:
    """Measure every net as deployed."""
    images, labels = data.splits["test"][:]
    return compare(
        nets,
        images[:1],
        evaluate=lambda net: float((net(images).argmax(1) == labels).float().mean()),
        engines=["onnxruntime"],
        size="bits",
        export={"inputs": images},
        controls=[SCRATCH, RANDOM, SAME_SIZE],
        samples=len(labels),
        progress_bar=False,
    )


def describe(report: ComparisonReport, data: DigitsData) -> None:
    """Add the title and the reading notes to the report."""
    sizes = {name: len(part) for name, part in data.splits.items()}
    report.title = "Handwritten digits: from a large net to a small int8 file"
    report.summary = (
        f"scikit-learn's 1,797 scans of 8x8 pixels: {sizes['train']} to train on, {sizes['validation']} to validate, "
        f"{sizes['test']} for the accuracy. The large net has seen all labels; the others know {LABELS} of them. Every "
        "row is trained in the same number of steps."
    )
    report.notes += [
        "Rows from 'distilled' on are one student, distilled from the large net and trained by one recipe with one "
        "more technique each, in the windows of the whole recipe. 'Drawn at random' is the whole recipe with random "
        "channels and weights.",
        f"One test image is {1 / sizes['test']:.4f}: with a single seed, differences below 0.01 are noise. The "
        "teacher replaces the labels that are missing; where all are known it adds nothing measurable on so small a "
        "task, and a small net from scratch matches it.",
        "In such a small net, one row has too few products for integers to pay for rounding the inputs; see 32 rows, "
        "and the larger models in the benchmarks.",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="train every row with this many seeds")
    parser.add_argument("--fast", action="store_true", help="about half of the epochs")
    parser.add_argument("--report", default="reports/digits", metavar="DIR", help="where report and file go")
    parser.add_argument("--verbose", action="store_true", help="print the logs of the Trainer and the callbacks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> ComparisonReport:
    """Train, measure, print and write the report; return it."""
    arguments = parse(argv)
    prepare(threads=THREADS, verbose=arguments.verbose)
    folder = Path(arguments.report)
    folder.mkdir(parents=True, exist_ok=True)
    reports = []
    for seed in range(arguments.seeds):
        data = DigitsData(seed=seed)
        nets = train_all(data, FAST_EPOCHS if arguments.fast else EPOCHS, folder)
        reports.append(measure(nets, data))
    report = ComparisonReport.mean(reports)
    describe(report, data)
    images = data.splits["test"][:][0]
    export_onnx(nets[DEPLOYED], folder / "digits.onnx", images[:1], inputs=images)
    write(report, folder)
    return report


if __name__ == "__main__":
    main()
