"""Converts a fake-quantized copy into a module that holds integers, which is then exported."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim._upstream import BatchNorm as _BatchNorm
from lightning_optim.export.attention import split_attention
from lightning_optim.export.functions import store_functions
from lightning_optim.export.packed import PACKED_BITS, StoredBlocks, StoredRows, has_blocks
from lightning_optim.export.recurrent import store_recurrent
from lightning_optim.export.stored import DynamicQuantizer, Quantizer, StoredBias, StoredWeight
from lightning_optim.functional.fake_quantize import LARGEST_BIAS
from lightning_optim.functional.subpixel import arrange_places, place_padding, subpixel_kernel, subpixel_vector
from lightning_optim.modules import EMBEDDINGS, LINEARS, TRANSPOSED, expert_weights
from lightning_optim.quantization.attention import QuantizedMultiheadAttention
from lightning_optim.quantization.experts import QuantizedExperts, ReadExperts, as_rows, from_rows
from lightning_optim.quantization.functions import QuantizedFunctions
from lightning_optim.quantization.layers import QuantizedConv1D, QuantizedLayer
from lightning_optim.quantization.transposed import kernels_as_rows, rows_as_kernels

__all__ = ["convert", "rounds", "rounds_output"]

_ROUNDING = ("fake_quantize", "frozen")
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


def rounds(layer: nn.Module) -> bool:
    """Whether a layer computes with a rounded weight now."""
    return isinstance(layer, QuantizedLayer) and layer.quantization_phase in _ROUNDING and layer.weight_bits is not None


def rounds_output(layer: nn.Module) -> bool:
    """Whether a layer rounds its output now."""
    return isinstance(layer, QuantizedLayer) and layer.quantizes_output and layer.output_phase in _ROUNDING


class _Integer(nn.Module):
    """Base of the classes below; they are set as ``__class__``, so that names and attributes of the layer stay."""

    stored: StoredWeight | None
    stored_bias: StoredBias | None
    reads: Quantizer | DynamicQuantizer | None
    writes: Quantizer | None
    output_relu: bool

    def _read_weight(self) -> Any:
        return self._parameters["weight"] if self.stored is None or self.stored.folded else self.stored.matrix()

    weight: Any = property(_read_weight)
    """For other modules that read it (``hidden @ table.weight.T``): the integers, so that the file holds them once."""

    def written(self, y: Tensor) -> Tensor:
        """Round the output if it has a range; a ReLU that follows is applied first, and has no effect when repeated."""
        if self.writes is None:
            return y
        return self.writes(y.relu() if self.output_relu else y)  # type: ignore[no-any-return]


class _IntegerConv(_Integer):
    bias: Any
    stride: Any
    padding: Any
    padding_mode: Any
    dilation: Any
    groups: Any
    _reversed_padding_repeated_twice: Any

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if self.stored is None else self.stored.matrix() if self.reads is None else self.stored()
        bias = self.bias if self.stored_bias is None else self.stored_bias()
        x = input if self.reads is None else self.reads(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            padding, x = 0, F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            # Rounding again changes nothing, and lets the layers on both sides of the padding run with integers.
            x = x if self.reads is None else self.reads(x)
        convolve = next(function for cls, function in _CONVOLUTIONS.items() if isinstance(self, cls))
        return self.written(convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups))


class _IntegerConv1d(_IntegerConv, nn.Conv1d):
    pass


class _IntegerConv2d(_IntegerConv, nn.Conv2d):
    pass


class _IntegerConv3d(_IntegerConv, nn.Conv3d):
    pass


class _IntegerConvTranspose(_Integer):
    """A transposed convolution, computed as a plain one, which engines run with integers, or in float as it is."""

    convolutions: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    as_plain: bool
    bias: Any
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    _output_padding: Any
    weight: Any = property(
        lambda self: (
            self._parameters["weight"]
            if self.as_plain or self.stored is None or self.stored.folded
            else rows_as_kernels(self.stored.matrix(), self.groups)
        )
    )

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = input if self.reads is None else self.reads(input)
        dims = len(self.kernel_size)
        added = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        plain, transposed = self.convolutions
        if self.as_plain:
            batch = x if x.ndim == dims + 2 else x.unsqueeze(0)
            y = self._plainly(plain, batch, None if output_size is None else added)
            return self.written(y if x.ndim == dims + 2 else y.squeeze(0))
        weight = self.weight if self.stored is None else rows_as_kernels(self.stored.matrix(), self.groups)
        y = transposed(x, weight, self.bias, self.stride, self.padding, added, self.groups, self.dilation)
        return self.written(y)

    def _plainly(self, convolve: Callable[..., Tensor], x: Tensor, added: Any) -> Tensor:
        assert self.stored is not None  # noqa: S101 - without integers it is computed as it is
        most = [max(pair) - 1 for pair in zip(self.stride, self.dilation, strict=True)]
        sizes = (
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.output_padding if added is None else most,
        )
        cuts = [place_padding(*size) for size in zip(*sizes, strict=True)]
        bias = self.bias if self.stored_bias is None else self.stored_bias()
        y = convolve(x, self.stored(), bias, padding=[sides for sides, _, _ in cuts], groups=self.groups)
        y = arrange_places(y, self.groups, self.stride)
        for dim, (_, start, end) in enumerate(cuts):
            end = end if added is None else end + most[dim] - added[dim]
            y = y.narrow(dim + 2, start, y.shape[dim + 2] - start - end) if start or added is not None or end else y
        return y


class _IntegerConvTranspose1d(_IntegerConvTranspose, nn.ConvTranspose1d):
    convolutions = (F.conv1d, F.conv_transpose1d)


class _IntegerConvTranspose2d(_IntegerConvTranspose, nn.ConvTranspose2d):
    convolutions = (F.conv2d, F.conv_transpose2d)


class _IntegerConvTranspose3d(_IntegerConvTranspose, nn.ConvTranspose3d):
    convolutions = (F.conv3d, F.conv_transpose3d)


class _IntegerProduct(_Integer):
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        in_engine = isinstance(self.reads, DynamicQuantizer) or (self.stored is not None and self.stored.multiplies)
        if in_engine and input.ndim == 2 and self.bias is not None:
            # ONNX Runtime would fuse a product of two dimensions and its bias into a float Gemm.
            return self.product(input.unsqueeze(0)).squeeze(0)
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """Multiply with the stored weight, and add the bias."""
        assert self.stored is not None  # noqa: S101 - a Linear without rounded weight is not converted
        x = input if self.reads is None else self.reads(input)
        if isinstance(self.stored, StoredBlocks | StoredRows):
            y = self.stored.product(x)
            return y if self.bias is None else y + self.bias
        if self.stored.grouped or self.reads is None:
            return F.linear(x, self.stored.matrix(), self.bias)
        # A weight shared with a table is stored as the table's rows: engines transpose it when the file is loaded.
        y = torch.matmul(x, self.stored() if self.stored.transposed else self.stored().t())
        if self.bias is None:
            return y
        # ONNX Runtime fuses a matrix product and an int32 bias into one integer Gemm; with more than two dimensions, it
        # fuses a product and a float bias.
        bias: Tensor = self.bias if self.stored_bias is None or y.ndim != 2 else self.stored_bias()
        return y + bias


class _IntegerLinear(_IntegerProduct, nn.Linear):
    pass


class _IntegerConv1D(_IntegerProduct):
    weight: Any = property(lambda self: self._read_weight().t() if self.stored is not None else self._read_weight())
    """As the layer stored it, ``[in, out]``."""


class _IntegerEmbedding(_Integer, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        assert self.stored is not None  # noqa: S101 - a table that is not rounded is not converted
        return self.stored.rows(input)


class _GatheredBag(_Integer, nn.EmbeddingBag):
    """An EmbeddingBag as lookup and reduction, float or int8: OpenVINO cannot read the exporter's EmbeddingBag."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if input.ndim != 2 or offsets is not None:
            raise ValueError(
                "an EmbeddingBag with `offsets` (bags of different length in one flat tensor) cannot be exported. "
                "Pass bags as [batch, length], padded to one length with `padding_idx`."
            )
        kept = None if self.padding_idx is None else input != self.padding_idx
        if self.mode == "max":
            rows = F.embedding(input, self.weight) if self.stored is None else self.stored.rows(input)
            return _largest(rows, None if kept is None else kept.unsqueeze(-1))
        total = self.total(input, kept, per_sample_weights)
        if self.mode == "sum":
            return total
        return total / (input.shape[1] if kept is None else kept.sum(1, keepdim=True).clamp_min(1))

    def total(self, input: Tensor, kept: Tensor | None, weights: Tensor | None) -> Tensor:
        """Return the weighted sum of rows, as a product that takes in their scales: ``[bags, length] -> [bags, size]``.

        Scaling whole rows first took a third of the time of an int8 recommender's call.
        """
        rows, scales = (F.embedding(input, self.weight), None) if self.stored is None else self.stored.unscaled(input)
        shared = scales if scales is not None and scales.ndim == 0 else None
        factors = [each for each in (weights, scales if shared is None else None) if each is not None]
        if kept is not None:
            factors.append(kept.to(rows.dtype))
        if factors:
            total = torch.matmul(math.prod(factors[1:], start=factors[0]).unsqueeze(1), rows).squeeze(1)
        else:
            total = rows.sum(1)
        return total if shared is None else total * shared


