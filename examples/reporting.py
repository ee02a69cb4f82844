"""What the examples share: facts about a finished model, and a report as terminal table, Markdown and one HTML file."""

import base64
import html
import io
import logging
import os
import platform
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_optim import LatencyResult
from lightning_optim.functional.score import Terms, performance_score

__all__ = [
    "COST_COLUMNS",
    "REPEAT_NOTE",
    "SCORE_COLUMN",
    "SCRATCH_SCORE_NOTE",
    "Column",
    "History",
    "Report",
    "Row",
    "accuracy_cell",
    "latency_facts",
    "mean_rows",
    "model_facts",
    "no_speed_note",
    "prepare",
    "score_against",
    "score_figures",
    "score_note",
    "speed_note",
    "trade_off_figure",
]

Row = dict[str, Any]
KINDS = ("dense", "pruned", "distilled", "integer", "control", "baseline")
"""How a row is drawn: the model as it is, what the package made of it (smaller, taught, or of integers), what it must
beat, and what needs no net."""


# Facts about a finished model.


def model_facts(module: nn.Module) -> Row:
    """Count parameters, non-zero parameters, and the bytes of the compressed ``state_dict`` file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "nonzero": sum(int(p.count_nonzero()) for p in module.parameters()),
        "bytes": len(zlib.compress(file.getvalue(), level=6)),
    }


def latency_facts(measured: LatencyResult) -> Row:
    """Return the measured ratio of one call to the dense model's, with its range."""
    return {
        "milliseconds": measured.milliseconds,
        "latency": measured.ratio,
        "latency_low": measured.low,
        "latency_high": measured.high,
    }


def score_note(held_out: str, floor: str) -> str:
    """Say what P is made of: on which data, and which floor marks a row with a star."""
    return (
        f"P = 0.4 non-zeros / dense + 0.6 time / dense + 0.1 (1 - accuracy), {held_out}. Without a floor under the "
        f"accuracy the emptiest net would win: * marks one below {floor}, whose P no monitor would choose."
    )


SCRATCH_SCORE_NOTE = (
    "The net from scratch beside a pruned one is scored against the same dense net, by its size and time in this "
    "table; in the figures of P and of those two it is left out."
)

REPEAT_NOTE = (
    "Run again, the numbers are the same but for the measured times, and P with them: by about a hundredth on an idle "
    "machine, by more on a busy one."
)


def no_speed_note(rows: Sequence[Row]) -> str:
    """Say what masks do to the time of a call, from what was measured."""
    ratios = _ratios(row for row in rows if row["kind"] in ("pruned", "control") and _is_masked(row))
    return (
        "Masks give no speed on dense kernels, which multiply zeros like any other number: the nets with zeros take "
        f"{ratios} times as long as their dense net (below 5 % is noise). "
        "What shrinks is the compressed file."
    )


def speed_note(rows: Sequence[Row]) -> str:
    """Say what removed channels do to the time of a call, from what was measured."""
    ratios = _ratios(row for row in rows if row["kind"] == "pruned" and not _is_masked(row))
    return (
        "Removed channels leave smaller matrices for the same dense kernels: the nets that lost some take "
        f"{ratios} times as long as their dense net, and need no kernel or file format of their own."
    )


def _is_masked(row: Row) -> bool:
    """Tell zeros from removed channels, after which hardly any parameter that is left is zero."""
    return "latency" in row and row["nonzero"] < 0.9 * row["parameters"]


def _ratios(rows: Iterable[Row]) -> str:
    """Write the smallest and the largest ratio, once where they read the same."""
    ratios = [row["latency"] for row in rows]
    return " to ".join(dict.fromkeys((f"{min(ratios):.2f}", f"{max(ratios):.2f}")))


def score_against(row: Row, dense: Row, accuracy: float) -> float:
    """Return P of a net that was small from the start, against a dense net, from the facts in their rows."""
    return performance_score(
        Terms(size=row["nonzero"] / dense["nonzero"], inference_time=row["latency"], error=1 - accuracy)
    )


def mean_rows(per_seed: Sequence[list[Row]]) -> list[Row]:
    """Average the rows over the seeds, and add the standard deviation of the accuracy where there are several."""
    rows = []
    for same in zip(*per_seed, strict=True):
        keys = [key for key, value in same[0].items() if key not in ("name", "kind") and value is not None]
        numbers = {key: float(np.mean([row[key] for row in same])) for key in keys}
        spread = {"accuracy_std": float(np.std([row["accuracy"] for row in same], ddof=1))} if len(same) > 1 else {}
        rows.append({"name": same[0]["name"], "kind": same[0]["kind"], **numbers, **spread})
    return rows


