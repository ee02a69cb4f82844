"""Statistics of the layers' inputs, batch by batch, pooled over the processes as soon as a step is counted."""

from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_optim.callbacks.base import ranks_per_batch
from lightning_optim.callbacks.statistics import Collected
from lightning_optim.change import Changed
from lightning_optim.target import Weight

__all__ = ["PooledInputs"]


class PooledInputs:
    """Watches the layers' inputs in a batch, and adds what all processes saw.

    It is added right after the optimizer's step: a callback that comes before ours may write a file at the end of this
    batch, and a resumed run must find there what the batch brought.

    Args:
        needs: Names of statistics.
        into: Where the sums of all processes are added.
    """

    def __init__(self, needs: Collection[str], into: Collected) -> None:
        self._batch, self._into = Collected(needs), into
        self._names: list[str] = []
        self._trainer: pl.Trainer | None = None

    @property
    def needed(self) -> bool:
        """Whether a statistic is read from inputs."""
        return self._batch.reads_inputs

    def watch(self, trainer: pl.Trainer, weights: Mapping[str, Weight]) -> None:
        """Watch the inputs of some weights' layers in the batch that begins.

        Args:
            trainer: The running Trainer.
            weights: By name, in the same order in every process.
        """
        if self.needed and weights:
            self._batch.watch(weights)
            self._names, self._trainer = list(weights), trainer

    def stop(self) -> None:
        """End the watch: techniques call the model now, or copies of it with its hooks."""
        self._batch.stop()

    def pool(self) -> None:
        """End the watch, and add what was seen in all processes; each of them must ask."""
        self.stop()
        if self._trainer is not None:
            self._into.pool(self._batch, self._names, self._trainer, ranks_per_batch(self._trainer))
            self._names, self._trainer = [], None

    def follow(self, changed: Changed) -> None:
        """Slice and rename what was seen and is not added yet."""
        self._batch.follow(changed)

    def release(self) -> None:
        """Forget the batch."""
        self.stop()
        self._batch.clear()
        self._names, self._trainer = [], None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_names": [], "_trainer": None}
