"""The picture of the front page: quality against file size of the two jobs, from their result files.

``python docs/front_picture.py`` writes ``docs/assets/front-light.svg`` and ``front-dark.svg``, and the badges.
"""

import argparse
import io
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from figures import ASSETS, ROOT, numbers, rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lightning_optim.report.styles import DARK, INK, KINDS

Point = tuple[float, float, float]
"""Megabytes, quality, its standard deviation."""


@dataclass(frozen=True)
class Shown:
    """A row of a result file in the picture.

    Attributes:
        row: Its first cell.
        label: Beside its point.
        kind: Of :data:`~lightning_optim.report.styles.KINDS`.
        offset: Of the label from the point, in points.
        to_the_left: Whether the label ends there.
    """

    row: str
    label: str
    kind: str
    offset: tuple[float, float] = (8, -4)
    to_the_left: bool = False


@dataclass(frozen=True)
class Panel:
    """One job.

    Attributes:
        title: Above it.
        file: The result file.
        size: Header of the column of sizes.
        megabytes: In one unit of that column.
        quality: Header of the column of quality.
        label: Of the vertical axis.
        shown: The rows drawn.
        lower: Whether a lower quality is better; the axis is then turned, so that up is better.
    """

    title: str
    file: str
    size: str
    megabytes: float
    quality: str
    label: str
    shown: Sequence[Shown]
    lower: bool = False


PANELS = (
    Panel(
        "Language model: SmolLM2-135M on customer messages",
        "language_model_job_cpu_2026-12-01.md",
        "engine, MB",
        1.0,
        "perplexity (engine)",
        "perplexity (up is better)",
        (
            Shown("fine-tuned", "fine-tuned, float32", "dense", (-8, 8), to_the_left=True),
            Shown("its 4 bits, rounded by the engine's builder", "its 4 bits by the builder", "integer", (8, -12)),
            Shown("compressed", "blocks, width, teacher, 4 bits", "compressed", (8, 2)),
        ),
        lower=True,
    ),
    Panel(
        "Recommender: next basket, Online Retail",
        "recommender_chain_cpu_2026-12-01.md",
        "ONNX file, bytes",
        1e-6,
        "recall",
        "recall@20 on test baskets",
        (
            Shown("large (teacher)", "large, float32", "dense", (-8, 8), to_the_left=True),
            Shown("its shape, from scratch (control)", "its shape from scratch", "control", (8, -26)),
            Shown("distilled", "distilled", "compressed", (8, -4)),
            Shown("+ channels", "+ channels pruned", "compressed", (8, 2)),
            Shown("+ int8", "+ zeros, int8", "compressed", (-20, 30)),
        ),
    ),
)


def read(panel: Panel) -> dict[str, Point]:
    """Return the points of a panel by their row."""
    rows = rows_of(panel.file)
    header = next(iter(rows.values()))
    size, quality = header.index(panel.size), header.index(panel.quality)
    points = {}
    for shown in panel.shown:
        if shown.row not in rows:
            raise ValueError(f"benchmarks/{panel.file} has no row {shown.row!r}; its rows: {', '.join(rows)}.")
        cells = rows[shown.row]
        found = numbers(cells[quality])
        points[shown.row] = (numbers(cells[size])[0] * panel.megabytes, found[0], found[1] if len(found) > 1 else 0.0)
    return points


def draw(axis: Axes, panel: Panel, points: Mapping[str, Point]) -> None:
    """Draw one panel."""
    axis.set_title(panel.title, fontsize=11, color=INK["text"], loc="left")
    for shown in panel.shown:
        kind, (size, quality, spread) = KINDS[shown.kind], points[shown.row]
        colour = kind.colours[0]
        axis.errorbar(
            size,
            quality,
            spread,
            marker=kind.marker,
            color=colour,
            markersize=9,
            capsize=3,
            markerfacecolor=colour if kind.filled else "none",
        )
        axis.annotate(
            f"{shown.label}, {size:.3g} MB",
            (size, quality),
            shown.offset,
            textcoords="offset points",
            ha="right" if shown.to_the_left else "left",
            fontsize=9.5,
            color=INK["text"],
        )
    axis.set_xscale("log")
    low, high = (choose(size for size, _, _ in points.values()) for choose in (min, max))
    axis.set_xlim(low / 1.8, high * 1.8)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.margins(y=0.25)
    if panel.lower:
        axis.invert_yaxis()
    axis.set_xlabel("file, MB (logarithmic)", color=INK["text"])
    axis.set_ylabel(panel.label, color=INK["text"])
    axis.grid(color=INK["grid"], linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK["front"])
    axis.tick_params(colors=INK["muted"], length=3)


def picture() -> str:
    """Return the SVG, in light colours."""
    matplotlib.rcParams |= {"svg.hashsalt": "front", "svg.fonttype": "path"}
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw(axis, panel, read(panel))
    return _svg(figure)


def badge(left: str, right: str) -> str:
    """Return a small SVG of a name and a value."""
    widths = [7 * len(text) + 12 for text in (left, right)]
    texts = "".join(
        f'<text x="{x}" y="14" fill="#fff" text-anchor="middle" font-family="Verdana,sans-serif" font-size="11">'
        f"{text}</text>"
        for x, text in ((widths[0] / 2, left), (widths[0] + widths[1] / 2, right))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{sum(widths)}" height="20" role="img" '
        f'aria-label="{left}: {right}"><rect width="{widths[0]}" height="20" fill="#555"/>'
        f'<rect x="{widths[0]}" width="{widths[1]}" height="20" fill="#3f51b5"/>{texts}</svg>\n'
    )


def badges() -> dict[str, str]:
    """Return the badges by name, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = [item.rsplit(" ", 1)[1] for item in project["classifiers"] if "Python :: 3." in item]
    return {
        "badge-python": badge("python", f"{versions[0]} to {versions[-1]}"),
        "badge-licence": badge("licence", project["license"]),
        "badge-version": badge("version", project["version"]),
    }


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def main() -> None:
    """Write the pictures and the badges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ASSETS, help="where the files go")
    folder = parser.parse_args().folder
    light = picture()
    dark = re.sub("|".join(DARK), lambda match: DARK[match[0]], light)
    for name, text in {"front-light": light, "front-dark": dark, **badges()}.items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
