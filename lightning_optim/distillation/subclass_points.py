"""What a subclass of DistillationModule may define differently: how logits, labels, masks and inputs are found."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_optim.distillation.capture import find_layer
from lightning_optim.distillation.features import Feature
from lightning_optim.distillation.indexed import Indexed
from lightning_optim.distillation.objective import LogitLosses
from lightning_optim.distillation.positions import (
    Positions,
    find_labels,
    find_logits,
    find_loss,
    find_mask,
    named_inputs,
    one_a_row,
)
from lightning_optim.distillation.projectors import Projectors
from lightning_optim.functional.rows import task_cross_entropy
from lightning_optim.target import ForwardInputs

__all__ = ["SubclassPoints"]


class SubclassPoints(pl.LightningModule):
    """The methods of a DistillationModule that a subclass may override, and the arguments that they read.

    The parts of a distillation (the step, the cache, the features) see the module as this class, so what they use of it
    is listed here.
    """

    student: nn.Module
    logits_from: str
    features: list[Feature]
    projectors: Projectors
    teacher_classes: list[int] | None
    _objective: LogitLosses
    _positions: Positions
    _task_loss: Callable[[Tensor, Any], Tensor] | None

    class_dim: int | None = None
    """The dimension of the logits that holds the classes, 1 or -1; None: told by the shape of the labels."""
    shift_labels: bool | None = None
    """Whether each position predicts the next label; None: told by the student's own loss, or else its class."""
    taught_backward: int | None = None
    """Which ``manual_backward`` of a training step gets the teacher's loss, from 0; None: there is only one.

    Calls of the student through which an earlier backward pass went do not count for it.
    """
    accumulated_batches: int | None = None
    """By how many batches a student that optimizes manually divides its loss: the teacher's is divided alike; None: 1.

    A step that accumulates must say it, 1 if it does not divide.
    """

    def get_logits(self, output: Any) -> Tensor:
        """Return the logits in an output of student or teacher: ``[rows, ..., classes]`` or ``[rows, classes, ...]``.

        The output itself, ``.logits``, the entry ``"logits"``, both ends of a span, or the first tensor of a tuple,
        dict, dataclass or other object that is neither a scalar nor integers.

        Raises:
            TypeError: If there is none.
        """
        logits = find_logits(output)
        if logits is None:
            raise TypeError(f"no logits in an output of type {type(output).__name__}. Override `get_logits(output)`.")
        return logits

    def teacher_inputs(self, batch: Any) -> Any:
        """Return the arguments of the teacher's forward if they differ from the student's; else None.

        A tensor, a tuple of arguments, or a dict of keyword arguments: for another tokenizer or another resolution. The
        batch is the one that the student's own step gets, without the index of an :class:`IndexedDataset`.
        """
        return None

    def targets(self, batch: Any) -> Any:
        """Return the labels in a batch: its second item, or the entry ``labels``, ``label``, ``targets`` or ``y``.

        Unless a subclass overrides this method, labels passed to the student's forward take precedence, and an item
        that the forward received as another argument is skipped. An override may return None: no labels.

        Raises:
            TypeError: If there are none.
        """
        labels = find_labels(batch, {})
        if labels is None:
            raise TypeError(f"no labels in a batch of type {type(batch).__name__}. Override `targets(batch)`.")
        return labels

    def padding_mask(self, batch: Any, inputs: ForwardInputs) -> Tensor | None:
        """Return which positions of the student's output count, ``[rows, positions]``, True or 1; None: all.

        By default the ``attention_mask`` that the student's forward received; for a student with encoder and decoder
        its ``decoder_attention_mask``.
        """
        return find_mask(batch, named_inputs(self._called, inputs), self.student)

    def sample_index(self, batch: Any) -> Any:
        """Return the samples' positions in the training dataset, ``[rows]``, for the cache.

        Raises:
            ValueError: If the batch does not hold them.
        """
        if isinstance(batch, Indexed):
            return batch.index
        if isinstance(batch, Mapping) and "index" in batch:
            return batch["index"]
        raise ValueError(
            "`cache` needs to know which samples a batch holds. Wrap the training dataset: IndexedDataset(dataset)."
        )

    def task_loss(self, output: Any, batch: Any) -> Tensor:
        """Return the loss of a plain student on its labels."""
        own = find_loss(output)
        if self._task_loss is None and own is not None:
            return own
        logits, targets = self.get_logits(output), self.targets(batch)
        if self._task_loss is not None:
            return self._task_loss(logits, targets)
        logits = one_a_row(logits)
        return task_cross_entropy(logits, targets, self._positions.dim_of(logits, targets, told=self.class_dim))

    def kd_loss(self, student_logits: Tensor, teacher_logits: Tensor, **arguments: Any) -> dict[str, Tensor]:
        """Return each loss of the logits, unweighted, by name.

        Args:
            student_logits: ``[rows, classes]``, without padding; with ``cache_top_k`` ``[rows, k + 1]``, those of the k
                classes and of the rest.
            teacher_logits: The same shape.
            arguments: ``temperature`` and ``targets``; each loss gets those that it takes.
        """
        return self._objective(student_logits, teacher_logits, **arguments)

    @property
    def _called(self) -> nn.Module:
        """The part of the student whose output the logits are."""
        return find_layer(self.student, self.logits_from, "logits_from")

    def _labels(self, batch: Any, inputs: ForwardInputs, *, asks: bool = True) -> Any:
        """Return the labels of a batch, or None; ``asks`` is whether a subclass's ``targets`` is called."""
        if is_overridden("targets", self, SubclassPoints):
            return self.targets(batch) if asks else None
        return find_labels(batch, named_inputs(self._called, inputs))