def accuracy_cell(row: Row) -> str:
    spread = f" ± {row['accuracy_std']:.4f}" if "accuracy_std" in row else ""
    return f"{row['accuracy']:.4f}{spread}"


class History(pl.Callback):
    """Keeps what was logged: all metrics at the end of each epoch, and the sparsity after each event.

    Put it last in the Trainer's list, so that it sees what the other callbacks log.

    Attributes:
        epochs: One dict of metrics per epoch.
        events: ``(step, asked, reached)`` of each pruning event.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.events: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        logged = trainer.callback_metrics
        if "pruning/asked" in logged:
            event = (trainer.global_step, logged["pruning/asked"].item(), logged["pruning/sparsity"].item())
            if not self.events or self.events[-1][1:] != event[1:]:
                self.events.append(event)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def forget_ratios(self) -> None:
        """Drop P and its ratios: those of a net that was small from the start are 1, against its own start."""
        for epoch in self.epochs:
            for name in ("P", "P/unguarded", "P/size", "P/inference_time"):
                epoch.pop(name, None)


def prepare(*, threads: int, verbose: bool) -> None:
    """Fix the number of threads, so that runs repeat, and hide the lines of the Trainer and callbacks unless asked."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO if verbose else logging.WARNING)


# The report.


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: In a row.
        title: Of the column.
        form: How it is written: of the value, or of the whole row.
        begins_part: Whether a table that is too wide for the terminal is broken before it.
    """

    key: str
    title: str
    form: str | Callable[[Row], str] = "{}"
    begins_part: bool = False

    def cell(self, row: Row) -> str:
        """Return the text of a row's value; a dash where it has none."""
        if row.get(self.key) is None:
            return "-"
        return self.form(row) if callable(self.form) else self.form.format(row[self.key])


def _latency_cell(row: Row) -> str:
    return f"{row['latency']:.2f} [{row['latency_low']:.2f}, {row['latency_high']:.2f}]"


def _score_cell(row: Row) -> str:
    return f"{row['P']:.3f}" + ("" if row["feasible"] == 1 else "*")


COST_COLUMNS = [
    Column("parameters", "parameters", "{:,.0f}"),
    Column("nonzero", "non-zero", "{:,.0f}"),
    Column("bytes", "file (bytes, compressed)", "{:,.0f}"),
    Column("milliseconds", "one call (ms)", "{:.3f}"),
    Column("latency", "one call / dense", _latency_cell),
]
"""What a model costs; the keys come from ``model_facts`` and ``latency_facts``."""

SCORE_COLUMN = Column("P", "P", _score_cell)

SCORE_PANELS = [
    ("P/unguarded", "P", True, "P on the validation data; lower is better."),
    ("P/size", "non-zeros / dense", True, "Its size term: non-zero parameters against the dense model's."),
    ("P/inference_time", "one call / dense", True, "Its inference term, measured anew in every epoch."),
    ("P/error", "1 - accuracy", False, "Its error term, on the validation data."),
]
"""P and its terms, as ``PerformanceScore`` logs them: name, label of the y axis,
whether that begins at 0, caption."""


@dataclass
class Report:
    """A table with notes and figures.

    Attributes:
        title: Of the whole.
        summary: One paragraph: what was run on what.
        columns: Of the table, in order; the first names the row.
        rows: One dict per row; ``kind`` is one of ``KINDS``.
        notes: Sentences that say how to read the numbers.
        figures: Name (of the file), caption, figure.
    """

    title: str
    summary: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    figures: list[tuple[str, str, Figure]] = field(default_factory=list)

    def print(self) -> None:
        """Print table and notes to the terminal, the table in parts where it is wider than that."""
        console = Console()
        if not console.is_terminal:
            console.width = 200  # a log file has no width of its own
        console.print(self.title, style="italic", highlight=False, markup=False)
        for columns in _parts(self.columns, self.rows, console.width):
            console.print(_table(columns, self.rows))
        for note in self.notes:
            console.print(f"- {note}", highlight=False, markup=False)

    def write(self, folder: str | Path) -> Path:
        """Write ``report.md`` with its figures as files, and ``report.html``, which holds everything in one file.

        Returns:
            The path of the HTML file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, _, figure in self.figures:
            (folder / f"{name}.svg").write_bytes(_svg(figure))
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        page = folder / "report.html"
        page.write_text(self.to_html(), encoding="utf-8")
        return page

    def to_markdown(self) -> str:
        """Return the report as Markdown; the figures are files beside it."""
        lines = [f"# {self.title}", "", self.summary, ""]
        lines.append(_markdown_row(column.title for column in self.columns))
        lines.append(_markdown_row("---:" if place else "---" for place in range(len(self.columns))))
        lines += [_markdown_row(column.cell(row) for column in self.columns) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes), ""]
        for name, caption, _ in self.figures:
            lines += [f"![{caption}]({name}.svg)", "", f"*{caption}*", ""]
        return "\n".join([*lines, environment(), ""])

    def to_html(self) -> str:
        """Return the report as one HTML page that needs no other file."""
        head = "".join(f"<th>{html.escape(column.title)}</th>" for column in self.columns)
        rows = "".join(
            f'<tr class="{row["kind"]}">'
            + "".join(f"<td>{html.escape(column.cell(row))}</td>" for column in self.columns)
            + "</tr>"
            for row in self.rows
        )
        return PAGE.format(
            title=html.escape(self.title),
            summary=html.escape(self.summary),
            head=head,
            rows=rows,
            notes="".join(f"<li>{html.escape(note)}</li>" for note in self.notes),
            figures="".join(_html_figure(caption, figure) for _, caption, figure in self.figures),
            environment=html.escape(environment()),
        )


def environment() -> str:
    """Return versions and threads in one line."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {pl.__version__}, "
        f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}"
    )


