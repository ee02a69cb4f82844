"""Weights in a second file, as those of more than 1.5 GiB are: here from the first byte on."""

import gc

import pytest
import torch
from torch import nn

from lightning_optim.checkpoint import plain_plan
from lightning_optim.export import export_onnx, external, runtimes
from lightning_optim.export import onnx as writing
from lightning_optim.export.session import ExportedModel
from lightning_optim.quantization.calibrate import quantize_post_training

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(external, "LARGEST_FILE", 0)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def small(name="int8"):
    module, options = net(), OPTIONS[name]
    if options is not None:
        quantize_post_training(module, [torch.randn(8, 32)], **options)
    return module, torch.randn(4, 32)


OPTIONS = {
    "float": None,
    "int8": {},
    "4-bit groups": {"weight_bits": 4, "activation_bits": None, "weight_granularity": "per_group:32"},
}


@pytest.mark.parametrize(
    "name", ["int8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("float", "4-bit groups"))]
)
def test_both_files_together_are_the_one(name, tmp_path, monkeypatch):
    module, inputs = small(name)
    whole = export_onnx(module, tmp_path / "whole.onnx", inputs, least_agreement=0.9)
    monkeypatch.setattr(external, "LARGEST_FILE", 0)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.9)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.name != "whole.onnx"}
    assert set(files) == {"net.onnx", "net.onnx.data"}
    assert report.file_bytes == sum(files.values())
    assert files["net.onnx"] < whole.file_bytes < 1.5 * report.file_bytes
    assert report.max_difference == whole.max_difference
    assert report.integer_convolutions == whole.integer_convolutions
    assert report.integer_matmuls == whole.integer_matmuls
    if report.float_bytes is not None:
        assert report.float_bytes >= whole.float_bytes
    assert any("net.onnx.data" in note for note in report.notes)
    assert not any(".data" in note for note in whole.notes)
    expected = ExportedModel(tmp_path / "whole.onnx")(inputs)
    assert torch.equal(ExportedModel(tmp_path / "net.onnx")(inputs), expected)
    link = tmp_path / "elsewhere" / "link.onnx"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "net.onnx")
    assert torch.equal(ExportedModel(link)(inputs), expected)


@pytest.mark.slow
def test_openvino_reads_both_files(tmp_path, small_files):
    pytest.importorskip("openvino")
    module, inputs = small()
    export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.9, runtime="openvino")
    got = ExportedModel(tmp_path / "net.onnx", "openvino")(inputs)
    assert torch.allclose(got, ExportedModel(tmp_path / "net.onnx")(inputs), atol=0.05)


def test_the_plan_is_read_without_the_weights(tmp_path, small_files):
    module, inputs = small()
    export_onnx(module, tmp_path / "net.onnx", inputs, verify=False)
    (tmp_path / "net.onnx.data").unlink()
    loaded = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    assert {entry.key: entry.value for entry in loaded.metadata_props} == writing._metadata(module, None)
    assert plain_plan(module)["modules"]


def test_a_small_model_in_its_place_takes_the_weights_away(tmp_path, monkeypatch):
    path, data = tmp_path / "net.onnx", tmp_path / "net.onnx.data"

    def export():
        export_onnx(net(), path, torch.randn(4, 32), verify=False)
        return {file.name for file in tmp_path.iterdir()}

    data.write_text("mine")
    path.write_text("no model")
    assert not external.holds_data(path)
    export()
    assert data.read_text() == "mine"  # the file does not refer to it
    assert external.stored_bytes(path) == path.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(external, "LARGEST_FILE", 0)
        assert export() == {"net.onnx", "net.onnx.data"}
        assert external.stored_bytes(path) == path.stat().st_size + data.stat().st_size
    assert export() == {"net.onnx"}


def test_a_file_with_other_answers_leaves_the_old_pair(tmp_path, small_files, monkeypatch):
    export_onnx(net(), tmp_path / "net.onnx", torch.randn(4, 32))
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other, run = net(), runtimes.OnnxRuntime.run
    other[0].weight.data += 1
    monkeypatch.setattr(runtimes.OnnxRuntime, "run", lambda self, inputs: [-10 * y for y in run(self, inputs)])
    with pytest.raises(RuntimeError, match="Nothing was written"):
        export_onnx(other, tmp_path / "net.onnx", torch.randn(4, 32))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_large_files_are_rewritten_beside_on_processors_without_vnni(tmp_path, small_files, monkeypatch):
    monkeypatch.setattr(runtimes, "_overflows_in_onnxruntime", lambda: True)
    module, inputs = small()
    export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.9)
    in_memory = ExportedModel(tmp_path / "net.onnx")
    monkeypatch.setattr(runtimes, "MOST_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rewritten = ExportedModel(tmp_path / "net.onnx")
    assert isinstance(in_memory.runtime._source.model, bytes)
    assert isinstance(rewritten.runtime._source.model, str)
    expected = in_memory(inputs)
    assert torch.equal(rewritten(inputs), expected)
    again = rewritten.runtime.again()
    assert torch.equal(again.run([inputs])[0], expected)
    assert len(list(tmp_path.iterdir())) == 3
    del rewritten, again
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "name", ["4-bit groups", *(pytest.param(n, marks=pytest.mark.slow) for n in ("float", "int8"))]
)
def test_weights_are_written_one_by_one_into_the_same_model(name, tmp_path, monkeypatch):
    """As fields of a message of protocol buffers, which everything that reads those reads."""
    module, inputs = small(name)
    models = []
    for most in (0, 2**40):
        monkeypatch.setattr(external, "_SMALL", most)
        path = tmp_path / f"{most}.onnx"
        export_onnx(module, path, inputs, verify=False)
        onnx.checker.check_model(str(path), full_check=True)
        models.append(onnx.load(path))
    weights = [{weight.name: weight.SerializeToString() for weight in model.graph.initializer} for model in models]
    assert weights[0] == weights[1]
    assert len(weights[0]) >= 4
    for model in models:
        del model.graph.initializer[:], model.graph.value_info[:]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("number", "encoded"), [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**31, "8080808008")]
)
def test_sizes_are_written_as_protocol_buffers_write_them(number, encoded):
    """Numbers by hand: seven bits in a byte, lowest first, the eighth says that more follow."""
    assert external._varint(number).hex() == encoded


def test_a_name_is_found_across_blocks(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"." * 13 + b"Dequantize" + b"." * 9)
    assert all(runtimes._mentions(path, b"Dequantize", block=block) for block in range(10, 40))
    assert not runtimes._mentions(path, b"Quantize", block=16)
