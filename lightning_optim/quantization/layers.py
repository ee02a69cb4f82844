"""Layers that compute with numbers rounded to a few bits.

Each is a subclass that is set as ``__class__``: Parameters, their names and the optimizer stay. By phase it is

* ``"off"``: the float layer, bit for bit;
* ``"observe"``: the float layer, which records its inputs and outputs;
* ``"fake_quantize"``: weights and inputs rounded to integers, ranges still updated;
* ``"frozen"``: the same with fixed ranges.

Weights are symmetric, with scales from the weights themselves; inputs (and outputs, if an addition or another
float operation follows a convolution) are affine, with one scale per tensor.

A weight that another module reads (``hidden @ table.weight.T``) is rounded there too: the file holds it once.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim.checkpoint import layer_class
from lightning_optim.functional.fake_quantize import (
    fake_quantize,
    fake_quantize_weight,
    finer_units,
    integer_range,
    symmetric_scale,
)
from lightning_optim.functional.observers import OBSERVERS
from lightning_optim.quantization.learned import (
    FIRST,
    STEPS,
    learned_range,
    learned_weight,
    learns,
    rounded_input,
    weight_step,
)
from lightning_optim.quantization.over import OverOwnClass
from lightning_optim.quantization.paths import found_from
from lightning_optim.quantization.rounded import dynamically_rounded, folded_bias, on_part, rounded_bias, rounded_weight
from lightning_optim.sharding import full, local
from lightning_optim.structure import LINK

__all__ = [
    "ATTRIBUTES",
    "PHASES",
    "QuantizedBatchNorm1d",
    "QuantizedBatchNorm2d",
    "QuantizedBatchNorm3d",
    "QuantizedConv1D",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedLayer",
    "QuantizedLinear",
    "float_kernels",
]

PHASES = ("off", "observe", "fake_quantize", "frozen")
"""In order; ``quantization/phase`` logs the index."""

ATTRIBUTES = (
    "weight_bits",
    "weight_granularity",
    "activation_bits",
    "activation_ranges",
    "observer",
    "quantization_phase",
    "quantizes_output",
    "output_relu",
    "output_phase",
    "folded_norm",
)
"""Attributes that a quantized layer adds to the float layer; plain types, since they are in the plan."""

STATE = ("statistic", "batches", "scale", "zero_point")
"""Buffers of one watched tensor, named ``input_scale``, ``output_scale`` and so on."""

_CALL = nn.Module.__call__.__code__
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_TORCH_COMPUTES = ("torch.nn.modules.", "torch.nn.functional")


def _computing() -> bool:
    """Whether the code that reads an attribute runs inside a forward pass or a step of a LightningModule.

    Only there may ``layer.weight`` be the rounded weight. Elsewhere it must be the Parameter: for the optimizer that
    ``configure_optimizers`` creates, and for code that changes weights in place. torch itself computes with weights in
    its layers and functions; the rest of it moves Parameters around, also inside a forward pass: ``fully_shard`` reads
    ``layer.weight`` in the first one (``FSDPParam.reset_sharded_param``) and keeps what it gets as the sharded
    Parameter.
    """
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(2)  # the code that reads the attribute
    reader = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    if reader.startswith("torch.") and not reader.startswith(_TORCH_COMPUTES):
        return False
    while frame is not None:
        if frame.f_code is _CALL or frame.f_code.co_name in _STEPS:
            return True
        frame = frame.f_back
    return False


class QuantizedLayer(nn.Module):
    """Base class of the quantized layers; never instantiated, only set as ``__class__``.

    Attributes:
        weight_bits: 2 to 8; None for a layer without a weight of its own to quantize (BatchNorm).
        weight_granularity: What shares a scale.
        activation_bits: Bits of input and output; None keeps them float.
        activation_ranges: "static": observed ranges; "symmetric": observed, with zero in the middle; "dynamic": the
            range of each call's own input.
        observer: Name in ``OBSERVERS``.
        quantization_phase: Phase of weight and input.
        quantizes_output: Whether the output is quantized too.
        output_relu: Whether the output is followed by a ReLU only, so that its range begins at 0.
        output_phase: Phase of the output.
        folded_norm: Path of the BatchNorm that an exported file folds into the layer, from the layer on: a dot for
            each module upwards, as in an import (``.1`` is the parent's child ``1``).
        observing: Whether a training batch runs now; nothing else is observed.
    """

    weight_bits: int | None
    weight_granularity: str
    activation_bits: int | None
    observer: str
    quantization_phase: str
    quantizes_output: bool
    output_relu: bool
    output_phase: str
    activation_ranges = "static"  # of files written before it could be another
    folded_norm: str | None = None
    observing = False
    seen_input: Tensor | None = None
    operands: tuple[str, ...] = ("input",)
    """Names of the tensors that are multiplied with weights."""

    def _read_weight(self) -> Any:
        if "weight" not in self._parameters:
            raise AttributeError(f"{type(self).__name__} has no weight.")
        return self.quantized_weight() if self._rounds_weight and _computing() else self._parameters["weight"]

    weight: Any = property(_read_weight)
    """The Parameter; inside a forward pass, in the phases that round, the rounded weight."""

    @property
    def _rounds_weight(self) -> bool:
        return self.quantization_phase in ("fake_quantize", "frozen") and self.weight_bits is not None

    @property
    def watched(self) -> tuple[str, ...]:
        """The tensors that have a range: of the operands and "output", all, some or none."""
        return tuple(which for which in (*self.operands, "output") if f"{which}_scale" in self._buffers)

    @property
    def rounds_operands(self) -> bool:
        """Whether there are operands, and all have ranges."""
        return bool(self.operands) and all(which in self.watched for which in self.operands)

    @property
    def integer_type(self) -> str:
        """What activations are rounded to: "uint8", or "int8" where ranges are symmetric."""
        return f"{'int' if self.activation_ranges == 'symmetric' else 'uint'}{self.activation_bits}"

    def phase_of(self, which: str) -> str:
        """Return the phase of the input or the output."""
        return self.output_phase if which == "output" else self.quantization_phase

    def watch(self, which: str, device: torch.device | None = None) -> None:
        """Register the buffers of the range of the input, of the output or of an operand; by default where weights are.

        What was observed since the last fold is the attribute ``seen_input`` (``seen_output``, ...).
        """
        device = device or next((p.device for p in self.parameters(recurse=False)), torch.device("cpu"))
        statistic = torch.zeros(OBSERVERS[self.observer].size, device=device, dtype=torch.float32)
        self.register_buffer(f"{which}_statistic", statistic)
        self.register_buffer(f"{which}_batches", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer(f"{which}_scale", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer(f"{which}_zero_point", torch.zeros((), dtype=torch.int32, device=device))

    def state_of(self, which: str) -> dict[str, Tensor]:
        """Return the buffers of one watched tensor."""
        return {name: getattr(self, f"{which}_{name}") for name in STATE}

    def range_of(self, which: str) -> tuple[Tensor, Tensor]:
        """Return scale (float32, ``[]``) and zero point (int32, ``[]``) of a watched tensor, as a file stores them."""
        scale, zero_point = getattr(self, f"{which}_scale"), getattr(self, f"{which}_zero_point")
        if which == "input" and learns(self, "input"):
            return learned_range(self, scale, zero_point, self.activation_bits or 8)
        return scale, zero_point

    def weight_scales(self) -> Tensor | None:
        """Return the trained steps of the weight, ``[out, 1, 1]`` or ``[1, 1, 1]``; None if the weight gives them."""
        return weight_step(self).view(-1, 1, 1) if learns(self, "weight") else None

    def parameter_bits(self, name: str) -> float | None:
        """Return the bits of a parameter when deployed; None if it is deployed as stored."""
        if name in STEPS:
            return 0.0  # a scale, which does not count
        return self.weight_bits if name == "weight" and self._rounds_weight else None

    def rounded_parameters(self) -> Mapping[str, Tensor]:
        """Return the parameters that are rounded, rounded."""
        return {"weight": self.quantized_weight()}

    def quantized_weight(self) -> Tensor:
        """Return the weight, rounded or not by phase."""
        weight = self._parameters["weight"]
        assert weight is not None  # noqa: S101 - layers without one are not asked
        if not self._rounds_weight or self.weight_bits is None:
            return weight
        return self._rounded(weight, self.weight_bits)

    def _rounded(self, rows: Tensor, bits: int) -> Tensor:
        """Round a weight ``[out, in, ...]``."""
        if learns(self, "weight"):
            return learned_weight(self, rows, bits, self.weight_granularity)
        return rounded_weight(rows, bits, self.weight_granularity)

    def connect(self, root: nn.Module, name: str) -> None:
        """Find the BatchNorm that is folded into the layer.

        Args:
            root: The module that the layer is in.
            name: The layer's dotted name there.
        """
        vars(self)[LINK] = None if self.folded_norm is None else (found_from(root, name, self.folded_norm),)

    def quantized_bias(self) -> Tensor | None:
        """Return the bias, rounded or not by phase, with what rounding it adds to the BatchNorm that follows.

        A file folds the BatchNorm in, and rounds the sum of both biases. In training mode it subtracts the mean of the
        batch, in which any bias of the layer is lost.
        """
        bias = self._parameters.get("bias")
        link: Any = getattr(self, LINK, None)
        norm = link[0] if link else None
        grouped = self.weight_granularity.startswith("per_group")
        if not self._rounds_weight or grouped or self.activation_bits is None or "input" not in self.watched:
            return bias
        if norm is None:
            return None if bias is None else rounded_bias(bias, self._product_scale())
        if norm.training:
            return bias
        added = folded_bias(bias, self._product_scale(), norm).to(norm.running_mean.dtype)
        return added if bias is None else bias + added

    @torch.no_grad()
    def _product_scale(self) -> Tensor:
        """Return the scale of the products of input and weight, as the file has them: ``[]`` or ``[out]``."""
        bits = self.weight_bits or 8
        scale = self.weight_scales()
        if scale is None:
            scale = symmetric_scale(full(self._rows()), bits, self.weight_granularity)
        scale, unit = scale.flatten() / finer_units(bits), self.range_of("input")[0]
        product: Tensor = unit * (scale if len(scale) > 1 else scale[0])
        return product

    def _rows(self) -> Tensor:
        """Return the weight with its outputs in dimension 0."""
        weight = self._parameters["weight"]
        assert weight is not None  # noqa: S101 - layers without one are not asked
        return weight

    def quantized_input(self, x: Tensor, which: str = "input") -> Tensor:
        """Return an operand, rounded or not by phase; record it if it is observed."""
        if self.activation_bits is None:
            return x
        if self.activation_ranges == "dynamic":
            return dynamically_rounded(x) if self.quantization_phase in ("fake_quantize", "frozen") else x
        return self._pass(which, self.quantization_phase, x)

    def quantized_output(self, x: Tensor) -> Tensor:
        """Return the output, rounded or not by phase; record it if it is observed."""
        return self._pass("output", self.output_phase, x) if self.quantizes_output else x

    def _pass(self, which: str, phase: str, x: Tensor) -> Tensor:
        trained = which == "input" and learns(self, "input")
        if self.observing and x.numel() and (phase == "observe" or (phase == "fake_quantize" and not trained)):
            self._note(which, x.detach())
        if phase in ("off", "observe") or self.activation_bits is None:
            return x
        low, high = integer_range(self.activation_bits, symmetric=False)
        scale, zero_point = getattr(self, f"{which}_scale"), getattr(self, f"{which}_zero_point")
        if trained:
            return rounded_input(self, x, scale, zero_point, self.activation_bits)
        return on_part(lambda part: fake_quantize(part, scale, zero_point, low, high), x)

    def _note(self, which: str, x: Tensor) -> None:
        observer = OBSERVERS[self.observer]
        x = local(x) if observer.reduction == "max" else full(x)  # extremes of parts are pooled over ranks later
        seen = observer.see(x.clamp_min(0) if which == "output" and self.output_relu else x)
        before: Tensor | None = getattr(self, f"seen_{which}", None)
        if before is not None:
            seen = torch.maximum(before, seen) if observer.reduction == "max" else before + seen
        setattr(self, f"seen_{which}", seen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLayer":
        """Move the ranges with the layer, but keep them float32 if ``fn`` changes the precision."""
        kept = {f"{which}_{part}": buffer for which in self.watched for part, buffer in self.state_of(which).items()}
        if FIRST in self._buffers:
            kept[FIRST] = getattr(self, FIRST)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


@layer_class
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A Linear layer; one scale per output by default."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``[..., in] -> [..., out]``."""
        if self.quantization_phase == "off":
            return nn.Linear.forward(self, input)
        # With more than two dimensions, engines add a float bias.
        bias = self.quantized_bias() if input.ndim == 2 else self.bias
        return F.linear(self.quantized_input(input), self.quantized_weight(), bias)


@layer_class
class QuantizedConv1D(OverOwnClass, QuantizedLayer):
    """The Linear of GPT-2, whose weight is ``[in, out]``; one scale per output by default."""

    def quantized_weight(self) -> Tensor:
        """Return the weight ``[in, out]``, rounded or not by phase."""
        weight = self._parameters["weight"]
        assert weight is not None  # noqa: S101 - it is what a Conv1D is known by
        if not self._rounds_weight or self.weight_bits is None:
            return weight
        return self._rounded(weight.t(), self.weight_bits).t()

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``[..., in] -> [..., out]`` as the layer's own class does, which reads the rounded weight."""
        result: Tensor = super().forward(self.quantized_input(x))
        bias = self._parameters.get("bias")
        if bias is None or x.ndim != 2 or not self._rounds_weight:
            return result
        rounded: Any = self.quantized_bias()
        moved: Tensor = result + (rounded - bias).detach()
        return moved

    def _rows(self) -> Tensor:
        return super()._rows().t()


class _QuantizedConv(QuantizedLayer):
    _conv_forward: Any

    def forward(self, input: Tensor) -> Tensor:
        """Compute the convolution."""
        weight = self.quantized_weight()
        x = input if self.quantization_phase == "off" else self.quantized_input(input)
        return self.quantized_output(self._conv_forward(x, weight, self.quantized_bias()))


@layer_class
class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """A Conv1d; one scale per output channel by default."""


@layer_class
class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """A Conv2d; one scale per output channel by default."""


@layer_class
class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """A Conv3d; one scale per output channel by default."""


@layer_class
class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """A table; one scale per row by default. Only the rows that are looked up are rounded in training."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``[...] -> [..., embedding_dim]``."""
        if not self._rounds_weight:
            return nn.Embedding.forward(self, input)
        rows = F.embedding(
            input,
            self._parameters["weight"],  # type: ignore[arg-type]
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        return _rounded_rows(self, rows.reshape(-1, self.embedding_dim)).view_as(rows)


@layer_class
class QuantizedEmbeddingBag(QuantizedLayer, nn.EmbeddingBag):
    """A table whose rows are averaged or summed; one scale per row by default.

    Only the rows that are looked up are rounded, or the whole table if that is smaller: the result is the same.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and reduce bags, as ``nn.EmbeddingBag`` does."""
        if not self._rounds_weight:
            return nn.EmbeddingBag.forward(self, input, offsets, per_sample_weights)
        table: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        places, padding = input, self.padding_idx
        if input.numel() < self.num_embeddings:
            flat = input.reshape(-1)
            table = F.embedding(flat, table, None, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
            places = torch.arange(len(flat), device=flat.device)
            if padding is not None:  # it becomes a row of zeros, which bags do not count
                table = torch.cat([table, table.new_zeros(1, self.embedding_dim)])
                places = torch.where(flat == padding, len(flat), places)
                padding = len(flat)
            places = places.view_as(input)
        elif self.max_norm is not None:
            F.embedding(input.reshape(-1), table, None, self.max_norm, self.norm_type)  # renormalizes in place
        return F.embedding_bag(
            places,
            _rounded_rows(self, table),
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


def _rounded_rows(layer: QuantizedEmbedding | QuantizedEmbeddingBag, rows: Tensor) -> Tensor:
    """Round rows of a table as the whole table would be rounded."""
    bits = layer.weight_bits or 8
    largest = None
    if layer.weight_granularity == "per_tensor":
        largest = layer._parameters["weight"].detach().abs().amax()  # type: ignore[union-attr]
    return fake_quantize_weight(rows, bits, layer.weight_granularity, largest=largest)


class _QuantizedBatchNorm(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Normalize as BatchNorm does, and quantize the output."""
        return self.quantized_output(super().forward(input))


@layer_class
class QuantizedBatchNorm1d(_QuantizedBatchNorm, nn.BatchNorm1d):
    """A BatchNorm1d after a quantized convolution, whose output is quantized."""


@layer_class
class QuantizedBatchNorm2d(_QuantizedBatchNorm, nn.BatchNorm2d):
    """A BatchNorm2d after a quantized convolution, whose output is quantized."""


@layer_class
class QuantizedBatchNorm3d(_QuantizedBatchNorm, nn.BatchNorm3d):
    """A BatchNorm3d after a quantized convolution, whose output is quantized."""


@contextmanager
def float_kernels(*modules: nn.Module) -> Iterator[None]:
    """Let quantized layers compute in float: rounding in PyTorch takes time, deployed integers do not."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, QuantizedLayer)]
    phases = [(layer.quantization_phase, layer.output_phase) for layer in layers]
    try:
        for layer in layers:
            layer.quantization_phase = layer.output_phase = "off"
        yield
    finally:
        for layer, (phase, output_phase) in zip(layers, phases, strict=True):
            layer.quantization_phase, layer.output_phase = phase, output_phase
