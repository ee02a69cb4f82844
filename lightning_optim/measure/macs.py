"""Counts the multiply-accumulate operations of one forward pass."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_optim.modules import evaluating, without_fast_path
from lightning_optim.target import as_forward_inputs

__all__ = ["count_macs"]


def count_macs(module: nn.Module, example_inputs: Any) -> int:
    """Count the multiply-accumulate operations of one forward pass: matrix products, convolutions, attention.

    Counted by torch's FlopCounterMode (two operations each), in eval mode without gradients, with the fused path of
    ``nn.TransformerEncoder`` off and the math kernel for attention, both of which it cannot see into. A number for
    reports; it does not predict speed.

    Args:
        module: The model; its flags are restored.
        example_inputs: What its forward receives: a tensor, a tuple, a dict of keywords, or caught inputs.

    Examples:
        >>> count_macs(nn.Linear(8, 4), torch.zeros(2, 8))
        64
    """
    counter = FlopCounterMode(display=False)
    with (
        evaluating(module),
        without_fast_path(),
        torch.random.fork_rng(devices=[]),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        as_forward_inputs(example_inputs).call(module)
    macs = counter.get_total_flops() // 2
    if macs == 0:
        rank_zero_warn(f"no operation of {type(module).__name__} was counted: it has no matrix product, or hides them.")
    return macs
