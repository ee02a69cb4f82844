"""The rows of PerformanceScore: the terms of an epoch, and the table at the end of a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lightning_optim.functional.score import MEASURED, Terms, performance_score
from lightning_optim.tables import render

__all__ = ["MEASURED", "ScoreRow", "score_table"]


@dataclass
class ScoreRow:
    """One epoch's score and what it is made of."""

    epoch: int
    score: float
    feasible: bool
    size: float | None
    train_time: float | None
    inference_time: float | None
    error: float


def score_table(
    best: ScoreRow | None,
    last: ScoreRow,
    weights: Mapping[str, float],
    *,
    dense_accuracy: float | None,
    against_warm_up: bool,
) -> str:
    """Return the table of the terms of the reference, the best epoch and the last one.

    Args:
        best: The feasible epoch with the lowest P, if there is any.
        last: The last epoch.
        weights: Of the terms.
        dense_accuracy: Accuracy of the reference; None where it is not the baseline.
        against_warm_up: Whether the training time is compared with the warm-up epoch.
    """
    rows = [_reference_cells(weights, dense_accuracy)]
    rows += [(name, *_cells(row)) for name, row in (("best", best), ("last", last)) if row is not None]
    title = "PerformanceScore, lower is better" + (
        " (training time against the warm-up epoch)" if against_warm_up else ""
    )
    return render(title, ("", "epoch", "size", "train time", "inference time", "1 - A", "P", "feasible"), rows)


def _reference_cells(weights: Mapping[str, float], dense_accuracy: float | None) -> tuple[str, ...]:
    if dense_accuracy is None:
        return ("reference", *[""] * 7)
    ones = {name: 1.0 if weights[name] > 0 else None for name in MEASURED}
    terms = Terms(**ones, error=1.0 - dense_accuracy)
    score = performance_score(terms, weights)
    return ("baseline", "", *(_number(value) for value in asdict(terms).values()), _number(score), "")


def _cells(row: ScoreRow) -> tuple[str, ...]:
    values = (row.size, row.train_time, row.inference_time, row.error, row.score)
    return (str(row.epoch), *(_number(value) for value in values), "yes" if row.feasible else "no")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
