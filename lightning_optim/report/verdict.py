"""What a comparison says in one sentence per compressed model: size, time, accuracy, and what is only noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning_optim.measure.rounds import SAME
from lightning_optim.report.columns import ENGINES, Row, label_of

__all__ = ["Compared", "deployed_engine", "tells_apart", "verdict"]

TWO_ERRORS = 2.0
"""Standard errors within which two accuracies are not told apart (about 95 %)."""


class Compared(Protocol):
    """What a verdict is made of: a :class:`~lightning_optim.ComparisonReport`."""

    reference: str
    engines: list[str]
    batch_size: int | None
    accuracy: str
    rows: list[Row]
    seeds: int
    samples: int | None


def deployed_engine(engines: Sequence[str], rows: Sequence[Row]) -> str | None:
    """Return the engine whose times count: the first that runs exported files, else the first with times."""
    timed = [name for name in engines if any(row.get(f"{name}_ratio") is not None for row in rows)]
    return next((name for name in timed if name != "torch"), timed[0] if timed else None)


def verdict(report: Compared) -> list[str]:
    """Return a sentence for each compressed model: what it costs beside the reference."""
    known = {row["name"]: row for row in report.rows}
    reference = known.get(report.reference, {})
    made = [row for row in report.rows if row.get("kind") not in ("dense", "control", "baseline")]
    sentences = []
    for row in made:
        parts = [_size(row, reference), *_times(report, row), _accuracy(report, row, reference)]
        if any(parts):
            sentences.append(f"{row['name']}: {', '.join(part for part in parts if part)}.")
    return sentences


def _size(row: Row, reference: Row) -> str:
    key = "onnx_bytes" if _number(row, "onnx_bytes") and _number(reference, "onnx_bytes") else "bytes"
    if not (_number(row, key) and _number(reference, key)):
        return ""
    ratio = reference[key] / row[key]
    if abs(ratio - 1) <= SAME:
        return "as large"
    return f"{_times_as(ratio)} times smaller" if ratio > 1 else f"{_times_as(1 / ratio)} times larger"


def _times(report: Compared, row: Row) -> list[str]:
    engine = deployed_engine(report.engines, report.rows)
    if engine is None:
        return []
    calls = {"": "a call" if report.batch_size is None else "one row", "_batch": f"{report.batch_size} rows"}
    found = []
    for suffix, words in calls.items():
        ratio = _number(row, f"{engine}{suffix}_ratio")
        if not ratio:
            continue
        if row.get(f"{engine}{suffix}_differs") is False:
            found.append(f"as fast at {words}")
        else:
            faster = f"{_times_as(1 / ratio)} times faster" if ratio < 1 else f"{_times_as(ratio)} times slower"
            found.append(f"{faster} at {words}")
    return [f"{' and '.join(found)} in {ENGINES.get(engine, engine)}"] if found else []


def _accuracy(report: Compared, row: Row, reference: Row) -> str:
    key = report.accuracy
    ours, theirs = _number(row, key), _number(reference, key)
    if ours is None or theirs is None:
        return ""
    difference = ours - theirs
    label = label_of(key)
    words = f"{label} {100 * difference:+.1f} points" if _is_share(report) else f"{label} {difference:+.4g}"
    apart = tells_apart(row, reference, key, seeds=report.seeds, samples=report.samples)
    if apart is None:
        return words
    behind = f"{report.seeds} runs" if report.seeds > 1 else f"{report.samples:,} samples"
    told = "told apart from" if apart else "not told apart from"
    return f"{words} ({told} that of {report.reference} with {behind})"


def tells_apart(
    row: Mapping[str, Any], reference: Mapping[str, Any], key: str, *, seeds: int, samples: int | None
) -> bool | None:
    """Whether two accuracies differ by more than two standard errors; None where nothing says how large these are.

    Args:
        row: Holds the accuracy, and its standard deviation over the runs as ``<key>_std``.
        reference: The same of the other model.
        key: Name of the accuracy.
        seeds: Number of averaged runs. With several, the spread over them is the error.
        samples: Number of samples behind one accuracy in [0, 1], taken as independent for the two models, which
            overstates the error where both see the same samples.
    """
    difference = abs(row[key] - reference[key])
    if seeds > 1 and _number(row, f"{key}_std") is not None and _number(reference, f"{key}_std") is not None:
        return bool(difference > TWO_ERRORS * math.hypot(row[f"{key}_std"], reference[f"{key}_std"]) / math.sqrt(seeds))
    if samples is None or not all(0 <= found[key] <= 1 for found in (row, reference)):
        return None
    variance = sum(found[key] * (1 - found[key]) for found in (row, reference)) / samples
    return bool(difference > TWO_ERRORS * math.sqrt(variance))


def _is_share(report: Compared) -> bool:
    values = [row[report.accuracy] for row in report.rows if _number(row, report.accuracy) is not None]
    return all(0 <= value <= 1 for value in values)


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def _times_as(factor: float) -> str:
    """Return a factor with two figures, more where it is large."""
    return f"{factor:.0f}" if factor >= 20 else f"{factor:.1f}"
