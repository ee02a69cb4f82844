"""The form of a file for TensorRT, and the rules that its ONNX parser and its explicit quantization set.

TensorRT runs integers where QuantizeLinear and DequantizeLinear say so (explicit quantization): int8 without zero
points, one scale per tensor for activations, one per output for weights, which may be stored as int8. Its parser knows
no other integer operator, no int32 input of DequantizeLinear (a rounded bias) and no uint8.

Sources: NVIDIA, "TensorRT documentation: Explicit Quantization" (docs.nvidia.com/deeplearning/tensorrt); onnx-tensorrt,
``docs/operators.md`` and the importer of QuantizeLinear and DequantizeLinear (read in 2026).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_optim.export.integer import rounds, rounds_output
from lightning_optim.export.report import Kernels
from lightning_optim.export.stored import Quantizer, StoredBias
from lightning_optim.quantization.layers import QuantizedLayer

__all__ = ["OPSET", "check_module", "finish", "integer_products", "prepare", "violations"]

OPSET = 19
"""Version of ONNX's operators. The next that changes integers, 21, adds types and blocks that are not used here."""

_TITLE = "target='tensorrt'"


def check_module(module: nn.Module) -> None:
    """Check that a module's integers have a form that TensorRT runs.

    Raises:
        ValueError: If activations have zero points or a range of each call, if weights of integer products share scales
            in groups, or if no layer computes with integers.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}
    rounding = {name: layer for name, layer in layers.items() if rounds(layer) or rounds_output(layer)}
    other = {name: layer for name, layer in rounding.items() if not _is_float(layer) and not _is_symmetric(layer)}
    if other:
        kinds = " and ".join(repr(kind) for kind in sorted({layer.activation_ranges for layer in other.values()}))
        raise ValueError(
            f"{_TITLE} needs activations without zero points, and {_named(other)} got activation_ranges={kinds}. "
            'Quantize with activation_ranges="symmetric" (quantize_post_training and QuantizationAwareTraining).'
        )
    multiplying = {name: layer for name, layer in rounding.items() if rounds(layer) and not _is_float(layer)}
    grouped = {name: layer for name, layer in multiplying.items() if layer.weight_granularity.startswith("per_group")}
    if grouped:
        raise ValueError(
            f"{_TITLE} has one scale per output or per tensor for weights that are multiplied with int8, and "
            f"{_named(grouped)} got weight_granularity={next(iter(grouped.values())).weight_granularity!r}. Take "
            "'per_channel' or 'per_tensor'."
        )
    if rounding and not multiplying:
        raise ValueError(
            f"{_TITLE} multiplies int8 weights with int8 inputs only, and the inputs of {_named(rounding)} are float: "
            'nothing would run with integers. Quantize with activation_bits=8, activation_ranges="symmetric", or '
            "export the module without quantization."
        )


def _is_float(layer: QuantizedLayer) -> bool:
    """Whether nothing that a layer reads or writes is rounded."""
    return layer.activation_bits is None or not (layer.watched or layer.activation_ranges == "dynamic")


def _is_symmetric(layer: QuantizedLayer) -> bool:
    return layer.activation_ranges == "symmetric"


def _named(layers: Mapping[str, nn.Module]) -> str:
    names = [name or "the whole module" for name in layers]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def prepare(module: nn.Module) -> list[str]:
    """Let layers that are not multiplied with int8 inputs hold their rounded weights as floats, in place.

    Args:
        module: A copy that is not converted yet; its parameters may be those of the module, and are not changed.

    Returns:
        Sentences for the report.
    """
    held = []
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLayer) and rounds(layer) and _is_float(layer):
            for key, rounded in layer.rounded_parameters().items():
                layer._parameters[key] = nn.Parameter(rounded.detach().clone(), requires_grad=False)
            layer.quantization_phase = "off"
            held.append(name)
    notes = ["TensorRT was not run: its rules for files were checked, and integer products are those of the file."]
    if held:
        notes.append(
            f"Stored as float32, with rounded values: {_named(dict.fromkeys(held, module))}. TensorRT reads int8 "
            "weights only where they are multiplied with int8 inputs."
        )
    return notes


class _FloatBias(nn.Module):
    """A bias that was rounded as the sums of an integer product are, stored as floats."""

    value: Tensor

    def __init__(self, bias: StoredBias) -> None:
        super().__init__()
        self.register_buffer("value", bias())

    def forward(self) -> Tensor:
        return self.value


def finish(module: nn.Module) -> None:
    """Turn a converted copy's uint8 activations into int8 ones, and its int32 biases into floats, in place."""
    for layer in list(module.modules()):
        if isinstance(layer, Quantizer):
            layer.count_from_zero()
        bias = getattr(layer, "stored_bias", None)
        if isinstance(bias, StoredBias):
            layer.stored_bias = _FloatBias(bias)


_QUANTIZE, _DEQUANTIZE, _TRANSPOSE = "QuantizeLinear", "DequantizeLinear", "Transpose"
_UNKNOWN = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
"""Integer operators of ONNX that the parser has no importer for."""

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def violations(path: Path) -> list[str]:
    """Return the rules that an ONNX file breaks, a sentence each; none if TensorRT can read its integers.

    Args:
        path: The file, with its weights beside it if they are there.
    """
    import onnx

    return [*_Rules(onnx.load(str(path))).broken()]


