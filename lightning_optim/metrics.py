"""The score P as a metric of torchmetrics."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_optim.functional.score import MEASURED, Terms, checked_references, checked_weights, performance_score

__all__ = ["PerformanceScoreMetric"]


class PerformanceScoreMetric(Metric):
    """The score P over what was measured; lower is better.

    ``P = wS*S/Sref + wTtrain*Ttrain/Tref + wTinfer*Tinfer/Tref + wA*(1 - A)``, each of S, T and A the mean over all
    calls of ``update`` on all processes. It synchronizes, resets, clones and works in a ``MetricCollection`` as every
    metric does; :class:`~lightning_optim.PerformanceScore` measures and logs P by itself.

    Args:
        weights: Of ``size``, ``train_time``, ``inference_time``, ``accuracy``: non-negative numbers, used as they are;
            what is missing is 0. None is the source's example for a recommender (0.4, 0, 0.6, 0.1).
        reference: What divides ``size``, ``train_time`` and ``inference_time``: positive numbers. What is missing, or
            None, is 1: the source's formula to the letter.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``weights`` or ``reference`` is no mapping.
        ValueError: If a name is unknown, a weight is negative, or a reference is not positive.

    Examples:
        >>> score = PerformanceScoreMetric(reference={"size": 1000, "inference_time": 2.0})
        >>> score.update(size=500, inference_time=1.0, accuracy=0.9)
        >>> round(float(score.compute()), 4)
        0.51
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        reference: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weights = checked_weights(weights)
        self.reference = checked_references(reference or {})
        for name in (*MEASURED, "accuracy"):
            self.add_state(f"{name}_sum", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{name}_count", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        size: float | Tensor | None = None,
        train_time: float | Tensor | None = None,
        inference_time: float | Tensor | None = None,
        accuracy: float | Tensor | None = None,
    ) -> None:
        """Add what was measured; a term that was not measured here is left out.

        Args:
            size: S, in the unit of its reference.
            train_time: Of an epoch, in the unit of its reference.
            inference_time: Of a call, in the unit of its reference.
            accuracy: A, in [0, 1]. A tensor of several values counts each.

        Raises:
            ValueError: If an accuracy is not in [0, 1], or another term is negative.
        """
        given = {"size": size, "train_time": train_time, "inference_time": inference_time, "accuracy": accuracy}
        for name, value in given.items():
            if value is None:
                continue
            values = torch.as_tensor(value, dtype=torch.float64, device=self.device)
            most = 1.0 if name == "accuracy" else float("inf")
            if bool((values < 0).any()) or bool((values > most).any()):
                expected = "in [0, 1]" if name == "accuracy" else "at least 0"
                raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
            setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + values.sum())
            setattr(self, f"{name}_count", getattr(self, f"{name}_count") + values.numel())

    def compute(self) -> Tensor:
        """Return P: a scalar, NaN where a term with weight was never given."""
        means = {name: self._mean(name) for name in (*MEASURED, "accuracy")}
        ratios = {name: None if (mean := means[name]) is None else mean / self.reference[name] for name in MEASURED}
        error = None if means["accuracy"] is None else 1.0 - means["accuracy"]
        score = performance_score(Terms(**ratios, error=error), self.weights)
        return torch.tensor(score, dtype=torch.get_default_dtype(), device=self.device)

    def _mean(self, name: str) -> float | None:
        count = float(getattr(self, f"{name}_count"))
        return float(getattr(self, f"{name}_sum")) / count if count else None
