"""Removes from an exported graph what its rounding makes idle, and from the file what engines find out by themselves.

All of it changes no number: a ReLU before a rounding that begins at zero, a rounding of what is rounded so already, the
same rounding of one tensor twice. A rounding moves from behind operations that only choose among values to before
them, so that the kernel before them writes integers.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["simplify"]

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_CHOOSE = ("MaxPool", "Concat", "Reshape", "Transpose", "Slice")
"""Operations that choose among values, or reorder them."""

_INFERRED = (_QUANTIZE, _DEQUANTIZE, "Conv", "Relu", "Clip", "Sigmoid", "HardSigmoid", "Add", "Mul", "MatMul", "Gemm",
             "AveragePool", "MaxPool", "GlobalAveragePool", "Concat", "Transpose")  # fmt: skip
"""Operations whose result's shape every engine infers, so that the file need not hold it."""


def simplify(model: Any) -> None:
    """Simplify an ONNX model with rounded activations, in place; others stay as they are.

    Args:
        model: An ``onnx_ir.Model``.
    """
    from onnx_ir.passes import common

    if not any(True for _ in _nodes(model, _QUANTIZE)):
        return
    common.DeduplicateInitializersPass()(model)
    _drop_defaults(model)
    _move_back(model)
    for node in list(_nodes(model, _QUANTIZE)):
        _drop_idle_before(node)
    _drop_repeated(model)
    common.RemoveUnusedNodesPass()(model)
    _shorten(model)


def _nodes(model: Any, *operators: str) -> Iterator[Any]:
    return (node for node in model.graph if node.op_type in operators)


def _constant(value: Any) -> Any:
    """Return a constant's array, None for other values."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _producer(value: Any, *operators: str) -> Any:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators else None


def _parameters(node: Any) -> tuple[Any, ...]:
    """Return what two roundings share if they are the same: identities of scale and zero point, and the axis."""
    attributes = ((name, attribute.value) for name, attribute in sorted(node.attributes.items()))
    return (*(None if value is None else id(value) for value in node.inputs[1:3]), *attributes)


_DEFAULTS = {"axis": 1, "block_size": 0, "output_dtype": 0, "saturate": 1}


def _drop_defaults(model: Any) -> None:
    """Drop attributes that say nothing, and the zero points of weights and biases, which are zero without any.

    Those of weights of matrix products stay: without them ONNX Runtime 1.32 finds no integer kernel for a product with
    a bias.
    """
    for node in _nodes(model, _QUANTIZE, _DEQUANTIZE):
        scalar = node.inputs[1].shape is not None and len(node.inputs[1].shape) == 0
        for name, default in _DEFAULTS.items():
            if name in node.attributes and (node.attributes[name].value == default or (name == "axis" and scalar)):
                del node.attributes[name]
        zero = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is not None and zero.dtype in (np.int8, np.int32) and not zero.any() and _is_dispensable(node):
            node.resize_inputs(2)


def _is_dispensable(node: Any) -> bool:
    """Whether engines do without a zero point of zeros: where it is that of a constant, but not of a product's weight.

    Of an activation it says that integers are int8: without it they are uint8.
    """
    constant = node.op_type == _DEQUANTIZE and node.inputs[0].const_value is not None
    return constant and not any(_multiplies(use.node) for use in node.outputs[0].uses())


def _multiplies(node: Any) -> bool:
    """Whether a node is a matrix product, or turns a matrix for one."""
    if node.op_type == "Transpose":
        return any(_multiplies(use.node) for use in node.outputs[0].uses())
    return node.op_type in ("MatMul", "Gemm")


def _move_back(model: Any) -> None:
    """Round before an operation that chooses among values, if its result is rounded in one way only."""
    changed = True
    while changed:
        changed = False
        for node in list(_nodes(model, _QUANTIZE)):
            chooser = _producer(node.inputs[0], *_CHOOSE)
            if chooser is None or chooser.outputs[0].is_graph_output():
                continue
            readers = [use.node for use in chooser.outputs[0].uses()]
            if any(reader.op_type != _QUANTIZE or _parameters(reader) != _parameters(node) for reader in readers):
                continue
            operands = chooser.inputs if chooser.op_type == "Concat" else chooser.inputs[:1]
            if all(_is_rounded(operand, node) for operand in operands) or not all(map(_is_integer, operands)):
                continue
            for place, operand in enumerate(operands):
                if not _is_rounded(operand, node):
                    chooser.replace_input_with(place, _rounded(operand, node, chooser))
                    changed = True


def _is_integer(value: Any) -> bool:
    """Whether a value comes from operations that read integers, and so can write them."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in ("Relu", "Clip", *_CHOOSE):
        return all(map(_is_integer, node.inputs if node.op_type == "Concat" else node.inputs[:1]))
    if node.op_type == _DEQUANTIZE:
        return True
    return _producer(node.inputs[0] if node.inputs else None, _DEQUANTIZE) is not None


