"""The figures of a search: its front, its trials in parallel coordinates, and what each choice matters."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_optim.report.figures import FONT, Picture, label_axes, panel, panels_of
from lightning_optim.report.styles import INK, KINDS
from lightning_optim.search.objectives import Objective
from lightning_optim.search.report import SearchReport, Trial

__all__ = ["front_figure", "search_figures"]

COLOUR = KINDS["compressed"].colours[0]
DENSE = KINDS["dense"]
OVER = KINDS["control"].colours[0]


def search_figures(report: SearchReport) -> list[Picture]:
    """Return name, caption and figure of each picture that the trials allow."""
    complete = [trial for trial in report.trials if trial.values]
    if not complete:
        return []
    pictures = [("front", _front_caption(report), front_figure(report))]
    tried = [trial for trial in complete if trial.arguments]
    if len(tried) > 1:
        caption = "Each line is a trial: its arguments, then what was measured. Trials on the front are drawn strong."
        pictures.append(("parallel", caption, parallel_figure(report, tried)))
    if report.importances:
        caption = (
            "How much of what tells the best trials from the others each open argument explains, by Optuna (PED-ANOVA)."
        )
        pictures.append(("importance", caption, importance_figure(report.importances)))
    return pictures


# The front.


def _front_caption(report: SearchReport) -> str:
    if len(report.objectives) == 1:
        return f"{report.objectives[0].name} of each trial; the line is the best so far."
    bars = "Bars are ranges: trials whose ranges overlap in every objective are equal."
    return f"Trials by {' and '.join(each.name for each in report.objectives[:2])}; the line joins the front. {bars}"


def front_figure(report: SearchReport) -> Figure:
    """Draw the first objective against the second; with one objective, it over the trials.

    Raises:
        ValueError: If no trial is complete.
    """
    complete = [trial for trial in report.trials if trial.values]
    if not complete:
        raise ValueError("no trial is complete, so there is nothing to draw.")
    if len(report.objectives) == 1:
        return _history(report, complete)
    upper, across = report.objectives[:2]
    figure, axis = panel()
    front = report.front
    on_front = {trial.number for trial in front}
    line = sorted((trial.values[across.name], trial.values[upper.name]) for trial in front)
    if line:
        axis.plot(*zip(*line, strict=True), color=INK["front"], linewidth=1.4, zorder=1)
    for trial in complete:
        _mark(axis, trial, across, upper, strong=trial.number in on_front)
    label_axes(axis, across.title, upper.title)
    return figure


def _mark(axis: Axes, trial: Trial, across: Objective, upper: Objective, *, strong: bool) -> None:
    x, y = trial.values[across.name], trial.values[upper.name]
    colour = DENSE.colours[0] if trial.dense else COLOUR if trial.feasible else OVER
    axis.errorbar(
        [x],
        [y],
        xerr=_arms(x, trial.intervals[across.name]),
        yerr=_arms(y, trial.intervals[upper.name]),
        color=colour,
        marker=DENSE.marker if trial.dense else "o" if trial.feasible else KINDS["control"].marker,
        markersize=8 if strong else 5,
        alpha=1.0 if strong else 0.45,
        elinewidth=1,
        capsize=3,
        linestyle="",
    )
    if strong:
        axis.annotate(
            str(trial.number), (x, y), (5, 5), textcoords="offset points", fontsize=FONT - 2, color=INK["muted"]
        )


def _arms(value: float, interval: tuple[float, float]) -> list[list[float]]:
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]


def _history(report: SearchReport, complete: Sequence[Trial]) -> Figure:
    (objective,) = report.objectives
    figure, axis = panel(2.9)
    best: list[float] = []
    for trial in complete:
        value = trial.values[objective.name]
        if trial.feasible:
            last = best[-1] if best and best[-1] == best[-1] else None
            best.append(value if last is None or objective.better(value, last) else last)
        else:
            best.append(best[-1] if best else float("nan"))
        axis.errorbar(
            [trial.number],
            [value],
            yerr=_arms(value, trial.intervals[objective.name]),
            color=DENSE.colours[0] if trial.dense else COLOUR if trial.feasible else OVER,
            marker=DENSE.marker if trial.dense else "o" if trial.feasible else KINDS["control"].marker,
            capsize=3,
            elinewidth=1,
            linestyle="",
        )
    axis.plot([trial.number for trial in complete], best, color=INK["front"], drawstyle="steps-post", zorder=1)
    label_axes(axis, "trial", objective.title)
    return figure


# All trials, and what matters.


def parallel_figure(report: SearchReport, trials: Sequence[Trial]) -> Figure:
    """Draw each trial as a line over its arguments and objectives, each scaled to its own range."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.arguments))
    scales = {name: _scale([trial.arguments[name] for trial in trials if name in trial.arguments]) for name in names}
    scales |= {each.name: _scale([trial.values[each.name] for trial in trials]) for each in report.objectives}
    figure, (axis,) = panels_of(1, width=max(5.2, 1.15 * len(scales)), height=3.8)
    on_front = {trial.number for trial in report.front}
    for trial in sorted(trials, key=lambda trial: trial.number in on_front):
        values = {**trial.arguments, **trial.values}
        heights = [scales[name].get(_key(values[name])) if name in values else None for name in scales]
        strong = trial.number in on_front
        axis.plot(
            range(len(scales)),
            [float("nan") if height is None else height for height in heights],
            color=COLOUR if strong else INK["front"],
            alpha=0.9 if strong else 0.4,
            linewidth=1.8 if strong else 1,
            marker="o",
            markersize=3,
        )
    axis.set_xticks(
        range(len(scales)), [name.replace(".", ".\n") for name in scales], fontsize=FONT - 2, parse_math=False
    )
    axis.set_yticks([])
    axis.set_ylim(-0.08, 1.08)
    for place, scale in enumerate(scales.values()):
        for word, height in _ends(scale):
            axis.annotate(
                word,
                (place, height),
                (4, 0),
                textcoords="offset points",
                fontsize=FONT - 3,
                color=INK["muted"],
                va="center",
                parse_math=False,
            )
    return figure


def _scale(values: Sequence[Any]) -> dict[Any, float]:
    """Return the height in [0, 1] of each value: numbers by their size, others one above the other."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        return {_key(value): 0.5 if low == high else (value - low) / (high - low) for value in values}
    keys = sorted({_key(value) for value in values})
    return {key: 0.5 if len(keys) == 1 else place / (len(keys) - 1) for place, key in enumerate(keys)}


def _key(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _ends(scale: Mapping[Any, float]) -> list[tuple[str, float]]:
    """Return the words beside an axis: every one of a few values, both ends of many."""
    shown = {key: height for key, height in scale.items() if len(scale) <= 4 or height in (0.0, 1.0)}
    return [(key[:14] if isinstance(key, str) else f"{key:.4g}", height) for key, height in shown.items()]


def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw a bar for each argument, in a panel for each objective."""
    names = list(dict.fromkeys(name for shares in importances.values() for name in shares))
    figure, axes = panels_of(len(importances), height=1.0 + 0.3 * len(names), sharey=True)
    for place, (axis, (objective, shares)) in enumerate(zip(axes, importances.items(), strict=True)):
        axis.barh(range(len(names)), [shares.get(name, 0.0) for name in names], height=0.6, color=COLOUR)
        axis.set_title(objective, parse_math=False)
        axis.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
        axis.set_yticks(range(len(names)), names, parse_math=False)
        axis.tick_params(axis="y", length=0, labelleft=place == 0)
    return figure
