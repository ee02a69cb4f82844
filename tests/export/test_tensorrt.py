"""Files for TensorRT: the rules that a file is checked by, and nets that keep them."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.exported import NETS, Branches, quantized
from lightning_optim.export import export_onnx, tensorrt
from lightning_optim.quantization.calibrate import quantize_post_training
from lightning_optim.target import as_forward_inputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Activations(nn.Module):
    """SiLU and Hardswish between convolutions, an addition, a transposed convolution and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = F.silu(self.first(x))
        x = F.relu(self.up(F.hardswish(self.second(x)) + x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def sequences(rows: int = 16):
    return torch.randn(rows, 6, 16)


MORE = {
    "attention": (Attending, sequences),
    "recurrent": (Recurrent, sequences),
    "activations": (Activations, lambda rows=16: torch.randn(rows, 3, 8, 8)),
}
KERNELS = {
    "residual": (6, 6, 1, 1),
    "branches": (4, 4, 1, 1),
    "text convolution": (2, 2, 1, 1),
    "attention": (0, 0, 5, 7),
    "recurrent": (0, 0, 1, 1),
    "activations": (3, 3, 1, 1),
    "tied": (0, 0, 3, 3),
    "bert": (0, 0, 8, 10),
    "recommender": (0, 0, 4, 5),
}


@pytest.fixture(autouse=True)
def _more_nets(monkeypatch):
    for name, net in MORE.items():
        monkeypatch.setitem(NETS, name, net)


@pytest.mark.parametrize("name", [n if n == "residual" else pytest.param(n, marks=pytest.mark.slow) for n in KERNELS])
def test_nets_keep_the_rules_and_their_answers(name, tmp_path):
    module, inputs = quantized(name, activation_ranges="symmetric")
    report = export_onnx(module, tmp_path / "net.onnx", inputs, target="tensorrt")
    assert (report.target, report.runtime, report.opset, report.latency) == ("tensorrt", "onnxruntime", 19, None)
    assert tensorrt.violations(tmp_path / "net.onnx") == []
    assert report.max_difference < 1e-3 * max(1.0, span(module, inputs))
    found = (report.integer_convolutions, report.convolutions, report.integer_matmuls, report.matmuls)
    assert found == KERNELS[name]
    assert any("int8 input" in text for text in report.layers.values())
    assert "for tensorrt" in " ".join(str(report).split())


def span(module, inputs):
    with torch.no_grad():
        output = as_forward_inputs(inputs).call(copy.deepcopy(module).eval())
    output = getattr(output, "logits", output)
    return float(output.max() - output.min())


@pytest.mark.slow
def test_weights_without_integer_inputs_are_stored_in_float(tmp_path):
    module, inputs = quantized("recurrent", activation_ranges="symmetric")
    report = export_onnx(module, tmp_path / "net.onnx", inputs, target="tensorrt")
    assert report.layers == {"lstm": "float", "head": "int8 weight per channel, int8 input"}
    assert any("float32, with rounded values: lstm." in note for note in report.notes)
    stored = [onnx.numpy_helper.to_array(weight) for weight in onnx.load(tmp_path / "net.onnx").graph.initializer]
    matrices = [weight for weight in stored if weight.dtype == np.float32 and weight.size == 64 * 16]
    assert len(matrices) == 2
    for matrix in matrices:  # gate by gate, each row has the values of one scale
        rows = matrix.reshape(64, 16)
        steps = rows / (np.abs(rows).max(1, keepdims=True) / 127)
        assert np.abs(steps - np.rint(steps)).max() < 1e-3


def test_a_float_module_has_the_older_opset(tmp_path):
    module, inputs = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 12)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, target="tensorrt")
    assert report.opset == onnx.load(tmp_path / "net.onnx").opset_import[0].version == 19
    assert report.integer_matmuls == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "without zero points, and 0, 2 got activation_ranges='static'. Quantize with activation_ranges=\"symm"),
        ({"activation_ranges": "dynamic"}, "got activation_ranges='dynamic'"),
        ({"activation_bits": None}, "the inputs of 0, 2 are float: nothing would run with integers"),
        ({"activation_bits": None, "weight_bits": 4, "weight_granularity": "per_group:32"}, "nothing would run with"),
        ({"activation_ranges": "symmetric", "weight_granularity": "per_group:4"}, "weight_granularity='per_group:4'"),
    ],
)
def test_other_integers_raise_before_anything_is_written(options, error, tmp_path):
    module, inputs = quantized("mlp", **options)
    with pytest.raises(ValueError, match=re.escape(error)):
        export_onnx(module, tmp_path / "net.onnx", inputs, target="tensorrt")
    assert not list(tmp_path.iterdir())


def test_arguments_that_do_not_fit_raise(tmp_path):
    module, inputs = quantized("mlp", activation_ranges="symmetric")
    with pytest.raises(ValueError, match="TensorRT cannot be run here"):
        export_onnx(module, tmp_path / "net.onnx", inputs, target="tensorrt", keep_float="auto")
    with pytest.raises(ValueError, match="`target` must be one of 'onnxruntime', 'openvino', 'tensorrt', got 'tflite'"):
        export_onnx(module, tmp_path / "net.onnx", inputs, target="tflite")
    assert not list(tmp_path.iterdir())


