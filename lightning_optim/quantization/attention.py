"""``nn.MultiheadAttention`` with rounded projections.

Its own forward computes all in one function, which calls no layer and reads ``in_proj_weight`` as one tensor. Here the
projections are calls, of which the inputs can be rounded, and the output projection is a layer as any other.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_optim.checkpoint import layer_class
from lightning_optim.quantization.layers import QuantizedLayer, QuantizedLinear
from lightning_optim.quantization.rounded import rounded_weight

__all__ = [
    "PROJECTIONS",
    "ProjectedAttention",
    "QuantizedMultiheadAttention",
    "QuantizedOutProjection",
    "projection_biases",
    "projection_names",
    "projection_weights",
]

PROJECTIONS = ("query", "key", "value")
"""What an attention projects, in the order of its weights; ranges of the inputs have these names."""


def projection_names(attention: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that hold the projections: one, or one each where sizes differ."""
    fused = attention._parameters.get("in_proj_weight") is not None
    return ("in_proj_weight",) if fused else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def projection_weights(attention: nn.Module) -> list[Tensor]:
    """Return the three matrices ``[embed_dim, in]`` of an attention, as views of its parameters."""
    parameters: list[Any] = [attention._parameters[name] for name in projection_names(attention)]
    return parameters if len(parameters) == 3 else list(parameters[0].chunk(3))


def projection_biases(attention: nn.Module) -> list[Tensor | None]:
    """Return the biases of the three projections."""
    bias = attention._parameters.get("in_proj_bias")
    return [None] * 3 if bias is None else list(bias.chunk(3))


class ProjectedAttention(nn.MultiheadAttention):
    """An attention whose projections are calls of :meth:`projected` and of ``out_proj``."""

    def projected(self, which: str, x: Tensor) -> Tensor:
        """Project one of ``PROJECTIONS``, ``[batch, length, in] -> [batch, length, embed_dim]``."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what ``nn.MultiheadAttention`` does, with the same arguments and results."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched, inputs = query.ndim == 3, (query, key, value)
        if not batched:
            inputs = (query[None], key[None], value[None])
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            inputs = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        q, k, v = (self.projected(which, x) for which, x in zip(PROJECTIONS, inputs, strict=True))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q)
        k, v, mask = self._with_more_keys(k, v, mask)
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            mask = None if mask is None else F.pad(mask, (0, 1))
        attended, weights = self._attend(q, k, v, mask, need_weights, causal)
        result = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return result[0], None if weights is None else weights[0]
        return result if self.batch_first else result.transpose(0, 1), weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the sum of both masks, which broadcasts over ``[batch, heads, length, keys]``."""
        masks = []
        if attn_mask is not None:
            shape = (1, 1) if attn_mask.ndim == 2 else (-1, self.num_heads)
            masks.append(_additive(attn_mask, like).reshape(*shape, *attn_mask.shape[-2:]))
        if key_padding_mask is not None:
            masks.append(_additive(key_padding_mask, like)[:, None, None])
        return sum(masks[1:], start=masks[0]) if masks else None

    def _with_more_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned key and value of ``add_bias_kv``."""
        if self.bias_k is None or self.bias_v is None:
            return k, v, mask
        rows = len(k)
        k, v = (torch.cat([x, more.expand(rows, 1, -1)], 1) for x, more in ((k, self.bias_k), (v, self.bias_v)))
        return k, v, None if mask is None else F.pad(mask, (0, 1))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights @ v, weights


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask that is added to scores: what True hides is minus infinity."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


@layer_class
class QuantizedMultiheadAttention(QuantizedLayer, ProjectedAttention):
    """An attention whose projections round weights and inputs; one scale per output by default.

    Query, key and value have ranges of their own, also where they are the same tensor. The output projection is a layer
    of its own.
    """

    operands = PROJECTIONS

    def projected(self, which: str, x: Tensor) -> Tensor:
        """Project one of ``PROJECTIONS``, rounded or not by phase."""
        place = PROJECTIONS.index(which)
        weight = self._round(projection_weights(self)[place])
        return F.linear(self.quantized_input(x, which), weight, projection_biases(self)[place])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention; in phase "off" by the function of the float layer."""
        phases = {self.quantization_phase, getattr(self.out_proj, "quantization_phase", "off")}
        own = nn.MultiheadAttention if phases == {"off"} else ProjectedAttention
        return own.forward(self, *args, **kwargs)

    def _round(self, weight: Tensor) -> Tensor:
        rounds = self._rounds_weight and self.weight_bits is not None
        return rounded_weight(weight, self.weight_bits or 8, self.weight_granularity) if rounds else weight

    def rounded_parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters that are rounded, rounded."""
        names, rounded = projection_names(self), [self._round(weight) for weight in projection_weights(self)]
        return dict(zip(names, rounded, strict=True)) if len(names) == 3 else {names[0]: torch.cat(rounded)}

    def parameter_bits(self, name: str) -> float | None:
        """Return the bits of a projection when deployed; other parameters are deployed as stored."""
        return self.weight_bits if name in projection_names(self) and self._rounds_weight else None


@layer_class
class QuantizedOutProjection(QuantizedLinear, NonDynamicallyQuantizableLinear):
    """The output projection of an attention, which calls it as a layer."""
