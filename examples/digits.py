"""Prune and quantize a residual net that reads handwritten digits, and show what that buys and what it does not.

The 1,797 scans come with scikit-learn; nothing is downloaded. Run it with ``python examples/digits.py``.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from exported import EXPORT_COLUMNS, EXPORT_NOTE, ExportedFiles
from lightning_optim import (
    ChannelPruning,
    CompressedCheckpoint,
    PerformanceScore,
    QuantizationAwareTraining,
    WeightPruning,
    measure_latency,
    quantize_post_training,
)
from reporting import (
    COST_COLUMNS,
    REPEAT_NOTE,
    SCORE_COLUMN,
    SCRATCH_SCORE_NOTE,
    Column,
    History,
    Report,
    Row,
    accuracy_cell,
    latency_facts,
    mean_rows,
    model_facts,
    no_speed_note,
    prepare,
    score_against,
    score_figures,
    score_note,
    speed_note,
    trade_off_figure,
)

TEST_IMAGES = 719
VALIDATION_IMAGES = 120
BATCH_SIZE = 64
WIDTH = 13
SMALL_WIDTH = 7  # about as many parameters as are left when half of the channels are gone
EPOCHS = 20
FAST_EPOCHS = 6
MIN_ACCURACY = 0.97
THREADS = 1  # the net is too small for more: two threads save a tenth, and cost tenfold on a busy machine


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class DigitsNet(pl.LightningModule):
    """A small residual net for 8x8 images; an ordinary LightningModule that knows nothing of lightning_optim."""

    def __init__(self, width: int = WIDTH, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            Residual(2 * width),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, name: str, batch: list[Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        metrics = {f"{name}_loss": F.cross_entropy(logits, labels), f"{name}_acc": accuracy}
        self.log_dict(metrics, batch_size=len(images), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        rate = self.hparams.learning_rate
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Attributes:
        name: In the table.
        kind: What it is in the comparison.
        pruning: Makes the callback that compresses while it trains.
        width: How wide it begins.
        of: Name of the row whose trained model is quantized; such a row is not trained.
        bits: Of the weights, where ``of`` is given.
        exported: Whether it is exported and measured in ONNX Runtime too.
    """

    name: str
    kind: str
    pruning: Callable[[], pl.Callback] | None = None
    width: int = WIDTH
    of: str = ""
    bits: int = 8
    exported: bool = False


RUNS = (
    Run("dense", "dense", exported=True),
    Run("80 % zeros", "pruned", lambda: WeightPruning(0.8, every_n_steps=10)),
    Run("90 % zeros", "pruned", lambda: WeightPruning(0.9, every_n_steps=10)),
    Run("2:4", "pruned", lambda: WeightPruning(granularity="2:4", every_n_steps=10)),
    Run("90 % at random", "control", lambda: WeightPruning(0.9, criterion="random", every_n_steps=10)),
    Run("half the channels", "pruned", lambda: ChannelPruning(0.5, events=8), exported=True),
    Run("small from scratch", "control", width=SMALL_WIDTH, exported=True),
    Run("int8, after training", "integer", of="dense", exported=True),
    Run("half the channels, int8", "integer", of="half the channels", exported=True),
    Run("3-bit weights, QAT", "integer", lambda: QuantizationAwareTraining(weight_bits=3), exported=True),
    Run("3-bit weights, after training", "control", of="dense", bits=3, exported=True),
)


@dataclass(frozen=True)
class Splits:
    """The scans, apart: to train on, to choose the epoch and compute P on, and to report on."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def load_splits() -> Splits:
    """Split scikit-learn's 1,797 scans, always in the same way."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, random_state=0, stratify=labels)
    train, validation = train_test_split(rest, test_size=VALIDATION_IMAGES, random_state=0, stratify=labels[rest])
    tensors = torch.from_numpy(images / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels)
    return Splits(*(TensorDataset(*(tensor[part] for tensor in tensors)) for part in (train, validation, test)))


def train(run: Run, splits: Splits, *, epochs: int, seed: int) -> tuple[DigitsNet, History, Row]:
    """Train one row: a plain Trainer with our callbacks. Returns the kept model, what was logged, and the row."""
    pl.seed_everything(seed, verbose=False)
    model, history = DigitsNet(run.width), History()
    shuffled = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = CompressedCheckpoint(dirpath=folder, monitor="val_loss", mode="min")
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_model_summary=False,
            callbacks=[
                *([run.pruning()] if run.pruning else []),
                PerformanceScore("val_acc", size="nonzero", min_accuracy=MIN_ACCURACY),
                checkpoint,
                history,
            ],
        )
        trainer.fit(
            model,
            DataLoader(splits.train, BATCH_SIZE, shuffle=True, generator=shuffled),
            DataLoader(splits.validation, VALIDATION_IMAGES),
        )
        (tested,) = trainer.test(model, DataLoader(splits.test, TEST_IMAGES), ckpt_path="best", verbose=False)
        kept = history.epochs[torch.load(checkpoint.best_model_path, weights_only=True)["epoch"]]
    score = {"P": kept["P/unguarded"], "feasible": kept["P/feasible"], "val_acc": kept["val_acc"]}
    return model, history, {"accuracy": tested["test_acc"], **score}


