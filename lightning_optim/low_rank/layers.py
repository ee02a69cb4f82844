"""The layer that a Linear or a 1x1 convolution becomes: two layers of the same kind, called one after the other."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.modules import CONVOLUTIONS, Conv1D
from lightning_optim.sharding import own_class, set_class
from lightning_optim.structure import is_layer_class, layer_class

__all__ = ["LowRank", "float_class", "make_low_rank", "matrix_of", "numbers_of"]


class _OfFactor:
    """An attribute of the layer that it was, read from the factor that has it now.

    What a plan sets is kept in the layer's ``__dict__``, for the day the layer is whole again.
    """

    def __init__(self, factor: str) -> None:
        self.factor = factor

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        return self if layer is None else getattr(layer._modules[self.factor], self.name)

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self.name] = value


@layer_class
class LowRank(nn.Module):
    """Two layers for one: ``expand(reduce(inputs))``; only ever set as the ``__class__`` of the layer it replaces.

    Both factors are ordinary layers (``nn.Linear``, ``nn.Conv1d``, ...), so that other techniques and exporters treat
    them as any other.

    Attributes:
        reduce: Inputs to ``rank`` features; without bias, with the stride and padding of a convolution.
        expand: ``rank`` features to outputs, with the bias.
    """

    reduce: Any
    expand: Any
    in_features = _OfFactor("reduce")
    in_channels = _OfFactor("reduce")
    out_features = _OfFactor("expand")
    out_channels = _OfFactor("expand")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, of the shape that the whole layer gave."""
        outputs: Tensor = self.expand(self.reduce(inputs))
        return outputs

    @property
    def rank(self) -> int:
        """Number of features between the factors."""
        return len(self.reduce.weight)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, for code that reads it: ``[out, in]`` or ``[out, in, 1, ...]``; no Parameter."""
        reduce = self.reduce.weight
        product: Tensor = self.expand.weight.flatten(1) @ reduce.flatten(1)
        return product.view(*product.shape, *[1] * (reduce.ndim - 2))

    @property
    def bias(self) -> nn.Parameter | None:
        """That of ``expand``."""
        bias: nn.Parameter | None = self.expand.bias
        return bias


def float_class(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class that a layer is without rounding: Linear, a Conv, or Conv1D; None for any other layer."""
    own = own_class(layer)
    if own in (nn.Linear, *CONVOLUTIONS) or (_is_conv1d(own) and isinstance(layer, Conv1D)):
        return own
    if is_layer_class(own) and hasattr(layer, "quantization_phase"):  # by its mark, as in modules.py
        return next((cls for cls in own.__mro__[1:] if cls in (nn.Linear, *CONVOLUTIONS) or _is_conv1d(cls)), None)
    return None


def _is_conv1d(cls: type) -> bool:
    return cls.__name__ == "Conv1D"


def matrix_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight as ``[out, in]``, sharing its memory."""
    weight: Tensor = layer._parameters["weight"].detach()  # type: ignore[union-attr]
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def numbers_of(layer: Any) -> int:
    """Return how many numbers a layer's weight has, or the weights of its factors."""
    layers = (layer.reduce, layer.expand) if isinstance(layer, LowRank) else (layer,)
    return sum(int(each.weight.numel()) for each in layers)


def make_low_rank(layer: nn.Module, reduce: Tensor, expand: Tensor) -> None:
    """Make a layer a :class:`LowRank` in place; its bias stays the same Parameter.

    Args:
        layer: One that :func:`float_class` knows.
        reduce: ``[rank, in]``.
        expand: ``[out, rank]``.
    """
    first, second = _empty_factors(layer, len(reduce))
    weight: Any = layer._parameters["weight"]
    bias = layer._parameters.get("bias")
    for factor, matrix in ((first, reduce), (second, expand)):
        # Contiguous, as after loading: the products add up in the same order.
        data = matrix.to(weight.dtype).reshape(factor.weight.shape).clone(memory_format=torch.contiguous_format)
        factor.weight = nn.Parameter(data, weight.requires_grad)
        factor.train(layer.training)
    if bias is not None:
        second.bias = bias
    layer._parameters.clear()
    layer._buffers.clear()  # ranges that quantization prepared
    set_class(layer, LowRank)
    layer.add_module("reduce", first)
    layer.add_module("expand", second)


def _empty_factors(layer: Any, rank: int) -> tuple[Any, Any]:
    """Return the two layers without memory; made on the meta device, they draw no random numbers."""
    has_bias = layer._parameters.get("bias") is not None
    kind = float_class(layer)
    outputs, inputs = matrix_of(layer).shape
    if kind is None or kind not in CONVOLUTIONS:
        return (
            nn.Linear(inputs, rank, bias=False, device="meta"),
            nn.Linear(rank, outputs, bias=has_bias, device="meta"),
        )
    place = {"stride": layer.stride, "padding": layer.padding, "padding_mode": layer.padding_mode}
    return (
        kind(inputs, rank, layer.kernel_size, bias=False, device="meta", **place),
        kind(rank, outputs, layer.kernel_size, bias=has_bias, device="meta"),
    )
