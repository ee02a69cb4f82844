"""``nn.MultiheadAttention`` in an exported file: three matrix products and an output projection, each with integers."""

from typing import Any

from torch import Tensor, nn

from lightning_optim.quantization.attention import (
    PROJECTIONS,
    ProjectedAttention,
    QuantizedMultiheadAttention,
    projection_biases,
    projection_weights,
)
from lightning_optim.quantization.layers import ATTRIBUTES, QuantizedLinear

__all__ = ["split_attention"]


class _SplitAttention(ProjectedAttention):
    stored: nn.ModuleDict

    def projected(self, which: str, x: Tensor) -> Tensor:
        result: Tensor = self.stored[which](x)
        return result


def split_attention(attention: QuantizedMultiheadAttention) -> None:
    """Replace the projections of an attention by quantized Linear layers, in place, which are converted then.

    Args:
        attention: A layer of the copy that is exported; it need not round.
    """
    layers: dict[str, nn.Module] = {}
    parts = zip(PROJECTIONS, projection_weights(attention), projection_biases(attention), strict=True)
    for which, weight, bias in parts:
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        layer.__class__ = QuantizedLinear
        vars(layer).update({name: getattr(attention, name) for name in ATTRIBUTES})
        if which in attention.watched:
            for name, tensor in attention.state_of(which).items():
                layer.register_buffer(f"input_{name}", tensor)
        layers[which] = layer
    attention.__class__ = _SplitAttention  # type: ignore[assignment]
    attention.add_module("stored", nn.ModuleDict(layers))
