"""Products of uint8 and int8 that overflow: on x86 processors without VNNI, ONNX Runtime adds pairs in 16 bits.

255 x 127 twice is 64,770, and 16 bits end at 32,767. The same weights as uint8 with a zero point of 128 are multiplied
in 32 bits there, slower but correct; ONNX Runtime's own option for it, ``session.x64quantprecision``, rejects files in
which two layers share a weight (1.32).
"""

from functools import cache
from typing import Any

import numpy as np

__all__ = ["NOTE", "overflows", "unsigned_weights"]

NOTE = (
    "This processor has no VNNI: ONNX Runtime's kernels for uint8 x int8 overflow on it. Answers and times here are "
    "those of the file with its weights as uint8, as ExportedModel loads it on such processors; a plain "
    "InferenceSession gives other answers there. On processors with VNNI, and on ARM, the file is correct as it is."
)


@cache
def overflows() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 overflow on this processor, found by trying one."""
    import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from onnx import TensorProto, helper, numpy_helper  # type: ignore[import-not-found, unused-ignore]

    inputs, weights = np.full((1, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["inputs", "weights"], ["outputs"])],
        "product",
        [helper.make_tensor_value_info("inputs", TensorProto.UINT8, inputs.shape)],
        [helper.make_tensor_value_info("outputs", TensorProto.INT32, (1, 16))],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"inputs": inputs})
    return bool((outputs != inputs.astype(np.int64) @ weights.astype(np.int64)).any())


def unsigned_weights(model: Any) -> bool:
    """Rewrite a model's int8 weights as uint8, with numbers and zero points 128 higher: the same values.

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
        if any(len(node.input) > 2 and node.input[2] not in held for node in nodes):
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


def _zero_point(node: Any, held: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    if len(node.input) > 2 and node.input[2]:
        return numpy_helper.to_array(held[node.input[2]])
    return np.zeros(tuple(held[node.input[1]].dims), np.int8)


def _unsigned(values: Any) -> Any:
    return (values.astype(np.int16) + 128).astype(np.uint8)
