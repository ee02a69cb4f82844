"""What a search optimizes and demands: columns of a comparison, each with its direction."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_optim.checks import check_choice
from lightning_optim.export.runtimes import RUNTIMES
from lightning_optim.report.columns import ENGINES, Row

__all__ = ["Limit", "Objective", "check_noise", "limits_of", "objectives_of", "read_limit"]

ACCURACY = "accuracy"

COUNTS = {
    "parameters": "parameters",
    "nonzero": "non-zero parameters",
    "bits": "parameters x bits / 32",
    "bytes": "state_dict file, compressed (bytes)",
    "macs": "multiplications of one row",
    "size_ratio": "size / dense",
}
"""Columns that are counted, so that they have no noise; lower is better."""

TIMES = ("ratio", "ms", "batch_ratio", "batch_ms", "P")


@dataclass(frozen=True)
class Objective:
    """A column of a comparison.

    Attributes:
        name: As the user calls it.
        column: Its key in a row.
        mode: Whether it is to be small or large.
        title: On axes and in tables.
        needs: "" for what is counted in PyTorch, "file" for an exported file, "time" for a timed call, "metric" for a
            result of ``evaluate``.
    """

    name: str
    column: str
    mode: Literal["min", "max"]
    title: str
    needs: str = ""

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Optuna's name of the mode."""
        return "minimize" if self.mode == "min" else "maximize"

    def better(self, one: float, other: float) -> bool:
        """Whether a value is better than another."""
        return one < other if self.mode == "min" else one > other

    def value(self, row: Row, notes: Sequence[str] = ()) -> float:
        """Return its value in a row.

        Raises:
            ValueError: If the row has none, with the notes of the comparison, or it is not finite.
        """
        value = row.get(self.column)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            why = f": {' '.join(notes)}" if notes else "."
            raise ValueError(f"the trial has no {self.name!r}{why}")
        if not math.isfinite(value):
            raise ValueError(f"{self.name!r} of the trial is {value}.")
        return float(value)

    def interval(self, row: Row, noise: Mapping[str, float]) -> tuple[float, float]:
        """Return the range of its value: of a time its rounds', of a metric its noise; a count has none."""
        value = self.value(row)
        key = self.column.removesuffix("_ratio")
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        if self.column.endswith("_ratio") and isinstance(low, (int, float)) and isinstance(high, (int, float)):
            return min(float(low), value), max(float(high), value)
        half = noise.get(self.name, row.get(f"{self.column}_std") or 0.0)
        return value - half, value + half


def objectives_of(given: Any, engine: str, accuracy: str) -> tuple[Objective, ...]:
    """Return the objectives that are asked for.

    Args:
        given: Names, or names and "min" or "max" for metrics that only ``evaluate`` knows.
        engine: Whose times count.
        accuracy: Name of the metric that is the accuracy.

    Raises:
        ValueError: If there is none, one is given twice, or is unknown.
        TypeError: If it is neither a list of names nor a mapping.
    """
    if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
        raise TypeError(f"`objectives` must be a list of names such as ('accuracy', 'bits'), got {given!r}.")
    if not given:
        raise ValueError("`objectives` is empty: name at least one, such as ('accuracy', 'bits').")
    modes = given if isinstance(given, Mapping) else {}
    found = tuple(objective_of(name, engine, accuracy, modes.get(name)) for name in given)
    columns = [objective.column for objective in found]
    twice = [objective.name for objective in found if columns.count(objective.column) > 1]
    if twice:
        raise ValueError(f"`objectives` names {twice[0]!r} twice.")
    return found


def objective_of(name: Any, engine: str, accuracy: str, mode: Any = None) -> Objective:
    """Return an objective by its name; a mode makes an unknown name a metric of ``evaluate``."""
    if mode is not None:
        check_choice(f"objectives[{name!r}]", mode, ("min", "max"))
    known = _known(engine, accuracy)
    if isinstance(name, str) and name in known and mode in (None, known[name].mode):
        return known[name]
    if mode is None or not isinstance(name, str) or name in known:
        listed = ", ".join(["accuracy", "file", "latency", "latency_batch", "P", *COUNTS])
        reason = f"is always {known[name].mode}imized" if name in known else "is no column of `compare`"
        raise ValueError(
            f"`objectives` has {name!r}, which {reason}; known: {listed}. For another metric that `evaluate` returns "
            "pass its direction: {'recall': 'max', 'bits': 'min'}."
        )
    return Objective(name, name, mode, name, "metric")


