"""Compress an intent classifier for customer-service messages with one recipe, from teacher to verified int8 file.

77 intents; the teacher is MiniLM if it is installed, else a larger net of the same kind; every stage is measured.
Run it with ``python examples/intents.py --data PATH``, or with ``--synthetic`` where the Banking77 files are missing.
The last stage alone, from YAML: ``--prepare --files checkpoints/intents``, then ``intents.yaml``.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from chain import Target, at_random, prepare, stages, target_notes, times_alone, write
from intents_data import FAST_TOPIC, HELD_OUT, IntentsData, IntentsTask, numbered
from intents_model import IntentsNet, MessagePieces, loader
from intents_teacher import SentenceTeacher, encode, find_teacher, load_teacher, write_cache
from lightning_optim import Recipe, export_onnx
from lightning_optim.export.session import ExportedModel
from lightning_optim.report import ComparisonReport, compare

__all__ = ["REAL", "SYNTHETIC", "TRAINER", "Job", "Widths", "fit", "main"]

RECIPE = "text-classifier"
THREADS = 1  # two threads save little, and cost many times the time on a busy machine
COMPARED_BATCHES = 4  # of held-out messages, in PyTorch and in ONNX Runtime
TARGET = Target(smaller=80, faster=100, drop=0.025, metric="accuracy")
TRAINER: dict[str, Any] = {
    "limit_val_batches": 0,  # nothing is chosen while it trains
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
SCRATCH = "small, from scratch"
DEPLOYED = "+ int8"
RANDOM = "the same, drawn at random"
SAME_SHAPE = "its shape, from scratch"


@dataclass(frozen=True)
class Widths:
    """Widths of a net's layers."""

    width: int
    channels: int
    hidden: int


@dataclass(frozen=True)
class Job:
    """Sizes of the student and of a teacher of its kind, and their training lengths."""

    student: Widths
    teacher: Widths
    epochs: int
    batch_size: int


REAL = Job(Widths(384, 256, 256), Widths(384, 512, 512), epochs=7, batch_size=64)  # MiniLM's vectors have 384 numbers
FAST = replace(REAL, epochs=15)  # of an eighth of the messages
SYNTHETIC = Job(Widths(96, 96, 96), Widths(192, 192, 192), epochs=9, batch_size=32)


@dataclass(frozen=True)
class Material:
    """Training material of the students besides the messages.

    Attributes:
        name: Name of the teacher.
        teacher: The teacher, to be measured.
        accuracy: Its accuracy on the held-out messages.
        logits: File of its logits of the training messages.
        vectors: File of the initial embedding; None: random numbers.
    """

    name: str
    teacher: nn.Module
    accuracy: float
    logits: Path
    vectors: Path | None


def prepare_material(data: IntentsData, job: Job, folder: Path) -> Material:
    """Build the teacher, and write its logits and the students' initial vectors."""
    task, logits, vectors = data.task, folder / "teacher_logits.bin", None
    if task.vocabulary.vectors is not None:
        vectors = folder / "vectors.pt"
        torch.save(task.vocabulary.vectors, vectors)
    minilm = find_teacher() if vectors is not None else None
    if minilm is None:
        name = "large"
        print(f"training: {name}, the teacher")
        teacher: nn.Module = fit(job.teacher, data, job.epochs, vectors)
        train, held_out = answers(teacher, task.train_pieces), answers(teacher, task.held_out_pieces)
    else:
        name = "MiniLM"
        print(f"encoding {len(task.train) + len(task.held_out):,} messages with {name}, the teacher")
        teacher = load_teacher(minilm, task.vocabulary, task.intents)
        found = [encode(teacher, messages) for messages in (task.train_pieces, task.held_out_pieces)]
        teacher.fit_head(found[0], task.train.labels)
        with torch.inference_mode():
            train, held_out = map(teacher.head, found)
    write_cache(logits, teacher, train)
    return Material(name, teacher, accuracy_of(held_out, task.held_out_pieces), logits, vectors)


def build(task: IntentsTask, widths: Widths, vectors: Path | None) -> IntentsNet:
    """Build a net, initialized with the vocabulary's vectors if there are any."""
    return IntentsNet(
        len(task.vocabulary),
        task.intents,
        width=widths.width,
        channels=widths.channels,
        hidden=widths.hidden,
        embedding_rate=3.0 if vectors is None else 1.0,
        vectors=None if vectors is None else str(vectors),
    )


