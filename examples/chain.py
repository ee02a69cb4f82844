"""Shared by the examples: stages of a recipe, its random control, and the check of targets."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from lightning_optim import Recipe
from lightning_optim.measure.latency import time_in_turns
from lightning_optim.report import ComparisonReport
from lightning_optim.target import ForwardInputs, as_forward_inputs

__all__ = ["Target", "at_random", "prepare", "stages", "target_notes", "times_alone", "write"]

ADDED = {"channel_pruning": "+ channels", "weight_pruning": "+ weights", "quantization": "+ int8"}
DEPLOYED = "onnxruntime"
ROUNDS = 5  # on a busy machine one takes half as long again as another


def prepare(*, threads: int, verbose: bool) -> None:
    """Fix the number of threads for reproducible runs, and hide logs of Trainer and callbacks unless verbose."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO if verbose else logging.WARNING)


def stages(recipe: Recipe) -> dict[str, Recipe]:
    """Return the stages of a recipe: first distillation alone, then one more technique each.

    Each has the windows of the whole recipe, so a row of the table says what its technique changed.
    """
    found = {"distilled": dataclasses.replace(recipe, **dict.fromkeys(recipe.stages))}
    for place, technique in enumerate(recipe.stages, start=1):
        found[ADDED[technique]] = dataclasses.replace(recipe, **dict.fromkeys(recipe.stages[place:]))
    return found


def at_random(recipe: Recipe) -> Recipe:
    """Return the recipe with random channels and weights: the control of its criteria."""
    drawn = [
        name for name in ("depth_pruning", "channel_pruning", "weight_pruning") if getattr(recipe, name) is not None
    ]
    return dataclasses.replace(recipe, **{name: {**getattr(recipe, name), "criterion": "random"} for name in drawn})


@dataclasses.dataclass(frozen=True)
class Target:
    """Targets of the deployed file relative to the dense model's.

    Attributes:
        smaller: Factor in bytes.
        faster: Factor in latency of a call of one row in ONNX Runtime.
        drop: Largest loss of the metric.
        metric: Name of the metric in a row.
    """

    smaller: float
    faster: float
    drop: float
    metric: str


def target_notes(report: ComparisonReport, deployed: str, target: Target, times: tuple[float, float]) -> list[str]:
    """Compare each target with the measured value.

    Args:
        report: Report of the comparison.
        deployed: Name of the deployed row.
        target: The targets.
        times: Milliseconds of a call of the deployed file and of the reference's, see ``times_alone``.
    """
    row, dense = report[deployed], report[report.reference]
    smaller, faster = dense["onnx_bytes"] / row["onnx_bytes"], times[1] / times[0]
    change = row[target.metric] - dense[target.metric]
    reached: Mapping[str, bool] = {
        f"{smaller:.1f} times smaller (required: {target.smaller:g})": smaller >= target.smaller,
        f"{faster:.1f} times faster (required: {target.faster:g})": faster >= target.faster,
        f"{target.metric} {change:+.4f} (required: at least {-target.drop:+g})": change >= -target.drop,
    }
    words = "; ".join(f"{text}: {'reached' if is_reached else 'MISSED'}" for text, is_reached in reached.items())
    return [
        f"The deployed file ({deployed}, {row['onnx_bytes']:,.0f} bytes) against {report.reference}: {words}.",
        f"Each file is timed alone, as it is deployed: {times[0]:.3f} and {times[1]:.3f} ms. In the table, calls "
        "alternate and tensors are converted, and the large file evicts the small one from the cache: it "
        f"is {1 / row[f'{DEPLOYED}_ratio']:.1f} times faster there.",
    ]


def times_alone(files: Sequence[Path], inputs: Any) -> tuple[float, ...]:
    """Return the milliseconds of an ONNX Runtime call of each file alone: the minimum over some rounds."""
    calls = [_call(path, as_forward_inputs(inputs)) for path in files]
    rounds = [[time_in_turns([call], time.thread_time).milliseconds for call in calls] for _ in range(ROUNDS)]
    return tuple(map(min, zip(*rounds, strict=True)))


def _call(path: Path, inputs: ForwardInputs) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = dict(zip(names, inputs.args, strict=False)) | (inputs.kwargs or {})
    feeds = {name: given[name].numpy() for name in names}
    return lambda: session.run(None, feeds)


def write(report: ComparisonReport, folder: Path) -> None:
    """Print a report and write it: a page, Markdown, and its numbers as JSON."""
    print(report)
    report.to_html(folder / "report.html")
    (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    report.save(folder / "report.json")
    print(f"report: {folder / 'report.html'}")