def _largest(rows: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return rows.amax(1)
    return torch.where(kept.any(1), torch.where(kept, rows, -torch.inf).amax(1), 0.0)


class _RoundedBatchNorm(_Integer, nn.BatchNorm1d):  # of any dimension: they differ only in that check
    def forward(self, input: Tensor) -> Tensor:
        return self.written(super().forward(input))

    def _check_input_dim(self, input: Tensor) -> None:
        pass


_INTEGER: tuple[tuple[type[nn.Module], type[_Integer]], ...] = (
    (nn.Conv1d, _IntegerConv1d),
    (nn.Conv2d, _IntegerConv2d),
    (nn.Conv3d, _IntegerConv3d),
    (nn.ConvTranspose1d, _IntegerConvTranspose1d),
    (nn.ConvTranspose2d, _IntegerConvTranspose2d),
    (nn.ConvTranspose3d, _IntegerConvTranspose3d),
    (nn.Linear, _IntegerLinear),
    (QuantizedConv1D, _IntegerConv1D),
    (nn.Embedding, _IntegerEmbedding),
    (nn.EmbeddingBag, _GatheredBag),
    (_BatchNorm, _RoundedBatchNorm),
)


class _IntegerExperts(ReadExperts):
    stored: nn.ModuleDict

    def weights_to_read(self) -> Mapping[str, Tensor]:
        stored: Any = self.stored
        return {
            name: from_rows(stored[name].matrix(), self._parameters[name], inputs_first=order)  # type: ignore[arg-type]
            for name, order in expert_weights(self).items()
        }


def _store_experts(layer: QuantizedExperts) -> None:
    """Store the matrices of experts as integers; they are multiplied out to float when the file is loaded."""
    if not rounds(layer):
        return
    stored = nn.ModuleDict()
    for name, inputs_first in expert_weights(layer).items():
        experts: Any = layer._parameters[name]
        rows, granularity = as_rows(experts, layer.weight_granularity, inputs_first=inputs_first)
        stored[name] = StoredWeight(rows, layer.weight_bits or 8, granularity)
    layer.__class__ = _IntegerExperts.over(layer)  # type: ignore[assignment]
    layer.add_module("stored", stored)


def convert(module: nn.Module, batch_norms: Mapping[str, str], returned: Collection[str] = ()) -> None:
    """Convert rounded layers to integers, in place; other layers stay float.

    Args:
        module: A float32 copy in eval mode on the CPU.
        batch_norms: Convolution -> BatchNorm to fold into it: this changes scales and signs, but no magnitudes.
        returned: Convolutions whose outputs are only returned: engines run these in float.
    """
    for attention in list(module.modules()):
        if isinstance(attention, QuantizedMultiheadAttention):
            split_attention(attention)
    layers = dict(module.named_modules())
    _renormalize(module)
    store = _Store(module)
    followers = {layers[name]: layers[follower] for name, follower in batch_norms.items() if rounds(layers[name])}
    outputs = {layers[name] for name in returned}
    for layer, norm in followers.items():
        _to_integer(layer, store, norm, in_float=layer in outputs)
        norm.__class__ = nn.Identity
    for layer in layers.values():
        if isinstance(layer, QuantizedExperts):
            _store_experts(layer)
        elif isinstance(layer, QuantizedLayer) and isinstance(layer, nn.RNNBase):
            if rounds(layer):
                store_recurrent(layer)
        elif isinstance(layer, QuantizedFunctions):
            if rounds_output(layer):
                store_functions(layer)
        elif isinstance(layer, QuantizedLayer) and (rounds(layer) or rounds_output(layer)):
            _to_integer(layer, store, in_float=layer in outputs)
        elif isinstance(layer, nn.EmbeddingBag) and not isinstance(layer, _Integer):
            layer.stored = None  # type: ignore[assignment]
            layer.__class__ = _GatheredBag


def _outputs_first(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Return a weight with its outputs in dimension 0."""
    if isinstance(layer, TRANSPOSED):
        return kernels_as_rows(weight, layer.groups)
    return weight.t() if isinstance(layer, QuantizedConv1D) else weight


class _Store:
    """The integers of each weight; a shared weight is stored once."""

    def __init__(self, module: nn.Module) -> None:
        layers = [layer for layer in module.modules() if rounds(layer) and layer._parameters.get("weight") is not None]
        self._holders: dict[int, list[nn.Module]] = {id(layer._parameters["weight"]): [] for layer in layers}
        for layer in layers:
            self._holders[id(layer._parameters["weight"])].append(layer)
        self._stored: dict[tuple[int, int, str], StoredWeight] = {}

    def of(self, layer: QuantizedLayer, factor: Tensor | None) -> StoredWeight:
        """Return the integers of a layer's weight.

        Args:
            layer: A layer with a rounded weight.
            factor: ``[out]``, of the BatchNorm that is folded into it.
        """
        weight, bits, granularity = layer._parameters["weight"], layer.weight_bits or 8, layer.weight_granularity
        assert weight is not None  # noqa: S101 - it is rounded
        key = (id(weight), bits, granularity)
        if factor is None and key in self._stored:
            return self._stored[key]
        matrix = _outputs_first(layer, weight)
        kind = self._kind(layer) if factor is None else None
        if kind is None:
            stored = StoredWeight(matrix, bits, granularity, factor, layer.weight_scales())
        else:
            stored = kind(matrix, bits, granularity)
        if factor is None and self.shares(layer):
            self._stored[key] = stored
        return stored

    def shares(self, layer: nn.Module) -> bool:
        """Whether other layers share this one's weight."""
        return len(self._holders[id(layer._parameters["weight"])]) > 1

    def _kind(self, layer: QuantizedLayer) -> type[StoredBlocks] | type[StoredRows] | None:
        """Return how a weight is packed, by all layers that share it; None: it is stored as int8."""
        holders = self._holders[id(layer._parameters["weight"])]
        tables = [isinstance(holder, EMBEDDINGS) for holder in holders]
        blocks = has_blocks(layer.weight_granularity) and not any(isinstance(_reader(x), Quantizer) for x in holders)  # type: ignore[arg-type]
        if all(isinstance(holder, (*LINEARS, QuantizedConv1D)) for holder in holders):
            return StoredBlocks if blocks else None
        narrow = (layer.weight_bits or 8) <= PACKED_BITS
        if all(tables):
            return StoredRows if narrow else None
        return StoredRows if narrow and blocks and any(tables) else None


def _renormalize(module: nn.Module) -> None:
    """Apply ``max_norm`` to whole tables in place; lookups would do it row by row."""
    for layer in module.modules():
        if isinstance(layer, EMBEDDINGS) and layer.max_norm is not None:
            with torch.no_grad():
                F.embedding(torch.arange(layer.num_embeddings), layer.weight, None, layer.max_norm, layer.norm_type)
            layer.max_norm = None


def _to_integer(layer: nn.Module, store: _Store, norm: nn.Module | None = None, *, in_float: bool = False) -> None:
    assert isinstance(layer, QuantizedLayer)  # noqa: S101 - the callers check it
    weight, bias, factor = layer._parameters.get("weight"), layer._parameters.get("bias"), None
    writer = layer if norm is None or not rounds_output(norm) else norm
    assert isinstance(writer, QuantizedLayer)  # noqa: S101 - rounds_output implies it
    if isinstance(norm, _BatchNorm):
        factor, folded = _folded(norm, bias)
        layer.bias = nn.Parameter(folded, requires_grad=False)
        bias = layer.bias
    reads = _reader(layer) if rounds(layer) else None
    writes = _quantizer(writer, "output") if rounds_output(writer) else None
    stored = store.of(layer, factor) if rounds(layer) and weight is not None else None
    counts = bias is not None and stored is not None and isinstance(reads, Quantizer)
    stored_bias = _integer_bias(bias, stored, reads) if counts else None  # type: ignore[arg-type]
    alone = stored is not None and not stored.grouped and not store.shares(layer)
    if stored is not None and alone and reads is not None and isinstance(layer, LINEARS):
        stored.transpose()
    if isinstance(layer, TRANSPOSED):
        as_plain = alone and isinstance(reads, Quantizer) and not in_float
        stored_bias = _store_transposed(layer, stored, stored_bias, as_plain=as_plain)
    if weight is not None and (factor is not None or isinstance(layer, TRANSPOSED)):
        weight.data = layer.quantized_weight()  # for other readers: the stored one includes the BatchNorm
    layer.output_relu = writer.output_relu
    layer.__class__ = next(integer for cls, integer in _INTEGER if isinstance(layer, cls))  # type: ignore[assignment]
    for name, value in {"stored": stored, "stored_bias": stored_bias, "reads": reads, "writes": writes}.items():
        layer.add_module(name, value)


def _store_transposed(
    layer: Any, stored: StoredWeight | None, bias: StoredBias | None, *, as_plain: bool
) -> StoredBias | None:
    """Prepare a transposed convolution's integers for how it is computed, and return its bias."""
    vars(layer)["as_plain"] = as_plain
    if stored is None or not as_plain:
        if bias is not None:
            layer.bias = nn.Parameter(bias(), requires_grad=False)
        return None
    places, groups = math.prod(layer.stride), layer.groups
    scale = subpixel_vector(stored.scale, groups, places) if stored.scale.ndim else stored.scale
    stored.rearrange(subpixel_kernel(stored.integers, groups, layer.stride, layer.dilation), scale)
    if bias is not None:
        bias.integers = subpixel_vector(bias.integers, groups, places)
        bias.scale = subpixel_vector(bias.scale, groups, places) if bias.scale.ndim else bias.scale
    return bias


def _folded(norm: _BatchNorm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the factor and summand of a BatchNorm, including the convolution's bias, each ``[out]``."""
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018 - otherwise nothing folds
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach()
    shift = (0.0 if bias is None else bias.detach()) - norm.running_mean
    added = shift * factor
    return factor, added if norm.bias is None else added + norm.bias.detach()


def _reader(layer: QuantizedLayer) -> Quantizer | DynamicQuantizer | None:
    if layer.activation_bits is None:
        return None
    if layer.activation_ranges == "dynamic":
        return DynamicQuantizer()
    return _quantizer(layer, "input") if "input" in layer.watched else None


def _quantizer(layer: QuantizedLayer, which: str) -> Quantizer:
    return Quantizer(*layer.range_of(which), layer.activation_bits or 8)


def _integer_bias(bias: Tensor, stored: StoredWeight, reads: Quantizer) -> StoredBias | None:
    if stored.grouped:
        return None
    bias = bias.detach().float()
    stored.make_room(bias.abs() / (reads.scale * LARGEST_BIAS))
    return StoredBias(bias, reads.scale * stored.scale)
