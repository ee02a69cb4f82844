"""Accuracy of a digit classifier at 8, 4 and 3 bits: post-training and quantization-aware, over seeds.

The task and the training of ``examples/digits.py``. Rows of one seed begin at the same weights and see the same data in
the same order. "float" is the control of "QAT": as many epochs, without rounding. The second table goes on from the
float model for some epochs, with rounding or without: its control says what the extra epochs give by themselves. Each
integer model is exported and scored again in ONNX Runtime. Needs the extra ``onnx``.

    python benchmarks/quantization_digits.py --output benchmarks/quantization_digits_cpu_2026-11-25.md
"""

import argparse
import copy
import platform
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import lightning
import lightning.pytorch as pl
import onnxruntime
import torch
from digits_runs import BATCH_SIZE, EPOCHS, TEST_IMAGES, THREADS, Run, Scans, splits, train
from quiet import prepare
from torch.utils.data import DataLoader

from lightning_optim import ExportReport, QuantizationAwareTraining, export_onnx, quantize_post_training
from lightning_optim.demo import DigitsNet
from lightning_optim.export.session import ExportedModel

BITS = (8, 4, 3)
MORE_EPOCHS = 5
MORE_RATE = 2e-3

TABLES = {
    f"The same {EPOCHS} epochs": ["float", *(f"w{b}a8, {word}" for b in BITS for word in ("after training", "QAT"))],
    f"{MORE_EPOCHS} epochs more, from the float model": [
        "float, then 5 epochs in float (control)",
        *(f"w{b}a8, {word}" for b in BITS for word in ("the control, then after training", "QAT in 5 epochs")),
    ],
}


def aware(bits: int, **words: float) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(weight_bits=bits, **words)


def further(model: DigitsNet, data: Scans, callbacks: list[pl.Callback], seed: int) -> DigitsNet:
    """Train a copy for some more epochs at a lower rate; the last epoch's weights are taken."""
    pl.seed_everything(seed, verbose=False)
    model = copy.deepcopy(model)
    model.hparams.learning_rate = MORE_RATE
    trainer = pl.Trainer(
        max_epochs=MORE_EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    shuffled = torch.Generator().manual_seed(100 + seed)
    trainer.fit(model, DataLoader(data["train"], BATCH_SIZE, shuffle=True, generator=shuffled))
    return model


def after(model: DigitsNet, data: Scans, bits: int, seed: int) -> DigitsNet:
    """Quantize a copy from 8 batches of training images."""
    shuffled = torch.Generator().manual_seed(seed)
    loader = DataLoader(data["train"], BATCH_SIZE, shuffle=True, generator=shuffled)
    return quantize_post_training(copy.deepcopy(model), loader, weight_bits=bits, batches=8, progress_bar=False)


def accuracy(model: DigitsNet, data: Scans) -> float:
    images, labels = data["test"][:TEST_IMAGES]
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


class Scores:
    """Accuracies by row, in torch and in ONNX Runtime."""

    def __init__(self, data: Scans, folder: str) -> None:
        self.data, self.folder = data, folder
        self.torch: dict[str, list[float]] = defaultdict(list)
        self.runtime: dict[str, list[float]] = defaultdict(list)
        self.agreement: list[float] = []
        self.reports: dict[str, ExportReport] = {}

    def add(self, row: str, model: DigitsNet, *, export: bool = True) -> None:
        self.torch[row].append(accuracy(model, self.data))
        if not export:
            return
        images, labels = self.data["test"][:TEST_IMAGES]
        path = Path(self.folder) / "model.onnx"
        report = export_onnx(model, path, images[:32], inputs=images, least_agreement=0.0)
        logits = ExportedModel(path)(images)
        self.runtime[row].append(float((logits.argmax(1) == labels).float().mean()))
        self.agreement.append(report.agreement)
        self.reports[row] = report

    def line(self, row: str) -> str:
        cells = [_percent(found[row]) if row in found else "" for found in (self.torch, self.runtime)]
        return f"| {row} | {cells[0]} | {cells[1]} |"


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the tables; default the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(threads=THREADS)
    scans = splits()
    with tempfile.TemporaryDirectory() as folder:
        scores = Scores(scans, folder)
        for seed in range(args.seeds):
            dense, _ = train(Run("float"), seed=seed)
            scores.add("float", dense, export=False)
            longer = further(dense, scans, [], seed)
            scores.add("float, then 5 epochs in float (control)", longer, export=False)
            for bits in BITS:
                scores.add(f"w{bits}a8, after training", after(dense, scans, bits, seed))
                run = Run("QAT", lambda bits=bits: aware(bits))
                scores.add(f"w{bits}a8, QAT", train(run, seed=seed)[0])
                scores.add(f"w{bits}a8, the control, then after training", after(longer, scans, bits, seed))
                within = further(dense, scans, [aware(bits, start=0, freeze=0.8)], seed)
                scores.add(f"w{bits}a8, QAT in 5 epochs", within)
    text = render(scores, args.seeds)
    print(text)
    if args.output:
        args.output.write_text(text)


def render(scores: Scores, seeds: int) -> str:
    report, least = scores.reports["w8a8, QAT"], 100 * min(scores.agreement)
    parts = [
        "# Digits at 8, 4 and 3 bits\n",
        f"{platform.machine()}; torch {torch.__version__}, lightning {lightning.__version__}, ONNX Runtime "
        f"{onnxruntime.__version__}.\n`python benchmarks/quantization_digits.py --seeds {seeds}`\n",
        f"Test accuracy, %, on {TEST_IMAGES} images ({100 / TEST_IMAGES:.2f} points each), {seeds} seeds, mean ± "
        f"standard deviation. wNa8: N-bit weights per channel, 8-bit activations. Of all exported models "
        f"{least:.2f} % of the test images or more have the same class in ONNX Runtime as in torch; "
        f"{report.integer_convolutions} of {report.convolutions} convolutions run with integers.\n",
    ]
    for title, rows in TABLES.items():
        parts.append(f"## {title}\n\n| | in torch | in ONNX Runtime |\n| --- | --- | --- |")
        parts.append("\n".join(map(scores.line, rows)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