def _is_rounded(value: Any, like: Any) -> bool:
    made = _producer(value, _DEQUANTIZE)
    return made is not None and _parameters(made) == _parameters(like)


def _rounded(value: Any, like: Any, before: Any) -> Any:
    """Insert a pair of rounding and scaling with the parameters of another before a node, and return its result."""
    from onnx_ir import Node

    quantize = Node("", _QUANTIZE, [value, *like.inputs[1:]])
    dequantize = Node("", _DEQUANTIZE, [quantize.outputs[0], *like.inputs[1:]])
    before.graph.insert_before(before, [quantize, dequantize])
    return dequantize.outputs[0]


def _drop_idle_before(node: Any) -> None:
    """Read over clippings to a range that the rounding clips to anyway, and over a rounding that is the same."""
    scale, zero = (_constant(value) for value in node.inputs[1:3])
    if scale is None or zero is None or scale.ndim or zero.dtype not in (np.uint8, np.int8):
        return
    ends = np.iinfo(zero.dtype)
    low, high = ((end - float(zero)) * float(scale) for end in (ends.min, ends.max))
    while True:
        before = node.inputs[0].producer()
        if before is None or not _is_idle(before, low, high, float(scale)):
            break
        node.replace_input_with(0, before.inputs[0])
    same = _producer(node.inputs[0], _DEQUANTIZE)
    if same is not None and _parameters(same) == _parameters(node):
        node.outputs[0].replace_all_uses_with(same.inputs[0])


def _is_idle(node: Any, low: float, high: float, scale: float) -> bool:
    """Whether a clipping changes nothing that a rounding to a range keeps: it clips less than half a step inside."""
    if node.op_type == "Relu":
        return low == 0.0
    if node.op_type != "Clip":
        return False
    bounds = [_constant(value) for value in (*node.inputs[1:3], None, None)[:2]]
    least, most = (None if bound is None else float(bound) for bound in bounds)
    return (least is None or least - low < 0.5 * scale) and (most is None or high - most < 0.5 * scale)


def _drop_repeated(model: Any) -> None:
    """Let one rounding, or one scaling, of a value serve all that read it."""
    made: dict[Any, Any] = {}
    for node in list(_nodes(model, _QUANTIZE, _DEQUANTIZE)):
        key = (node.op_type, id(node.inputs[0]), _parameters(node))
        first = made.setdefault(key, node)
        if first is not node and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(first.outputs[0])


def _shorten(model: Any) -> None:
    """Drop names of nodes and shapes that are inferred, and shorten names of constants."""
    for node in model.graph:
        node.name = None
        for value in node.outputs:
            if node.op_type in _INFERRED and not value.is_graph_output():
                value.shape = value.type = None
    taken: set[str] = set(model.graph.initializers)
    for name, value in list(model.graph.initializers.items()):
        value.shape = value.type = None  # its tensor has them
        shorter = name.removeprefix("module.")
        for long, short in _NAMES:
            shorter = shorter.replace(long, short)
        if shorter not in taken:
            taken.add(shorter)
            value.name = shorter


_NAMES = (
    ("stored_operands.", ""),
    ("stored_gate.", "gate_"),
    ("stored_bias.integers", "bias"),
    ("stored_bias.scale", "bias_scale"),
    ("stored.integers", "weight"),
    ("stored.scale", "weight_scale"),
    ("reads.", "input_"),
    ("writes.", "output_"),
)
