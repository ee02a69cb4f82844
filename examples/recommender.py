"""Prune and quantize a two-tower recommender on the Online Retail transactions, beside what needs no net at all.

For each customer the net ranks the whole catalogue for the next basket. Run it with
``python examples/recommender.py --data PATH``, or with ``--synthetic`` where the file is not at hand.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from exported import EXPORT_COLUMNS, EXPORT_NOTE, ExportedFiles, rounding_notes
from lightning_optim import (
    ChannelPruning,
    DistillationModule,
    PerformanceScore,
    WeightPruning,
    measure_latency,
    quantize_post_training,
)
from online_retail import find_file, merge_repeats, purchases, read_transactions
from ranking import ranking_metrics
from recommender_baselines import BASELINES
from recommender_data import TEST, VALIDATION, NextBasket, Task, build_task, loader, relevant_and_seen
from recommender_model import RAGGED, Serving, TwoTower, padded
from reporting import (
    COST_COLUMNS,
    REPEAT_NOTE,
    SCORE_COLUMN,
    SCRATCH_SCORE_NOTE,
    Column,
    History,
    Report,
    Row,
    latency_facts,
    model_facts,
    no_speed_note,
    prepare,
    score_against,
    score_figures,
    score_note,
    speed_note,
    trade_off_figure,
)
from synthetic_retail import generate_purchases

EPOCHS = 3  # in a fourth, recall over all items falls again on the validation customers
BATCH_SIZE = 64
FAST_CUSTOMERS = 1000
THREADS = 1  # two threads save a third on an idle machine, and cost many times the time on a busy one
ACCURACY = "val_new_recall"  # what P judges: over all items buying again hides what a net has lost
FLOOR = 0.85  # of the dense tower's
TABLES_AND_MATRICES = [nn.EmbeddingBag, nn.Linear]  # embeddings and the last layer are left alone unless named
CATALOGUE = ["item"]  # the item table reads the embedding width, and its outputs are the items: all of them stay
TABLES = ["history", "item"]
CALIBRATION_BATCHES = 16
COMPARED_BATCHES = 4  # of held-out customers, in PyTorch and in ONNX Runtime


@dataclass(frozen=True)
class Tower:
    """Size of a tower, and the learning rate chosen for it on the validation customers."""

    width: int
    hidden: tuple[int, ...]
    learning_rate: float

    def build(self, items: int) -> TwoTower:
        return TwoTower(items, width=self.width, hidden=self.hidden, learning_rate=self.learning_rate)


Inputs = dict[str, Tensor]
Pruning = Callable[[Inputs], pl.Callback]
"""Makes a callback, given what the tower's forward receives."""


def zeros(criterion: str = "taylor") -> Pruning:
    """Prune four fifths of the single weights."""
    return lambda inputs: WeightPruning(0.8, criterion=criterion, include=TABLES_AND_MATRICES, every_n_steps=20)


def channels(*, embedding: bool) -> Pruning:
    """Prune half of the hidden units, and half of the embedding's columns where asked.

    The same fraction of each, so that a tower from scratch can have the same shape; ranked together, nearly all that
    leaves is hidden units.
    """
    selection = {"include": TABLES_AND_MATRICES, "exclude": CATALOGUE} if embedding else {}
    return lambda inputs: ChannelPruning(0.5, criterion="taylor", scope="layer", example_inputs=inputs, **selection)


Quantization = Callable[[Serving, Task], Serving]
"""Quantizes a trained tower, given the task that has its training baskets."""


def tables(bits: int) -> Quantization:
    """Round both tables, row by row; needs no data."""
    return lambda model, task: quantize_post_training(
        model, weight_bits=bits, activation_bits=None, include=TABLES, progress_bar=False
    )


