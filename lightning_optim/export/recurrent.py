"""LSTM and GRU in an exported file: int8 weights, which engines scale once, when the file is loaded."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_optim.export.stored import StoredWeight
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.recurrent import RecurrentWeights, recurrent_names

__all__ = ["store_recurrent"]


class _StoredRecurrent(RecurrentWeights):
    stored: nn.ModuleDict

    def weights_to_read(self) -> Mapping[str, Tensor]:
        return {name: stored.matrix() for name, stored in self.stored.items()}  # type: ignore[operator]


class _StoredLSTM(_StoredRecurrent, nn.LSTM):
    pass


class _StoredGRU(_StoredRecurrent, nn.GRU):
    pass


def store_recurrent(layer: QuantizedLayer) -> None:
    """Let a recurrent layer hold integers, in place.

    Args:
        layer: A quantized LSTM or GRU that rounds.
    """
    bits, granularity = layer.weight_bits or 8, layer.weight_granularity
    stored: dict[str, nn.Module] = {}
    for name in recurrent_names(layer):
        weight: Any = layer._parameters[name]
        stored[name] = StoredWeight(weight, bits, granularity)
    layer.__class__ = _StoredLSTM if isinstance(layer, nn.LSTM) else _StoredGRU  # type: ignore[assignment]
    layer.add_module("stored", nn.ModuleDict(stored))
