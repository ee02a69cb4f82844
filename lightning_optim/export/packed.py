"""Weights of 4 bits and fewer, and of groups, in the forms that engines read packed.

* A matrix whose inputs share scales in groups is stored ``[in, out]`` for a DequantizeLinear with blocks before a
  MatMul. ONNX Runtime makes one operator of the two, MatMulNBits, which multiplies integers; OpenVINO multiplies such a
  matrix packed too. Only this form is recognized: not ``[out, in]`` with a Transpose or Gemm, not with float16 weights,
  not after a QuantizeLinear (ONNX Runtime 1.32).
* Rows of a table are bytes of two integers, looked up and then taken apart: Gather takes no 4-bit integers.
* A table that is also a matrix (a tied head) is stored once, as rows, which ``com.microsoft.MatMulNBits`` multiplies.
  It is no standard operator, but ONNX Runtime and OpenVINO have it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optim.export.stored import StoredWeight
from lightning_optim.functional.fake_quantize import parse_weight_granularity

__all__ = ["PACKED_BITS", "StoredBlocks", "StoredRows", "has_blocks", "pack_initializers", "schema", "translations"]

PACKED_BITS = 4
"""Most bits of an integer in half a byte."""

BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of groups that engines multiply packed."""

ACCURACY_LEVEL = 4
"""How ONNX Runtime's MatMulNBits computes by default: it rounds inputs to 8 bits, by row and block."""


def has_blocks(granularity: str) -> bool:
    """Whether engines multiply matrices of a granularity packed."""
    return parse_weight_granularity(granularity)[1] in BLOCKS


@torch.library.custom_op("lightning_optim::dequantize_blocks", mutates_args=())
def dequantize_blocks(integers: Tensor, scale: Tensor, size: int) -> Tensor:
    """Return ``[in, out]`` integers times their ``[in / size, out]`` scales: DequantizeLinear with blocks."""
    return integers.float() * scale.float().repeat_interleave(size, 0)


@dequantize_blocks.register_fake
def _(integers: Tensor, scale: Tensor, size: int) -> Tensor:
    return torch.empty_like(integers, dtype=torch.float32)


@torch.library.custom_op("lightning_optim::packed_product", mutates_args=())
def packed_product(x: Tensor, rows: Tensor, scale: Tensor, size: int) -> Tensor:
    """Multiply ``[..., in]`` with packed rows ``[out, groups, size / 2]``: ``com.microsoft.MatMulNBits``."""
    weight = (_unpacked(rows) * scale.float().unsqueeze(-1)).flatten(1)
    return x @ weight[:, : x.shape[-1]].t()


@packed_product.register_fake
def _(x: Tensor, rows: Tensor, scale: Tensor, size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows.shape[0]))


