import subprocess
import sys

import pytest

from helpers.exported import quantized
from lightning_optim.export import export_onnx, runtimes
from lightning_optim.quantization.prepare import quantized_layers

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

KERNELS = {
    "residual": (6, 6, 1, 1),
    "recommender": (0, 0, 4, 5),  # the sum of a bag is a product with float weights
    "text convolution": (2, 2, 1, 1),
}


@pytest.mark.parametrize(
    "name", ["residual", *(pytest.param(n, marks=pytest.mark.slow) for n in ("recommender", "text convolution"))]
)
def test_nets_run_with_integers_and_give_their_answers(name, tmp_path):
    module, inputs = quantized(name)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, runtime="openvino", least_agreement=0.9)
    found = (report.integer_convolutions, report.convolutions, report.integer_matmuls, report.matmuls)
    convolutions, *others = KERNELS[name]
    overflows = runtimes._overflows_in_openvino()  # then its convolutions with uint8 weights compute in float
    assert found == (0 if overflows else convolutions, *others)
    assert report.runtime == "openvino"
    assert report.latency.ratio > 0
    assert report.max_difference < 0.05
    noted = any("OpenVINO's kernels for uint8 x int8 overflow" in note for note in report.notes)
    assert noted == overflows


@pytest.mark.slow
def test_a_processor_without_vnni_runs_the_weights_as_uint8(tmp_path, monkeypatch):
    """Everywhere: the rewritten file gives the same answers and still runs with integers."""
    monkeypatch.setattr(runtimes, "_overflows_in_openvino", lambda: True)
    module, inputs = quantized("recommender")
    report = export_onnx(module, tmp_path / "net.onnx", inputs, runtime="openvino", least_agreement=0.9)
    assert report.max_difference < 0.05
    assert (report.integer_matmuls, report.matmuls) == KERNELS["recommender"][2:]
    assert any("OpenVINO's kernels for uint8 x int8 overflow" in note for note in report.notes)


def test_what_it_cannot_read_is_not_written(tmp_path):
    module, inputs = quantized("branches")
    with pytest.raises(RuntimeError, match="openvino cannot load the exported file"):
        export_onnx(module, tmp_path / "net.onnx", inputs, runtime="openvino")  # circular padding
    assert not list(tmp_path.iterdir())


SIGNALS_AFTER_TWO_MODELS = """
import gc, signal, sys
from pathlib import Path
from lightning_optim.export.runtimes import RUNTIMES

first = RUNTIMES["openvino"](Path(sys.argv[1]))
second = RUNTIMES["openvino"](Path(sys.argv[1]))
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.slow
def test_a_signal_after_two_models_does_not_crash_the_process(tmp_path):
    """DataLoader workers that end send one; OpenVINO leaves a freed signal stack behind where it has two cores."""
    module, inputs = quantized("text convolution")
    export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.9)
    command = [sys.executable, "-c", SIGNALS_AFTER_TWO_MODELS, str(tmp_path / "net.onnx")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr[-2000:]


def test_the_form_for_openvino_leaves_inputs_of_dynamic_ranges_float(tmp_path):
    module, inputs = quantized("mlp", activation_ranges="dynamic")
    report = export_onnx(module, tmp_path / "net.onnx", inputs, target="openvino", keep_float="none")
    assert (report.target, report.runtime, report.opset) == ("openvino", "openvino", 21)
    assert report.layers == {"0": "int8 weight per channel", "2": "int8 weight per channel"}
    assert report.max_difference < 1e-4
    assert any("The inputs of 2 layers" in note for note in report.notes)
    assert {layer.activation_bits for layer in quantized_layers(module).values()} == {8}
    operators = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert "DynamicQuantizeLinear" not in operators
