"""LSTM and GRU: all matrices are rounded, what they read stays float, and the file holds the integers."""

import copy

import pytest
import torch
from torch import nn

from lightning_optim import export_onnx, quantize_post_training
from lightning_optim.checkpoint import conform, plain_plan
from lightning_optim.export.weights import deployed_copy, deployed_state
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.measure import SIZES
from lightning_optim.quantization.layers import float_kernels


class Net(nn.Module):
    def __init__(self, cls: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body = cls(64, 64, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 5)

    def forward(self, x):
        return self.head(self.body(x)[0].mean(1))


def net(cls: type[nn.RNNBase]) -> Net:
    torch.manual_seed(0)
    return Net(cls).eval()


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(6, 7, 64, generator=torch.Generator().manual_seed(seed))


BOTH = pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])


@BOTH
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group:8"])
def test_every_matrix_is_rounded_and_inputs_stay_float(cls, granularity):
    made, plain = net(cls), net(cls)
    quantize_post_training(
        made, [inputs()], weight_bits=4, weight_granularity=granularity, exclude=["head"], progress_bar=False
    )
    with torch.no_grad():
        for weight in plain.body.parameters():
            if weight.ndim == 2:
                weight.copy_(fake_quantize_weight(weight, 4, granularity))
    assert torch.equal(made(inputs()), plain(inputs()))
    assert made.body.watched == ()
    state = deployed_state(deployed_copy(made))
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    count = sum(weight.numel() for weight in made.body.parameters() if weight.ndim == 2)
    assert SIZES["bits"](plain) - SIZES["bits"](made) == count * 28 / 32
    with float_kernels(made):
        assert torch.equal(made(inputs()), net(cls)(inputs()))


@BOTH
def test_gradients_copies_and_files(cls):
    made = quantize_post_training(net(cls), [inputs()], progress_bar=False)
    made(inputs()).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in made.body.parameters())
    assert all(
        flat is made.body.get_parameter(name)
        for flat, name in zip(made.body._flat_weights, made.body._flat_weights_names, strict=True)
    )
    fresh = Net(cls).eval()
    conform(fresh, plain_plan(made))
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(inputs()), made(inputs()))
    assert torch.equal(copy.deepcopy(made)(inputs()), made(inputs()))
    conform(fresh, {**plain_plan(made), "modules": {}, "entries": {}})
    assert type(fresh.body) is cls


@BOTH
def test_the_first_call_after_a_parameter_became_another_is_rounded_too(cls):
    """A pruned or loaded layer has other parameters than its list, which torch makes anew in the next call."""
    made = quantize_post_training(net(cls), [inputs()], weight_bits=4, progress_bar=False)
    expected = made(inputs())
    made.body._parameters.update({name: nn.Parameter(p.detach().clone()) for name, p in made.body.named_parameters()})
    assert torch.equal(made(inputs()), expected)
    with torch.no_grad():
        made.body.bias_ih_l0.add_(1)
    assert not torch.equal(made(inputs()), expected)


@pytest.mark.parametrize("cls", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_file_is_smaller_and_gives_the_same(tmp_path, cls, runtime):
    pytest.importorskip(runtime)
    made = quantize_post_training(net(cls), None, activation_bits=None)
    report = export_onnx(made, tmp_path / "net.onnx", inputs(), inputs=inputs(9), runtime=runtime)
    assert report.max_difference < 1e-5
    assert report.size_ratio < 0.45
    assert report.layers["body"] == "int8 weight per channel"


@BOTH
def test_other_ways_of_rounding_take_it(cls):
    for more in ({"method": "gptq", "weight_bits": 4}, {"bits": "auto", "effective_bits": 5.0}):
        made = quantize_post_training(net(cls), [inputs()], activation_bits=None, progress_bar=False, **more)
        assert (made(inputs()) - net(cls)(inputs())).abs().mean() < 0.05