def fit(
    widths: Widths,
    data: IntentsData,
    epochs: int,
    vectors: Path | None,
    recipe: Recipe | None = None,
    logits: Path | None = None,
) -> IntentsNet:
    """Train a net with a plain Trainer, the recipe's callbacks and the teacher's cached logits, if any."""
    data.indexed = recipe is not None
    pl.seed_everything(data.seed, verbose=False)
    model = build(data.task, widths, vectors)
    trainer = pl.Trainer(**TRAINER, max_epochs=epochs, callbacks=recipe.callbacks() if recipe else [])
    trainer.fit(recipe.wrap(model, cache=logits) if recipe else model, datamodule=data)
    return model.eval()


def train_all(data: IntentsData, job: Job, material: Material, recipe: Recipe) -> dict[str, nn.Module]:
    """Train the student at every stage, and the controls; the teacher comes first."""

    def train(name: str, widths: Widths, recipe: Recipe | None = None) -> None:
        print(f"seed {data.seed}, training: {name}")
        nets[name] = fit(widths, data, job.epochs, material.vectors, recipe, material.logits)

    nets: dict[str, nn.Module] = {material.name: material.teacher}
    train(SCRATCH, job.student)
    for name, part in stages(recipe).items():
        train(name, job.student, part)
    train(RANDOM, job.student, at_random(recipe))
    train(SAME_SHAPE, shape_of(nets[DEPLOYED]))
    return nets


def shape_of(model: IntentsNet) -> Widths:
    """Return the widths of a net that has this shape from the start."""
    return Widths(model.embedding.embedding_dim, model.convolution.out_channels, model.hidden.out_features)


def answers(model: nn.Module, messages: MessagePieces) -> Tensor:
    """Return the logits of all messages, in their order."""
    model.eval()
    with torch.inference_mode():
        found = [(index, model(pieces)) for (pieces, _), index in numbered(loader(messages, batch_size=128))]
    order = torch.cat([index for index, _ in found])
    return torch.cat([logits for _, logits in found])[order.argsort()]


def accuracy_of(logits: Tensor, messages: MessagePieces) -> float:
    return float((logits.argmax(1) == messages.labels).float().mean())


def measure(nets: Mapping[str, nn.Module], task: IntentsTask, material: Material) -> ComparisonReport:
    """Measure every net as deployed, relative to the teacher, and add the baselines without a network."""

    def evaluate(model: nn.Module) -> float:
        if isinstance(model, SentenceTeacher):  # known from its vectors, which took half a minute
            return material.accuracy
        return accuracy_of(answers(model, task.held_out_pieces), task.held_out_pieces)

    report = compare(
        nets,
        task.one_message,
        evaluate=evaluate,
        batch_size=None,
        engines=["onnxruntime", "torch"],
        size="bits",
        export=export_options(task),
        controls=[SCRATCH, RANDOM, SAME_SHAPE],
        progress_bar=False,
    )
    report.add_row("word counts (TF-IDF)", **word_counts(task))
    return report


