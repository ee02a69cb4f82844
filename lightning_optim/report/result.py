"""The result of a comparison: rows of plain values, and their presentations."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group

from lightning_optim.checks import listed
from lightning_optim.files import replace_files
from lightning_optim.measure.rounds import ROUNDS, SAME, LatencyResult
from lightning_optim.report.columns import ENGINES, Column, Row, formatted, label_of
from lightning_optim.report.document import Card, Documented, Report, as_json
from lightning_optim.report.verdict import deployed_engine, verdict
from lightning_optim.tables import Plotted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RESERVED", "ComparisonReport"]

RESERVED = frozenset(
    {"name", "kind", "parameters", "nonzero", "bits", "size_ratio", "bytes", "macs", "P"}
    | {"onnx_bytes", "onnx_agreement", "integer_kernels", "kernels"}
)
"""Keys of a row that metrics cannot use."""

TIMES = ("ms", "ratio", "low", "high", "differs")
PLAIN = (str, int, float, bool, type(None))


@dataclass
class ComparisonReport(Documented, Plotted):
    """The result of :func:`~lightning_optim.compare`; ``print(report)`` shows a table.

    Its plot shows accuracy against size and against time, with the front that no other model beats in both.

    Attributes:
        reference: Name of the row that ratios refer to.
        engines: Engines in which calls were timed; "P" uses the first.
        batch_size: Rows of the larger call; None if the inputs were used as given.
        accuracy: Name of the metric that is A in P.
        metrics: Names of all metrics, in order.
        weights: Weights of the terms of P.
        rows: One dict of plain values per row: ``name``, ``kind`` ("dense", "compressed", "control", "baseline"), the
            metrics (and ``<metric>_std`` over seeds), ``parameters``, ``nonzero``, ``bits`` (over 32), ``size_ratio``
            (S of P), ``bytes`` (compressed ``state_dict``), ``onnx_bytes``, ``onnx_agreement``, ``integer_kernels``,
            ``kernels``, ``macs`` (of one row), ``P``; and per engine ``<engine>_P``, ``<engine>_ms``, ``_ratio``,
            ``_low``, ``_high`` and ``_differs`` of one row, the same after ``<engine>_batch`` of ``batch_size`` rows.
        layers: Model -> facts of its layers, as :func:`~lightning_optim.report.layers.layer_facts` gives them.
        notes: Sentences on this comparison: failed exports, what a number leaves out.
        histories: Model -> one dict of logged metrics per epoch, if they were given.
        environment: Versions and machine.
        seeds: Number of averaged runs.
        samples: Number of held-out samples behind each accuracy, where it is known.
        title: Title of page and Markdown.
        summary: Below the title.

    Examples:
        >>> report = compare({"dense": dense, "int8": int8}, example_inputs, evaluate=accuracy)  # doctest: +SKIP
        >>> report["int8"]["onnxruntime_ratio"]  # of the dense model's time  # doctest: +SKIP
        >>> report.write("reports/int8")  # report.html, report.md and its figures, report.json  # doctest: +SKIP
    """

    reference: str
    engines: list[str]
    batch_size: int | None = None
    accuracy: str = "accuracy"
    metrics: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    layers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    environment: str = ""
    seeds: int = 1
    samples: int | None = None
    title: str = "Models compared"
    summary: str = ""

    def __getitem__(self, name: str) -> Row:
        """Return the row of a name."""
        for row in self.rows:
            if row["name"] == name:
                return row
        raise KeyError(f"no row is called {name!r}; there are {', '.join(str(row['name']) for row in self.rows)}.")

    def add_row(self, name: str, *, kind: str = "baseline", **values: Any) -> None:
        """Add a row of numbers that were found elsewhere, such as a baseline without a net.

        Args:
            name: Of the row, not taken yet.
            kind: "dense", "compressed", "control" or "baseline".
            **values: Under the keys of the other rows; further ones become metrics.

        Raises:
            ValueError: If the name is taken.
            TypeError: If a value is no plain number or text.
        """
        if any(row["name"] == name for row in self.rows):
            raise ValueError(f"there is a row {name!r} already. Choose another name.")
        for key, value in values.items():
            if not isinstance(value, PLAIN):
                raise TypeError(f"a row holds plain numbers and text, got {type(value).__name__} for {key!r}.")
        known = {*self._keys(), *self.metrics, *(f"{metric}_std" for metric in self.metrics)}
        self.metrics += [key for key in values if key not in known and not key.endswith("_std")]
        self.rows.append({"name": name, "kind": kind, **values})

    def _keys(self) -> set[str]:
        timed = {f"{engine}{suffix}_{word}" for engine in self.engines for suffix in ("", "_batch") for word in TIMES}
        return {*RESERVED, *timed, *(f"{engine}_P" for engine in self.engines)}

    # What it is read in.

    def columns(self) -> list[Column]:
        """Return the columns that have values, in the order of the table."""
        columns = [
            Column("name", "model"),
            *(Column(metric, label_of(metric), _metric_form(metric)) for metric in self.metrics),
            *self._score_columns(),
            Column("parameters", "parameters", "{:,.0f}", part="Size and operations"),
            Column("nonzero", "non-zero", "{:,.0f}"),
            Column("bits", "bits / 32", "{:,.0f}"),
            Column("bytes", "state_dict, compressed (bytes)", "{:,.0f}"),
            Column("onnx_bytes", "ONNX file (bytes)", "{:,.0f}"),
            Column("macs", "MACs, one row", "{:,.0f}"),
            Column("kernels", "integer kernels", _kernels),
        ]
        for engine in self.engines:
            columns += self._time_columns(engine)
        return [column for column in columns if any(row.get(column.key) is not None for row in self.rows)]

    def _time_columns(self, engine: str) -> list[Column]:
        one = "one row" if self.batch_size is not None else "one call"
        calls = {"": one, "_batch": f"{self.batch_size} rows"}
        columns = []
        for suffix, words in calls.items():
            key = engine + suffix
            part = f"Time of a call in {ENGINES.get(engine, engine)}" if not suffix else ""
            columns += [
                Column(f"{key}_ms", f"{words} (ms)", "{:#.4g}", part=part),
                Column(f"{key}_ratio", f"{words} / {self.reference}", _ratio_form(key)),
            ]
        return columns

    def _score_columns(self) -> list[Column]:
        """Return P by each engine, that of the deployed file first."""
        deployed = deployed_engine(self.engines, self.rows)
        order = sorted(self.engines, key=lambda engine: engine != deployed)
        if not any(f"{engine}_P" in row for engine in order for row in self.rows):
            return [Column("P", "P", "{:.3f}")]
        return [Column(f"{engine}_P", f"P by {ENGINES.get(engine, engine)}", "{:.3f}") for engine in order]

    def reading(self) -> list[str]:
        """Return the sentences that say how the numbers are to be read, then the notes."""
        sentences = []
        if self.seeds > 1:
            sentences.append(
                f"Means over {self.seeds} runs; ± is the standard deviation over them, and the range of a time ratio "
                "that over all of them."
            )
        if any(row.get(f"{engine}_ratio") is not None for row in self.rows for engine in self.engines):
            sentences.append(
                f"Times are on one thread, and ratios to {self.reference} from calls of all models that take turns; in "
                f"brackets the range over {ROUNDS} rounds, in each of which every model lies elsewhere in memory. “No "
                f"difference”: the ratio is within {SAME:g} of 1, or its range includes 1. The range beside "
                f"{self.reference} is that of the model against itself at another place, widened to include 1: the "
                "noise. A range that overlaps it is extended to include 1."
            )
        if any(row.get("P") is not None for row in self.rows):
            sentences.append(self._words_of_score())
        if any(_has_zeros(row) for row in self.rows):
            sentences.append("Zeros make the compressed file smaller; dense kernels multiply them like other numbers.")
        return [*sentences, *self.notes]

    def _words_of_score(self) -> str:
        parts = {
            "size": f"size / that of {self.reference}",
            "train_time": "training time",
            "inference_time": f"time of a call in {ENGINES.get(self.engines[0], self.engines[0])} / same",
            "accuracy": f"(1 - {self.accuracy})",
        }
        words = " + ".join(f"{weight:g} {parts[name]}" for name, weight in self.weights.items() if weight)
        return f"P = {words}; lower is better. Without a floor under the accuracy an empty model would win: set one."

    def as_document(self, *, figures: bool = False) -> Report:
        """Return the report as title, table, notes and figures.

        Args:
            figures: Whether figures are drawn, which needs matplotlib (the extra ``report``).
        """
        document = Report(self.title, self.summary, self.columns(), self.rows, self.reading(), footer=self.environment)
        document.verdict = self.verdict()
        document.cards = self._cards()
        if figures:
            from lightning_optim.report.figures import comparison_figures, layer_sections

            document.figures = comparison_figures(self)
            document.sections = layer_sections(self)
        return document

    def verdict(self) -> list[str]:
        """Return a sentence per compressed model: size, time in the deployed engine and accuracy beside the reference.

        Two accuracies are told apart by more than two standard errors: of the runs' spread where there are several
        ``seeds``, else of ``samples`` independent samples, where their number is known.
        """
        return verdict(self)

    def _cards(self) -> list[Card]:
        """Return what each compressed model costs beside the reference, in a few numbers."""
        known = {row["name"]: row for row in self.rows}
        reference = known.get(self.reference, {})
        made = [row for row in self.rows if row["kind"] not in ("dense", "control", "baseline")]
        cards = [Card(row["name"], self._headlines(row, reference)) for row in made if row is not reference]
        return [card for card in cards if card.facts]

    def _headlines(self, row: Row, reference: Row) -> list[tuple[str, str]]:
        facts = []
        if _is_number(row.get(self.accuracy)) and _is_number(reference.get(self.accuracy)):
            facts.append((f"{row[self.accuracy] - reference[self.accuracy]:+.4f}", label_of(self.accuracy)))
        size = "onnx_bytes" if _is_known(row, reference, "onnx_bytes") else "bytes"
        if _is_known(row, reference, size):
            facts.append((f"{row[size] / reference[size]:.2f}x", "ONNX file" if size == "onnx_bytes" else "file"))
        for engine in self.engines:
            if _is_number(row.get(f"{engine}_ratio")):
                same = row.get(f"{engine}_differs") is False
                facts.append(
                    ("same" if same else f"{row[f'{engine}_ratio']:.2f}x", f"time, {ENGINES.get(engine, engine)}")
                )
        return facts

    def table(self) -> Group:
        """Return the table for rich, in parts where it is wider than the terminal, with the notes below it."""
        return self.as_document().as_rich(Console().width)

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html``, ``report.md`` with its figures as files, and ``report.json`` (see :meth:`load`).

        Returns:
            The path of the page.

        Raises:
            ImportError: If matplotlib is missing; the text names the extra.
        """
        return self.as_document(figures=True).write(folder, {"report.json": self.to_json()})

    def _figure(self) -> "Figure":
        from lightning_optim.report.figures import trade_offs

        return trade_offs(self)

    def to_dataframe(self) -> Any:
        """Return the rows as a pandas DataFrame.

        Raises:
            ImportError: If pandas is missing.
        """
        try:
            import pandas  # type: ignore[import-untyped, import-not-found, unused-ignore]
        except ImportError as error:
            raise ImportError("a DataFrame needs pandas, which is not installed: pip install pandas.") from error
        return pandas.DataFrame(self.rows)

    def to_json(self) -> str:
        """Return everything as JSON; what is not finite is null."""
        return as_json(asdict(self))

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        replace_files({Path(path): self.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> "ComparisonReport":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is no saved comparison.
        """
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {entry.name for entry in fields(cls)}
        if not isinstance(found, dict) or not {"reference", "engines", "rows"} <= found.keys() <= names:
            raise ValueError(f"{str(path)!r} is no comparison that ComparisonReport.save wrote.")
        return cls(**found)

    @classmethod
    def mean(cls, reports: "Sequence[ComparisonReport]") -> "ComparisonReport":
        """Average the reports of several runs, such as seeds.

        Metrics get their standard deviation as ``<metric>_std``; other numbers are means; the range of a time ratio is
        that over all runs. What is no number, and the histories, are the first run's. A number that some runs lack (a
        model that one seed could not export; NaN counts as lacking) is the mean of those that have it, and a note says
        in how many.

        Args:
            reports: At least one, of one run each, of the same rows, reference, engines, batch size, accuracy and
                weights.

        Raises:
            TypeError: If they are no list of reports.
            ValueError: If there is none, they differ, or one is a mean already.
        """
        given: list[ComparisonReport] = listed("reports", reports, "ComparisonReport")
        _check_like(given)
        first, metrics = given[0], list(dict.fromkeys(metric for report in given for metric in report.metrics))
        notes = list(dict.fromkeys(note for report in given for note in report.notes))
        rows = []
        for same in zip(*(report.rows for report in given), strict=True):
            rows.append(_mean_row(same, metrics))
            notes += _lacking(same)
        names = dict.fromkeys(name for report in given for name in report.layers)
        layers = {name: _mean_layers([r.layers[name] for r in given if r.layers.get(name)]) for name in names}
        return replace(first, metrics=metrics, rows=rows, layers=layers, notes=notes, seeds=len(given))


def _has_zeros(row: Row) -> bool:
    nonzero, parameters = row.get("nonzero"), row.get("parameters")
    return _is_number(nonzero) and _is_number(parameters) and nonzero < 0.9 * parameters  # type: ignore[operator]


def _is_known(row: Row, reference: Row, key: str) -> bool:
    return all(_is_number(each.get(key)) and each[key] for each in (row, reference))


def _metric_form(metric: str) -> Callable[[Row], str]:
    def form(row: Row) -> str:
        spread = row.get(f"{metric}_std")
        return formatted(row[metric], "{:#.4g}") + ("" if spread is None else f" ± {formatted(spread, '{:.2g}')}")

    return form


def _ratio_form(key: str) -> Callable[[Row], str]:
    def form(row: Row) -> str:
        ratio, low, high = (formatted(row.get(f"{key}_{word}"), "{:.2f}") for word in ("ratio", "low", "high"))
        span = "" if "-" in (low, high) else f" [{low}, {high}]"
        return f"{ratio}{span}" + (" no difference" if row.get(f"{key}_differs") is False else "")

    return form


def _kernels(row: Row) -> str:
    return " of ".join(formatted(row.get(key), "{:.0f}") for key in ("integer_kernels", "kernels"))


ALIKE = ("reference", "engines", "batch_size", "accuracy", "weights")
"""What reports must have in common to be averaged."""


def _check_like(reports: Sequence[ComparisonReport]) -> None:
    """Check that reports can be averaged."""
    if not reports:
        raise ValueError("`reports` is empty: give at least one.")
    for report in reports:
        if not isinstance(report, ComparisonReport):
            raise TypeError(f"`reports` must be a list of ComparisonReport, got {type(report).__name__} in it.")
        if report.seeds != 1:
            raise ValueError(
                f"`reports` must be of one run each, got a mean over {report.seeds}. Pass the single-seed reports, all "
                "at once: a mean of means has neither their spread nor their weights."
            )
    for name in ALIKE:
        found = [getattr(report, name) for report in reports]
        if any(each != found[0] for each in found):
            other = next(each for each in found if each != found[0])
            raise ValueError(
                f"`reports` must have the same {name}, got {found[0]!r} and {other!r}. Average those that share it."
            )
    names = [[row["name"] for row in report.rows] for report in reports]
    if any(other != names[0] for other in names):
        raise ValueError(f"reports of the same rows can be averaged, got {' and '.join(map(str, names))}.")


def _mean_row(same: Sequence[Row], metrics: Sequence[str]) -> Row:
    means: Row = {}
    for key in _keys_of(same):
        values = [row.get(key) for row in same]
        means[key] = _mean_of(values)
        spread = _spread(values) if key in metrics else None
        means |= {} if spread is None else {f"{key}_std": spread}
    for key in [key.removesuffix("_differs") for key in means if key.endswith("_differs")]:
        means |= _range(key, means, same)
    return means


def _keys_of(same: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in same for key in row))


def _lacking(same: Sequence[Row]) -> list[str]:
    """Return a sentence for each number of runs that have what others lack."""
    lacking: dict[int, list[str]] = {}
    for key in _keys_of(same):
        count = len(_numbers([row.get(key) for row in same]))
        if 0 < count < len(same) and not key.endswith(("_ratio", "_low", "_high")):
            lacking.setdefault(count, []).append(key)
    return [
        f"{same[0]['name']}: means over {count} of {len(same)} runs, which alone have it: {', '.join(keys)}."
        for count, keys in lacking.items()
    ]


def _range(key: str, means: Row, same: Sequence[Row]) -> Row:
    """Return the range of a ratio over all runs, and whether the mean differs from 1 by more than the noise."""
    lows, highs = (_numbers([row.get(f"{key}_{word}") for row in same]) for word in ("low", "high"))
    ratio, milliseconds = means.get(f"{key}_ratio"), means.get(f"{key}_ms")
    if not (lows and highs and _is_number(ratio) and _is_number(milliseconds)):
        return {}
    low, high = min(lows), max(highs)
    differs = LatencyResult(milliseconds, ratio=ratio, low=low, high=high).differs  # type: ignore[arg-type]
    return {f"{key}_low": low, f"{key}_high": high, f"{key}_differs": differs}


def _mean_layers(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Average the facts of each layer; the first run's where the runs have not the same layers."""
    if any([facts["layer"] for facts in run] != [facts["layer"] for facts in runs[0]] for run in runs):
        return runs[0]
    return [{key: _mean_of([facts.get(key) for facts in same]) for key in same[0]} for same in zip(*runs, strict=True)]


def _mean_of(values: Sequence[Any]) -> Any:
    """Return the mean of the numbers; where there is none, the first that is something."""
    numbers = _numbers(values)
    if not numbers:
        return next((value for value in values if value is not None), None)
    return fmean(numbers) if all(map(isfinite, numbers)) else sum(numbers) / len(numbers)


def _spread(values: Sequence[Any]) -> float | None:
    """Return the standard deviation over the runs that have a number; None where that says nothing."""
    numbers = _numbers(values)
    return stdev(numbers) if len(numbers) > 1 and all(map(isfinite, numbers)) else None


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in values if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
