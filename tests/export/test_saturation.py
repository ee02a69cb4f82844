"""Files give the same answers on processors whose products of uint8 and int8 overflow."""

import copy

import numpy as np
import pytest
import torch

from helpers.exported import quantized
from lightning_optim.export import export_onnx, runtimes, saturation
from lightning_optim.export.session import ExportedModel

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(params=[False, True], ids=["as this processor is", "as one without VNNI"])
def without_vnni(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(runtimes, "_overflows_in_onnxruntime", lambda: True)
    return request.param or runtimes._overflows_in_onnxruntime()


@pytest.mark.parametrize(
    "name", ["text convolution", *(pytest.param(n, marks=pytest.mark.slow) for n in ("residual", "recommender"))]
)
def test_files_give_the_answers_of_the_module(name, without_vnni, tmp_path):
    module, inputs = quantized(name)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.9)
    assert report.max_difference < 0.05
    noted = saturation.note_on("ONNX Runtime", "a plain InferenceSession") in report.notes
    assert noted == without_vnni
    stored = [w.data_type for w in onnx.load(tmp_path / "net.onnx").graph.initializer if len(w.dims) > 1]
    assert onnx.TensorProto.INT8 in stored  # the file is the same everywhere
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        expected = copy.deepcopy(module).eval()(*inputs)
    got = ExportedModel(tmp_path / "net.onnx")(*inputs)
    assert float((got - expected).abs().max() / (expected.max() - expected.min())) < 0.05


def test_unsigned_weights_have_the_same_values():
    weights = np.array([[-128, -1], [0, 127]], np.int8)
    from onnx.reference import ReferenceEvaluator

    helper = onnx.helper
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["a"], axis=1),
        helper.make_node("DequantizeLinear", ["w", "scale"], ["b"], axis=1),
    ]
    initializers = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (("w", weights), ("scale", np.array([0.5, 2], np.float32)), ("zero", np.int8([3, -4])))
    ]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2, 2)) for name in "ab"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, initializers),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    before = ReferenceEvaluator(copy.deepcopy(model)).run(None, {})
    assert saturation.unsigned_weights(model)
    after = ReferenceEvaluator(model).run(None, {})
    assert all(np.array_equal(left, right) for left, right in zip(before, after, strict=True))
    assert not saturation.unsigned_weights(model)  # none is left


def test_weights_of_seven_bits_run_as_they_are_everywhere(tmp_path):
    module, inputs = quantized("text convolution", weight_bits=7)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.9)
    assert not any("VNNI" in note for note in report.notes)
    assert report.max_difference < 0.05
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    feeds = {put.name: tensor.numpy() for put, tensor in zip(session.get_inputs(), inputs, strict=True)}
    plain = torch.from_numpy(session.run(None, feeds)[0])
    assert torch.equal(plain, ExportedModel(tmp_path / "net.onnx")(*inputs))