def export_options(task: IntentsTask) -> dict[str, Any]:
    """Return the export options: verification inputs and dynamic dimensions."""
    held_out = [pieces for pieces, _ in task.evaluation()]
    return {"inputs": held_out[:: max(len(held_out) // COMPARED_BATCHES, 1)], "dynamic_dims": {"pieces": {1: "length"}}}


def word_counts(task: IntentsTask) -> dict[str, float]:
    """Score word counts (TF-IDF) with logistic regression, fitted to the same messages."""
    words = TfidfVectorizer(sublinear_tf=True)
    classifier = LogisticRegression(C=5, max_iter=1000)  # C by the validation part
    classifier.fit(words.fit_transform(task.train.texts), task.train.labels)
    return {
        "accuracy": float(np.mean(classifier.predict(words.transform(task.held_out.texts)) == task.held_out.labels)),
        "parameters": classifier.coef_.size + classifier.intercept_.size + len(words.idf_),
    }


def deploy(model: nn.Module, task: IntentsTask, path: Path) -> ExportedModel:
    """Export a net as deployed, and load the file."""
    export_onnx(model, path, task.one_message, **export_options(task))
    return ExportedModel(path)


def describe(report: ComparisonReport, data: IntentsData, job: Job, material: Material, source: str) -> None:
    """Add the title and the reading notes to the report."""
    task, held_out = data.task, data.source[1]
    noise = 2 * (material.accuracy * (1 - material.accuracy) / len(task.held_out)) ** 0.5
    gain = report["distilled"]["accuracy"] - report[SCRATCH]["accuracy"]
    report.title = f"Customer-service messages ({source}) by intent: from {material.name} to a small int8 file"
    report.summary = (
        f"{task.intents} intents; {len(task.train):,} training messages, {len(task.held_out):,} ({held_out}) for "
        f"the accuracy. {len(task.vocabulary):,} {task.vocabulary.name}. {job.epochs} epochs in every row; the last "
        "weights count."
    )
    report.notes += [
        f"Two standard errors of one accuracy are {noise:.3f}; of a difference between rows it is less, since all "
        "answer the same messages.",
        f"The teacher adds {gain:+.4f}: the student that also learns from {material.name}'s cached logits, compared "
        "with one that learns from labels alone and starts with the same weights.",
        f"Rows from 'distilled' on are one student, trained by the recipe {RECIPE!r} with one more technique each. "
        "'Drawn at random' is the whole recipe with random channels and weights.",
        "Zeros take as much of the file as other numbers. Word vectors are most of a small text model: without them in "
        "int8, the file would hardly shrink.",
        "The net of the final shape starts with the first principal components of MiniLM's vectors, others with all.",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="the folder with Banking77's train.csv and test.csv")
    parser.add_argument("--synthetic", action="store_true", help="generated messages instead of the files")
    parser.add_argument("--fast", action="store_true", help=f"only the ten intents about a {FAST_TOPIC}")
    parser.add_argument("--held-out", choices=HELD_OUT, default="test", help="validation: for choosing")
    parser.add_argument("--recipe", default=RECIPE, help="a recipe's name, or its YAML file")
    parser.add_argument("--seeds", type=int, default=1, help="train every row with this many seeds")
    parser.add_argument("--no-minilm", action="store_true", help="own word pieces, even if MiniLM is installed")
    parser.add_argument("--prepare", action="store_true", help="only create the files that intents.yaml reads")
    parser.add_argument("--files", metavar="DIR", help="folder of vectors and teacher logits; default the report's")
    parser.add_argument("--report", default="reports/intents", metavar="DIR", help="where report and file go")
    parser.add_argument("--verbose", action="store_true", help="print the logs of the Trainer and the callbacks")
    arguments = parser.parse_args(argv)
    if arguments.synthetic and arguments.data:
        parser.error("--data and --synthetic exclude each other")
    return arguments


def _job(arguments: argparse.Namespace) -> Job:
    if arguments.synthetic:
        return SYNTHETIC
    return FAST if arguments.fast else REAL


def main(argv: Sequence[str] | None = None) -> ComparisonReport | None:
    """Train, measure, print and write the report; return it. With ``--prepare`` there is none."""
    arguments = parse(argv)
    prepare(threads=THREADS, verbose=arguments.verbose)
    recipe, job = Recipe.load(arguments.recipe), _job(arguments)
    folder = Path(arguments.report)
    files = Path(arguments.files or folder)
    files.mkdir(parents=True, exist_ok=True)
    data = IntentsData(
        arguments.data,
        held_out=arguments.held_out,
        synthetic=arguments.synthetic,
        fast=arguments.fast,
        minilm=not arguments.no_minilm,
        batch_size=job.batch_size,
    )
    material = prepare_material(data, job, files)
    if arguments.prepare:
        print(f"{material.logits}{f' and {material.vectors}' if material.vectors else ''} are made")
        return None
    reports = []
    for data.seed in range(arguments.seeds):
        nets = train_all(data, job, material, recipe)
        reports.append(measure(nets, data.task, material))
    report = ComparisonReport.mean(reports)
    describe(report, data, job, material, "generated" if arguments.synthetic else "Banking77")
    folder.mkdir(parents=True, exist_ok=True)
    file, messages = deploy(nets[DEPLOYED], data.task, folder / "intents.onnx"), data.task.held_out_pieces
    report.notes.append(
        "intents.onnx is the deployed file of the last seed: in ONNX Runtime itself its accuracy is "
        f"{accuracy_of(answers(file, messages), messages):.4f}."
    )
    if material.name == "MiniLM" and not arguments.fast:
        deploy(material.teacher, data.task, folder / "teacher.onnx")
        times = times_alone([folder / "intents.onnx", folder / "teacher.onnx"], data.task.one_message)
        report.notes += target_notes(report, DEPLOYED, TARGET, times)
    write(report, folder)
    return report


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from problem