def quantize(model: DigitsNet, splits: Splits, bits: int) -> tuple[DigitsNet, Row]:
    """Quantize a copy of a trained model from some batches of training images."""
    model = copy.deepcopy(model)
    quantize_post_training(model, DataLoader(splits.train, BATCH_SIZE), weight_bits=bits, progress_bar=False)
    accuracies = {f"{name}_acc": accuracy_on(model, part) for name, part in vars(splits).items()}
    return model, {"accuracy": accuracies["test_acc"], "val_acc": accuracies["validation_acc"]}


def accuracy_on(model: DigitsNet, part: TensorDataset) -> float:
    images, labels = part[:]
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def compare(splits: Splits, *, epochs: int, seed: int) -> tuple[list[Row], dict[str, History]]:
    """Train or quantize all rows with one seed, and measure them against the dense one."""
    models: dict[str, DigitsNet] = {}
    histories: dict[str, History] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = splits.test[:][0]
        files = ExportedFiles(folder, images[:1], images)
        for run in RUNS:
            print(f"{'quantizing' if run.of else 'training'}: {run.name}")
            if run.of:
                models[run.name], row = quantize(models[run.of], splits, run.bits)
            else:
                models[run.name], histories[run.name], row = train(run, splits, epochs=epochs, seed=seed)
                row |= facts(run, models, splits)
            if run.width != WIDTH:
                row["P"] = score_against(row, rows[0], row["val_acc"])
                histories[run.name].forget_ratios()
            if run.exported:
                row |= files.add(run.name, models[run.name], dense="dense", accuracy=row["val_acc"])
            rows.append({"name": run.name, "kind": run.kind, **row})
    return rows, histories


def facts(run: Run, models: dict[str, DigitsNet], splits: Splits) -> Row:
    """Return what a trained model costs in PyTorch."""
    latency = measure_latency(models[run.name], splits.test[:1][0], against=models["dense"])
    costs = model_facts(models[run.name]) | latency_facts(latency)
    if run.kind == "integer":  # in PyTorch it computes in float, and its file holds floats
        costs = {name: costs[name] for name in ("parameters", "nonzero")} | {"P": None}
    return costs


def integers_note(rows: list[Row]) -> str:
    """Say what rounding costs, from what was measured."""
    moved = {row["name"]: f"{row['accuracy'] - rows[0]['accuracy']:+.4f}" for row in rows}
    return (
        f"Rounding to 8 bits after training moved the test accuracy by {moved['int8, after training']}; to 3 bits by "
        f"{moved['3-bit weights, after training']} after training, and by {moved['3-bit weights, QAT']} with the "
        "rounding in training. Weights of fewer than 8 bits lie in 8-bit containers: P, exported, counts their bits, "
        "the file does not."
    )


def build_report(rows: list[Row], histories: dict[str, History], seeds: int) -> Report:
    """Arrange the rows as a report; the curves are those of the last seed."""
    repeats = "one seed" if seeds == 1 else f"mean and standard deviation of {seeds} seeds"
    training = 1797 - TEST_IMAGES - VALIDATION_IMAGES
    return Report(
        title="Handwritten digits: a small residual net, pruned and quantized",
        summary=(
            f"scikit-learn's 1,797 scans of 8x8 pixels: {training} to train on, {VALIDATION_IMAGES} to choose the "
            f"epoch and to compute P, {TEST_IMAGES} for the test accuracy. Every row is trained from scratch in the "
            f"same way, or quantized from one that was; {repeats}."
        ),
        columns=[
            Column("name", "model"),
            *COST_COLUMNS,
            Column("accuracy", "test accuracy", accuracy_cell),
            SCORE_COLUMN,
            *EXPORT_COLUMNS,
        ],
        rows=rows,
        notes=[
            no_speed_note(rows),
            speed_note(rows)
            + " At one image a call, so small a net spends most of its time on the way into the kernels.",
            f"One test image is {1 / TEST_IMAGES:.4f}: with a single seed, differences below 0.01 say nothing.",
            score_note("on the validation images, in the kept epoch", f"an accuracy of {MIN_ACCURACY}"),
            SCRATCH_SCORE_NOTE,
            EXPORT_NOTE,
            integers_note(rows),
            REPEAT_NOTE,
        ],
        figures=[
            *score_figures(rows, histories),
            ("trade_off", "Accuracy against file size.", trade_off_figure(rows, "accuracy", "test accuracy")),
        ],
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="train every row with this many seeds")
    parser.add_argument("--fast", action="store_true", help="a third of the epochs")
    parser.add_argument("--report", default="reports/digits", metavar="DIR", help="where the report is written")
    parser.add_argument("--verbose", action="store_true", help="print what the Trainer and the callbacks say")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Train, compare, print and write the report; return the table's rows."""
    arguments = parse(argv)
    prepare(threads=THREADS, verbose=arguments.verbose)
    splits = load_splits()
    epochs = FAST_EPOCHS if arguments.fast else EPOCHS
    results = [compare(splits, epochs=epochs, seed=seed) for seed in range(arguments.seeds)]
    rows = mean_rows([rows for rows, _ in results])
    report = build_report(rows, results[-1][1], arguments.seeds)
    report.print()
    print(f"report: {report.write(arguments.report)}")
    return rows


if __name__ == "__main__":
    main()