def test_a_file_that_breaks_a_rule_is_not_written(tmp_path, monkeypatch):
    """Without the step that makes activations int8 and biases float."""
    module, inputs = quantized("mlp", activation_ranges="symmetric")
    monkeypatch.setattr(tensorrt, "finish", lambda module: None)
    with pytest.raises(RuntimeError, match="not one that TensorRT reads"):
        export_onnx(module, tmp_path / "net.onnx", inputs, target="tensorrt")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_symmetric_module_has_the_other_form_too(tmp_path):
    torch.manual_seed(0)
    module, inputs = Branches(), torch.randn(8, 3, 12, 12)
    quantize_post_training(module, [inputs], activation_ranges="symmetric", progress_bar=False)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, keep_float="none")
    assert (report.target, report.opset) == ("onnxruntime", 21)
    assert report.max_difference < 0.02
    assert any("opset 21" in broken for broken in tensorrt.violations(tmp_path / "net.onnx"))


def rounded_product():
    """A matrix product that keeps all rules: nodes, constants, version of the operators, domain."""
    node = onnx.helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "step", "zero"], ["a"]),
        node("DequantizeLinear", ["weight", "scales"], ["b"], axis=1),
        node("MatMul", ["a", "b"], ["y"]),
    ]
    constants = {
        "step": np.float32(0.1),
        "zero": np.int8(0),
        "weight": np.ones((4, 3), np.int8),
        "scales": np.ones(3, np.float32),
    }
    return nodes, constants, {"": 19}


def written(path, nodes, constants, opsets):
    make = onnx.helper
    graph = make.make_graph(
        nodes,
        "g",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (2, 4))],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid(*pair) for pair in opsets.items()]), path)
    return tensorrt.violations(path)


def test_a_file_that_keeps_the_rules_passes(tmp_path):
    assert written(tmp_path / "net.onnx", *rounded_product()) == []


def _change(what):
    """Return the parts of the file with one rule broken."""
    nodes, constants, opsets = rounded_product()
    quantize, _, weight, product = nodes
    node = onnx.helper.make_node
    if what == "newer opset":
        opsets[""] = 21
    elif what == "other domain":
        opsets["com.microsoft"] = 1
    elif what == "uint8 activations":
        constants["zero"] = np.uint8(0)
    elif what == "zero point":
        constants["zero"] = np.int8(3)
    elif what == "no zero point":
        del quantize.input[2]
    elif what == "scale that is computed":
        nodes.insert(0, node("Identity", ["step"], ["computed"]))
        quantize.input[1] = "computed"
    elif what == "scale of zero":
        constants["step"] = np.float32(0)
    elif what == "scale for each channel":
        constants.update(step=np.ones(4, np.float32), zero=np.zeros(4, np.int8))
    elif what == "dynamic ranges":
        nodes.insert(0, node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]))
        quantize.input[0] = "a"
    elif what == "int32 bias":
        constants["bias"] = np.ones(3, np.int32)
        nodes[3:] = [
            node("DequantizeLinear", ["bias", "scales"], ["c"], axis=0),
            node("MatMul", ["a", "b"], ["p"]),
            node("Add", ["p", "c"], ["y"]),
        ]
    elif what == "uint8 weight":
        constants["weight"] = np.ones((4, 3), np.uint8)
    elif what == "wrong axis":
        weight.attribute[0].i = 0
        constants["scales"] = np.ones(4, np.float32)
    elif what == "too few scales":
        constants["scales"] = np.ones(2, np.float32)
    elif what == "float input":
        product.input[0] = "x"
    elif what == "table":
        constants["table"], constants["index"] = np.ones((4, 3), np.int8), np.int64(0)
        nodes.append(node("Gather", ["table", "index"], ["rows"]))
    elif what == "blocks":
        weight.attribute.append(onnx.helper.make_attribute("block_size", 2))
    elif what == "weight of an addition":
        nodes[3] = node("Add", ["x", "b"], ["y"])
    return nodes, constants, opsets


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("newer opset", "opset 21"),
        ("other domain", "'com.microsoft'"),
        ("uint8 activations", "zero is UINT8"),
        ("zero point", "a zero point other than"),
        ("no zero point", "and so writes UINT8"),
        ("scale that is computed", "no positive constant"),
        ("scale of zero", "no positive constant"),
        ("scale for each channel", "for each channel of an activation"),
        ("dynamic ranges", "DynamicQuantizeLinear"),
        ("int32 bias", "reads INT32"),
        ("uint8 weight", "weight is UINT8"),
        ("wrong axis", "not that of the outputs"),
        ("too few scales", "2 scales for dimension 1"),
        ("float input", "not rounded to int8"),
        ("table", "Gather reads the INT8 constant table"),
        ("blocks", "scales blocks"),
        ("weight of an addition", "Add reads the weight weight"),
    ],
)
def test_a_file_that_breaks_a_rule_fails(what, sentence, tmp_path):
    broken = written(tmp_path / "net.onnx", *_change(what))
    assert any(sentence in one for one in broken), broken
