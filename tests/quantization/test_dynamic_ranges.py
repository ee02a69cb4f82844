"""Inputs rounded with the range of each call: in the module, in training, in checkpoints and in the file."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.exported import Encoder, Tied, sentences
from helpers.models import Classifier, Files, assert_same_state, fit, new, trainer, val_loader
from lightning_optim import QuantizationAwareTraining, load_from_checkpoint, quantize_post_training
from lightning_optim.checkpoint import plain_plan
from lightning_optim.export import export_onnx
from lightning_optim.functional.fake_quantize import dynamic_fake_quantize, fake_quantize_weight
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.quantization.scheme import QuantizationScheme


def dynamic(**words):
    return QuantizationAwareTraining(**{"start": 8, "freeze": 20, "activation_ranges": "dynamic", **words})


def by_numpy(x):
    """DynamicQuantizeLinear and back, by ONNX's text."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = np.float32((high - low) / np.float32(255))
    zero_point = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point).astype(np.float32) * scale


@pytest.mark.parametrize("shift", [-30.0, 0.0, 0.5, 30.0])
def test_it_is_what_the_operator_is_defined_to_do(shift):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) + shift
    assert torch.equal(dynamic_fake_quantize(x), torch.as_tensor(by_numpy(x.numpy())))
    assert torch.equal(dynamic_fake_quantize(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert dynamic_fake_quantize(torch.zeros(0, 3)).shape == (0, 3)


def test_gradients_pass_through():
    x = torch.randn(4, 9).requires_grad_()
    dynamic_fake_quantize(x).mul(3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


def test_after_training_it_needs_no_data_and_holds_no_ranges():
    model = new()
    keys = model.state_dict().keys()
    quantize_post_training(model, activation_ranges="dynamic")
    assert model.state_dict().keys() == keys
    layer, x = model.net[0], torch.randn(5, 12)
    expected = F.linear(dynamic_fake_quantize(x), fake_quantize_weight(layer._parameters["weight"]), layer.bias)
    assert torch.equal(layer(x), expected)


def test_convolutions_and_tables_keep_float_inputs():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(3, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    quantize_post_training(net, activation_ranges="dynamic")
    found = [x.activation_bits for x in net.modules() if isinstance(x, QuantizedLayer)]
    assert found == [None, None, 8]


def test_training_resumes_and_its_files_reload(tmp_path):
    module = new()
    fit(tmp_path, module, dynamic(), Files(tmp_path / "files"))
    assert module.net[0].activation_ranges == "dynamic"
    assert {x.quantization_phase for x in module.modules() if isinstance(x, QuantizedLayer)} == {"frozen"}
    assert module.state_dict().keys() == new().state_dict().keys()
    again = new()
    fit(tmp_path, again, dynamic(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)
    path = max((tmp_path / "files").iterdir())
    loaded = load_from_checkpoint(Classifier, path)
    assert loaded.net[0].activation_ranges == "dynamic"
    run = trainer(tmp_path)
    scores = [run.validate(x, val_loader(), verbose=False) for x in (module, loaded)]
    assert scores[0] == scores[1]
    assert torch.load(path, weights_only=True)["lightning_optim"]["entries"]


def test_rounding_begins_at_start_without_observing(tmp_path):
    module = new()
    fit(tmp_path, module, dynamic(start=3, freeze=4), max_steps=4)
    assert module.net[0].quantization_phase == "frozen"
    assert not module.net[0].watched


def test_a_model_goes_from_one_kind_of_range_to_the_other(tmp_path):
    module = quantize_post_training(new(), val_loader(), progress_bar=False)
    assert module.net[0].watched == ("input",)
    quantize_post_training(module, activation_ranges="dynamic")
    assert module.net[0].watched == ()
    quantize_post_training(module, val_loader(), progress_bar=False)
    assert (module.net[0].watched, module.net[0].activation_ranges) == (("input",), "static")
    assert module.net[0].quantization_phase == "frozen"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"activation_ranges": "per_call"}, "must be one of 'static', 'symmetric', 'dynamic', got 'per_call'"),
        ({"activation_bits": None}, "needs `activation_bits=8`"),
        ({"activation_bits": 4}, "rounds inputs to 8 bits, as engines do, got activation_bits=4"),
        ({"weight_granularity": "per_group:32"}, "For groups pass activation_bits=None"),
        ({"observer": "histogram"}, "observes nothing, got observer='histogram'"),
        ({"observe_steps": 3}, "observes nothing, got observe_steps=3"),
    ],
)
def test_arguments_without_meaning_raise(words, error):
    with pytest.raises(ValueError, match=error):
        dynamic(**words)


def test_files_from_before_have_static_ranges():
    assert QuantizationScheme().activation_ranges == QuantizedLayer.activation_ranges == "static"


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
@pytest.mark.parametrize("net", [Encoder, pytest.param(Tied, marks=pytest.mark.slow)])
def test_the_file_answers_the_same_with_integer_products(tmp_path, net, runtime):
    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module = net()
    ids = sentences(6)
    quantize_post_training(module, activation_ranges="dynamic")
    before = copy.deepcopy(plain_plan(module))
    report = export_onnx(module, tmp_path / "net.onnx", ids, runtime=runtime)
    assert report.max_difference < 0.02  # a value between two integers may be rounded either way
    assert report.mean_difference < 1e-3
    assert report.integer_matmuls == (13 if net is Encoder else 3)  # of them attention's projections: 8
    assert any("uint8 input, range of each call" in text for text in report.layers.values())
    assert plain_plan(module) == before


def test_an_encoder_learns_with_it(tmp_path):
    module = new()
    fit(tmp_path, module, dynamic(start=0, freeze=0.9), max_epochs=6)
    plain = new()
    fit(tmp_path, plain, max_epochs=6)
    losses = [trainer(tmp_path).validate(x, val_loader(), verbose=False)[0]["val_loss"] for x in (module, plain)]
    assert abs(losses[0] - losses[1]) < 0.05