def integer_products(path: Path) -> Kernels:
    """Count the convolutions and matrix products of a file, and those whose weights and inputs are int8."""
    import onnx

    rules = _Rules(onnx.load(str(path), load_external_data=False))
    nodes = [node for node in rules.model.graph.node if node.op_type in _PRODUCTS]
    convolutions = [rules.has_integer_weight(node) for node in nodes if node.op_type.startswith("Conv")]
    matmuls = [rules.has_integer_weight(node) for node in nodes if not node.op_type.startswith("Conv")]
    return Kernels(len(convolutions), sum(convolutions), len(matmuls), sum(matmuls))


@dataclass
class _Rules:
    model: Any
    makers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, list[Any]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            self.makers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def broken(self) -> Iterator[str]:
        """Yield what is wrong."""
        for domain in self.model.opset_import:
            if domain.domain not in ("", "ai.onnx"):
                yield f"operators of {domain.domain!r}, which are no standard ones"
            elif domain.version > OPSET:
                yield f"opset {domain.version}, at most {OPSET} is read everywhere"
        for tensor in self.constants.values():
            yield from self._broken_by_constant(tensor)
        for node in self.model.graph.node:
            if node.op_type in _UNKNOWN:
                yield f"{node.op_type}, which the parser does not know"
            elif node.op_type in (_QUANTIZE, _DEQUANTIZE):
                yield from self._broken_by_rounding(node)

    def has_integer_weight(self, product: Any) -> bool:
        """Whether the weight of a convolution or matrix product is a scaled constant."""
        node = self.makers.get(product.input[1])
        while node is not None and node.op_type == _TRANSPOSE:
            node = self.makers.get(node.input[0])
        return node is not None and node.op_type == _DEQUANTIZE and node.input[0] in self.constants

    def _broken_by_constant(self, tensor: Any) -> Iterator[str]:
        from onnx import TensorProto

        kind = TensorProto.DataType.Name(tensor.data_type)
        if kind in ("UINT8", "INT4", "UINT4", "INT16", "UINT16", "INT2", "UINT2"):
            yield f"{tensor.name} is {kind}; its integers are INT8"
        if kind == "INT8":
            for node in self.readers.get(tensor.name, []):
                if node.op_type not in (_QUANTIZE, _DEQUANTIZE):
                    yield f"{node.op_type} reads the INT8 constant {tensor.name}; DequantizeLinear alone may"

    def _broken_by_rounding(self, node: Any) -> Iterator[str]:
        from onnx import TensorProto

        where = f"{node.op_type} of {node.input[0]}"
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        scale = self._constant(node.input[1])
        if scale is None or not (scale > 0).all():
            yield f"{where} has a scale that is no positive constant"
            return
        if attributes.get("block_size"):
            yield f"{where} scales blocks"
        zero = self._constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is None and node.op_type == _QUANTIZE:
            yield f"{where} has no zero point, and so writes UINT8"
        if zero is not None and (zero.dtype != np.int8 or zero.any()):
            yield f"{where} has a zero point other than an INT8 zero"
        weight = self.constants.get(node.input[0])
        if node.op_type == _QUANTIZE or weight is None:
            if scale.size != 1:
                yield f"{where} has a scale for each channel of an activation"
            made_by = self.makers.get(node.input[0])
            if node.op_type == _DEQUANTIZE and (made_by is None or made_by.op_type not in _CARRYING):
                yield f"{where} reads what is not rounded"
            return
        if weight.data_type != TensorProto.INT8:
            yield f"{where} reads {TensorProto.DataType.Name(weight.data_type)}, no INT8"
            return
        yield from self._broken_by_weight(node, weight, scale, attributes.get("axis", 1))

    def _broken_by_weight(self, node: Any, weight: Any, scale: Any, axis: int) -> Iterator[str]:
        if scale.size > 1 and scale.shape != (weight.dims[axis],):
            yield f"{weight.name} has {scale.size} scales for dimension {axis} of {list(weight.dims)}"
        for product, turned in self._products(node.output[0]):
            if product.op_type not in _PRODUCTS:
                yield f"{product.op_type} reads the weight {weight.name}; a convolution or matrix product may"
                continue
            if not self._is_rounded(product.input[0]):
                yield f"{product.op_type} multiplies {weight.name} with an input that is not rounded to int8"
            if scale.size > 1 and axis != _outputs(product, len(weight.dims), turned):
                yield f"{weight.name} has its scales along dimension {axis}, which is not that of the outputs"

    def _products(self, name: str, turned: bool = False) -> Iterator[tuple[Any, bool]]:
        """Yield the nodes that read a weight, and whether it is transposed on the way."""
        for node in self.readers.get(name, []):
            if node.op_type == _TRANSPOSE and len(self.readers.get(node.output[0], [])) > 0:
                yield from self._products(node.output[0], not turned)
            else:
                yield node, turned

    def _is_rounded(self, name: str) -> bool:
        """Whether an activation is an int8 one, scaled; operations that only reorder values may stand between."""
        node = self.makers.get(name)
        while node is not None and node.op_type in _REORDERING:
            node = self.makers.get(node.input[0])
        return node is not None and node.op_type == _DEQUANTIZE and node.input[0] not in self.constants

    def _constant(self, name: str) -> Any:
        from onnx import numpy_helper

        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)


_REORDERING = ("Flatten", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_CARRYING = (_QUANTIZE, "Concat", "MaxPool", *_REORDERING)
"""Operators that may stand between a rounding and its scaling."""


def _outputs(product: Any, dimensions: int, turned: bool) -> int:
    """Return the dimension of a stored weight that holds the outputs of the product that reads it."""
    if product.op_type == "Conv":
        return 0
    if product.op_type == "ConvTranspose":
        return 1
    transposed = any(attribute.name == "transB" and attribute.i for attribute in product.attribute)
    return dimensions - 2 if transposed != turned else dimensions - 1
