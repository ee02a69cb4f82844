"""Which positions of a sequence's features count: those whose logits are compared, and no padding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_optim.distillation.positions import find_logits, fitting_mask, has_decoder, named_inputs, one_a_row
from lightning_optim.distillation.subclass_points import SubclassPoints
from lightning_optim.target import ForwardInputs

__all__ = ["Counted"]

_ENCODER = "encoder"
_MASK = "attention_mask"


@dataclass(frozen=True)
class Counted:
    """The positions of one call of the student that count.

    Attributes:
        output: Those of its output, ``[rows, positions]``: not labeled -100, and no padding; None: all.
        padding: Those of its output that are no padding; None: all.
        encoder: Those of its encoder that are no padding, if it has encoder and decoder; None: all.
    """

    output: Tensor | None = None
    padding: Tensor | None = None
    encoder: Tensor | None = None

    @classmethod
    def of_call(
        cls, points: SubclassPoints, output: Any, inputs: ForwardInputs, item: Any, loss: Tensor | None
    ) -> "Counted":
        """Read them as the losses of logits do.

        Args:
            points: The distillation module.
            output: What the student returned.
            inputs: The arguments of its forward.
            item: The batch without its index.
            loss: The loss that the student computed, which tells whether it shifts the labels.
        """
        received = named_inputs(points._called, inputs)
        padding, encoder = points.padding_mask(item, inputs), None
        if has_decoder(received, points.student):
            encoder = {**(item if isinstance(item, Mapping) else {}), **received}.get(_MASK)
        # No logits (a student whose features alone are matched), or not those of a sequence: only padding is left out.
        found = find_logits(output)
        logits = None if found is None else one_a_row(found)
        keep = None
        if logits is not None and logits.ndim == 3:
            labels = points._labels(item, inputs)
            dim = points._positions.dim_of(logits, labels, mask=padding, told=points.class_dim, matters=False)
            mask = padding
            if not is_overridden("padding_mask", points, SubclassPoints):
                mask = fitting_mask(mask, logits, labels, dim)
            told = points.shift_labels
            rows = points._positions.read(logits, labels, mask, student=points.student, dim=dim, loss=loss, shifts=told)
            keep = rows.keep
        return cls(keep, _bool(padding), _bool(encoder))

    def of(self, layer: str, feature: Tensor) -> Tensor | None:
        """Return the positions of a layer's feature that count, ``[rows, positions]``; None: all, or no sequence.

        Args:
            layer: The student's layer; below a part named ``encoder`` of a model that has a decoder too, the encoder's.
            feature: What it returned.
        """
        if feature.ndim != 3:
            return None
        of_encoder = self.encoder is not None and _ENCODER in layer.split(".")
        masks = (self.encoder,) if of_encoder else (self.output, self.padding, self.encoder)
        return next((mask for mask in masks if mask is not None and mask.shape == feature.shape[:2]), None)


def _bool(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) else None