def all_layers(model: Serving, task: Task) -> Serving:
    """Round weights and inputs of all layers to 8 bits, with ranges from some training batches."""
    batches = loader(task.train, task.popularity, batch_size=BATCH_SIZE, train=True)
    return quantize_post_training(
        model, batches, inputs=lambda batch: padded(batch["inputs"]), batches=CALIBRATION_BATCHES, progress_bar=False
    )


@dataclass(frozen=True)
class Run:
    """A row of the table: its name, what it is in the comparison, its tower, how that is pruned or quantized.

    Attributes:
        name: In the table.
        kind: As a row has it.
        tower: What is trained.
        pruning: Makes the callback.
        against: The dense tower it is compared with; its own unless it was small from the start.
        teacher: Name of the row whose trained towers teach this one.
        of: Name of the row whose trained towers are quantized; such a row is not trained.
        quantization: Of those.
        exported: Whether it is exported and measured in ONNX Runtime too.
    """

    name: str
    kind: str
    tower: Tower
    pruning: Pruning | None = None
    against: Tower | None = None
    teacher: str = ""
    of: str = ""
    quantization: Quantization | None = None
    exported: bool = False

    @property
    def dense(self) -> Tower:
        return self.against or self.tower


def _rounded(name: str, tower: Tower, of: str, quantization: Quantization) -> Run:
    return Run(name, "integer", tower, of=of, quantization=quantization, exported=True)


LARGE = Tower(256, (1024, 1024), 5e-4)
HALF = Tower(128, (512, 512), 5e-4)  # that of the large one: twice the rate trades all items (-.005) for new (+.022)
SMALL = Tower(64, (128,), 1.5e-3)
HALF_SMALL = Tower(32, (64,), 1.5e-3)
LARGE_RUNS = (
    Run("large", "dense", LARGE, exported=True),
    Run("large, 80 % zeros", "pruned", LARGE, zeros()),
    Run("large, half the hidden units", "pruned", LARGE, channels(embedding=False)),
    Run("large, half of every width", "pruned", LARGE, channels(embedding=True), exported=True),
    Run("the same shape from scratch", "control", HALF, against=LARGE),
    _rounded("large, int8 tables", LARGE, "large", tables(8)),
    _rounded("large, half of every width, int8", LARGE, "large, half of every width", all_layers),
)
SMALL_RUNS = (
    Run("small", "dense", SMALL, exported=True),
    Run("small, 80 % zeros", "pruned", SMALL, zeros()),
    Run("small, 80 % at random", "control", SMALL, zeros("random")),
)
ALL_RUNS = (
    *LARGE_RUNS,
    *SMALL_RUNS,
    Run("small, taught by large", "distilled", SMALL, teacher="large"),
    _rounded("small, 4-bit tables", SMALL, "small", tables(4)),
    _rounded("small, int8", SMALL, "small", all_layers),
    _rounded("small, taught by large, int8", SMALL, "small, taught by large", all_layers),
)
FAST_RUNS = (
    *SMALL_RUNS,
    Run("small, half of every width", "pruned", SMALL, channels(embedding=True), exported=True),
    Run("the same shape from scratch", "control", HALF_SMALL, against=SMALL),
    Run("the same shape, taught by small", "distilled", HALF_SMALL, against=SMALL, teacher="small"),
    _rounded("small, int8 tables", SMALL, "small", tables(8)),
    _rounded("small, half of every width, int8", SMALL, "small, half of every width", all_layers),
)


def load_purchases(arguments: argparse.Namespace) -> pd.DataFrame:
    """Return the real purchases, or generated ones; with ``--fast`` those of some customers."""
    if arguments.synthetic:
        return generate_purchases(seed=arguments.seed)
    path = find_file(arguments.data)
    print(f"reading {path}")
    rows = merge_repeats(purchases(read_transactions(path)))
    if not arguments.fast:
        return rows
    customers = np.sort(rows["customer"].unique())
    chosen = np.random.default_rng(arguments.seed).choice(customers, FAST_CUSTOMERS, replace=False)
    return rows[rows["customer"].isin(chosen)]


