"""Prune and quantize a convolutional net that sorts customer-service messages into 77 intents.

It is compared with word counts. Run it with ``python examples/intents.py --data PATH``, or with ``--synthetic`` where
the Banking77 files are missing. With ``--teacher`` nothing is compressed: MiniLM teaches the net, see
``intents_teacher.py``.
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
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from banking77 import Messages, find_folder, hold_out, keep_intents, read_messages
from exported import EXPORT_COLUMNS, EXPORT_NOTE, ExportedFiles, rounding_notes
from intents_model import IntentsNet, MessagePieces, loader
from intents_teacher import compare_with_teacher, find_teacher, teacher_report
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
from synthetic_messages import generate_messages
from word_pieces import Vocabulary, find_minilm, learn_pieces, narrow, read_minilm

VALIDATION_SHARE = 0.1
EVALUATION_BATCH_SIZE = 128
FAST_TOPIC = "transfer"  # ten intents that are easily taken for one another
MAX_DROP = 0.03  # of the validation accuracy, below the dense net
THREADS = 1  # two threads save little, and cost many times the time on a busy machine
CALIBRATION_BATCHES = 16
LAYERS = [nn.Embedding, nn.Conv1d, nn.Linear]  # embeddings and the last layer are left alone unless named
INTENTS = ["intents"]  # the outputs of the last layer are the intents: all of them stay


@dataclass(frozen=True)
class Widths:
    """Widths of a net's layers."""

    embedding: int
    channels: int
    hidden: int

    def half(self) -> "Widths":
        return Widths(self.embedding // 2, self.channels // 2, self.hidden // 2)


REAL = {"widths": Widths(384, 256, 256), "epochs": 7, "batch_size": 64}  # MiniLM's vectors have 384 numbers
FAST_EPOCHS = 6
SYNTHETIC = {"widths": Widths(128, 128, 128), "epochs": 9, "batch_size": 32}


@dataclass(frozen=True)
class Task:
    """What is learned, and how large a net learns it.

    Attributes:
        texts: The messages, apart: to train on, to choose the epoch and compute P on, and to report on.
        pieces: The same as numbers.
        vocabulary: What the numbers mean.
        widths: Of the dense net.
        epochs: Of every row.
        batch_size: In training.
    """

    texts: dict[str, Messages]
    pieces: dict[str, MessagePieces]
    vocabulary: Vocabulary
    widths: Widths
    epochs: int
    batch_size: int

    @property
    def one_message(self) -> Tensor:
        """A real message of median length, as a batch of one: what calls are timed with."""
        messages = self.pieces["validation"]
        median = int(np.argsort(messages.lengths, kind="stable")[len(messages) // 2])
        return messages[median][0]

    def net(self, widths: Widths, kind: type[IntentsNet] = IntentsNet, **options: Any) -> IntentsNet:
        """Make a net, which begins with the vocabulary's vectors where it has some."""
        vectors = self.vocabulary.vectors
        model = kind(
            len(self.vocabulary),
            len(self.texts["train"].intents),
            width=widths.embedding,
            channels=widths.channels,
            hidden=widths.hidden,
            embedding_rate=3.0 if vectors is None else 1.0,
            **options,
        )
        if vectors is not None:
            model.start_from(narrow(vectors, widths.embedding))
        return model


Compression = Callable[[Tensor], pl.Callback]
"""Makes a callback for one training, given one message."""


def zeros(criterion: str = "magnitude") -> Compression:
    """Prune four fifths of the single weights of every layer.

    Ranked together by magnitude, the convolution and the linear layers would lose 99 % of theirs, since embedding
    vectors begin longer: on ten intents that left a test accuracy of .23 with this number of steps, and this .86.
    """
    return lambda message: WeightPruning(0.8, criterion=criterion, scope="layer", include=LAYERS, every_n_steps=20)


def channels(message: Tensor) -> pl.Callback:
    """Remove half of the embedding's columns, of the convolution's channels and of the hidden units.

    The same fraction of each, so that a net from scratch can have the same shape.
    """
    return ChannelPruning(0.5, scope="layer", include=LAYERS, exclude=INTENTS, example_inputs=message)


def four_bits(message: Tensor) -> pl.Callback:
    """Train with weights rounded to 4 bits from the middle of the run on."""
    return QuantizationAwareTraining(weight_bits=4, example_inputs=message)


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Attributes:
        name: In the table.
        kind: What it is in the comparison, as a row has it.
        compressions: What makes the net smaller while it trains, in the Trainer's order.
        is_small: It begins with half of every width.
        of: Name of the row whose trained net is quantized; such a row is not trained.
        bits: Of the weights, where ``of`` is given.
        exported: Whether it is exported and measured in ONNX Runtime too.
    """

    name: str
    kind: str
    compressions: tuple[Compression, ...] = ()
    is_small: bool = False
    of: str = ""
    bits: int = 8
    exported: bool = False

    def build(self, task: Task) -> IntentsNet:
        return task.net(task.widths.half() if self.is_small else task.widths)


FAST_RUNS = (
    Run("dense", "dense", exported=True),
    Run("80 % zeros", "pruned", (zeros(),)),
    Run("80 % at random", "control", (zeros("random"),)),
    Run("half of every width", "pruned", (channels,), exported=True),
    Run("the same shape from scratch", "control", is_small=True, exported=True),
    Run("int8, after training", "integer", of="dense", exported=True),
    Run("half of every width, int8", "integer", of="half of every width", exported=True),
)
RUNS = (
    *FAST_RUNS,
    Run("4-bit weights, QAT", "integer", (four_bits,), exported=True),
    Run("4-bit weights, after training", "control", of="dense", bits=4),
)


def load_texts(arguments: argparse.Namespace) -> dict[str, Messages]:
    """Return the real messages or generated ones, in three parts; with ``--fast`` those of some intents."""
    if arguments.synthetic:
        rest, test = generate_messages(seed=0)
    else:
        folder = find_folder(arguments.data)
        print(f"reading {folder}")
        rest, test = read_messages(folder)
        if arguments.fast:
            kept = [place for place, intent in enumerate(rest.intents) if FAST_TOPIC in intent]
            rest, test = keep_intents(rest, kept), keep_intents(test, kept)
    train, validation = hold_out(rest, VALIDATION_SHARE)
    return {"train": train, "validation": validation, "test": test}


def build_task(arguments: argparse.Namespace) -> Task:
    """Read the messages, and choose the vocabulary from those to train on."""
    texts = load_texts(arguments)
    minilm = None if arguments.no_minilm or arguments.synthetic else find_minilm()
    to_read = texts["train"].texts
    vocabulary = read_minilm(minilm, to_read) if minilm else learn_pieces(to_read)
    print(f"vocabulary: {len(vocabulary):,} {vocabulary.name}")
    return Task(
        texts=texts,
        pieces={part: MessagePieces(vocabulary.encode(found.texts), found.labels) for part, found in texts.items()},
        vocabulary=vocabulary,
        **_size(arguments),
    )


def _size(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how large a net is trained, and how long."""
    if arguments.synthetic:
        return SYNTHETIC
    return REAL | {"epochs": FAST_EPOCHS} if arguments.fast else REAL


def train(run: Run, task: Task, *, floor: float | None, seed: int) -> tuple[IntentsNet, History, Row]:
    """Train one row: a plain Trainer with our callbacks. Returns the kept model, what was logged, and the row."""
    pl.seed_everything(seed, verbose=False)
    model, history = run.build(task), History()
    validation, test = (loader(task.pieces[part], batch_size=EVALUATION_BATCH_SIZE) for part in ("validation", "test"))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = CompressedCheckpoint(dirpath=folder, monitor="val_acc", mode="max")
        trainer = pl.Trainer(
            max_epochs=task.epochs,
            accelerator="cpu",
            logger=False,
            enable_model_summary=False,
            callbacks=[
                *(make(task.one_message) for make in run.compressions),
                PerformanceScore("val_acc", size="nonzero", min_accuracy=floor, example_inputs=task.one_message),
                checkpoint,
                history,
            ],
        )
        trainer.fit(model, loader(task.pieces["train"], batch_size=task.batch_size, shuffle_seed=seed), validation)
        (tested,) = trainer.test(model, test, ckpt_path="best", verbose=False)
        kept = history.epochs[torch.load(checkpoint.best_model_path, weights_only=True)["epoch"]]
    score = {"P": kept["P/unguarded"], "feasible": kept["P/feasible"], "val_acc": kept["val_acc"]}
    return model, history, {"accuracy": tested["test_acc"], **score}


def quantize(model: IntentsNet, task: Task, bits: int) -> tuple[IntentsNet, Row]:
    """Quantize a copy of a trained net, with ranges from some batches of messages to train on."""
    model = copy.deepcopy(model).eval()
    batches = loader(task.pieces["train"], batch_size=task.batch_size, shuffle_seed=0)
    quantize_post_training(model, batches, weight_bits=bits, batches=CALIBRATION_BATCHES, progress_bar=False)
    return model, {"accuracy": accuracy_on(model, task, "test"), "val_acc": accuracy_on(model, task, "validation")}


def accuracy_on(model: IntentsNet, task: Task, part: str) -> float:
    batches = loader(task.pieces[part], batch_size=EVALUATION_BATCH_SIZE)
    with torch.no_grad():
        right = sum(int((model(pieces).argmax(1) == labels).sum()) for pieces, labels in batches)
    return right / len(task.pieces[part])


def compare(runs: Sequence[Run], task: Task, *, seed: int) -> tuple[list[Row], dict[str, History]]:
    """Train or quantize all rows with one seed, and measure them against the dense one."""
    models: dict[str, IntentsNet] = {}
    histories: dict[str, History] = {}
    rows: list[Row] = []
    held_out = [pieces for pieces, _ in loader(task.pieces["test"], batch_size=EVALUATION_BATCH_SIZE)]
    with tempfile.TemporaryDirectory() as folder:
        files = ExportedFiles(folder, task.one_message, [task.one_message, *held_out], {"pieces": {1: "length"}})
        for run in runs:
            print(f"{'quantizing' if run.of else 'training'}: {run.name}")
            if run.of:
                models[run.name], row = quantize(models[run.of], task, run.bits)
            else:
                floor = rows[0]["val_acc"] - MAX_DROP if rows else None
                models[run.name], histories[run.name], row = train(run, task, floor=floor, seed=seed)
                row |= facts(run, models, task)
            if run.is_small:
                row["P"] = score_against(row, rows[0], row["val_acc"])
                histories[run.name].forget_ratios()
            if run.exported:
                row |= files.add(run.name, models[run.name], dense="dense", accuracy=row["val_acc"])
            rows.append({"name": run.name, "kind": run.kind, **row})
    return rows, histories


def facts(run: Run, models: dict[str, IntentsNet], task: Task) -> Row:
    """Return what a trained net costs in PyTorch."""
    costs = model_facts(models[run.name])
    if run.kind == "integer":  # in PyTorch it computes in float, and its file holds floats
        return {name: costs[name] for name in ("parameters", "nonzero")} | {"P": None}
    return costs | latency_facts(measure_latency(models[run.name], task.one_message, against=models["dense"]))


def baseline_row(texts: dict[str, Messages]) -> Row:
    """Judge word counts (TF-IDF) with logistic regression, fitted to the same messages."""
    words = TfidfVectorizer(sublinear_tf=True)
    classifier = LogisticRegression(C=5, max_iter=1000)  # C by the validation part
    classifier.fit(words.fit_transform(texts["train"].texts), texts["train"].labels)
    found = {part: classifier.predict(words.transform(texts[part].texts)) for part in ("validation", "test")}
    return {
        "name": "word counts (TF-IDF)",
        "kind": "baseline",
        "parameters": classifier.coef_.size + classifier.intercept_.size + len(words.idf_),
        "accuracy": float(np.mean(found["test"] == texts["test"].labels)),
        "val_acc": float(np.mean(found["validation"] == texts["validation"].labels)),
    }


def integers_notes(rows: list[Row], share: float) -> list[str]:
    """Say what rounding costs and what it saves, from what was measured; ``share`` is the embedding's of the net."""
    by_name = {row["name"]: row for row in rows}
    ratio = by_name["int8, after training"]["onnx_bytes"] / by_name["dense"]["onnx_bytes"]
    sources = {run.name: run.of for run in RUNS if run.of and run.name in by_name}
    return [
        f"The int8 file of the dense net has {ratio:.0%} of the float32 one's bytes, since the embedding, {share:.0%} "
        f"of the parameters, is int8 in it too; with float32 vectors it could not go below {share:.0%}.",
        *rounding_notes(rows, sources, "accuracy", "test accuracy"),
        *_training_notes(by_name),
    ]


def _training_notes(by_name: dict[str, Row]) -> list[str]:
    """Say what rounding in training gains over rounding after it, where both were run."""
    if "4-bit weights, QAT" not in by_name:
        return []
    after, trained = (by_name[f"4-bit weights, {when}"]["accuracy"] for when in ("after training", "QAT"))
    return [
        f"With the rounding to 4 bits in training (QAT) the test accuracy is {trained:.4f}, with the rounding after it "
        f"{after:.4f}. Weights of fewer than 8 bits lie in 8-bit containers: P, exported, counts their bits, the file "
        "does not."
    ]


def build_report(rows: list[Row], histories: dict[str, History], task: Task, arguments: argparse.Namespace) -> Report:
    """Arrange the rows as a report; the curves are those of the last seed."""
    numbers = {part: len(found) for part, found in task.texts.items()}
    intents = len(task.texts["train"].intents)
    source = "generated" if arguments.synthetic else "Banking77"
    share = len(task.vocabulary) * task.widths.embedding / rows[0]["parameters"]
    return Report(
        title=f"Customer-service messages ({source}) by intent: a small convolutional net, pruned and quantized",
        summary=(
            f"{intents} intents; {numbers['train']:,} messages to train on, {numbers['validation']:,} of the training "
            f"file, drawn from every intent, to choose the epoch and to compute P, {numbers['test']:,} for the test "
            f"accuracy. {_short(arguments)}{len(task.vocabulary):,} {task.vocabulary.name}. Every net is trained in "
            "the same way, or quantized from one that was; "
            f"{'one seed' if arguments.seeds == 1 else f'mean and deviation of {arguments.seeds} seeds'}."
        ),
        columns=[
            Column("name", "model"),
            *COST_COLUMNS,
            Column("val_acc", "validation accuracy", "{:.4f}"),
            Column("accuracy", "test accuracy", accuracy_cell),
            SCORE_COLUMN,
            *EXPORT_COLUMNS,
        ],
        rows=rows,
        notes=[
            no_speed_note(rows),
            speed_note(rows),
            _noise_note(rows[0]["accuracy"], numbers["test"], numbers["validation"]),
            "The validation part is for choosing: the kept epoch is the best one on it, and of two equal ones the "
            "first, so its accuracy reads a little too high. Nothing is chosen on the test messages.",
            "Word counts and nets learn from the same messages, those of the validation part left out. The parameters "
            "of the word counts are nearly all that such a classifier is; its time is not measured here.",
            "Zeros are the same share of every layer, and so are the channels that leave: ranked together by "
            "magnitude, the layers behind the embedding would lose nearly everything, since its vectors begin longer.",
            f"{share:.0%} of the dense net's parameters are embedding vectors, of which a message reads a few: they "
            "decide about the file, the convolution about the time of a call.",
            *_vector_notes(task),
            score_note(
                "on the validation messages, in the kept epoch", f"the dense net's validation accuracy less {MAX_DROP}"
            ),
            SCRATCH_SCORE_NOTE,
            EXPORT_NOTE,
            *integers_notes(rows, share),
            REPEAT_NOTE,
        ],
        figures=[
            *score_figures(rows, histories),
            ("trade_off", "Accuracy against file size.", trade_off_figure(rows, "accuracy", "test accuracy")),
            (
                "trade_off_onnx",
                "Accuracy against the size of the exported file.",
                trade_off_figure(rows, "accuracy", "test accuracy", size="onnx_bytes"),
            ),
        ],
    )


def _short(arguments: argparse.Namespace) -> str:
    if arguments.fast and not arguments.synthetic:
        return f"Short form: only the intents with '{FAST_TOPIC}' in their name. "
    return ""


def _noise_note(accuracy: float, test: int, validation: int) -> str:
    """Say how large a difference must be to mean something: two standard errors of one accuracy."""
    noise = 2 * (accuracy * (1 - accuracy) / test) ** 0.5
    return (
        f"One test message is {1 / test:.4f}, one validation message {1 / validation:.4f}: with a single seed, "
        f"differences in test accuracy below {max(noise, 0.01):.2f} say nothing."
    )


def _vector_notes(task: Task) -> list[str]:
    if task.vocabulary.vectors is None:
        return []
    return [
        "The small net from scratch begins with the first principal components of MiniLM's vectors, the others with "
        "all of them: what was trained from scratch is the rest."
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="the folder with Banking77's train.csv and test.csv")
    parser.add_argument("--synthetic", action="store_true", help="generated messages in place of the files")
    parser.add_argument(
        "--fast", action="store_true", help=f"only the ten intents about a {FAST_TOPIC}, and not all rows"
    )
    parser.add_argument("--seeds", type=int, default=1, help="train every row with this many seeds")
    parser.add_argument("--no-minilm", action="store_true", help="own word pieces, also where MiniLM is installed")
    parser.add_argument("--teacher", action="store_true", help="let MiniLM teach the net, in place of compressing it")
    parser.add_argument("--report", metavar="DIR", help="where the report is written")
    parser.add_argument("--verbose", action="store_true", help="print what the Trainer and the callbacks say")
    arguments = parser.parse_args(argv)
    if arguments.synthetic and arguments.data:
        parser.error("--data and --synthetic exclude each other")
    if arguments.teacher and (arguments.synthetic or arguments.no_minilm):
        parser.error("--teacher is MiniLM on the real files: without --synthetic and --no-minilm")
    arguments.report = arguments.report or ("reports/intents_teacher" if arguments.teacher else "reports/intents")
    return arguments


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Train, compare, print and write the report; return the table's rows."""
    arguments = parse(argv)
    prepare(threads=THREADS, verbose=arguments.verbose)
    rows, report = run_teacher(arguments) if arguments.teacher else run_compression(arguments)
    report.print()
    print(f"report: {report.write(arguments.report)}")
    return rows


def run_compression(arguments: argparse.Namespace) -> tuple[list[Row], Report]:
    task = build_task(arguments)
    runs = FAST_RUNS if arguments.fast else RUNS
    results = [compare(runs, task, seed=seed) for seed in range(arguments.seeds)]
    rows = [*mean_rows([rows for rows, _ in results]), baseline_row(task.texts)]
    return rows, build_report(rows, results[-1][1], task, arguments)


def run_teacher(arguments: argparse.Namespace) -> tuple[list[Row], Report]:
    minilm = find_teacher()
    task = build_task(arguments)
    rows = compare_with_teacher(task, minilm, seeds=arguments.seeds)
    return rows, teacher_report(rows, task, seeds=arguments.seeds, short=_short(arguments))


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from problem
