"""Draw the figures of the technique pages from the result files: ``python docs/figures.py`` writes ``docs/assets/``.

Each figure reads one table in ``benchmarks/``; nothing is typed in here but which rows are shown. The backgrounds are
transparent and the gray of the text is readable on light and on dark pages, so one file serves both.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs" / "assets"
GRAY, BLUE, ORANGE = "#808890", "#4c78c8", "#e08030"
NUMBER = re.compile(r"-?[\d,]*\.?\d+")


def rows_of(path: str, title: str = "") -> dict[str, list[str]]:
    """Return the first table behind a title: the cells of each row by its first cell."""
    text = (ROOT / "benchmarks" / path).read_text(encoding="utf-8")
    if title not in text:
        raise ValueError(f"benchmarks/{path} has no {title!r}.")
    lines = text[text.index(title) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows: dict[str, list[str]] = {}
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        name = cells[0] if cells[0] not in rows else f"{cells[0]}, {cells[1]}"
        rows[name] = cells[1:]
    return rows


def numbers(cell: str) -> list[float]:
    """Return the numbers in a cell: ``96.71 ± 0.42`` has two, ``11.18 -> 2.80`` too."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(cell)]


def number(cell: str, place: int = 0) -> float:
    """Return the number of this place in a cell."""
    found = numbers(cell)
    if len(found) <= place:
        raise ValueError(f"{cell!r} has no number {place}.")
    return found[place]