def fit(
    run: Run,
    task: Task,
    callbacks: Sequence[pl.Callback],
    *,
    seed: int,
    validate: bool,
    teacher: TwoTower | None = None,
) -> TwoTower:
    """Train a tower on the baskets before the cut: a plain Trainer with our callbacks, and a teacher where given."""
    pl.seed_everything(seed, verbose=False)
    model = run.tower.build(len(task.items))
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=5.0,
        limit_val_batches=1.0 if validate else 0,
        callbacks=[*([run.pruning(one_customer(task))] if run.pruning else []), *callbacks],
    )
    trainer.fit(
        model if teacher is None else DistillationModule(model, teacher, alpha=0.5, temperature=1.0),
        loader(task.train, task.popularity, batch_size=BATCH_SIZE, train=True, seed=seed),
        loader(task.evaluation, task.popularity, batch_size=BATCH_SIZE),
    )
    return model


def one_customer(task: Task) -> Inputs:
    """Return the inputs of one real customer, with a history of median length."""
    lengths = np.diff(task.evaluation.starts)
    median = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    return NextBasket(task.evaluation, task.popularity)[median]["inputs"]


def score_run(
    run: Run, validation: Task, floor: float | None, seed: int, teacher: TwoTower | None
) -> tuple[TwoTower, History, Row]:
    """Train up to the validation cut.

    Returns:
        The tower, what was logged, and P and its accuracy on the validation customers.
    """
    history = History()
    score = PerformanceScore(ACCURACY, size="nonzero", min_accuracy=floor, example_inputs=one_customer(validation))
    model = fit(run, validation, [score, history], seed=seed, validate=True, teacher=teacher)
    last = history.epochs[-1]
    return model, history, {"P": last["P/unguarded"], "feasible": last["P/feasible"], ACCURACY: last[ACCURACY]}


def rank(model: TwoTower | Serving, task: Task) -> Tensor:
    """Score the catalogue for every customer of the evaluation."""
    model.eval()
    arrange = padded if isinstance(model, Serving) else dict
    with torch.no_grad():
        batches = loader(task.evaluation, task.popularity, batch_size=BATCH_SIZE)
        return torch.cat([model(**arrange(batch["inputs"])) for batch in batches])


def judge(model: TwoTower | Serving, task: Task) -> Row:
    """Judge what a tower ranks first for the customers of the evaluation."""
    relevant, seen = relevant_and_seen(task.evaluation, len(task.items))
    return ranking_metrics(rank(model, task), relevant, seen)