def _parts(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[list[Column]]:
    """Deal out columns to tables that fit into a width where that can be; each begins with the first column."""

    def fits(part: Sequence[Column]) -> bool:
        return sum(_width(column, rows) for column in part) < width

    name, *others = columns
    parts = [[name]]
    for column in others:
        is_full = not fits([*parts[-1], column]) or (column.begins_part and not fits(columns))
        if is_full and len(parts[-1]) > 1:
            parts.append([name])
        parts[-1].append(column)
    return parts


def _width(column: Column, rows: Sequence[Row]) -> int:
    """Return how wide a column is when its title breaks between words and its cells do not, with frame and padding."""
    return max(len(text) for text in (*column.title.split(), *map(column.cell, rows))) + 3


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """Make a terminal table; rows that have none of the columns after the first are left out."""
    shown = [row for row in rows if any(row.get(column.key) is not None for column in columns[1:])]
    table = Table()
    for place, column in enumerate(columns):
        justify = "right" if place else "left"
        table.add_column(column.title, justify=justify, overflow="fold", min_width=_width(column, rows) - 3)
    for row, after in zip_longest(shown, shown[1:]):
        is_last_of_kind = after is not None and _is_net(row) != _is_net(after)
        table.add_row(*(column.cell(row) for column in columns), end_section=is_last_of_kind)
    return table


def _is_net(row: Row) -> bool:
    return row["kind"] != "baseline"


def _markdown_row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _html_figure(caption: str, figure: Figure) -> str:
    data = base64.b64encode(_svg(figure)).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light; }}
  * {{ box-sizing: border-box; }}
  body {{ margin: 0 auto; max-width: 80rem; padding: 2rem 1.25rem 3rem; background: #fff; color: #1c2024;
         font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
  h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }}
  p, ul {{ max-width: 46rem; }}
  .scroll {{ overflow-x: auto; margin: 1.5rem 0; border: 1px solid #dde1e6; border-radius: .5rem; }}
  table {{ border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .5rem .6rem; text-align: right; border-bottom: 1px solid #e8ebee; white-space: nowrap; }}
  th {{ background: #f5f7f9; font-weight: 600; vertical-align: bottom; white-space: normal; }}
  th:first-child, td:first-child {{ position: sticky; left: 0; background: #fff; text-align: left; }}
  th:first-child {{ background: #f5f7f9; }}
  tr:last-child td {{ border-bottom: 0; }}
  tr.dense td:first-child {{ font-weight: 600; }}
  tr.control td, tr.baseline td {{ color: #6a737d; }}
  tr.control td:first-child, tr.baseline td:first-child {{ font-style: italic; }}
  tr:not(.baseline) + tr.baseline td {{ border-top: 2px solid #c3c9d0; }}
  .figures {{ display: grid; gap: 1.5rem 2rem;
              grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }}
  figure {{ margin: 0; }}
  img {{ display: block; width: 100%; height: auto; }}
  figcaption {{ color: #57606a; font-size: .9rem; }}
  footer {{ margin-top: 2.5rem; color: #6a737d; font-size: .85rem; }}
  @media (max-width: 40rem) {{ body {{ padding: 1.25rem .75rem 2rem; }} td:first-child {{ white-space: normal; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<ul>{notes}</ul>
<div class="figures">{figures}</div>
<footer>{environment}</footer>
</body>
</html>
"""


# Figures. A run looks the same in all of them.

COLOURS = {
    "dense": ("#1c2024", "#8a9199"),
    "pruned": ("#0072b2", "#009e73", "#8e5aa8", "#56b4e9", "#8c564b"),
    "distilled": ("#b8860b", "#6b8e23"),
    "integer": ("#cc79a7", "#117733", "#882255", "#999933"),
    "control": ("#d55e00", "#e69f00"),
}
LONG_NAME = 20  # three columns of longer ones are wider than the figure
MARKERS = {"dense": "s", "pruned": "o", "distilled": "P", "integer": "D", "control": "X"}


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Give each net a colour, controls dashed lines and crosses."""
    styles: dict[str, dict[str, Any]] = {}
    used = dict.fromkeys(COLOURS, 0)
    for row in filter(_is_net, rows):
        kind = row["kind"]
        colours = COLOURS[kind]
        styles[row["name"]] = {
            "color": colours[used[kind] % len(colours)],
            "linestyle": "--" if kind == "control" else "-",
            "marker": MARKERS[kind],
            "markerfacecolor": "none" if kind == "control" else None,
        }
        used[kind] += 1
    return styles


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    axis.grid(color="#e8ebee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) > LONG_NAME else 3
    figure.set_figheight(3.6 + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def progress_figure(
    rows: Sequence[Row], histories: dict[str, History], metric: str, label: str, *, from_zero: bool = True
) -> Figure:
    """Draw a logged metric over the epochs.

    Args:
        rows: The table's rows, for the styles.
        histories: Of the runs, by name.
        metric: Name as logged; a run that did not log it is left out.
        label: Of the y axis.
        from_zero: Whether the y axis begins at 0.
    """
    figure, axis = _panel()
    styles = _styles(rows)
    for name, history in histories.items():
        values = [epoch.get(metric, np.nan) for epoch in history.epochs]
        if not np.isnan(values).all():
            axis.plot(range(1, len(values) + 1), values, label=name, markersize=5, linewidth=1.5, **styles[name])
    axis.set(xlabel="epoch", ylabel=label)
    if from_zero:
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
    return figure


def sparsity_figure(rows: Sequence[Row], histories: dict[str, History]) -> Figure:
    """Draw the sparsity asked (lines) and reached (markers) at each event of the runs that prune."""
    figure, axis = _panel()
    for name, style in _styles(rows).items():
        if name in histories and histories[name].events:
            steps, asked, reached = np.array(histories[name].events).T
            axis.plot(steps, asked, drawstyle="steps-post", linewidth=1.2, **{**style, "marker": ""})
            axis.plot(steps, reached, markersize=5, **{**style, "linestyle": ""})
            axis.plot([], [], label=name, markersize=5, linewidth=1.2, **style)
    axis.set(xlabel="optimizer step", ylabel="zeros (fraction of the selected)", ylim=(0, 1))
    _legend(figure)
    return figure


SIZE_LABELS = {"bytes": "state_dict file, compressed", "onnx_bytes": "ONNX file"}


def trade_off_figure(rows: Sequence[Row], metric: str, label: str, *, size: str = "bytes") -> Figure:
    """Draw a metric against the size of the file, with its standard deviation where there is one.

    Args:
        rows: The table's rows; those without that file are left out.
        metric: Key in a row.
        label: Of the y axis.
        size: Key of the size in a row: "bytes" or "onnx_bytes".
    """
    figure, axis = _panel()
    styles = _styles(rows)
    for row in (row for row in rows if size in row):
        style = {**styles[row["name"]], "linestyle": ""}
        spread = row.get(f"{metric}_std")
        axis.errorbar(row[size] / 1000, row[metric], spread, label=row["name"], markersize=9, capsize=3, **style)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set(xlabel=f"{SIZE_LABELS[size]} (kB, logarithmic)", ylabel=label)
    _legend(figure)
    return figure


def score_figures(rows: Sequence[Row], histories: dict[str, History]) -> list[tuple[str, str, Figure]]:
    """Draw P, its terms and the sparsity: name, caption and figure of each."""
    panels = [
        (metric.replace("/", "_"), caption, progress_figure(rows, histories, metric, label, from_zero=from_zero))
        for metric, label, from_zero, caption in SCORE_PANELS
    ]
    caption = "Zeros asked (lines) and reached (markers) at each event; n:m moves in steps of one weight."
    return [*panels, ("sparsity", caption, sparsity_figure(rows, histories))]
