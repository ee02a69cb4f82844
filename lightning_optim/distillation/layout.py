"""How the logits of one call lie: the dimension of their classes, their labels, and the mask of their positions."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_optim.distillation.positions import Positions, answered_positions, fitting_mask
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.target import ForwardInputs

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How the logits of one call lie.

    Attributes:
        labels: Labels of the batch; None if there are none.
        mask: The positions that count, ``[rows, positions...]``; None: all.
        dim: The dimension of the logits that holds the classes.
    """

    labels: Any
    mask: Tensor | None
    dim: int

    @classmethod
    def of(
        cls,
        points: SubclassPoints,
        logits: Tensor,
        inputs: ForwardInputs,
        item: Any,
        *,
        positions: Positions | None = None,
        class_dim: int | None = None,
    ) -> "Layout":
        """Find out how logits lie.

        Args:
            points: The distillation.
            logits: The student's or the teacher's, at least two dimensions.
            inputs: The arguments of the student's forward.
            item: The batch without its index.
            positions: What remembers the layout of earlier batches; default the distillation's own.
            class_dim: The dimension of the classes if it is known.
        """
        objective = points._objective
        positions = points._positions if positions is None else positions
        labels = points._labels(item, inputs, asks="targets" in objective.needs or logits.ndim > 2)
        mask = points.padding_mask(item, inputs) if logits.ndim > 2 else None
        told = points.class_dim if class_dim is None else class_dim
        dim = positions.dim_of(logits, labels, mask=mask, told=told, matters=not objective.elementwise)
        if not is_overridden("padding_mask", points, SubclassPoints):
            mask = fitting_mask(mask, logits, labels, dim)
        return cls(labels, mask, dim)

    def answered(self, logits: Tensor, points: SubclassPoints) -> Tensor | None:
        """Return the positions that a cache of the teacher holds, see :func:`answered_positions`; None: all."""
        return answered_positions(logits.shape, self.labels, self.mask, student=points.student, dim=self.dim)
