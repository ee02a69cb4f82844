"""How big a model is."""

from collections.abc import Callable

import torch
from torch import nn

from lightning_optim.registry import Registry

__all__ = ["SIZES"]

SIZES: Registry[Callable[[nn.Module], float]] = Registry("size")
"""``size(module) -> float``, by name. Shared parameters count once, buffers do not count."""


@SIZES.register("parameters")
def parameters(module: nn.Module) -> float:
    """Number of parameters: the source's S."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


@SIZES.register("nonzero")
def nonzero(module: nn.Module) -> float:
    """Number of parameters that are not zero: what a mask leaves."""
    return float(sum(int(torch.count_nonzero(parameter.detach())) for parameter in module.parameters()))


@SIZES.register("bits")
def bits(module: nn.Module) -> float:
    """Parameters times their bits, in 32-bit parameters: sees half precision and quantization (without its scales)."""
    counted: set[int] = set()
    total = 0.0
    for layer in module.modules():
        bits_of = getattr(layer, "parameter_bits", lambda name: None)
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                total += parameter.numel() * (bits_of(name) or parameter.element_size() * 8) / 32
    return total