def canvas(width: float = 6.4, height: float = 2.9) -> Any:
    """Return a figure and its axes in the style of the pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.hashsalt": "lightning_optim",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            **{key: GRAY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
        }
    )
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, folder: Path, name: str) -> None:
    """Write the figure without a date, so that the same numbers give the same file."""
    import matplotlib.pyplot as plt

    figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def bars(
    axes: Any, names: list[str], series: dict[str, list[float]], errors: dict[str, list[float]] | None = None
) -> None:
    """Draw groups of bars with their values."""
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        at = [i + (place - (len(series) - 1) / 2) * width for i in range(len(names))]
        yerr = None if errors is None else errors[label]
        color = (BLUE, ORANGE, GRAY)[place]
        drawn = axes.bar(at, values, width * 0.92, label=label, color=color, yerr=yerr, ecolor=GRAY)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.set_xticks(range(len(names)), names)


def legend(axes: Any) -> None:
    """Place the legend above the axes."""
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def channel_pruning(folder: Path) -> None:
    """Time of a call and parameters without half of the channels, relative to the dense model."""
    rows = rows_of("channel_zoo_cpu_2026-11-24.md")
    names = ["ResNet-18", "ConvNeXt-tiny", "ViT-small", "BERT-small"]
    figure, axes = canvas()
    series = {
        "parameters": [number(rows[name][1], 1) / number(rows[name][1]) for name in names],
        "call, batch 1": [number(rows[name][3], 2) for name in names],
        "call, batch 32": [number(rows[name][4], 2) for name in names],
    }
    bars(axes, names, series)
    axes.axhline(1, color=GRAY, linewidth=0.8, linestyle=":")
    axes.set_ylabel("relative to dense")
    legend(axes)
    save(figure, folder, "channel_pruning")


def depth_pruning(folder: Path) -> None:
    """Perplexity of a language model without ten blocks."""
    path = ROOT / "benchmarks" / "language_model_cpu_2026-11-30.md"
    found = re.findall(r"^\| 10 blocks \| (\w+) \| .*\| ([\d,.]+) \| ([\d,.]+) \|$", path.read_text("utf-8"), re.M)
    dense = number(rows_of("language_model_cpu_2026-11-30.md")["nothing"][4])
    figure, axes = canvas()
    series = {
        "after removal": [number(cells[1]) for cells in found],
        "after recovery": [number(cells[2]) for cells in found],
    }
    bars(axes, [cells[0] for cells in found], series)
    axes.axhline(dense, color=GRAY, linewidth=0.8, linestyle=":")
    axes.text(-0.65, dense, "all blocks", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlim(-0.7)
    axes.set_ylim(8, 1e9)
    axes.set_ylabel("perplexity (log)")
    legend(axes)
    save(figure, folder, "depth_pruning")


def low_rank(folder: Path) -> None:
    """Accuracy and parameters of a transformer whose layers became two."""
    rows = rows_of("low_rank_cpu_2026-11-30.md", "## Transformer")
    figure, axes = canvas()
    shown = {"second_moment": (BLUE, "o"), "svd": (ORANGE, "s"), "random": (GRAY, "^")}
    for criterion, (color, marker) in shown.items():
        cells = [rows[f"rank {rank}, {criterion}"] for rank in ("1/8", "1/4")]
        x, y = [number(c[0]) / 1000 for c in cells], [number(c[2]) for c in cells]
        axes.errorbar(x, y, [number(c[2], 1) for c in cells], color=color, marker=marker, label=criterion)
    whole = rows["trained on, whole"]
    axes.errorbar(number(whole[0]) / 1000, number(whole[2]), number(whole[2], 1), color=GRAY, marker="D", label="whole")
    axes.set_xlabel("parameters, thousands")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    save(figure, folder, "low_rank")


def weight_pruning(folder: Path) -> None:
    """Accuracy by sparsity, by magnitude and at random."""
    rows = rows_of("digits_cpu_2026-11-24.md")
    levels = [80, 90, 95]
    figure, axes = canvas()
    for label, start, color, marker in (("magnitude", "cubic", BLUE, "o"), ("random", "random", ORANGE, "s")):
        cells = [rows[f"{start}, global, {level}%"][0] for level in levels]
        axes.errorbar(
            levels, [number(c) for c in cells], [number(c, 1) for c in cells], color=color, marker=marker, label=label
        )
    axes.axhline(number(rows["dense"][0]), color=GRAY, linewidth=0.8, linestyle=":", label="dense")
    axes.set_xticks(levels)
    axes.set_xlabel("zeros, %")
    axes.set_ylabel("test accuracy, %")
    legend(axes)
    save(figure, folder, "weight_pruning")


def quantization(folder: Path) -> None:
    """Accuracy by bits, after training and in training."""
    rows = rows_of("quantization_digits_cpu_2026-11-25.md", "## The same 20 epochs")
    bits = [8, 4, 3]
    kinds = {"post-training": "after training", "quantization-aware": "QAT"}
    cells = {label: [rows[f"w{b}a8, {kind}"][1] for b in bits] for label, kind in kinds.items()}
    figure, axes = canvas()
    bars(
        axes,
        [f"{b}-bit weights" for b in bits],
        {label: [number(c) for c in found] for label, found in cells.items()},
        {label: [number(c, 1) for c in found] for label, found in cells.items()},
    )
    axes.axhline(number(rows["float"][0]), color=GRAY, linewidth=0.8, linestyle=":", label="float")
    axes.set_ylim(95, 100.5)
    axes.set_ylabel("test accuracy, % (from 95)")
    legend(axes)
    save(figure, folder, "quantization")


def distillation(folder: Path) -> None:
    """Accuracy of a small student with many and with few labels."""
    rows = rows_of("distillation_digits_cpu_2026-11-25.md")
    shown = {
        "alone": "cross-entropy (control)",
        "label smoothing": "label smoothing (control)",
        "kd": "kd",
        "dist": "dist",
    }
    figure, axes = canvas()
    columns = {"all 958 labels": 0, "100 labels, the other images without": 1}
    cells = {label: [rows[row][place] for row in shown.values()] for label, place in columns.items()}
    bars(
        axes,
        list(shown),
        {label: [number(c) for c in found] for label, found in cells.items()},
        {label: [number(c, 1) for c in found] for label, found in cells.items()},
    )
    axes.set_ylim(70, 101)
    axes.set_ylabel("test accuracy, % (from 70)")
    legend(axes)
    save(figure, folder, "distillation")


def recommender(folder: Path) -> None:
    """Recall against the bytes of the ONNX file, stage by stage."""
    rows = rows_of("recommender_chain_cpu_2026-12-01.md")
    figure, axes = canvas(height=3.4)
    chain = ["distilled", "+ channels", "+ int8"]
    places = [(number(rows[name][7]) / 1e6, number(rows[name][0])) for name in chain]
    axes.plot(*zip(*places, strict=True), color=BLUE, linewidth=1)
    labels = {
        "large (teacher)": "large tower",
        "small, from scratch (control)": "small, from scratch",
        "its shape, from scratch (control)": "final shape, from scratch",
        **{name: name for name in chain},
    }
    for name, label in labels.items():
        x, y, error = number(rows[name][7]) / 1e6, number(rows[name][0]), number(rows[name][0], 1)
        axes.errorbar(x, y, error, color=BLUE if name in chain else GRAY, marker="o", capsize=2)
        axes.annotate(label, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.axhline(number(rows["buy it again"][0]), color=GRAY, linewidth=0.8, linestyle=":")
    axes.text(9, number(rows["buy it again"][0]), "buy it again, without a net", va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.25, 30)
    axes.set_xlabel("ONNX file, MB (log)")
    axes.set_ylabel("recall at 20")
    save(figure, folder, "recommender")


FIGURES = (channel_pruning, depth_pruning, low_rank, weight_pruning, quantization, distillation, recommender)


def main(folder: Path = ASSETS) -> None:
    """Draw all figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        draw(folder)


if __name__ == "__main__":
    sys.exit(main())
