"""``lightning-optim demo``: all techniques on scanned digits, in about a minute, without data."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

from lightning_optim.callbacks.report import ReportCallback
from lightning_optim.checks import check_folder
from lightning_optim.cli.command import Command, UserError, command_parser, console, said_plainly
from lightning_optim.demo import DigitsData, DigitsNet
from lightning_optim.recipe import Recipe
from lightning_optim.report import compare

__all__ = ["COMMAND"]

TEACHER_WIDTH = 26
EPOCHS = 15
LABELS = 100
"""That the student and its control see; the large net has seen all."""
CONTROL = "half as wide, from scratch"
RECIPE = Recipe(
    description="All techniques in one short run.",
    channel_pruning={"pruning_ratio": 0.4, "events": 4},
    weight_pruning={"sparsity": 0.5, "every_n_steps": 10},
    quantization=True,
    distillation={"loss": "kd", "alpha": 0.5},
    score={"accuracy": "val_acc", "size": "bits", "min_accuracy": 0.9},
)
NEEDED = {"sklearn": "examples", "onnxruntime": "onnx", "onnx": "onnx", "onnxscript": "onnx", "matplotlib": "report"}


def run(arguments: Sequence[str]) -> int:
    """Train a large net, distill it into a small one that is pruned and quantized in the same run, and compare."""
    parser = command_parser(
        "demo",
        f"Scanned digits (from scikit-learn): a large net is trained on all labels. With {LABELS} labels at hand and "
        "the other scans unlabeled, it is distilled into a small net, which is pruned and quantized to 8 bits in the "
        "same run. Both, and the small net trained on the labels alone, are exported, verified and measured. Takes "
        "about a minute on two cores.",
    )
    parser.add_argument(
        "--report", default="reports/demo", metavar="DIR", help="folder of the pages; default %(default)s"
    )
    given = parser.parse_args(arguments)
    _check_packages()
    with said_plainly():
        check_folder("--report", given.report)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are too small for more
    try:
        _run(console(), Path(given.report))
    finally:
        torch.set_num_threads(threads)
    return 0


def _check_packages() -> None:
    missing = sorted({extra for module, extra in NEEDED.items() if find_spec(module) is None})
    if missing:
        raise UserError(
            "the demo needs packages that are not installed. Install them with: "
            f'python -m pip install "lightning-optim[{",".join(missing)}]"'
        )


def _run(shown: Console, folder: Path) -> None:
    everything, data = DigitsData(), DigitsData(labels=LABELS)
    shown.print(f"1/4 a net of {TEACHER_WIDTH} channels, all labels, {EPOCHS} epochs")
    dense = _train(DigitsNet(TEACHER_WIDTH), everything)
    shown.print(f"2/4 half as wide, {LABELS} labels, from scratch, as many steps: the control")
    control = _train(DigitsNet(), DigitsData(labels=LABELS, unlabeled=False))
    shown.print(f"3/4 half as wide, {LABELS} labels, distilled, pruned and quantized in one run, by this recipe:")
    shown.print(str(RECIPE), style="dim", highlight=False, markup=False)
    compressed = _train(DigitsNet(), data, RECIPE, dense, [ReportCallback(folder / "run", title="The run of the demo")])
    shown.print("4/4 exporting, verifying and measuring")
    images, labels = data.splits["test"][:]
    report = compare(
        {"large, all labels": dense, CONTROL: control, "all techniques": compressed},
        images[:1],
        evaluate=lambda net: float((net(images).argmax(1) == labels).float().mean()),
        engines=["onnxruntime"],
        export={"inputs": images},
        size="bits",
        controls=[CONTROL],
        samples=len(labels),
        progress_bar=False,
    )
    report.title = f"Scanned digits: all techniques in one run, with {LABELS} labels"
    report.summary = (
        f"{len(labels)} test images. The large net has seen all {len(everything.splits['train'])} labels; the control "
        f"trains on {LABELS} of them for as many steps, and the compressed net has the other scans without labels too."
    )
    shown.print(report)
    shown.print(f"report: {report.write(folder)}", highlight=False, markup=False)


def _train(
    net: DigitsNet, data: DigitsData, recipe: Recipe | None = None, teacher: Any = None, callbacks: Any = ()
) -> DigitsNet:
    pl.seed_everything(0, verbose=False)
    recipe = recipe or Recipe()
    trainer = pl.Trainer(
        max_epochs=data.as_many_epochs(EPOCHS),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[*recipe.callbacks(), *callbacks],
    )
    trainer.fit(recipe.wrap(net, teacher), datamodule=data)
    return net.eval()


COMMAND = Command("demo", "all techniques on scanned digits: about a minute, no data needed", run)
