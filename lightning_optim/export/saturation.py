"""Products of uint8 and int8 that overflow: on x86 processors without VNNI, engines add pairs of them in 16 bits.

255 x 127 twice is 64,770, and 16 bits end at 32,767. The same weights as uint8 with a zero point of 128 are multiplied
in 32 bits there, slower but correct (ONNX Runtime 1.32, OpenVINO 2026.4). Weights of 7 bits and fewer leave room for
the sum and stay as they are. ONNX Runtime's own option for it,
``session.x64quantprecision``, rejects files in which two layers share a weight (1.32).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["note_on", "overflows", "unsigned_weights"]

_MOST_WITHOUT_OVERFLOW = 32_767 // (2 * 255)


def note_on(engine: str, plainly: str) -> str:
    """Return the sentences for the export report.

    Args:
        engine: Name of the engine.
        plainly: How a file is loaded in it without this package.
    """
    return (
        f"This processor has no VNNI: {engine}'s kernels for uint8 x int8 overflow on it. Answers and times here are "
        f"those of the file with its weights as uint8, as ExportedModel loads it on such processors; {plainly} gives "
        "other answers there. On processors with VNNI, and on ARM, the file is correct as it is."
    )


def overflows(run: Callable[[bytes, Any], Any]) -> bool:
    """Whether an engine's products of uint8 and int8 overflow on this processor, found by trying one.

    Args:
        run: Returns an engine's output for a model and its input.
    """
    from onnx import TensorProto, helper, numpy_helper  # type: ignore[import-not-found, unused-ignore]

    inputs, weights = np.full((1, 64), 255, np.float32), np.full((64, 16), 127, np.int8)
    constants = {
        "weights": weights,
        "one": np.float32(1),
        "ones": np.ones(16, np.float32),
        "zero": np.uint8(0),
        "zeros": np.zeros(16, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["inputs", "one", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "one", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weights", "ones", "zeros"], ["matrix"], axis=1),
        helper.make_node("MatMul", ["rounded", "matrix"], ["outputs"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, inputs.shape)],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, (1, 16))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bool((np.asarray(run(model.SerializeToString(), inputs)) != inputs @ weights.astype(np.float32)).any())


def unsigned_weights(model: Any) -> bool:
    """Rewrite a model's int8 weights as uint8, with numbers and zero points 128 higher: the same values.

    Weights whose products cannot overflow stay: those of 7 bits and fewer.

    Args:
        model: An ``onnx.ModelProto`` whose weights are read by DequantizeLinear; it is changed in place.

    Returns:
        Whether there was such a weight.
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    held = {weight.name: weight for weight in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    changed = False
    for weight in list(graph.initializer):
        nodes = readers.get(weight.name, [])
        if weight.data_type != TensorProto.INT8 or not nodes:
            continue
        if any(node.op_type != "DequantizeLinear" or node.input[0] != weight.name for node in nodes):
            continue  # a zero point, or a table whose rows are looked up before they are scaled
        if any(attribute.name == "block_size" and attribute.i for node in nodes for attribute in node.attribute):
            continue  # ONNX Runtime's MatMulNBits does not add in 16 bits, OpenVINO multiplies blocks with floats
        if any(len(node.input) > 2 and node.input[2] not in held for node in nodes) or _leaves_room(weight):
            continue
        for number, node in enumerate(nodes):
            zero = _zero_point(node, held)
            zero_point = numpy_helper.from_array(_unsigned(zero), f"{weight.name}_zero_point_of_{number}")
            graph.initializer.append(zero_point)
            del node.input[2:]
            node.input.append(zero_point.name)
        weight.CopyFrom(numpy_helper.from_array(_unsigned(numpy_helper.to_array(weight)), weight.name))
        changed = True
    return changed


def _leaves_room(weight: Any) -> bool:
    """Whether two products with the largest activation fit into 16 bits."""
    from onnx import numpy_helper

    integers = numpy_helper.to_array(weight)
    return not integers.size or int(np.abs(integers.astype(np.int16)).max()) <= _MOST_WITHOUT_OVERFLOW


def _zero_point(node: Any, held: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    if len(node.input) > 2 and node.input[2]:
        return numpy_helper.to_array(held[node.input[2]])
    return np.zeros(tuple(held[node.input[1]].dims), np.int8)


def _unsigned(values: Any) -> Any:
    return (values.astype(np.int16) + 128).astype(np.uint8)
