"""Conv1D is rounded as the Linear that it is, and each expert of a mixture with scales of its own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.mixtures import Conv1D, Experts, as_linear
from lightning_optim import export_onnx, quantize_post_training
from lightning_optim.checkpoint import conform, plain_plan
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.measure import SIZES
from lightning_optim.modules import matrices_of
from lightning_optim.quantization.layers import float_kernels
from lightning_optim.report.layers import layer_facts

GRANULARITIES = ("per_channel", "per_tensor", "per_group:4")


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x))


def inputs(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_conv1d_answers_as_the_rounded_linear(granularity, bits):
    layer = Conv1D(8, 8)
    nets = [Net(layer), Net(as_linear(layer))]
    nets[1].head.load_state_dict(nets[0].head.state_dict())
    answers = []
    for net in nets:
        quantize_post_training(
            net, [inputs()], weight_bits=bits, weight_granularity=granularity, progress_bar=False, exclude=["head"]
        )
        answers.append(net(inputs()))
    torch.testing.assert_close(*answers)
    with float_kernels(nets[0]):
        assert torch.equal(nets[0](inputs()), nets[0].head(layer(inputs())))
    rounded = nets[0].layer.quantized_weight()
    assert torch.equal(rounded.t(), fake_quantize_weight(layer.weight.detach().t(), bits, granularity))
    assert isinstance(nets[0].layer, Conv1D)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_scales_of_its_own(granularity, transposed):
    layer = Experts(transposed=transposed)
    with torch.no_grad():
        layer.up_proj[1] *= 100.0
    net, plain = Net(copy.deepcopy(layer)), Net(copy.deepcopy(layer))
    plain.head = net.head
    for name in ("up_proj", "down_proj"):
        weight = getattr(plain.layer, name).data
        for matrix in matrices_of(layer, name, weight):
            matrix.copy_(fake_quantize_weight(matrix.clone(), 4, granularity))
    quantize_post_training(
        net, None, weight_bits=4, activation_bits=None, weight_granularity=granularity, exclude=["head"]
    )
    torch.testing.assert_close(net(inputs()), plain(inputs()))
    assert torch.equal(net.layer.up_proj, layer.up_proj)  # outside of a call: the Parameter


def test_gradients_reach_the_experts_through_the_rounding():
    net = quantize_post_training(Net(Experts()), None, activation_bits=None, include=["layer"])
    net(inputs()).sum().backward()
    assert net.layer.up_proj.grad.abs().sum() > 0
    assert not hasattr(net.layer, "_lightning_optim_read")


@pytest.mark.parametrize("make", [lambda: Conv1D(8, 8), Experts], ids=["Conv1D", "experts"])
def test_copies_pickles_and_files_are_the_same_layer(make):
    net = quantize_post_training(Net(make()), [inputs()], progress_bar=False)
    expected = net(inputs())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other.layer) is type(net.layer)
        assert torch.equal(other(inputs()), expected)
    fresh = Net(make())
    conform(fresh, plain_plan(net))
    fresh.load_state_dict(net.state_dict())
    assert type(fresh.layer) is type(net.layer)
    assert torch.equal(fresh(inputs()), expected)
    conform(fresh, {**plain_plan(net), "modules": {}, "entries": {}})
    assert type(fresh.layer) is type(make())


def test_inputs_of_experts_stay_float_and_sizes_count_their_bits():
    net = Net(Experts())
    before = SIZES["bits"](net)
    quantize_post_training(net, [inputs()], progress_bar=False)
    assert net.layer.watched == ()
    assert net.head.watched == ("input",)
    matrices = net.layer.up_proj.numel() + net.layer.down_proj.numel() + net.head.weight.numel()
    assert SIZES["bits"](net) == before - matrices * 0.75
    facts = {fact["layer"]: fact for fact in layer_facts(net)}
    assert facts["layer"]["bits"] == 8
    assert facts["layer"]["type"] == "Experts"
    conv = quantize_post_training(Net(Conv1D(8, 8)), [inputs()], progress_bar=False)
    assert layer_facts(conv)[0] == {
        "layer": "layer",
        "type": "Conv1D",
        "parameters": 64,
        "sparsity": 0.0,
        "bits": 8.0,
        "width": 8,
    }


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "activation_bits"),
    [
        ("per_channel", 8),
        pytest.param("per_channel", None, marks=SLOW),
        pytest.param("per_tensor", 8, marks=SLOW),
        pytest.param("per_group:4", 8, marks=SLOW),
        pytest.param("per_group:4", None, marks=SLOW),
    ],
)
def test_the_file_of_conv1d_answers_as_the_module(tmp_path, granularity, activation_bits):
    net = Net(Conv1D(8, 8))
    quantize_post_training(
        net, [inputs()], activation_bits=activation_bits, weight_granularity=granularity, progress_bar=False
    )
    report = export_onnx(net, tmp_path / "net.onnx", inputs(), inputs=inputs(64), least_agreement=0.98)
    grouped = granularity == "per_group:4"  # rounded once more by ONNX Runtime, as a Linear's is
    assert report.mean_difference < (0.03 if grouped else 0.01)
    assert report.layers["layer"].startswith("int8 weight")
    assert grouped or report.integer_matmuls == (2 if activation_bits else 0)


@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=SLOW)])
def test_the_file_holds_the_experts_as_integers(tmp_path, transposed):
    net = Net(Experts(experts=2, inner=1200, transposed=transposed))
    quantize_post_training(net, [inputs()], progress_bar=False)
    report = export_onnx(net, tmp_path / "net.onnx", inputs(2), dynamic_batch=False, least_agreement=0.0)
    assert report.layers["layer"] == "int8 weight per channel"
    assert report.mean_difference < 0.01
    assert report.size_ratio < 0.6
