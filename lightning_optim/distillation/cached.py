"""The cached teacher of a distillation: its file is built at fit start where it is missing, and then read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_optim.distillation.cache import LogitCache
from lightning_optim.distillation.indexed import dataset_length, every_sample_once, without_index
from lightning_optim.distillation.live import LiveTeacher
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.target import ForwardInputs, batch_inputs, map_inputs

__all__ = ["CachedTeacher"]


@dataclass(eq=False)
class CachedTeacher:
    """Builds and reads the file of a distillation's teacher logits, on a disk that all ranks see."""

    points: SubclassPoints
    live: LiveTeacher
    path: Path
    cache: LogitCache | None = None
    _proven: bool = True

    def open(self, trainer: Any, checksum: str | None) -> None:
        """Open the file on every rank; rank 0 builds it first if it does not exist.

        Args:
            trainer: The run.
            checksum: The teacher's; None: any.

        Raises:
            ValueError: If it is of another teacher or dataset.
        """
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
        rows = dataset_length(loader)
        _build_on_rank_zero(trainer, self.path, partial(self._build, trainer, loader, rows))
        self.cache = LogitCache(self.path, teacher=checksum, rows=rows)
        rank_zero_info(f"Teacher logits of {rows} samples are read from {str(self.path)!r}.")
        self._proven = False

    def _build(self, trainer: Any, loader: Any, rows: int) -> None:
        teacher = self.live.required()
        bar = getattr(trainer.progress_bar_callback, "is_enabled", False)
        with isolate_rng():
            once = every_sample_once(loader)
            answers = (self._answer(batch) for batch in once)
            LogitCache.build(self.path, answers, teacher=teacher.checksum(), rows=rows, batches=len(once), progress=bar)

    def _answer(self, batch: Any) -> tuple[Any, Tensor]:
        item = without_index(batch)
        index = self.points.sample_index(batch)
        inputs = batch_inputs(self.points._called, item)
        return index, self.live.ask_combined(map_inputs(lambda tensor: tensor.to(self.points.device), inputs), item)

    def read(self, inputs: ForwardInputs, batch: Any) -> Tensor:
        """Return the cached logits of a batch.

        Args:
            inputs: The arguments of the student's forward. In the first batch the teacher, if there is one, answers
                them too.
            batch: The batch with its index.

        Raises:
            ValueError: If the teacher's answers to the first batch differ from the cached ones.
        """
        if self.cache is None:
            raise RuntimeError("no cache is open.")
        logits = self.cache.read(self.points.sample_index(batch)).to(self.points.device)
        if not self._proven and self.live.teacher is not None:
            self._proven = True
            answer = self.live.ask_combined(inputs, without_index(batch))
            if answer.shape != logits.shape or not torch.allclose(answer.to(logits), logits, rtol=2e-2, atol=2e-2):
                raise ValueError(
                    f"the cache {str(self.path)!r} does not hold the teacher's answers to this batch. The inputs must "
                    "be the same each time (no augmentation, no shuffling before IndexedDataset); if student and "
                    "teacher read batches differently, override `teacher_inputs(batch)`."
                )
        return logits


def _build_on_rank_zero(trainer: Any, path: Path, build: Callable[[], None]) -> None:
    """Build a file that does not exist; an error is raised on every rank, or those that wait would hang."""
    problem: Exception | None = None
    if trainer.is_global_zero and not path.exists():
        try:
            build()
        except (ValueError, TypeError, RuntimeError, OSError, MisconfigurationException) as error:
            problem = error
    if trainer.world_size > 1:
        problem = trainer.strategy.broadcast(problem, src=0)
    if problem is not None:
        raise problem
