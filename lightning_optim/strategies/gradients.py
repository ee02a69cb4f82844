"""Clips sharded gradients, by their total norm or by value."""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.sharding import full, is_dtensor, local

__all__ = ["clip_by_norm", "clip_by_value"]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def clip_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
    """Scale all gradients together so that their norm is at most ``clip_val``.

    The norm is that of all parts on all processes. torch's own function adds up tensors of one mesh only: it fails
    on tensor parallelism, where some gradients are ordinary tensors, and on 2-D meshes (torch 2.13, issue 180346).
    """
    if clip_val <= 0:
        return
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for gradient in _gradients(optimizer):
        groups[gradient.device_mesh if is_dtensor(gradient) else None].append(gradient)
    if not groups:
        return
    squares = [full(torch.nn.utils.get_total_norm(group)).square() for group in groups.values()]
    norm = torch.stack(squares).sum().sqrt()
    scale = (clip_val / (norm + 1e-6)).clamp(max=1.0)
    for group in groups.values():
        torch._foreach_mul_([local(gradient) for gradient in group], scale)


@torch.no_grad()
def clip_by_value(optimizer: Optimizer, clip_val: int | float) -> None:
    """Clamp every gradient to ``[-clip_val, clip_val]``."""
    parts = [local(gradient) for gradient in _gradients(optimizer)]
    if clip_val > 0 and parts:
        torch._foreach_clamp_min_(parts, -clip_val)
        torch._foreach_clamp_max_(parts, clip_val)
