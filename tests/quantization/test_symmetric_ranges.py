"""Ranges with zero in the middle: in the module, in training, in checkpoints, and where steps are learned."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.models import Classifier, Files, assert_same_state, fit, new, trainer, val_loader
from lightning_optim import QuantizationAwareTraining, load_from_checkpoint, quantize_post_training
from lightning_optim.functional.fake_quantize import fake_quantize, symmetric_parameters
from lightning_optim.functional.observers import OBSERVERS, Histogram
from lightning_optim.quantization.layers import QuantizedLayer


def symmetric(**words):
    return QuantizationAwareTraining(**{"start": 8, "freeze": 20, "activation_ranges": "symmetric", **words})


def layers_of(module):
    return [layer for layer in module.modules() if isinstance(layer, QuantizedLayer) and layer.watched]


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_the_larger_end_is_the_largest_integer(one, other):
    low, high = torch.tensor([min(one, other)]), torch.tensor([max(one, other)])
    scale, zero_point = symmetric_parameters(low, high)
    assert int(zero_point) == 128
    largest = torch.maximum(-low, high).clamp_min(0)
    torch.testing.assert_close(scale * 127, largest.clamp_min(127e-12))
    x = torch.cat([largest, -largest, largest * 0])
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, 0, 255), x, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_every_observer_has_symmetric_ranges(name):
    if OBSERVERS[name].learns:
        return
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    quantize_post_training(net, [x], activation_ranges="symmetric", observer=name, progress_bar=False)
    with torch.no_grad():
        hidden = net[1](net[0](x))
    for layer, seen in ((net[0], x), (net[2], hidden)):
        scale, zero_point = layer.range_of("input")
        assert int(zero_point) == 128
        assert 0.5 * float(seen.abs().max()) <= 127 * float(scale) <= 1.05 * float(seen.abs().max())


def test_a_histogram_finds_the_best_symmetric_range():
    """No other symmetric range has clearly less error: its search knows both signs and the coarser step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(20_000, generator=generator), torch.tensor([-40.0])])
    counts = Histogram.magnitudes(Histogram.see(x)[None])
    scale, zero_point = symmetric_parameters(*Histogram.range_of(counts, 7))

    def error(bound):
        return float((fake_quantize(x, torch.tensor(bound / 127), 128, 0, 255) - x).square().sum())

    least = min(error(0.25 * step) for step in range(4, 180))
    assert int(zero_point) == 128
    assert error(127 * float(scale)) <= 1.1 * least < error(40.0)


def test_training_resumes_and_its_files_reload(tmp_path):
    module = new()
    fit(tmp_path, module, symmetric(), Files(tmp_path / "files"))
    assert {layer.activation_ranges for layer in layers_of(module)} == {"symmetric"}
    assert {int(layer.input_zero_point) for layer in layers_of(module)} == {128}
    again = new()
    fit(tmp_path, again, symmetric(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)
    path = max((tmp_path / "files").iterdir())
    loaded = load_from_checkpoint(Classifier, path)
    assert {layer.activation_ranges for layer in layers_of(loaded)} == {"symmetric"}
    run = trainer(tmp_path)
    scores = [run.validate(x, val_loader(), verbose=False) for x in (module, loaded)]
    assert scores[0] == scores[1]


def test_learned_steps_have_no_zero_points_to_learn(tmp_path):
    module = new()
    fit(tmp_path, module, symmetric(observer="learned"))
    names = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    assert "input_log_step" in names
    assert "input_offset" not in names
    layer = layers_of(module)[0]
    scale, zero_point = layer.range_of("input")
    assert int(zero_point) == 128
    assert float(scale) != float(layer.input_scale)


def test_a_model_goes_from_one_kind_of_range_to_the_other():
    module = quantize_post_training(new(), val_loader(), progress_bar=False)
    scale, zero_point = (tensor.clone() for tensor in module.net[0].range_of("input"))
    quantize_post_training(module, val_loader(), activation_ranges="symmetric", progress_bar=False)
    assert [int(layer.input_zero_point) for layer in layers_of(module)] == [128] * len(layers_of(module))
    quantize_post_training(module, val_loader(), progress_bar=False)
    assert all(torch.equal(*pair) for pair in zip(module.net[0].range_of("input"), (scale, zero_point), strict=True))


@pytest.mark.parametrize("bits", [None, 4])
def test_other_numbers_of_bits_raise(bits):
    with pytest.raises(ValueError, match=f"rounds inputs to int8 without zero points.*got activation_bits={bits}"):
        symmetric(activation_bits=bits)
