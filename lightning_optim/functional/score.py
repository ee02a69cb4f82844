"""The score P: size, times and error in one number, lower is better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_optim.checks import check_mapping, check_names

__all__ = [
    "DEFAULT_WEIGHTS",
    "MEASURED",
    "Terms",
    "checked_references",
    "checked_weights",
    "guarded",
    "performance_score",
]

DEFAULT_WEIGHTS: Mapping[str, float] = {"size": 0.4, "train_time": 0.0, "inference_time": 0.6, "accuracy": 0.1}
"""The source's example, a recommender: they sum to 1.1, and are never rescaled."""


def checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weight of every term: 0 where none is given, the source's example for None.

    Raises:
        ValueError: If a name is unknown, a weight is negative or no finite number, or all are 0.

    Examples:
        >>> checked_weights({"size": 1})
        {'size': 1.0, 'train_time': 0.0, 'inference_time': 0.0, 'accuracy': 0.0}
    """
    if weights is None:
        return dict(DEFAULT_WEIGHTS)
    check_mapping("weights", weights, "terms of P to numbers")
    check_names("weights", weights, DEFAULT_WEIGHTS)
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
            raise ValueError(f"`weights` must be non-negative numbers, got {name}={value!r}.")
    if not any(weights.values()):
        raise ValueError("`weights` are all 0, so P would always be 0. Give at least one term weight.")
    return {name: float(weights.get(name, 0.0)) for name in DEFAULT_WEIGHTS}


MEASURED = ("size", "train_time", "inference_time")
"""Terms of P that a reference divides."""


def checked_references(references: Mapping[str, float]) -> dict[str, float]:
    """Return what divides each measured term of P: 1 where nothing is given.

    Raises:
        ValueError: If a name is unknown, or a number is not positive and finite.

    Examples:
        >>> checked_references({"size": 10})
        {'size': 10.0, 'train_time': 1.0, 'inference_time': 1.0}
    """
    check_mapping("reference", references, "terms of P to numbers")
    check_names("reference", references, MEASURED)
    for name, value in references.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
            raise ValueError(f"`reference` must hold positive numbers, got {name}={value!r}.")
    return {name: float(references.get(name, 1.0)) for name in MEASURED}


@dataclass(frozen=True)
class Terms:
    """The terms of P, unweighted: ratios to the references, and the error 1 - A; None where not measured."""

    size: float | None = None
    train_time: float | None = None
    inference_time: float | None = None
    error: float | None = None


def performance_score(terms: Terms, weights: Mapping[str, float] = DEFAULT_WEIGHTS) -> float:
    """Return ``P = wS*S/Sref + wTtrain*Ttrain/Tref + wTinfer*Tinfer/Tref + wA*(1 - A)``; lower is better.

    With all references 1 this is the source's formula to the letter.

    Args:
        terms: The ratios and the error.
        weights: Of ``size``, ``train_time``, ``inference_time`` and ``accuracy``; a term of weight 0 may be None.

    Returns:
        The score; NaN when a term that has weight was not measured.

    Examples:
        >>> performance_score(Terms(size=1.0, inference_time=1.0, error=0.05))
        1.005
    """
    parts = {
        "size": terms.size,
        "train_time": terms.train_time,
        "inference_time": terms.inference_time,
        "accuracy": terms.error,
    }
    weighted = [(weight, parts[name]) for name, weight in weights.items() if weight > 0]
    return math.fsum(math.nan if value is None else weight * value for weight, value in weighted)


def guarded(score: float, feasible: bool) -> float:
    """Return the score that monitors see: ``1000 * (P + 1)`` for a model that is not feasible.

    The formula alone prefers an empty model (with ``wA = 0.1`` a point of accuracy costs 0.001), so a floor under the
    accuracy must stand beside it. The value is finite, so that EarlyStopping's ``check_finite`` does not stop.
    """
    return score if feasible else 1000.0 * (score + 1.0)
