"""What a comparison found: rows of plain values, and the forms they are read in."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult

from lightning_optim.measure.latency import SAME, LatencyResult
from lightning_optim.report.columns import Column, Row
from lightning_optim.report.document import Card, Report, as_json, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ENGINES", "RESERVED", "ComparisonReport"]

ENGINES: Mapping[str, str] = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""How engines are called in a table."""

RESERVED = frozenset(
    {"name", "kind", "parameters", "nonzero", "bits", "size_ratio", "bytes", "macs", "P"}
    | {"onnx_bytes", "onnx_agreement", "integer_kernels", "kernels"}
)
"""Keys of a row that a metric cannot have."""

TIMES = ("ms", "ratio", "low", "high", "differs")
PLAIN = (str, int, float, bool, type(None))


@dataclass
class ComparisonReport:
    """What :func:`~lightning_optim.compare` measured; ``print(report)`` is a table.

    Attributes:
        reference: Name of the row that ratios are taken against.
        engines: In which calls were timed; the first one's time is in "P".
        batch_size: Rows of the larger call; None where the inputs were taken as given.
        accuracy: Name of the metric that is A in P.
        metrics: Names of all metrics, in order.
        weights: Of the terms of P.
        rows: One dict of plain values per row: ``name``, ``kind`` ("dense", "compressed", "control", "baseline"), the
            metrics (and ``<metric>_std`` over seeds), ``parameters``, ``nonzero``, ``bits`` (over 32), ``size_ratio``
            (S of P), ``bytes`` (compressed ``state_dict``), ``onnx_bytes``, ``onnx_agreement``, ``integer_kernels``,
            ``kernels``, ``macs`` (of one row), ``P``; and per engine ``<engine>_P``, ``<engine>_ms``, ``_ratio``,
            ``_low``, ``_high`` and ``_differs`` of one row, the same after ``<engine>_batch`` of ``batch_size`` rows.
        layers: Model -> facts of its layers, as :func:`~lightning_optim.report.layers.layer_facts` gives them.
        notes: Sentences on this comparison: what could not be exported, what a number leaves out.
        histories: Model -> one dict of logged metrics per epoch, where they were given.
        environment: Versions and machine.
        seeds: How many runs were averaged.
        title: Of page and Markdown.
        summary: Below the title.
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
            *(Column(metric, metric, _metric_form(metric)) for metric in self.metrics),
            Column("P", "P", "{:.3f}"),
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
        return [*columns, Column(f"{engine}_P", f"P by {ENGINES.get(engine, engine)}", "{:.3f}")]

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
                f"Times are on one thread, and ratios to {self.reference} from calls that take turns; in brackets the "
                f"range over five rounds. “No difference”: nearer to 1 than {SAME:g}, or a range that holds 1. The "
                f"range beside {self.reference} is that of the model against itself: the noise."
            )
        if any(row.get("P") is not None for row in self.rows):
            sentences.append(self._words_of_score())
        if any(row.get("nonzero", 0) < 0.9 * row.get("parameters", 0) for row in self.rows):
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
        document.cards = self._cards()
        if figures:
            from lightning_optim.report.figures import comparison_figures, layer_sections

            document.figures = comparison_figures(self)
            document.sections = layer_sections(self)
        return document

    def _cards(self) -> list[Card]:
        """Return what each compressed model costs beside the reference, in a few numbers."""
        known = {row["name"]: row for row in self.rows}
        reference = known.get(self.reference, {})
        made = [row for row in self.rows if row["kind"] not in ("dense", "control", "baseline")]
        cards = [Card(row["name"], self._headlines(row, reference)) for row in made if row is not reference]
        return [card for card in cards if card.facts]

    def _headlines(self, row: Row, reference: Row) -> list[tuple[str, str]]:
        facts = []
        if row.get(self.accuracy) is not None and reference.get(self.accuracy) is not None:
            facts.append((f"{row[self.accuracy] - reference[self.accuracy]:+.4f}", self.accuracy))
        size = "onnx_bytes" if row.get("onnx_bytes") and reference.get("onnx_bytes") else "bytes"
        if row.get(size) and reference.get(size):
            facts.append((f"{row[size] / reference[size]:.2f}x", "ONNX file" if size == "onnx_bytes" else "file"))
        for engine in self.engines:
            if row.get(f"{engine}_ratio") is not None:
                same = row.get(f"{engine}_differs") is False
                facts.append(
                    ("same" if same else f"{row[f'{engine}_ratio']:.2f}x", f"time, {ENGINES.get(engine, engine)}")
                )
        return facts

    def table(self) -> Group:
        """Return the table for rich, in parts where it is wider than the terminal, with the notes below it."""
        return self.as_document().as_rich(Console().width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table as wide as the console is."""
        yield self.as_document().as_rich(options.max_width)

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def to_markdown(self) -> str:
        """Return tables and notes as Markdown."""
        return self.as_document().to_markdown()

    def to_html(self, path: str | Path | None = None) -> str:
        """Return one self-contained page with tables, notes and figures, and write it where a path is given.

        Raises:
            ImportError: If matplotlib is missing; the text names the extra.
        """
        page = self.as_document(figures=True).to_html()
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html``, ``report.md`` with its figures as files, and ``report.json`` (see :meth:`load`).

        Returns:
            The path of the page.

        Raises:
            ImportError: If matplotlib is missing; the text names the extra.
        """
        page = self.as_document(figures=True).write(folder)
        replace_file(page.with_name("report.json"), self.to_json())
        return page

    def plot(self) -> "Figure":
        """Draw accuracy against size and against time, with the front that no other model beats in both.

        Raises:
            ImportError: If matplotlib is missing; the text names the extra.
        """
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
        Path(path).write_text(self.to_json(), encoding="utf-8")

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
        that over all runs. What is no number, and the histories, are the first run's.

        Args:
            reports: At least one, with the same rows.

        Raises:
            ValueError: If there is none, or their rows differ.
        """
        if not reports:
            raise ValueError("`reports` is empty: give at least one.")
        first = reports[0]
        names = [[row["name"] for row in report.rows] for report in reports]
        if any(other != names[0] for other in names):
            raise ValueError(f"reports of the same rows can be averaged, got {' and '.join(map(str, names))}.")
        rows = [_mean_row(same, first.metrics) for same in zip(*(report.rows for report in reports), strict=True)]
        layers = {name: _mean_layers([report.layers.get(name, []) for report in reports]) for name in first.layers}
        notes = list(dict.fromkeys(note for report in reports for note in report.notes))
        return replace(first, rows=rows, layers=layers, notes=notes, seeds=sum(report.seeds for report in reports))


