import pytest

from helpers.exported import quantized
from lightning_optim.export import export_onnx

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

KERNELS = {
    "residual": (6, 6, 1, 1),
    "recommender": (0, 0, 4, 4),
    "text convolution": (2, 2, 1, 1),
}


@pytest.mark.parametrize(
    "name", ["residual", *(pytest.param(n, marks=pytest.mark.slow) for n in ("recommender", "text convolution"))]
)
def test_nets_run_with_integers_and_give_their_answers(name, tmp_path):
    module, inputs = quantized(name)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, runtime="openvino", least_agreement=0.9)
    found = (report.integer_convolutions, report.convolutions, report.integer_matmuls, report.matmuls)
    assert found == KERNELS[name]
    assert report.runtime == "openvino"
    assert report.latency.ratio > 0
    assert report.max_difference < 0.05


def test_what_it_cannot_read_is_not_written(tmp_path):
    module, inputs = quantized("branches")
    with pytest.raises(RuntimeError, match="openvino cannot load the exported file"):
        export_onnx(module, tmp_path / "net.onnx", inputs, runtime="openvino")  # circular padding
    assert not list(tmp_path.iterdir())
