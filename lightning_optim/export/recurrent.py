"""LSTM and GRU in an exported file: int8 weights, which engines scale once, when the file is loaded."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.export.stored import StoredWeight
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.recurrent import recurrent_names

__all__ = ["store_recurrent"]


class _StoredRecurrent(nn.RNNBase):
    """Calls torch's function itself: ``torch.export`` traces nn.RNNBase by its parameters, not by its list of them."""

    stored: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compute(*args, **kwargs)

    def _compute(self, input: Tensor, hx: Any = None) -> Any:
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        gated = isinstance(self, nn.LSTM)
        states = self._states(x) if hx is None else hx if gated else (hx,)
        states = states if batched or hx is None else tuple(state.unsqueeze(1) for state in states)
        weights = [self._weight(name) for name in self._flat_weights_names]
        how = (self.bias, self.num_layers, 0.0, False, self.bidirectional, self.batch_first)
        y, *last = torch.lstm(x, states, weights, *how) if gated else torch.gru(x, states[0], weights, *how)
        if not batched:
            y, last = y.squeeze(0 if self.batch_first else 1), [state.squeeze(1) for state in last]
        return y, tuple(last) if gated else last[0]

    def _weight(self, name: str) -> Any:
        held: Any = self.stored
        return held[name].matrix() if name in held else self._parameters[name]

    def _states(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, layers = x.shape[0 if self.batch_first else 1], self.num_layers * (2 if self.bidirectional else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        return tuple(x.new_zeros(layers, rows, size) for size in sizes)


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