def compare(runs: Sequence[Run], validation: Task, test: Task, *, seed: int) -> tuple[list[Row], dict[str, History]]:
    """Train or quantize all runs, and measure each against the dense one of its tower."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(folder, validation, test, seed=seed)
        for run in runs:
            row = comparison.quantize(run) if run.of else comparison.train(run)
            if run.exported:
                row |= comparison.export(run, row[ACCURACY])
            rows.append({"name": run.name, "kind": run.kind, **row})
    return rows, comparison.histories


class Comparison:
    """The towers of one comparison, trained to both cuts, and as they are deployed: with padded customers.

    Args:
        folder: Where the exported files go.
        validation: Its towers are those that P judges.
        test: Its towers are those of the other columns, and exported.
        seed: Of all trainings.
    """

    def __init__(self, folder: str, validation: Task, test: Task, *, seed: int) -> None:
        self.validation, self.test, self.seed = validation, test, seed
        customers = loader(test.evaluation, test.popularity, batch_size=BATCH_SIZE)
        held_out = [padded(batch["inputs"]) for batch in islice(customers, COMPARED_BATCHES)]
        one = padded(one_customer(test))
        self.files = ExportedFiles(folder, one, [one, *held_out], {name: {1: "entries"} for name in RAGGED})
        self.histories: dict[str, History] = {}
        self.dense: dict[Tower, tuple[str, TwoTower, Row]] = {}
        self.trained: dict[str, tuple[TwoTower, TwoTower]] = {}
        self.towers: dict[str, tuple[Serving, Serving]] = {}

    def train(self, run: Run) -> Row:
        """Train a run to both cuts."""
        print(f"training: {run.name}, to {VALIDATION[0]:%Y-%m-%d} for P and to {TEST[0]:%Y-%m-%d} for the test")
        floor = FLOOR * self.dense[run.dense][2][ACCURACY] if run.dense in self.dense else None
        teachers = self.trained.get(run.teacher, (None, None))
        scored, history, row = score_run(run, self.validation, floor, self.seed, teachers[0])
        model = fit(run, self.test, [], seed=self.seed, validate=False, teacher=teachers[1])
        if run.dense not in self.dense:  # a copy: against itself a model would find its weights in the cache
            self.dense[run.dense] = run.name, copy.deepcopy(model), row
        _, against, dense_row = self.dense[run.dense]
        row |= test_facts(model, against, self.test)
        if run.against is not None:
            row["P"] = score_against(row, dense_row, row[ACCURACY])
            history.forget_ratios()
        self.histories[run.name], self.trained[run.name] = history, (scored, model)
        self.towers[run.name] = Serving(scored), Serving(model)
        return row

    def quantize(self, run: Run) -> Row:
        """Quantize copies of both towers of an earlier run."""
        print(f"quantizing: {run.name}")
        scored, model = copy.deepcopy(self.towers[run.of])
        self.towers[run.name] = run.quantization(scored, self.validation), run.quantization(model, self.test)
        return {**judge(model, self.test), ACCURACY: judge(scored, self.validation)["new_recall"]}

    def export(self, run: Run, accuracy: float) -> Row:
        """Export the tower that was trained to the test cut, and measure the file."""
        return self.files.add(run.name, self.towers[run.name][1], dense=self.dense[run.dense][0], accuracy=accuracy)


def test_facts(model: TwoTower, against: TwoTower, test: Task) -> Row:
    """Judge a tower on the test customers, and measure what it costs."""
    latency = measure_latency(model, one_customer(test), against=against, batch_size=None)
    return judge(model, test) | model_facts(model) | latency_facts(latency)


def baseline_rows(test: Task) -> list[Row]:
    """Judge the rankings that need no net."""
    relevant, seen = relevant_and_seen(test.evaluation, len(test.items))
    return [
        {"name": name, "kind": "baseline", **ranking_metrics(torch.from_numpy(scores(test)), relevant, seen)}
        for name, scores in BASELINES.items()
    ]


def integers_notes(rows: list[Row]) -> list[str]:
    """Say what rounding costs and what it saves, from what was measured."""
    shown = {row["name"] for row in rows}
    sources = {run.name: run.of for run in (*ALL_RUNS, *FAST_RUNS) if run.of and run.name in shown}
    notes = [
        "Exported towers take customers padded to one length, since engines know no ragged bags; the class that is "
        "compared is the item ranked first. Tables alone are rounded by rows, without any data; their products stay "
        "float. int8 without 'tables' rounds weights and inputs of all layers, with ranges from "
        f"{CALIBRATION_BATCHES} training batches.",
        *rounding_notes(rows, sources, "new_recall", "recall of new items"),
    ]
    if any("4-bit" in name for name in sources):
        notes.append(
            "Weights of fewer than 8 bits lie in 8-bit containers: P, exported, counts their bits, the file does not."
        )
    return notes


def build_report(rows: list[Row], histories: dict[str, History], test: Task, source: str) -> Report:
    """Arrange the rows as a report."""
    relevant, seen = relevant_and_seen(test.evaluation, len(test.items))
    again = (relevant & seen).sum() / relevant.sum()
    return Report(
        title=f"Next-basket recommender on {source}, pruned and quantized",
        summary=(
            f"{len(test.train):,} baskets before {TEST[0]:%Y-%m-%d}; for each of {len(test.evaluation):,} customers "
            f"all {len(test.items):,} items are ranked for the first basket after it, from what was known before. "
            "Metrics are those of the first 20; 'new' leaves out what the customer had bought before."
        ),
        columns=[
            Column("name", "model"),
            *COST_COLUMNS,
            Column("recall", "recall", "{:.4f}"),
            Column("ndcg", "NDCG", "{:.4f}"),
            Column("hit_rate", "hit rate", "{:.3f}"),
            Column("new_recall", "recall, new", "{:.4f}"),
            Column("new_ndcg", "NDCG, new", "{:.4f}"),
            SCORE_COLUMN,
            *EXPORT_COLUMNS,
        ],
        rows=rows,
        notes=[
            no_speed_note(rows),
            speed_note(rows),
            f"{again:.0%} of the items asked for had been bought before by the same customer, so buying again is hard "
            "to beat over all items. What a recommender adds shows among the new ones.",
            "Zeros and channels are chosen by weight x gradient (taylor) unless the row says otherwise: most rows of "
            "the tables get a gradient only now and then, and their size says more about how they were initialised.",
            "A smaller dense tower is the control of a large pruned one: compare its parameters with the non-zeros, or "
            "with the parameters where channels left. The one of the same shape keeps the pruned one's learning rate: "
            "on the validation customers a higher one moved every tower from recall over all items to new ones.",
            f"Every net is trained twice in the same way: up to {VALIDATION[0]:%Y-%m-%d} for P, up to "
            f"{TEST[0]:%Y-%m-%d} for the other columns. Nothing is chosen on the test customers.",
            score_note(
                "with the recall of new items on the validation customers as accuracy (first baskets from "
                f"{VALIDATION[0]:%Y-%m-%d} on), against the dense start of each run",
                f"{FLOOR} of the dense tower's",
            ),
            SCRATCH_SCORE_NOTE,
            EXPORT_NOTE,
            *integers_notes(rows),
            REPEAT_NOTE,
        ],
        figures=[
            *score_figures(rows, histories),
            (
                "trade_off_new",
                "Recall among new items against file size.",
                trade_off_figure(rows, "new_recall", "recall@20, new items"),
            ),
            ("trade_off", "Recall over all items against file size.", trade_off_figure(rows, "recall", "recall@20")),
            (
                "trade_off_onnx",
                "Recall among new items against the size of the exported file.",
                trade_off_figure(rows, "new_recall", "recall@20, new items", size="onnx_bytes"),
            ),
        ],
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="the Online Retail file (.xlsx, .csv, .csv.gz), or its folder")
    parser.add_argument("--synthetic", action="store_true", help="a generated shop in place of the file")
    parser.add_argument("--fast", action="store_true", help=f"the small tower on {FAST_CUSTOMERS:,} customers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", default="reports/recommender", metavar="DIR", help="where the report is written")
    parser.add_argument("--verbose", action="store_true", help="print what the Trainer and the callbacks say")
    arguments = parser.parse_args(argv)
    if arguments.synthetic and arguments.data:
        parser.error("--data and --synthetic exclude each other")
    return arguments


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Train, compare, print and write the report; return the table's rows."""
    arguments = parse(argv)
    prepare(threads=THREADS, verbose=arguments.verbose)
    bought = load_purchases(arguments)
    validation, test = build_task(bought, *VALIDATION), build_task(bought, *TEST)
    runs = FAST_RUNS if arguments.fast or arguments.synthetic else ALL_RUNS
    rows, histories = compare(runs, validation, test, seed=arguments.seed)
    rows += baseline_rows(test)
    source = "a generated shop" if arguments.synthetic else "Online Retail"
    report = build_report(rows, histories, test, source)
    report.print()
    print(f"report: {report.write(arguments.report)}")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from problem
