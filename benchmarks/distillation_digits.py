"""Does a teacher help a small digit classifier? With all labels, and with 100 labels and the other images unlabeled.

The student is the net of ``examples/digits.py`` with 3 channels, the teacher the same with 26. Every row trains the
student for as many steps from the same weights; the controls are cross-entropy and label smoothing without a teacher.
Losses of logits stand at weight .9 beside cross-entropy at .1, with their default temperatures, untuned.

    python benchmarks/distillation_digits.py --output benchmarks/distillation_digits_cpu_2026-11-25.md
"""

import argparse
import platform
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import lightning
import lightning.pytorch as pl
import torch
from digits_runs import BATCH_SIZE, TEST_IMAGES, THREADS, Scans, splits
from quiet import prepare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.demo import DigitsNet
from lightning_optim.distillation import DistillationModule
from lightning_optim.functional.losses import FEATURE_LOSSES, LOSSES

TEACHER_WIDTH, STUDENT_WIDTH = 26, 3
STEPS = 400
LABELS = 100
ALPHA = 0.9
IGNORED = -100
FEATURE = ("net.7.layers.4", "net.7.layers.4")
"""The last BatchNorm of the last residual block, on both sides."""


def run(module: pl.LightningModule, data: TensorDataset, seed: int) -> None:
    """Train for the same number of steps, whatever the number of rows."""
    trainer = pl.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    shuffled = torch.Generator().manual_seed(seed)
    trainer.fit(module, DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True, generator=shuffled))


def new(width: int, seed: int) -> DigitsNet:
    pl.seed_everything(seed, verbose=False)
    return DigitsNet(width)


def accuracy(model: nn.Module, scans: Scans) -> float:
    images, labels = scans["test"][:]
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def rows_of(labelled: TensorDataset, everything: TensorDataset, seed: int, scans: Scans) -> dict[str, float]:
    """Train all rows on some labels and some images."""
    teacher = new(TEACHER_WIDTH, seed)
    run(teacher, labelled, seed)
    found = {"teacher": accuracy(teacher, scans)}

    def student(name: str, data: TensorDataset, **words: object) -> None:
        model = new(STUDENT_WIDTH, seed)
        module = DistillationModule(model, teacher, **words) if words else model
        run(module, data, seed)
        found[name] = accuracy(model, scans)

    student("cross-entropy (control)", labelled)
    student("label smoothing (control)", labelled, loss="label_smoothing", alpha=1.0, temperature=None)
    needs_labels = {name for name in LOSSES if "targets" in getattr(LOSSES[name], "needs", ())}
    for loss in sorted(set(LOSSES) - {"label_smoothing"}):
        if loss in needs_labels and everything is not labelled:
            continue
        student(loss, everything, loss=loss, alpha=ALPHA, temperature=None)
    for loss in sorted(FEATURE_LOSSES):
        student(f"kd + {loss}", everything, alpha=ALPHA, features=[(*FEATURE, loss)])
    return found


def settings(scans: Scans, seed: int) -> dict[str, tuple[TensorDataset, TensorDataset]]:
    images, labels = scans["train"][:]
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:LABELS]
    hidden = torch.full_like(labels, IGNORED)
    hidden[chosen] = labels[chosen]
    few = TensorDataset(images[chosen], labels[chosen])
    return {
        f"all {len(labels)} labels": (scans["train"], scans["train"]),
        f"{LABELS} labels, the other images without": (few, TensorDataset(images, hidden)),
    }


def percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(threads=THREADS)
    scans = splits()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(args.seeds):
        for setting, (labelled, everything) in settings(scans, seed).items():
            for row, value in rows_of(labelled, everything, seed, scans).items():
                found[row][setting].append(value)
    names = list(settings(scans, 0))
    sizes = [sum(p.numel() for p in DigitsNet(width).parameters()) for width in (TEACHER_WIDTH, STUDENT_WIDTH)]
    lines = [
        "# A teacher for a small digit reader\n",
        f"{platform.machine()}, {THREADS} thread; torch {torch.__version__}, lightning {lightning.__version__}.",
        f"`python benchmarks/distillation_digits.py --seeds {args.seeds}`\n",
        f"Test accuracy, %, on {TEST_IMAGES} images, {args.seeds} seeds, mean ± standard deviation. Teacher of "
        f"{sizes[0]:,} parameters, student of {sizes[1]:,}; {STEPS} steps each. One test image is "
        f"{100 / TEST_IMAGES:.2f} points.\n",
        f"| | {' | '.join(names)} |",
        "| --- | --- | --- |",
        *(
            f"| {row} | {' | '.join(percent(values[name]) if name in values else '-' for name in names)} |"
            for row, values in found.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
