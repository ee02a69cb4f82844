"""The masks of one event: what each rank scores, and what is pruned of it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import lightning.pytorch as pl
from torch import Tensor

from lightning_optim.callbacks.base import ranks_per_batch
from lightning_optim.callbacks.division import Division, divide
from lightning_optim.callbacks.masks import HeldMasks
from lightning_optim.callbacks.statistics import Collected
from lightning_optim.functional.criteria import STATISTICS, Criterion, Statistics, parameter_generator, scores_of
from lightning_optim.functional.granularity import Granularity
from lightning_optim.functional.masks import global_masks
from lightning_optim.functional.thresholds import Scores
from lightning_optim.sharding import wrap_like
from lightning_optim.sparsity.goals import Goal
from lightning_optim.sparsity.matrices import masks_by_matrix, ranks_matrices, scores_by_matrix

__all__ = ["Ranking"]


@dataclass(frozen=True)
class Ranking:
    """Scores the weights of a running fit and makes their masks.

    Attributes:
        trainer: The running Trainer.
        held: The selected weights and their masks.
        statistics: What was collected since the last event.
        criterion: Scores a weight.
        needs: What the criterion asks for.
        granularity: What is pruned together.
        scope: "global" or "layer".
    """

    trainer: pl.Trainer
    held: HeldMasks
    statistics: Collected
    criterion: Criterion
    needs: Collection[str]
    granularity: Granularity
    scope: str

    @property
    def _by_element(self) -> bool:
        """Whether a weight's score depends on nothing but itself and its own statistics."""
        own = getattr(self.criterion, "elementwise", False) and "generator" not in self.needs
        return own and self.statistics.elementwise

    def division(self) -> Division:
        """Decide which rank ranks which weights: where a strategy shards them, all ranks together."""
        weights = self.held.weights
        within_rows = str(self.granularity) == "weight" or self.granularity.final_sparsity is not None
        return divide(
            {name: weight.parameter for name, weight in weights.items()},
            self.trainer.strategy,
            by_element=self._by_element,
            by_row=within_rows and not ranks_matrices(weights, self.granularity, self.scope),
        )

    def new_masks(self, division: Division, goal: Goal, sparsity: float) -> dict[str, Tensor]:
        """Return the masks of the parts that this rank holds."""
        scores = {name: division.take(name, self._scores(division, name)) for name in goal.names}
        previous = {name: division.mask_of(name, self.held.of(name)) for name in goal.names if name in self.held.keeps}
        masks = self._masks(division, scores, previous, sparsity)
        return {name: division.give(name, mask) for name, mask in masks.items()}

    def _masks(
        self, division: Division, scores: Mapping[str, Scores], previous: Mapping[str, Tensor], sparsity: float
    ) -> dict[str, Tensor]:
        weights, shards = self.held.weights, division.shards
        if ranks_matrices({name: weights[name] for name in scores}, self.granularity, self.scope):
            each = self.scope == "layer"
            return masks_by_matrix(
                scores, weights, sparsity, self.granularity, previous=previous, each=each, shards=shards
            )
        return global_masks(scores, sparsity, self.granularity, previous=previous or None, shards=shards)

    def _scores(self, division: Division, name: str) -> Scores:
        weight = self.held.weights[name]
        parameter = weight.parameter.detach()
        tensor = division.read(parameter)
        values = self.statistics.values(self.trainer, name, ranks_per_batch(self.trainer))
        for statistic in values:
            if STATISTICS[statistic].elementwise:
                values[statistic] = division.read(wrap_like(values[statistic], parameter))
        generator = parameter_generator(name) if "generator" in self.needs else None
        if self._by_element or weight.is_plain:
            return scores_of(self.criterion, tensor, Statistics(generator=generator, **values))
        return scores_by_matrix(self.criterion, weight, tensor, values, generator)
