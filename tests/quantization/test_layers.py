import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.quantization.classes import QUANTIZED
from lightning_optim.quantization.graph import GraphFacts
from lightning_optim.quantization.layers import QuantizedLayer, float_kernels
from lightning_optim.quantization.prepare import prepare, quantized_layers, set_phase
from lightning_optim.quantization.ranges import fold_ranges, observing, settle_ranges
from lightning_optim.quantization.scheme import QuantizationScheme


def quantized(layer, *calls, **scheme):
    """The layer, observed on some calls and frozen."""
    net = nn.Sequential(layer)
    prepare(net, ["0"], QuantizationScheme(**scheme))
    layers = quantized_layers(net)
    set_phase(net, layers, "observe")
    with observing(layers), torch.no_grad():
        for call in calls:
            layer(*call)
            fold_ranges(layers)
    settle_ranges(layers)
    set_phase(net, layers, "frozen")
    return layer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear without bias, 3-d": (lambda: nn.Linear(6, 5, bias=False), (2, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9)),
    "conv1d, same": (lambda: nn.Conv1d(6, 4, 3, padding="same"), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2, stride=2), (2, 6, 9, 9)),
    "conv2d, circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, dilation=2), (2, 6, 4, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [8, 4])
def test_it_computes_with_rounded_weights_and_inputs(name, bits):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain, layer = make(), make()
    layer.load_state_dict(plain.state_dict())
    x = draw(*shape)
    quantized(layer, (x,), weight_bits=bits)
    with torch.no_grad():
        # As the file stores it: a weight of fewer bits is a multiple of 2^(7 - bits) in int8.
        steps = (
            plain.weight.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1) / 2 ** max(7 - bits, 0) * layer.input_scale
        )
        plain.weight.copy_(fake_quantize_weight(plain.weight, bits))
        if plain.bias is not None and (x.ndim == 2 or not isinstance(layer, nn.Linear)):
            plain.bias.copy_((plain.bias.double() / steps.double()).round() * steps.double())
        expected = plain(layer.quantized_input(x))
        torch.testing.assert_close(layer(x), expected, atol=2e-7, rtol=1e-6)
        step = float(layer.input_scale)
        assert float((layer.quantized_input(x) - x).abs().max()) <= 0.5 * step * 1.001
    with torch.no_grad(), float_kernels(layer):
        plain.load_state_dict(layer.state_dict(), strict=False)
        assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group:3"])
def test_looked_up_rows_are_those_of_the_rounded_table(granularity):
    table = quantized(nn.Embedding(9, 8, padding_idx=0), weight_bits=4, weight_granularity=granularity)
    index = torch.tensor([[1, 5, 0], [5, 8, 2]])
    expected = F.embedding(index, fake_quantize_weight(table.weight, 4, granularity))
    torch.testing.assert_close(table(index), expected, rtol=0, atol=0)
    assert table.watched == ()


BAGS = {
    "mean": {},
    "sum, padding": {"mode": "sum", "padding_idx": 0},
    "mean, padding": {"padding_idx": 3},
    "max": {"mode": "max"},
    "max, padding": {"mode": "max", "padding_idx": 1},
    "last offset": {"include_last_offset": True},
    "max_norm": {"max_norm": 0.5},
}


@pytest.mark.parametrize("rows", [200, 10], ids=["few looked up", "more than rows"])
@pytest.mark.parametrize("name", BAGS)
def test_bags_are_those_of_the_rounded_table(name, rows):
    words = BAGS[name]
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(rows, 8, **words)
    index = torch.tensor([[1, 3, 0, 5], [3, 3, 9, 2], [0, 0, 1, 1]])
    F.embedding(index, bag.weight.detach(), None, bag.max_norm) if bag.max_norm else None
    offsets = torch.tensor([0, 4, 8, 12]) if "include_last_offset" in words else None
    given = index.flatten() if offsets is not None else index
    plain = nn.EmbeddingBag(
        rows, 8, _weight=fake_quantize_weight(bag.weight.detach(), 4), **(words | {"max_norm": None})
    )
    bag = quantized(bag, weight_bits=4)
    torch.testing.assert_close(bag(given, offsets), plain(given, offsets))


