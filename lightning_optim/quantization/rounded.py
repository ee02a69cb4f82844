"""Rounding of tensors of which a process may hold a part."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_optim.functional.fake_quantize import (
    dynamic_fake_quantize,
    fake_quantize_bias,
    fake_quantize_weight,
    straight_through,
)
from lightning_optim.sharding import full, is_dtensor, local, shard_like, wrap_like

__all__ = ["dynamically_rounded", "folded_bias", "on_part", "rounded_bias", "rounded_weight"]


def on_part(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an elementwise function to this rank's part of a tensor."""
    if not is_dtensor(x):
        return function(x)
    return wrap_like(function(x.to_local()), x)


def dynamically_rounded(x: Tensor) -> Tensor:
    """Round an input to 8 bits with its own range: that of the whole, where ranks hold parts of it."""
    if not is_dtensor(x):
        return dynamic_fake_quantize(x)
    extremes = full(x.detach()).float().aminmax()
    return on_part(lambda part: dynamic_fake_quantize(part, extremes), x)


def rounded_weight(weight: Tensor, bits: int, granularity: str) -> Tensor:
    """Round a weight; under tensor parallelism by the scales of the whole, which is gathered if rows are split."""
    if not is_dtensor(weight):
        return fake_quantize_weight(weight, bits, granularity)
    if granularity != "per_tensor" and all(placement.is_shard(0) for placement in weight.placements):
        return on_part(lambda part: fake_quantize_weight(part, bits, granularity), weight)
    rounded = local(shard_like(fake_quantize_weight(full(weight), bits, granularity), weight))
    return on_part(lambda part: straight_through(part, rounded), weight)


def rounded_bias(bias: Tensor, unit: Tensor) -> Tensor:
    """Round a bias to multiples of a unit."""
    if not is_dtensor(bias):
        return fake_quantize_bias(bias, unit)
    rounded = local(shard_like(fake_quantize_bias(full(bias), unit), bias))
    return on_part(lambda part: straight_through(part, rounded), bias)


@torch.no_grad()
def folded_bias(bias: Tensor | None, unit: Tensor, norm: Any) -> Tensor:
    """Return what is added before a BatchNorm to give what it gives with its own sum of biases rounded."""
    factor = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
    shift = (-norm.running_mean if bias is None else bias - norm.running_mean) * factor
    shift = shift if norm.bias is None else shift + norm.bias
    added = (fake_quantize_bias(shift, unit * factor.abs()) - shift) / factor
    return torch.where(factor == 0, 0.0, added)
