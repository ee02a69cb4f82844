"""Layers that a file computes in float although they are quantized."""

from dataclasses import replace

import pytest
import torch

from helpers.exported import quantized
from lightning_optim.demo import DigitsNet
from lightning_optim.export import export_onnx, mixed, runtimes
from lightning_optim.export.mixed import leave_float
from lightning_optim.measure.latency import LatencyResult
from lightning_optim.modules import copy_module
from lightning_optim.quantization.calibrate import quantize_post_training

REAL_SIZES = mixed.SMALL_MATRIX, mixed.SMALL_CONVOLUTION  # the tests' nets are smaller: see conftest.py

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def small(monkeypatch):
    """The sizes of the package."""
    monkeypatch.setattr(mixed, "SMALL_MATRIX", REAL_SIZES[0])
    monkeypatch.setattr(mixed, "SMALL_CONVOLUTION", REAL_SIZES[1])


def digits(width):
    """The demo's net, and what it reads."""
    images = torch.rand(16, 1, 8, 8)
    return quantize_post_training(DigitsNet(width).eval(), [images], progress_bar=False), images


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def answer(module, inputs):
    with torch.no_grad():
        return module(inputs)


def unrounded(module, names, inputs):
    copy = copy_module(module)
    leave_float(copy, names)
    return answer(copy, inputs)


@pytest.mark.usefixtures("small")
def test_a_small_net_is_computed_in_float_with_its_weights_as_integers(tmp_path):
    module, inputs = digits(8)
    path = tmp_path / "net.onnx"
    report = export_onnx(module, path, inputs)
    assert not operators(path) & {"QuantizeLinear", "DequantizeLinear"}
    assert (report.integer_convolutions, report.integer_matmuls) == (0, 0)
    assert report.size_ratio < 0.65
    assert report.max_difference < 1e-5  # from the module whose inputs are not rounded
    assert not torch.equal(answer(module, inputs), unrounded(module, report.kept_float, inputs))
    assert {*report.layers.values()} >= {"int8 weight per channel"}
    assert any("too small to gain from integers" in note for note in report.notes)
    assert any("Difference from the module with them" in note for note in report.notes)
    assert all(layer.activation_bits == 8 for layer in module.modules() if hasattr(layer, "activation_bits"))


def test_matrices_are_left_float_if_all_are_small(monkeypatch):
    module, _ = quantized("mlp")
    monkeypatch.setattr(mixed, "SMALL_MATRIX", 193)  # the first has 192 weights
    assert mixed.small_layers(module) == ("0", "2")
    monkeypatch.setattr(mixed, "SMALL_MATRIX", 192)
    assert mixed.small_layers(module) == ()


@pytest.mark.usefixtures("small")
def test_convolutions_are_left_float_together_and_only_where_float_is_fast():
    small, _ = digits(8)
    assert [name for name in mixed.small_layers(small) if "." in name] == [
        "net.0", "net.3", "net.3.layers.0", "net.3.layers.3", "net.4", "net.7", "net.7.layers.0", "net.7.layers.3",
        "net.8", "net.11",
    ]  # fmt: skip
    one_is_large, _ = quantized("residual")
    assert mixed.small_layers(one_is_large) == ()
    odd_channels, _ = digits(13)  # ONNX Runtime's fast float kernels take channels in fours
    assert mixed.small_layers(odd_channels) == ()


@pytest.mark.slow
def test_auto_keeps_the_fastest_mix_and_says_what_it_cost(tmp_path, monkeypatch):
    """Times are made up: an integer convolution costs a fifth, an integer product saves one."""

    def times(loaded, batches):
        ratios = [
            1 + 0.2 * each.kernels().integer_convolutions - 0.2 * each.kernels().integer_matmuls for each in loaded
        ]
        seen.append([len(batch[0]) for batch in batches])
        return [[LatencyResult(r, 1.0, r, r, r, 8, len(batch[0])) for r in ratios] for batch in batches]

    seen = []
    monkeypatch.setattr(mixed, "runtime_latencies", times)
    module, inputs = digits(8)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, keep_float="auto", batch_sizes=[1, 3])
    assert {*map(tuple, seen)} == {(1, 3)}
    assert (report.integer_convolutions, report.convolutions) == (0, 6)
    assert (report.integer_matmuls, report.matmuls) == (1, 1)
    first, second, third, *_ = report.mixes
    assert (first.name, second.name, third.name) == (mixed.FLOAT_EXPORT, mixed.ALL_INTEGERS, mixed.ALL_FLOAT)
    assert first.file_bytes == report.float_bytes
    assert min(report.mixes, key=lambda mix: mix.ratio).layers == report.kept_float
    assert f"{mixed.ALL_INTEGERS}: {second.file_bytes:,} bytes, batch 1: " in str(report)


@pytest.mark.slow
def test_files_that_do_not_differ_keep_their_integers(tmp_path, monkeypatch):
    same = LatencyResult(1.0, 1.0, 1.0, 1.0, 1.0, 8, 4)
    monkeypatch.setattr(mixed, "runtime_latencies", lambda loaded, batches: [[replace(same) for _ in loaded]])
    module, inputs = quantized("mlp")
    report = export_onnx(module, tmp_path / "net.onnx", inputs[:4], keep_float="auto", verify=False)
    assert report.kept_float == ()
    assert [mix.name for mix in report.mixes[:3]] == [mixed.FLOAT_EXPORT, mixed.ALL_INTEGERS, mixed.ALL_FLOAT]


def test_products_run_with_integers_in_a_plain_session(tmp_path, monkeypatch):
    """Without VNNI the weights are rewritten as uint8, with zero points that the file itself may lack."""
    monkeypatch.setattr(runtimes, "_overflows_in_onnxruntime", lambda: False)
    module, inputs = quantized("mlp")
    export_onnx(module, tmp_path / "net.onnx", inputs, verify=False)
    kernels = runtimes.load_runtime(tmp_path / "net.onnx", "onnxruntime").kernels()
    assert (kernels.integer_matmuls, kernels.matmuls) == (2, 2)


def test_small_weights_that_are_multiplied_out_are_stored_as_integers(tmp_path):
    module, inputs = quantized("mlp", activation_bits=None)
    export_onnx(module, tmp_path / "net.onnx", inputs, verify=False)
    weights = onnx.load(tmp_path / "net.onnx").graph.initializer
    assert (16, 12) in [tuple(weight.dims) for weight in weights if weight.data_type == onnx.TensorProto.INT8]


def test_wrong_arguments_say_what_is_expected(tmp_path):
    module, inputs = quantized("mlp")
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="`keep_float` must be one of small, none, auto, got 'some'"):
        export_onnx(module, path, inputs, keep_float="some")
    with pytest.raises(ValueError, match='`batch_sizes` are timed with keep_float="auto"; got'):
        export_onnx(module, path, inputs, batch_sizes=[1])
    with pytest.raises(ValueError, match="`batch_sizes` must be whole numbers >= 1, got \\[0\\]"):
        export_onnx(module, path, inputs, keep_float="auto", batch_sizes=[0])
    with pytest.raises(ValueError, match="need a file whose batch is free"):
        export_onnx(module, path, inputs, keep_float="auto", batch_sizes=[4], dynamic_batch=False)