def test_weighted_and_ragged_bags():
    bag = quantized(nn.EmbeddingBag(50, 4, mode="sum", padding_idx=2), weight_bits=3)
    plain = nn.EmbeddingBag(50, 4, mode="sum", padding_idx=2, _weight=fake_quantize_weight(bag.weight.detach(), 3))
    flat, offsets, weights = torch.tensor([1, 2, 7, 9, 2, 4]), torch.tensor([0, 2, 2]), draw(6)
    torch.testing.assert_close(bag(flat, offsets, weights), plain(flat, offsets, weights))


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("sparse", [False, True])
def test_tables_learn_as_the_float_table_does(cls, sparse):
    """The straight-through gradient is the float table's, sparse where that is."""
    index = torch.tensor([[1, 5, 0], [5, 8, 2]])
    torch.manual_seed(0)
    plain, table = cls(90, 8, sparse=sparse), cls(90, 8, sparse=sparse)
    table.load_state_dict(plain.state_dict())
    quantized(table)
    weights = draw(*plain(index).shape)
    for layer in (plain, table):
        (layer(index) * weights).sum().backward()
    assert table.weight.grad.is_sparse == sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), plain.weight.grad.to_dense())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_norm_rounds_its_output_after_the_relu(size):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[size](6).eval()
    net, x = nn.Sequential(norm), draw(4, 6, *[5] * (size - 2))
    prepare(net, (), QuantizationScheme(), facts=GraphFacts(outputs={"0": True}))
    layers = quantized_layers(net)
    set_phase(net, layers, "observe")
    with observing(layers):
        assert torch.equal(net(x), norm(x))
        net(x)
    fold_ranges(layers)
    set_phase(net, layers, "frozen")
    assert int(norm.output_zero_point) == 0
    rounded = net(x).detach()
    assert float(rounded.min()) == 0.0
    torch.testing.assert_close(rounded, norm(x).relu().detach(), rtol=0, atol=float(norm.output_scale))
    assert len(rounded.unique()) > 10


def test_nothing_is_observed_unless_a_training_batch_runs():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer)
    prepare(net, ["0"], QuantizationScheme())
    set_phase(net, quantized_layers(net), "observe")
    net(draw(4, 3))
    assert layer.seen_input is None
    fold_ranges(quantized_layers(net))
    assert int(layer.input_batches) == 0


def test_several_calls_of_a_step_are_one_batch():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer)
    prepare(net, ["0"], QuantizationScheme())
    layers = quantized_layers(net)
    set_phase(net, layers, "observe")
    with observing(layers):
        net(torch.tensor([[0.0, 1.0, 2.0]]))
        net(torch.tensor([[-5.0, 0.0, 0.0]]))
        net(torch.empty(0, 3))
    fold_ranges(layers)
    assert int(layer.input_batches) == 1
    assert layer.input_statistic.tolist() == [5.0, 2.0]


def test_ranges_move_with_the_layer_and_stay_float32():
    layer = quantized(nn.Linear(3, 3), (draw(4, 3),))
    scale = layer.input_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.input_scale, scale)
    assert layer(draw(4, 3).bfloat16()).dtype == torch.bfloat16
    layer.to("meta")
    assert layer.input_scale.device.type == "meta"


@pytest.mark.parametrize("cls", QUANTIZED, ids=lambda cls: cls.__name__)
def test_every_quantized_class_is_a_subclass_that_adds_no_parameter(cls):
    quantized_class = QUANTIZED[cls]
    assert issubclass(quantized_class, cls)
    assert issubclass(quantized_class, QuantizedLayer)
    assert quantized_class.__init__ is cls.__init__ or "__init__" not in vars(quantized_class)