class StoredBlocks(StoredWeight):
    """A matrix ``[in, out]`` of integers, whose groups of inputs have float16 scales ``[groups, out]``."""

    multiplies = True

    def __init__(self, weight: Tensor, bits: int, granularity: str) -> None:
        super().__init__(weight, bits, granularity)
        rows, _, self.size = self.integers.shape
        self.is_packed = bits <= PACKED_BITS
        self.register_buffer("integers", self.integers.reshape(rows, -1).t().contiguous())
        self.register_buffer("scale", self.scale.t().contiguous())

    def matrix(self) -> Tensor:
        """Return the weight ``[out, in]``."""
        whole: Tensor = dequantize_blocks(self.integers, self.scale, self.size)
        return whole[: self.shape[1]].t()

    def product(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.t()``."""
        missing = len(self.integers) - x.shape[-1]
        if missing:  # OpenVINO 2026.4 reads whole blocks only
            x = F.pad(x, (0, missing))
        return torch.matmul(x, dequantize_blocks(self.integers, self.scale, self.size))


class StoredRows(StoredWeight):
    """A table of integers of at most 4 bits, two in a byte: ``[rows, groups, size / 2]`` or ``[rows, size / 2]``.

    The first of two is in the lower half; each is stored 8 higher.
    """

    is_packed = True

    def __init__(self, weight: Tensor, bits: int, granularity: str) -> None:
        super().__init__(weight, bits, granularity)
        self.multiplies = has_blocks(granularity)
        self.size = self.integers.shape[-1]
        self.register_buffer("integers", _packed(self.integers))

    def _whole(self, integers: Tensor) -> Tensor:
        return _unpacked(integers)[..., : self.size]

    def _expanded(self, integers: Tensor) -> Tensor:
        scale = self.scale.float()
        return self._whole(integers) * scale.reshape(*scale.shape, *[1] * (integers.ndim - scale.ndim))

    def product(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.t()``."""
        product: Tensor = packed_product(x, self.integers, self.scale, self.size)
        return product


def _packed(integers: Tensor) -> Tensor:
    """Pack pairs of integers from -8 to 7 of the last dimension into bytes."""
    raised = F.pad(integers, (0, integers.shape[-1] % 2)).to(torch.uint8) + 8 & 15
    return raised[..., ::2] | raised[..., 1::2] << 4


def _unpacked(rows: Tensor) -> Tensor:
    # With floats: OpenVINO 2026.4 shifts bytes by dividing and rounding.
    values = rows.float()
    upper = torch.floor(values * (1 / 16))
    return torch.stack((values - 16 * upper, upper), -1).flatten(-2) - 8


def translations() -> dict[Any, Any]:
    """Return what the custom operators are in a file."""
    import onnx_ir
    from onnxscript import opset21 as standard
    from onnxscript import values

    opset21: Any = standard

    multiply = values.Op(values.Opset("com.microsoft", 1), "MatMulNBits", _schema())

    def blocks(integers: Any, scale: Any, size: int) -> Any:
        scales = opset21.Cast(scale, to=onnx_ir.DataType.FLOAT)  # in this order ONNX Runtime sees the block
        return opset21.DequantizeLinear(integers, scales, axis=0, block_size=size)

    def product(x: Any, rows: Any, scale: Any, size: int) -> Any:
        scales = opset21.Reshape(opset21.Cast(scale, to=onnx_ir.DataType.FLOAT), opset21.Constant(value_ints=[-1]))
        sizes = {"K": int(x.shape[-1]), "N": int(rows.shape[0]), "block_size": size}
        return multiply(x, rows, scales, bits=PACKED_BITS, accuracy_level=ACCURACY_LEVEL, **sizes)

    own = torch.ops.lightning_optim
    return {own.dequantize_blocks.default: blocks, own.packed_product.default: product}


def _schema() -> Any:
    """Return the part of the operator's definition that is used here; the ``onnx`` package has standard ones only."""
    types = {"A": "T1", "B": "T2", "scales": "T1"}
    constraints = [("T1", ["tensor(float)"], ""), ("T2", ["tensor(uint8)"], "")]
    return schema(
        "MatMulNBits", "com.microsoft", types, constraints, ("K", "N", "bits", "block_size", "accuracy_level")
    )


def schema(
    name: str, domain: str, inputs: Mapping[str, str], constraints: Sequence[Any], attributes: Sequence[str] = ()
) -> Any:
    """Return the definition of an operator that the ``onnx`` package does not have; its result is of the first type.

    Args:
        name: The operator.
        domain: Its domain.
        inputs: Name -> type, a variable of ``constraints``.
        constraints: Variables of types, what each stands for, and a description.
        attributes: Names of attributes that are whole numbers.
    """
    from onnx.defs import OpSchema

    return OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter(key, type_) for key, type_ in inputs.items()],
        outputs=[OpSchema.FormalParameter("Y", "T1")],
        type_constraints=list(constraints),
        attributes=[OpSchema.Attribute(key, OpSchema.AttrType.INT) for key in attributes],
    )


def pack_initializers(model: Any) -> None:
    """Store the weights of blocks as 4-bit integers, which torch has no type for, where all of them are.

    Args:
        model: The exporter's model; it is changed in place.
    """
    import ml_dtypes
    import onnx_ir

    for node in model.graph.all_nodes():
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" and "block_size" in node.attributes else None
        if weight is None or weight.const_value is None or weight.dtype != onnx_ir.DataType.INT8:
            continue
        integers = weight.const_value.numpy()
        if integers.size and (integers.min() < -8 or integers.max() > 7):
            continue
        narrow = onnx_ir.Tensor(integers.astype(ml_dtypes.int4), onnx_ir.DataType.INT4, name=weight.name)
        weight.const_value, weight.type = narrow, onnx_ir.TensorType(onnx_ir.DataType.INT4)
