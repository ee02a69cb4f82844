"""How big a model is."""

import os
import sys
from collections.abc import Callable

import torch
from torch import nn

from lightning_optim.registry import Registry
from lightning_optim.sharding import full

__all__ = ["SIZES", "bytes_of", "free_bytes"]

SIZES: Registry[Callable[[nn.Module], float]] = Registry("size")
"""``size(module) -> float``, by name. Shared parameters count once, buffers do not count.

Of a model that is divided among processes the size is that of the whole; every process must ask."""


@SIZES.register("parameters")
def parameters(module: nn.Module) -> float:
    """Number of parameters: the source's S."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


@SIZES.register("nonzero")
def nonzero(module: nn.Module) -> float:
    """Number of parameters that are not zero: what a mask leaves."""
    return float(sum(int(torch.count_nonzero(full(parameter.detach()))) for parameter in module.parameters()))


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
                own = bits_of(name)
                total += parameter.numel() * (parameter.element_size() * 8 if own is None else own) / 32
    return total


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers as they are stored; of a divided model, of the whole."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_bytes(device: torch.device) -> int:
    """Return how many bytes are free on a device; of a CPU, in physical memory (where the system tells, else many)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return sys.maxsize
