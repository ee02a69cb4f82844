import numpy as np
import pytest

from lightning_optim.export.simplify import simplify

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def model(nodes, outputs, zero=0, **constants):
    """A graph from x to its outputs, simplified; s and z are the scale 0.1 and the zero point."""
    constants = {"s": np.float32(0.1), "z": np.uint8(zero), **constants}
    graph = helper.make_graph(
        [helper.make_node(operator, inputs.split(), out.split(), **words) for operator, inputs, out, words in nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3, 4, 4))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b", "c", "d"]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    simplified = ir.from_proto(made)
    simplify(simplified)
    simplified = ir.to_proto(simplified)
    onnx.checker.check_model(simplified, full_check=True)
    return made, simplified


def answers(model):
    from onnx.reference import ReferenceEvaluator

    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32) * 10
    return ReferenceEvaluator(model).run(None, {"x": x})


def operators(model):
    return [node.op_type for node in model.graph.node]


def pair(x, y, q):
    return [("QuantizeLinear", f"{x} s z", q, {}), ("DequantizeLinear", f"{q} s z", y, {})]


CASES = {
    "a ReLU before zero": ([("Relu", "x", "a", {}), *pair("a", "y", "q")], {}, ["QuantizeLinear", "DequantizeLinear"]),
    "a ReLU above zero": (
        [("Relu", "x", "a", {}), *pair("a", "y", "q")],
        {"zero": 7},
        ["Relu", "QuantizeLinear", "DequantizeLinear"],
    ),
    "a clip to the range": (
        [("Clip", "x low high", "a", {}), *pair("a", "y", "q")],
        {"low": np.float32(0), "high": np.float32(25.5)},
        ["QuantizeLinear", "DequantizeLinear"],
    ),
    "a clip inside of the range": (
        [("Clip", "x low high", "a", {}), *pair("a", "y", "q")],
        {"low": np.float32(0), "high": np.float32(6)},
        ["Clip", "QuantizeLinear", "DequantizeLinear"],
    ),
    "rounded twice": (
        [*pair("x", "a", "q"), *pair("a", "y", "r")],
        {"zero": 9},
        ["QuantizeLinear", "DequantizeLinear"],
    ),
    "a maximum between": (
        [
            *pair("x", "a", "q"),
            ("Relu", "a", "b", {}),
            ("MaxPool", "b", "c", {"kernel_shape": [2, 2]}),
            *pair("c", "y", "r"),
        ],
        {},
        ["QuantizeLinear", "DequantizeLinear", "MaxPool", "QuantizeLinear", "DequantizeLinear"],
    ),
    "nothing rounded": ([("Relu", "x", "a", {}), ("Relu", "a", "y", {})], {}, ["Relu", "Relu"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_idle_is_dropped_and_no_number_changes(name):
    nodes, constants, expected = CASES[name]
    before, after = model(nodes, ["y"], **constants)
    assert operators(after) == expected
    for left, right in zip(answers(before), answers(after), strict=True):
        np.testing.assert_array_equal(left, right)


def test_one_rounding_serves_all_that_read_it():
    nodes = [*pair("x", "a", "q"), *pair("x", "b", "r"), ("Add", "a b", "y", {})]
    before, after = model(nodes, ["y"], zero=128)
    assert operators(after) == ["QuantizeLinear", "DequantizeLinear", "Add"]
    np.testing.assert_array_equal(answers(before)[0], answers(after)[0])
