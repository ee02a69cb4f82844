"""Functions between integer layers in an exported file: their operands rounded by quantizers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim.export.stored import Quantizer, dequantize, quantize
from lightning_optim.quantization.functions import GATE_SCALE, QuantizedFunctions, RoundsFunctions, gated
from lightning_optim.sharding import set_class

__all__ = ["store_functions"]


class _Gate(nn.Module):
    """Rounds gates to multiples of 1 / 255, as :func:`lightning_optim.quantization.functions.gated` asks."""

    scale: Tensor
    six: Tensor
    zero_point: Tensor
    one: Tensor
    three: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(GATE_SCALE))
        self.register_buffer("six", torch.tensor(6 * GATE_SCALE))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("one", torch.tensor(1, dtype=torch.uint8))
        self.register_buffer("three", torch.tensor(3.0))

    def forward(self, x: Tensor, scale: float) -> Tensor:
        step = self.scale if scale == GATE_SCALE else self.six
        rounded: Tensor = dequantize(quantize(x, step, self.zero_point), self.scale, self.zero_point, -1)
        return rounded

    def shifted(self, x: Tensor) -> Tensor:
        """Return ``x + 3``: an integer kernel adds a constant that is stored as an integer."""
        constant: Tensor = dequantize(self.one, self.three, self.zero_point, -1)
        return x + constant


class _IntegerFunctions(RoundsFunctions):
    keeps_name = True
    stored_operands: nn.ModuleDict
    stored_gate: _Gate
    activation_ranges: str

    def round_operand(self, which: str, x: Tensor) -> Tensor:
        rounded: Tensor = self.stored_operands[which](x)
        return rounded

    def gated(self, kind: str, x: Tensor) -> Tensor:
        if self.activation_ranges == "symmetric":  # as in the module, a float gate
            return F.silu(x) if kind == "silu" else F.hardswish(x)
        return gated(kind, x, self.stored_gate, self.stored_gate.shifted)


def store_functions(module: QuantizedFunctions) -> None:
    """Give a module quantizers for the operands of its functions."""
    quantizers = {}
    for which in module.watched:
        quantizers[which] = Quantizer(*module.range_of(which), module.activation_bits or 8)
    set_class(module, _IntegerFunctions.over(module))
    module.add_module("stored_operands", nn.ModuleDict(quantizers))
    module.add_module("stored_gate", _Gate())
