"""Transposed convolutions: one scale per output, trained as their file computes, which is a plain convolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optim import export_onnx, prune_channels, quantize_post_training
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.functional.subpixel import arrange_places, place_padding, subpixel_kernel, subpixel_vector
from lightning_optim.quantization.layers import float_kernels
from lightning_optim.quantization.transposed import kernels_as_rows, rows_as_kernels

CONVOLVE = {nn.ConvTranspose1d: F.conv1d, nn.ConvTranspose2d: F.conv2d, nn.ConvTranspose3d: F.conv3d}


@pytest.mark.parametrize(
    ("cls", "kernel", "stride", "padding", "more"),
    [
        (nn.ConvTranspose1d, 16, 8, 4, {}),
        (nn.ConvTranspose1d, 5, 3, 4, {"output_padding": 2, "groups": 2}),
        (nn.ConvTranspose1d, 3, 2, 0, {"dilation": 3, "output_padding": 2}),
        (nn.ConvTranspose1d, 3, 1, 1, {"dilation": 2}),
        (nn.ConvTranspose1d, 2, 3, 0, {}),
        (nn.ConvTranspose2d, 2, 2, 0, {}),
        (nn.ConvTranspose2d, (4, 3), (2, 3), (1, 0), {"groups": 2}),
        (nn.ConvTranspose2d, 3, 2, 1, {"output_padding": 1}),
        (nn.ConvTranspose3d, (2, 3, 1), (2, 1, 1), 0, {}),
    ],
)
def test_a_plain_convolution_gives_the_same_as_a_transposed_one(cls, kernel, stride, padding, more):
    layer = cls(4, 6, kernel, stride, padding, **more)
    dims = len(layer.kernel_size)
    x = torch.randn(2, 4, *(5, 4, 3)[:dims], generator=torch.Generator().manual_seed(0))
    sizes = zip(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding, strict=True)
    cuts = [place_padding(*size) for size in sizes]
    rows = kernels_as_rows(layer.weight, layer.groups)
    assert torch.equal(rows_as_kernels(rows, layer.groups), layer.weight)
    places = torch.tensor(layer.stride).prod().item()
    y = CONVOLVE[cls](
        x,
        subpixel_kernel(rows, layer.groups, layer.stride, layer.dilation),
        subpixel_vector(layer.bias, layer.groups, places),
        padding=[sides for sides, _, _ in cuts],
        groups=layer.groups,
    )
    y = arrange_places(y, layer.groups, layer.stride)
    for dim, (_, start, end) in enumerate(cuts, 2):
        y = y.narrow(dim, start, y.shape[dim] - start - end)
    torch.testing.assert_close(y, layer(x))


class Net(nn.Module):
    """Transposed convolutions inside and at the end; ``grow`` has groups, a BatchNorm and an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 4, 2, 1)
        self.grow = nn.ConvTranspose2d(12, 6, 3, 2, 1, output_padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.ConvTranspose2d(6, 2, 2, 2)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.grow(F.relu(self.up(F.relu(self.first(x))))))))


def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        made.norm.running_mean.normal_()
        made.norm.weight.normal_()
    return made


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group:4"])
def test_rows_are_those_of_outputs_and_gradients_pass(granularity):
    made = net()
    before = copy.deepcopy(made)
    quantize_post_training(
        made, None, weight_bits=4, activation_bits=None, weight_granularity=granularity, include=["grow"]
    )
    rows = [part.transpose(0, 1) for part in before.grow.weight.chunk(2)]
    rounded = torch.cat(rows).detach()
    expected = fake_quantize_weight(rounded, 4, granularity).chunk(2)
    weight = torch.cat([part.transpose(0, 1) for part in expected])
    assert torch.equal(made.grow.quantized_weight(), weight)
    assert torch.equal(
        made.grow(torch.ones(1, 12, 3, 3)), F.conv_transpose2d(torch.ones(1, 12, 3, 3), weight, None, 2, 1, 1, 2)
    )
    made(inputs()).sum().backward()
    assert made.grow.weight.grad.abs().sum() > 0
    with float_kernels(made):
        assert torch.equal(made(inputs()), before(inputs()))


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_file_computes_with_integers_what_the_module_does(tmp_path, runtime):
    pytest.importorskip(runtime)
    made = quantize_post_training(net(), [inputs(seed) for seed in range(4)], weight_bits=7, progress_bar=False)
    report = export_onnx(
        made, tmp_path / "net.onnx", inputs(), inputs=inputs(9), runtime=runtime, dynamic_dims={"x": {2: "height"}}
    )
    # The last layer's output is the model's own: nothing rounds it, so engines compute it in float.
    assert (report.integer_convolutions, report.convolutions) == (3, 4)
    assert report.mean_difference < 1e-4
    assert report.size_ratio < 0.95  # the last layer's weight is turned into kernels in the file, by a few operations
    assert "int7" in report.layers["up"]
    assert report.layers["norm"] == "folded into grow"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"activation_bits": None},
        pytest.param({"weight_granularity": "per_group:8", "weight_bits": 4}, marks=pytest.mark.slow),
    ],
)
def test_weights_alone_and_groups_are_stored_as_integers_and_computed_in_float(tmp_path, more):
    made = quantize_post_training(net(), [inputs()], progress_bar=False, **more)
    report = export_onnx(made, tmp_path / "net.onnx", inputs(), inputs=inputs(9))
    assert report.mean_difference < 1e-2
    assert report.layers["up"].startswith(f"int{made.up.weight_bits}")


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv1d(2, 8, 3, 2), nn.ConvTranspose1d(8, 4, 3, 2), nn.Conv1d(4, 2, 1)

    def forward(self, x):
        return self.out(F.relu(self.up(F.relu(self.down(x)), output_size=[x.shape[2]])))


@pytest.mark.slow
@pytest.mark.parametrize("length", [pytest.param(9, marks=pytest.mark.slow), 10])
def test_an_output_size_is_kept(tmp_path, length):
    torch.manual_seed(0)
    x = torch.randn(3, 2, length)
    made = quantize_post_training(Decoder(), [x], weight_bits=7, progress_bar=False)
    assert made(x).shape == x.shape
    report = export_onnx(made, tmp_path / "net.onnx", x, dynamic_batch=False)
    assert report.integer_convolutions == 2
    assert report.mean_difference < 1e-4


def test_bits_are_chosen_by_outputs_and_other_techniques_take_the_rounded_layer():
    made = net()
    quantize_post_training(
        made,
        [inputs()],
        bits="auto",
        effective_bits=5.0,
        activation_bits=None,
        progress_bar=False,
        include=["up", "grow"],
    )
    assert {made.up.weight_bits, made.grow.weight_bits} <= set(range(2, 9))
    prune_channels(made, inputs(), pruning_ratio=0.5, include=["up"])
    assert made.up.weight.shape[1] == 6
    assert made.grow.weight.shape[0] in (6, 12)
    assert made(inputs()).shape == (4, 2, 48, 48)


def test_gptq_rounds_them_to_the_nearest_and_says_so(monkeypatch):
    made, plain = net(), net()
    lines: list[str] = []
    monkeypatch.setattr("lightning_optim.quantization.calibrate.rank_zero_info", lines.append)
    quantize_post_training(made, [inputs()], method="gptq", weight_bits=4, activation_bits=None, progress_bar=False)
    assert "belongs to a QuantizedConvTranspose2d" in lines[-1]
    quantize_post_training(plain, None, weight_bits=4, activation_bits=None)
    assert torch.equal(made.up.quantized_weight(), plain.up.quantized_weight())
