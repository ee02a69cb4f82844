import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optim.export import export_onnx
from lightning_optim.quantization.calibrate import quantize_post_training
from lightning_optim.quantization.functions import QuantizedFunctions, gated
from lightning_optim.quantization.prepare import quantized_layers, set_phase
from lightning_optim.quantization.ranges import fold_ranges, observing


def images(rows=16, seed=0):
    return torch.randn(rows, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def convolution(width=8, of=8):
    return nn.Sequential(nn.Conv2d(of, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))


class Squeeze(nn.Module):
    """Squeeze and excitation, with an activation in place."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.SiLU(inplace=True)

    def forward(self, x):
        return torch.sigmoid(self.up(self.act(self.down(F.adaptive_avg_pool2d(x, 1))))) * x


class Net(nn.Module):
    def __init__(self, body, **layers):
        super().__init__()
        self.first, self.second, self.head = convolution(of=3), convolution(), nn.Linear(8, 5)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.body = body

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.body(self, x), 1).flatten(1))


def mobile(net, x):
    x = F.relu6(net.first(x))
    return x + net.second(x)


NETS = {
    "hardswish": lambda: Net(lambda s, x: F.hardswish(s.second(F.hardswish(s.first(x))))),
    "silu in place": lambda: Net(lambda s, x: s.act(s.second(s.act(s.first(x)))), act=nn.SiLU(inplace=True)),
    "addition in place": lambda: Net(lambda s, x: s.second(y := s.first(x).relu()).add_(y).relu_()),
    "squeeze and excitation": lambda: Net(lambda s, x: s.second(s.se(F.silu(s.first(x)))).relu(), se=Squeeze()),
    "relu6": lambda: Net(mobile),
    "concatenation": lambda: Net(lambda s, x: s.third(torch.cat([y := s.first(x).relu(), s.second(y)], 1)).relu(),
                                 third=convolution(of=16)),
}  # fmt: skip
EAGER = ("hardswish", "addition in place")


def made(name, **options):
    torch.manual_seed(0)
    net = NETS[name]()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    net(images(64, seed=1))  # statistics
    return quantize_post_training(net.eval(), [images(seed=2), images()], progress_bar=False, **options)


@pytest.mark.parametrize("name", [n if n in EAGER else pytest.param(n, marks=pytest.mark.slow) for n in NETS])
def test_the_file_computes_with_integers_what_the_rounded_model_computes(name, tmp_path):
    pytest.importorskip("onnxruntime")
    from lightning_optim.export.runtimes import load_runtime

    net = made(name)
    report = export_onnx(net, tmp_path / "net.onnx", images(4), inputs=images())
    with torch.no_grad():
        answers = net(images())
    assert report.mean_difference < 3e-4 * float(answers.max() - answers.min())
    assert report.integer_convolutions == report.convolutions
    operators = load_runtime(tmp_path / "net.onnx", "onnxruntime")._operators
    floats = {"Add", "Mul", "Sigmoid", "HardSigmoid", "HardSwish", "QuickGelu", "Relu", "Clip", "Concat"}
    assert not floats & set(operators)


def test_gates_are_rounded_to_steps_of_a_255th():
    def gate(x, scale):
        return (x / scale).round().clamp(0, 255) / 255

    x = torch.linspace(-6, 6, 200)
    assert float((gated("silu", x, gate) - F.silu(x)).abs().max()) <= 6 * 0.5 / 255 + 1e-6
    assert float((gated("hardswish", x, gate) - F.hardswish(x)).abs().max()) <= 6 * 0.5 / 255 + 1e-6


def test_operands_are_rounded_and_gradients_pass():
    net = made("silu in place")
    owner = net.act
    assert isinstance(owner, QuantizedFunctions)
    assert isinstance(owner, nn.SiLU)
    assert owner.functions == ("silu_0",)
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    before = x.detach().clone()
    y = owner(x * 1.0)
    step, zero = float(owner.silu_0_operand_scale), int(owner.silu_0_operand_zero_point)
    rounded = ((before / step).round() + zero).clamp(0, 255).sub(zero) * step
    torch.testing.assert_close(y, rounded * (torch.sigmoid(rounded) * 255).round() / 255, atol=1e-6, rtol=0)
    y.sum().backward()
    inside = (before / step).round().add(zero).clamp(0, 255) == (before / step).round().add(zero)
    assert float(x.grad[inside].abs().min()) > 0
    assert float(x.grad[~inside].abs().max()) == 0
    set_phase(net, quantized_layers(net), "off")
    assert torch.equal(owner(before.clone()), F.silu(before))


def test_readers_of_one_tensor_have_one_scale():
    net = made("addition in place")
    assert net.functions[0] == "add_0"
    assert float(net.add_0_right_scale) == float(net.second[0].input_scale)
    assert int(net.add_0_right_zero_point) == int(net.second[0].input_zero_point) == 0


class Noisy(nn.Module):
    """Adds in training what it does not add in eval mode, so that the names of its functions differ."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = convolution(of=3), convolution(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        if self.training:
            x = x + torch.ones_like(x)
        return self.head((x + self.second(x)).relu().mean((2, 3)))


def test_functions_that_differ_in_training_are_not_observed():
    net = quantize_post_training(Noisy().eval(), [images()], progress_bar=False)
    assert net.functions == ("add_0", "mean_0")
    layers = quantized_layers(net)
    for which in net.watched:
        net.state_of(which)["batches"].zero_()
    set_phase(net, layers, "observe")
    net.train()
    with observing(layers):
        net(images())
        fold_ranges(layers)
    assert all(int(net.state_of(which)["batches"]) == 0 for which in net.watched)
    set_phase(net, layers, "frozen")
    assert net.output_phase == "observe"  # not rounded
    assert net.first[0].quantization_phase == "frozen"


def test_a_copy_keeps_ranges_and_its_own_norms():
    net = made("hardswish")
    twin = copy.deepcopy(net)
    assert torch.equal(net(images()), twin(images()))
    with torch.no_grad():
        net.second[1].running_mean += 100.0
    assert not torch.equal(net(images()), twin(images()))
    link = vars(twin.second[0])["_lightning_optim_link"]
    assert link[0] is twin.second[1]


@pytest.mark.slow
def test_twelve_convolutions_differ_from_their_file_by_less_than_a_step(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layers = []
    for place in range(12):
        layers += [nn.Conv2d(8 if place else 3, 8, 3, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
        nn.init.normal_(layers[-2].bias, std=0.1)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    quantize_post_training(net, [images()], progress_bar=False)
    report = export_onnx(net, tmp_path / "net.onnx", images(4), inputs=images())
    with torch.no_grad():
        answers = net(images())
    assert report.mean_difference < 3e-4 * float(answers.max() - answers.min())


def test_a_batch_norm_folds_into_a_linear_layer(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(64, 12)
    net(x + 1)
    quantize_post_training(net.eval(), [x], progress_bar=False)
    report = export_onnx(net, tmp_path / "net.onnx", x, inputs=x)
    assert report.layers["1"] == "folded into 0"
    assert report.integer_matmuls == report.matmuls == 2
    assert report.mean_difference < 2e-3