def _metric_form(metric: str) -> Callable[[Row], str]:
    def form(row: Row) -> str:
        spread = row.get(f"{metric}_std")
        return f"{row[metric]:#.4g}" + ("" if spread is None else f" ± {spread:.2g}")

    return form


def _ratio_form(key: str) -> Callable[[Row], str]:
    def form(row: Row) -> str:
        ratio, low, high = (row.get(f"{key}_{word}") for word in ("ratio", "low", "high"))
        span = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
        return f"{ratio:.2f}{span}" + (" no difference" if row.get(f"{key}_differs") is False else "")

    return form


def _kernels(row: Row) -> str:
    return f"{row['integer_kernels']:.0f} of {row['kernels']:.0f}"


def _mean_row(same: Sequence[Row], metrics: Sequence[str]) -> Row:
    means: Row = {}
    for key in same[0]:
        values = [row.get(key) for row in same]
        means[key] = _mean_of(values)
        if key in metrics and len(same) > 1 and all(map(_is_number, values)):
            means[f"{key}_std"] = stdev(values)  # type: ignore[type-var]
    for key in [key.removesuffix("_differs") for key in means if key.endswith("_differs")]:
        means |= _range(key, means, same)
    return means


def _range(key: str, means: Row, same: Sequence[Row]) -> Row:
    """Return the range of a ratio over all runs, and whether the mean differs from 1 by more than the noise."""
    low, high = min(row[f"{key}_low"] for row in same), max(row[f"{key}_high"] for row in same)
    ratio = means[f"{key}_ratio"]
    differs = LatencyResult(means[f"{key}_ms"], ratio=ratio, low=low, high=high).differs
    return {f"{key}_low": low, f"{key}_high": high, f"{key}_differs": differs}


def _mean_layers(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Average the facts of each layer; the first run's where the runs have not the same layers."""
    if any([facts["layer"] for facts in run] != [facts["layer"] for facts in runs[0]] for run in runs):
        return runs[0]
    return [{key: _mean_of([facts[key] for facts in same]) for key in same[0]} for same in zip(*runs, strict=True)]


def _mean_of(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, and the first of what is none."""
    return fmean(values) if all(map(_is_number, values)) else values[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
