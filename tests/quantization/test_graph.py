import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.exported import Branches, ResNet, TextConv, images, quantized, sentences
from lightning_optim.quantization.graph import GraphFacts, read_graph
from lightning_optim.target import ForwardInputs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def facts(module, inputs):
    convolutions = {name for name, layer in module.named_modules() if isinstance(layer, CONVOLUTIONS)}
    linear = {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return read_graph(module, ForwardInputs((inputs,)), convolutions, convolutions | linear)


def test_residual_additions_round_their_operands_and_batch_norms_are_found():
    found = facts(ResNet(), images(2))
    assert found.batch_norms == {
        "stem.0": "stem.1",
        "blocks.0.conv1": "blocks.0.norm1",
        "blocks.0.conv2": "blocks.0.norm2",
        "blocks.1.conv1": "blocks.1.norm1",
        "blocks.1.conv2": "blocks.1.norm2",
        "blocks.1.short.0": "blocks.1.short.1",
    }
    assert found.outputs == {}  # each is read by convolutions and additions only
    assert found.functions == {"": ("mean_0",), "blocks.0": ("add_0",), "blocks.1": ("add_0",)}


def test_concatenation_pooling_and_padding_inside_a_reader_leave_values_as_they_are():
    assert facts(Branches(), images(2)) == GraphFacts({}, {}, {"": ("mean_0",)}, {"": 1})


def test_convolutions_over_time():
    assert facts(TextConv(), sentences(2)) == GraphFacts({"conv1": "norm"}, {"conv2": True})


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


CASES = {
    "a convolution called twice": (
        Net(lambda s, x: s.b(s.a(F.relu(s.a(x)))), a=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3)),
        GraphFacts({}, {"a": False}),
    ),
    "a BatchNorm of two convolutions": (
        Net(lambda s, x: s.b(s.a(x)) + s.b(s.c(x)), a=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3), c=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {"a": False, "c": False}),
    ),
    "a BatchNorm that is not alone": (
        Net(lambda s, x: s.b(y := s.a(x)) + y, a=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3)),
        GraphFacts({}, {"a": False}),
    ),
    "a BatchNorm without statistics": (
        Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3, track_running_stats=False)),
        GraphFacts({}, {"a": False}),
    ),
    "a functional BatchNorm": (
        Net(lambda s, x: F.batch_norm(s.a(x), torch.zeros(3), torch.ones(3)), a=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {"a": False}),
    ),
    "the graph's output": (
        Net(lambda s, x: s.b(s.a(x)).relu(), a=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3)),
        GraphFacts({"a": "b"}, {}, returned=frozenset("a")),
    ),
    "an output that is read, too": (
        Net(lambda s, x: (y := s.a(x), y + 1), a=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {"a": False}),
    ),
    "in place": (
        Net(lambda s, x: s.a(x).relu_() + 1, a=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {"a": True}),
    ),
    "three dimensions": (
        Net(lambda s, x: s.b(s.a(x[:, :, None])) + 1, a=nn.Conv3d(3, 3, 1), b=nn.BatchNorm3d(3)),
        GraphFacts({"a": "b"}, {"b": False}),
    ),
    "a ReLU after one of two calls": (
        Net(lambda s, x: s.a(x) + s.a(x).relu(), a=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {}, {"": ("add_0",)}, {"": 1}),
    ),
    "a sum that two read in their own ways": (
        Net(lambda s, x: (y := s.a(x) + s.a(x)) * y.relu(), a=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {}, {"": ("add_0", "mul_0")}, {"": 2}),
    ),
    "a convolution that two read in their own ways": (
        Net(lambda s, x: (y := s.a(x)) * s.b(y.relu()), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {"a": False}, {"": ("mul_0",)}, {"": 1}),
    ),
    "an activation of a float operand": (
        Net(lambda s, x: s.b(F.silu(s.a(x) + x.exp())), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {"a": False}, returned=frozenset("b")),
    ),
    "in place, and read as it was": (
        Net(lambda s, x: F.silu(y := s.a(x), inplace=True) + y, a=nn.Conv2d(3, 3, 1)),
        GraphFacts({}, {"a": False}),
    ),
    "a module called in two ways": (
        Net(lambda s, x: s.b(s.c(s.c(s.a(x)))), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), c=nn.Hardswish()),
        GraphFacts({}, {}, {"c": ("hardswish_0",)}, {"c": 1}, frozenset("b")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_follows(name):
    module, expected = CASES[name]
    assert facts(module, images(2)) == expected


def test_reading_changes_nothing_and_sees_quantized_layers_as_float():
    module, inputs = quantized("residual")
    module.train()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    untouched = facts(ResNet(), inputs)
    random_state = torch.get_rng_state()
    assert facts(module, inputs) == untouched
    assert module.training
    assert module.stem[0].quantization_phase == "frozen"
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_nothing_to_read_and_what_cannot_be_read():
    def branch(self, x):
        return self.a(x) if x.sum() > 0 else x

    module = Net(branch, a=nn.Conv2d(3, 3, 1))
    assert read_graph(module, ForwardInputs((images(2),)), (), ()) == GraphFacts({}, {})
    with pytest.raises(ValueError, match=r"cannot be exported by torch.export .*\. Without the graph"):
        facts(module, images(2))


def test_a_pooling_that_returns_two_tensors_is_read_over():
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 3))
    facts = read_graph(net, ForwardInputs((torch.randn(2, 3, 8),)), ["0"], ["0", "3"])
    assert facts.outputs == {"0": False}