def _known(engine: str, accuracy: str) -> dict[str, Objective]:
    where = ENGINES.get(engine, engine)
    found = {name: Objective(name, name, "min", title) for name, title in COUNTS.items()}
    found[accuracy] = Objective(accuracy, accuracy, "max", accuracy, "metric")
    found[ACCURACY] = Objective(ACCURACY, accuracy, "max", accuracy, "metric")
    for name in ("file", "onnx_bytes"):
        found[name] = Objective(name, "onnx_bytes", "min", "ONNX file (bytes)", "file")
    found["latency"] = Objective("latency", f"{engine}_ratio", "min", f"one call in {where} / dense", "time")
    found["latency_batch"] = Objective(
        "latency_batch", f"{engine}_batch_ratio", "min", f"one batch in {where} / dense", "time"
    )
    found["P"] = Objective("P", "P", "min", "P", "time")
    for name in ("torch", *RUNTIMES):
        for word in TIMES:
            column = f"{name}_{word}"
            found[column] = Objective(column, column, "min", column, "time")
    return found


# Demands.


@dataclass(frozen=True)
class Limit:
    """A bound on an objective: ``accuracy >= 0.92``.

    Attributes:
        objective: What is bounded.
        bound: The bound, which is allowed itself.
        at_least: Whether it is a lower bound.
    """

    objective: Objective
    bound: float
    at_least: bool

    def excess(self, value: float) -> float:
        """Return by how much a value breaks it; 0 or below where it does not."""
        return self.bound - value if self.at_least else value - self.bound

    def __str__(self) -> str:
        return f"{self.objective.name} {'>=' if self.at_least else '<='} {self.bound:g}"


_LIMIT = re.compile(r"\s*(>=|<=|≥|≤|>|<)\s*([-+0-9.eE]+)\s*")


def read_limit(argument: str, objective: Objective, given: Any) -> Limit:
    """Read a bound: ``">=0.9"``, or a number, which bounds what should be small from above, other things from below.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given):
        return Limit(objective, float(given), objective.mode == "max")
    found = _LIMIT.fullmatch(given) if isinstance(given, str) else None
    try:
        bound = float(found[2]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or math.isnan(bound):
        raise ValueError(
            f"`{argument}` of {objective.name} must be a number or a bound such as '>=0.92', got {given!r}."
        )
    return Limit(objective, bound, found[1] in (">=", "≥", ">"))


def limits_of(
    given: Mapping[str, Any] | None, objectives: Sequence[Objective], engine: str, accuracy: str
) -> tuple[Limit, ...]:
    """Return the bounds of a budget.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If a name or a bound is unknown.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"`budget` must be a mapping such as {{'latency': 0.5, 'accuracy': '>=0.92'}}, got {given!r}.")
    own = {objective.name: objective for objective in objectives}
    try:
        return tuple(
            read_limit("budget", own.get(name) or objective_of(name, engine, accuracy), bound)
            for name, bound in (given or {}).items()
        )
    except ValueError as error:
        raise ValueError(str(error).replace("`objectives` has", "`budget` has")) from None


def check_noise(noise: Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    """Return the half width within which values of an objective count as equal.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If a name is none of the search, or a width is negative.
    """
    if noise is not None and not isinstance(noise, Mapping):
        raise TypeError(f"`noise` must be a mapping such as {{'accuracy': 0.005}}, got {noise!r}.")
    for name, width in (noise or {}).items():
        if name not in names:
            raise ValueError(f"`noise` has {name!r}, which is not searched for; known: {', '.join(names)}.")
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 <= width < math.inf:
            raise ValueError(f"`noise` of {name} must be a number of at least 0, got {width!r}.")
    return {name: float(width) for name, width in (noise or {}).items()}
