"""Experts of a mixture with rounded weights: each expert's matrix has scales of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_optim.checkpoint import layer_class
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.modules import expert_weights
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.over import OverOwnClass

__all__ = ["QuantizedExperts", "ReadExperts", "as_rows", "from_rows"]

_READ = "_lightning_optim_read"
"""Attribute that holds what the parameters' names stand for while the experts compute."""


def as_rows(experts: Tensor, granularity: str, *, inputs_first: bool) -> tuple[Tensor, str]:
    """Return the rows of all experts, and the granularity by which no two experts share a scale.

    Args:
        experts: ``[experts, out, in]``, or ``[experts, in, out]`` with ``inputs_first``.
        granularity: As for a weight ``[out, in]``.
        inputs_first: How they are stored.

    Returns:
        ``[experts * out, in]``; for "per_tensor" ``[experts, out * in]``, whose rows have one scale each.
    """
    matrices = experts.transpose(1, 2) if inputs_first else experts
    return (
        (matrices.flatten(1), "per_channel") if granularity == "per_tensor" else (matrices.flatten(0, 1), granularity)
    )


def from_rows(rows: Tensor, like: Tensor, *, inputs_first: bool) -> Tensor:
    """Return the rows of :func:`as_rows` as the layer stores its experts, ``like`` one of its parameters."""
    number, first, second = like.shape
    return rows.view(number, second, first).transpose(1, 2) if inputs_first else rows.view(number, first, second)


class ReadExperts(OverOwnClass):
    """Experts whose forward reads other weights than the parameters; they are made once in a call."""

    @classmethod
    def read_names(cls, layer: nn.Module) -> tuple[str, ...]:
        """Return the names of the experts' matrices."""
        return tuple(expert_weights(layer))

    def read(self, name: str) -> Any:
        """Return what forward reads; outside of a call, the parameter."""
        return vars(self).get(_READ, self._parameters)[name]

    def weights_to_read(self) -> Mapping[str, Tensor] | None:
        """Return what forward reads by the parameters' names; None: the parameters."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the layer's own class does."""
        weights = self.weights_to_read()
        if weights is None:
            return super().forward(*args, **kwargs)
        vars(self)[_READ] = weights
        try:
            return super().forward(*args, **kwargs)
        finally:
            del vars(self)[_READ]


@layer_class
class QuantizedExperts(ReadExperts, QuantizedLayer):
    """Experts whose matrices are rounded; one scale per output of each expert by default.

    Inputs stay float: what the second matrix reads is computed inside of the layer.
    """

    def weights_to_read(self) -> Mapping[str, Tensor] | None:
        """Return the rounded weights, in the phases that round."""
        bits = self.weight_bits
        if not self._rounds_weight or bits is None:
            return None
        weights = {}
        for name, inputs_first in expert_weights(self).items():
            stored: Any = self._parameters[name]
            rows, granularity = as_rows(stored, self.weight_granularity, inputs_first=inputs_first)
            rounded = fake_quantize_weight(rows, bits, granularity)
            weights[name] = from_rows(rounded, stored, inputs_first=inputs_first)
        return weights

    def rounded_parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters that are rounded, rounded."""
        return self.weights_to_read() or {}

    def parameter_bits(self, name: str) -> float | None:
        """Return the bits of an expert's matrix; other parameters are deployed as stored."""
        return self.weight_bits if name in expert_weights(self) and self._rounds_weight else None
