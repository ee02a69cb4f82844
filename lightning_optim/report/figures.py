"""The figures of a report. A model looks the same in all of them; matplotlib draws, and loads where this file does."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_optim.measure.rounds import SAME
from lightning_optim.report.columns import ENGINES, Column, Row, label_of
from lightning_optim.report.layers import against_reference, layer_rows
from lightning_optim.report.parts import Section
from lightning_optim.report.styles import INK, KINDS, styles_of

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError(
        "figures are drawn by matplotlib, which is not installed. Install it with: "
        'pip install "lightning-optim[report]"'
    ) from error

__all__ = [
    "LAYER_COLUMNS",
    "SCORE_PANELS",
    "Panel",
    "comparison_figures",
    "label_axes",
    "layer_figure",
    "layer_picture",
    "layer_sections",
    "panel",
    "panels_of",
    "pareto_front",
    "progress_figure",
    "score_figures",
    "sparsity_figure",
    "trade_offs",
]

Picture = tuple[str, str, Figure]
"""Name (of the file), caption, figure."""

WIDTH = 5.2
"""Inches: on a phone of 370 pixels letters of 10 points are 10 pixels high, in a column of a desk 11 to 14."""

FONT = 10

LETTERS_PER_INCH = 12.5


def panels_of(
    count: int, *, width: float = WIDTH, height: float = 3.2, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with empty panels side by side, in the look of a report."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
    for axis in axes:
        _dress(axis)
    return figure, axes


def panel(height: float = 3.2) -> tuple[Figure, Axes]:
    """Return a figure with one empty panel."""
    figure, (axis,) = panels_of(1, height=height)
    return figure, axis


def _dress(axis: Axes) -> None:
    axis.grid(color=INK["grid"], linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK["front"])
    axis.tick_params(colors=INK["muted"], labelsize=FONT, length=3)
    for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
        label.set(color=INK["text"], fontsize=FONT + 0.5)


def _legend(figure: Figure) -> None:
    """Put the names below where there are several, as many in a line as fit, and make the figure that much higher."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [label.removeprefix(NAME) for label in labels]
    if len(labels) < 2:
        return
    width = figure.get_figwidth()
    most = max(1, min(len(labels), int(width * LETTERS_PER_INCH // (max(map(len, labels)) + 6))))
    lines = -(-len(labels) // most)
    columns = -(-len(labels) // lines)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.2 * lines)
    words = {"ncols": columns, "frameon": False, "fontsize": FONT, "labelcolor": INK["text"]}
    legend = figure.legend(handles, list(map(_named, labels)), loc="outside lower left", **words)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)


NAME = "name "
"""Before a label until it is in the legend: matplotlib leaves out those that begin with an underscore."""


def _named(name: str) -> str:
    return f"{NAME}{name}"


def label_axes(axis: Axes, x: str, y: str) -> None:
    """Name the axes; a dollar in a name begins no formula."""
    axis.set_xlabel(x, parse_math=False)
    axis.set_ylabel(y, parse_math=False)


# Accuracy against what it costs.


def pareto_front(points: Iterable[tuple[float, float]], *, higher: bool = True) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, from left to right.

    Args:
        points: ``(cost, value)``; a lower cost is better.
        higher: Whether a higher value is better.

    Examples:
        >>> pareto_front([(1, 0.5), (2, 0.9), (3, 0.8)])
        [(1, 0.5), (2, 0.9)]
    """
    sign = 1 if higher else -1
    front: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * value > sign * front[-1][1]:
            front.append((cost, value))
    return front


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _scatter(
    axis: Axes, rows: Sequence[Row], cost: str, value: str, *, scale: float = 1.0, higher: bool = True
) -> None:
    """Draw the rows that have both numbers, and the front of them all: a control may be on it.

    A row without one of the two, such as a baseline without a file, is neither drawn nor on the front.
    """
    styles = styles_of(rows)
    placed = {row["name"]: (_number(row, cost) / scale, _number(row, value)) for row in rows}
    placed = {name: point for name, point in placed.items() if not any(map(math.isnan, point))}
    front = pareto_front(placed.values(), higher=higher)
    axis.plot(*zip(*front, strict=True), color=INK["front"], linewidth=1.4, zorder=1) if front else None
    for row in rows:
        if row["name"] in placed:
            style = {**styles[row["name"]], "linestyle": ""}
            spread = None if math.isnan(_number(row, f"{value}_std")) else _number(row, f"{value}_std")
            label = _named(row["name"])
            axis.errorbar(*placed[row["name"]], spread, label=label, markersize=8, capsize=3, elinewidth=1, **style)


def _logarithmic(axis: Axes) -> None:
    axis.set_xscale("log")
    low, high = axis.dataLim.intervalx
    fine = high < 8 * low
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if fine else (1, 2, 3, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if 0 < low <= high < 2.5 * low:  # else hardly a tick would lie in it
        middle = math.sqrt(low * high)
        axis.set_xlim(min(0.9 * low, middle / 2), max(1.1 * high, middle * 2))


SIZE_LABELS = {"bytes": "state_dict file, compressed", "onnx_bytes": "ONNX file"}


def _draw_size(axis: Axes, rows: Sequence[Row], metric: str, label: str, size: str) -> None:
    _scatter(axis, rows, size, metric, scale=1000.0)
    _logarithmic(axis)
    label_axes(axis, f"{SIZE_LABELS[size]} (kB, logarithmic)", label)


def _draw_time(axis: Axes, rows: Sequence[Row], metric: str, label: str, cost: str, words: str) -> None:
    axis.axvspan(1 - SAME, 1 + SAME, color=INK["grid"], alpha=0.6, linewidth=0, zorder=0)
    _scatter(axis, rows, cost, metric)
    label_axes(axis, words, label)


@dataclass(frozen=True)
class Panel:
    """One scatter of a comparison.

    Attributes:
        name: Of the figure's file.
        caption: Below it.
        draw: Draws it.
    """

    name: str
    caption: str
    draw: Callable[[Axes], None]


FRONT = "The line joins the models that no other beats in both."


class Compared(Protocol):
    """What the figures of a comparison are drawn from: a :class:`~lightning_optim.ComparisonReport`."""

    reference: str
    engines: list[str]
    accuracy: str
    metrics: list[str]
    rows: list[Row]
    layers: dict[str, list[dict[str, Any]]]
    histories: dict[str, list[dict[str, Any]]]


def _panels(report: Compared) -> list[Panel]:
    """Return accuracy against file and against time; without an accuracy, file against time."""
    rows = report.rows
    size = "onnx_bytes" if any(row.get("onnx_bytes") for row in rows) else "bytes"
    engine = next((e for e in reversed(report.engines) if any(row.get(f"{e}_ratio") for row in rows)), None)
    panels = []
    if report.metrics:
        metric = report.accuracy if report.accuracy in report.metrics else report.metrics[0]
        panels.append(
            Panel(
                "pareto_size",
                f"{_first_upper(label_of(metric))} against the size of the {SIZE_LABELS[size]}. {FRONT}",
                lambda axis: _draw_size(axis, rows, metric, label_of(metric), size),
            )
        )
        for engine in report.engines:
            if any(row.get(f"{engine}_ratio") is not None for row in rows):
                panels.append(_time_panel(rows, metric, engine, ENGINES.get(engine, engine), report.reference))
    elif engine is not None:
        label = f"{SIZE_LABELS[size]} (bytes)"
        words = f"one call in {ENGINES.get(engine, engine)} / {report.reference}"

        def draw(axis: Axes) -> None:
            _scatter(axis, rows, f"{engine}_ratio", size, higher=False)
            label_axes(axis, words, label)

        panels.append(Panel("pareto_size", f"Size of the file against the time of a call. {FRONT}", draw))
    return panels


def _time_panel(rows: Sequence[Row], metric: str, engine: str, name: str, reference: str) -> Panel:
    words = f"one call in {name} / {reference}"
    return Panel(
        f"pareto_{engine}",
        f"{_first_upper(label_of(metric))} against the time of a call in {name}, as a ratio to {reference}. {FRONT} "
        "Within the band times are called equal.",
        lambda axis: _draw_time(axis, rows, metric, label_of(metric), f"{engine}_ratio", words),
    )


def _first_upper(words: str) -> str:
    return words[:1].upper() + words[1:]


def trade_offs(report: Compared) -> Figure:
    """Draw the scatters of a comparison side by side.

    Raises:
        ValueError: If nothing was measured that could be drawn.
    """
    panels = _panels(report)
    if not panels:
        raise ValueError("there is neither an accuracy nor a time to draw. Pass `evaluate` to compare.")
    figure, axes = panels_of(len(panels), width=WIDTH * len(panels))
    for each, axis in zip(panels, axes, strict=True):
        each.draw(axis)
    _legend(figure)
    return figure


def comparison_figures(report: Compared) -> list[Picture]:
    """Return the figures of a comparison: its scatters, and P and its terms over the epochs where they are known."""
    pictures = []
    for each in _panels(report):
        figure, axis = panel()
        each.draw(axis)
        _legend(figure)
        pictures.append((each.name, each.caption, figure))
    return _renamed([*pictures, *score_figures(report.rows, report.histories)])


def _renamed(pictures: Sequence[Picture]) -> list[Picture]:
    """Give pictures names that are safe in files and ids, and differ also where letters of either case are one."""
    taken: set[str] = set()
    renamed = []
    for name, caption, figure in pictures:
        safe = free = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:LONGEST_FILE]
        count = 1
        while free.lower() in taken:
            count += 1
            free = f"{safe}_{count}"
        taken.add(free.lower())
        renamed.append((free, caption, figure))
    return renamed


LONGEST_FILE = 100
"""Letters in the name of a figure's file."""


# P and its terms over the epochs.


SCORE_PANELS = [
    ("P/unguarded", "P", True, "P on the validation data; lower is better."),
    ("P/size", "size / reference", True, "Its size term, against the reference."),
    ("P/train_time", "training time / reference", True, "Its training term: time of an epoch."),
    ("P/inference_time", "one call / reference", True, "Its inference term, measured anew in every epoch."),
    ("P/error", "1 - accuracy", False, "Its error term, on the validation data."),
    ("pruning/sparsity", "zeros (fraction)", True, "Zeros among the selected weights."),
    ("channels/parameters", "parameters / dense", True, "Parameters that removed channels leave."),
    ("channels/leaving_norm", "norm / mean norm", True, "Channels that leave, against the mean of their groups."),
]
"""What callbacks of this package log: name, label of the y axis, whether that begins at 0, caption."""

Epochs = Mapping[str, Sequence[Mapping[str, Any]]]


def score_figures(
    rows: Sequence[Row], epochs: Epochs, panels: Sequence[tuple[str, str, bool, str]] = SCORE_PANELS
) -> list[Picture]:
    """Draw what was logged over the epochs: name, caption and figure of each metric that any run has.

    Args:
        rows: The table's rows, for the styles.
        epochs: Run -> one dict of metrics per epoch.
        panels: Metric, label of the y axis, whether that begins at 0, caption.
    """
    logged = {name for run in epochs.values() for epoch in run for name, value in epoch.items() if _is_known(value)}
    return _renamed(
        [
            (metric, caption, progress_figure(rows, epochs, metric, label, from_zero=from_zero))
            for metric, label, from_zero, caption in panels
            if metric in logged
        ]
    )


def _is_known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)


def progress_figure(rows: Sequence[Row], epochs: Epochs, metric: str, label: str, *, from_zero: bool = True) -> Figure:
    """Draw a logged metric over the epochs.

    Args:
        rows: The table's rows, for the styles.
        epochs: Run -> one dict of metrics per epoch; a run that did not log the metric is left out.
        metric: Name as logged.
        label: Of the y axis.
        from_zero: Whether the y axis begins at 0.
    """
    figure, axis = panel(2.9)
    styles = styles_of(rows)
    for name, run in epochs.items():
        values = [_number(dict(epoch), metric) for epoch in run]
        if not all(map(math.isnan, values)):
            axis.plot(
                range(1, len(values) + 1), values, label=_named(name), markersize=4, linewidth=1.6, **styles[name]
            )
    label_axes(axis, "epoch", label)
    if from_zero and axis.dataLim.ymax > 0:
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(figure)
    return figure


def sparsity_figure(rows: Sequence[Row], events: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """Draw the sparsity asked (lines) and reached (markers) at each event of the runs that prune.

    Args:
        rows: The table's rows, for the styles.
        events: Run -> ``(step, asked, reached)`` of each event.
    """
    figure, axis = panel(2.9)
    for name, style in styles_of(rows).items():
        if events.get(name):
            steps, asked, reached = zip(*events[name], strict=True)
            axis.plot(steps, asked, drawstyle="steps-post", linewidth=1.3, **{**style, "marker": ""})
            axis.plot(steps, reached, markersize=4.5, **{**style, "linestyle": ""})
            axis.plot([], [], label=_named(name), markersize=4.5, linewidth=1.3, **style)
    axis.set(xlabel="optimizer step", ylabel="zeros (fraction of the selected)", ylim=(0, 1))
    _legend(figure)
    return figure


# What each layer kept.

MOST_LAYERS = 40
"""In a figure; the table has all."""

LONGEST_NAME = 30


@dataclass(frozen=True)
class _Bars:
    key: str
    label: str
    whole: float
    changed: Callable[[float], bool]


BARS = (
    _Bars("kept", "width kept", 1.0, lambda value: value != 1.0),
    _Bars("sparsity", "zeros", 1.0, lambda value: value > 0.01),
    _Bars("bits", "bits", 32.0, lambda value: value != 32.0),
)

LAYER_COLUMNS = [
    Column("layer", "layer"),
    Column("type", "type"),
    Column("parameters", "parameters", "{:,.0f}"),
    Column("width", "output channels", "{:,.4g}"),
    Column("kept", "width kept", "{:.0%}"),
    Column("sparsity", "zeros", "{:.1%}"),
    Column("bits", "bits", "{:.3g}"),
]


def layer_figure(layers: Sequence[Mapping[str, Any]], colour: str = KINDS["compressed"].colours[0]) -> Figure | None:
    """Draw a bar per layer: of its width, zeros and bits those that any layer changed; None where none did.

    Args:
        layers: Facts of the layers, with ``kept``.
        colour: Of the bars.
    """
    shown = sorted(layers, key=lambda facts: -facts["parameters"])[:MOST_LAYERS]
    shown = [facts for facts in layers if facts in shown]
    bars = [
        bar for bar in BARS if any(facts.get(bar.key) is not None and bar.changed(facts[bar.key]) for facts in shown)
    ]
    if not bars:
        return None
    figure, axes = panels_of(len(bars), height=0.75 + 0.21 * len(shown), sharey=True)
    for place, (axis, bar) in enumerate(zip(axes, bars, strict=True)):
        _draw_bars(axis, bar, shown, colour, named=place == 0)
    return figure


def _draw_bars(axis: Axes, bar: _Bars, layers: Sequence[Mapping[str, Any]], colour: str, *, named: bool) -> None:
    places = range(len(layers))
    values = [facts.get(bar.key) for facts in layers]
    axis.barh(places, [bar.whole] * len(layers), height=0.66, color=INK["grid"])
    axis.barh(places, [value or 0.0 for value in values], height=0.66, color=colour)
    axis.set(xlim=(0, bar.whole), title=bar.label)
    axis.grid(visible=False)
    axis.set_yticks(places, [_short(facts["layer"]) for facts in layers], parse_math=False)
    axis.tick_params(axis="y", length=0, labelleft=named)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_ylim(len(layers) - 0.5, -0.5)
    axis.set_xticks([0, bar.whole / 2, bar.whole])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def layer_sections(report: Compared) -> list[Section]:
    """Return a section with the layers of every model that lost anything against the reference; none without such."""
    styles, found = styles_of(report.rows), Section("What each layer kept")
    reference = report.layers.get(report.reference, [])
    rows: list[Row] = []
    for place, row in enumerate(report.rows):
        layers = against_reference(report.layers.get(row["name"], []), reference)
        drawn = layer_picture(
            f"layers_{place}", f"{row['name']}, against {report.reference}", layers, styles[row["name"]]
        )
        if row["name"] != report.reference and drawn is not None:
            found.figures.append(drawn)
            rows += [{"model": row["name"], **facts} for facts in layer_rows(layers)]
    found.columns, found.rows = [Column("model", "model"), *LAYER_COLUMNS], rows
    return [found] if rows else []


def layer_picture(
    name: str, words: str, layers: Sequence[Mapping[str, Any]], style: Mapping[str, Any]
) -> Picture | None:
    """Return name, caption and bars of a model's layers; None where nothing changed.

    Args:
        name: Of the figure's file.
        words: Which model, and against what.
        layers: Facts of the layers, with ``kept``.
        style: Of the model's row.
    """
    figure = layer_figure(layers, style["color"])
    most = f"; the {MOST_LAYERS} largest of {len(layers)} layers" if len(layers) > MOST_LAYERS else ""
    caption = f"{words}: {_and([axis.get_title() for axis in figure.axes])} of each layer{most}." if figure else ""
    return None if figure is None else (name, caption, figure)


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
