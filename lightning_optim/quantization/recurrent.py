"""LSTM and GRU with rounded weights, of the input products and the recurrent ones; what they read stays float."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_optim.checkpoint import layer_class
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.rounded import rounded_weight

__all__ = ["QuantizedGRU", "QuantizedLSTM", "recurrent_names"]


def recurrent_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the matrices of a recurrent layer: all layers and directions, inputs, states, projections."""
    return tuple(name for name, parameter in layer._parameters.items() if parameter is not None and parameter.ndim == 2)


class _QuantizedRecurrent(QuantizedLayer, nn.RNNBase):
    operands = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the float layer does, with rounded weights in the phases that round."""
        weights = self.weights_to_read()
        if not weights:
            return super().forward(*args, **kwargs)
        self._update_flat_weights()  # else the call below would, with the float weights, where a parameter is another
        own = self._flat_weights
        # nn.RNNBase computes with this list, which holds its parameters in the order of their names.
        self._flat_weights = [weights.get(n, p) for n, p in zip(self._flat_weights_names, own, strict=True)]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._flat_weights = own

    def weights_to_read(self) -> Mapping[str, Tensor]:
        """Return the rounded weights, in the phases that round."""
        bits = self.weight_bits
        if not self._rounds_weight or bits is None:
            return {}
        parameters: dict[str, Any] = self._parameters
        return {name: rounded_weight(parameters[name], bits, self.weight_granularity) for name in recurrent_names(self)}

    def rounded_parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters that are rounded, rounded."""
        return self.weights_to_read()

    def parameter_bits(self, name: str) -> float | None:
        """Return the bits of a matrix when deployed; biases are deployed as stored."""
        return self.weight_bits if name in recurrent_names(self) and self._rounds_weight else None


@layer_class
class QuantizedLSTM(_QuantizedRecurrent, nn.LSTM):
    """An LSTM with rounded weights; one scale per row of each gate by default."""


@layer_class
class QuantizedGRU(_QuantizedRecurrent, nn.GRU):
    """A GRU with rounded weights; one scale per row of each gate by default."""
