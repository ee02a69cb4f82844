import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_optim.checkpoint import EMPTY, conform, plain_plan
from lightning_optim.quantization.layers import QuantizedEmbedding, QuantizedLinear
from lightning_optim.quantization.prepare import (
    prepare,
    quantized_layers,
    select_layers,
    set_phase,
)
from lightning_optim.quantization.scheme import QuantizationScheme


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.rnn = nn.RNN(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.scaled = Scaled(4, 4)
        self.normed = weight_norm(nn.Linear(4, 4))
        self.up = nn.ConvTranspose1d(4, 4, 2)
        self.free = nn.Parameter(torch.zeros(4))


def test_all_that_can_be_is_selected_and_the_rest_has_a_reason():
    selection = select_layers(Everything())
    assert list(selection.chosen) == ["table", "body.0", "body.2", "attention", "attention.out_proj", "up"]
    reasons = selection.left_out
    assert reasons["rnn"].startswith("a recurrent layer")
    assert reasons["scaled"].startswith("a subclass of Linear")
    assert reasons["normed"].startswith("its weight is computed")
    assert reasons["body.1"] == "LayerNorm stays float"
    assert reasons[""] == "Everything stays float"


def test_patterns():
    net = Everything()
    assert list(select_layers(net, include=["body.*"]).chosen) == ["body.0", "body.2"]
    assert list(select_layers(net, include=["body"]).chosen) == ["body.0", "body.2"]
    assert list(select_layers(net, include=[nn.Embedding]).chosen) == ["table"]
    assert list(select_layers(net, exclude=["body.0", "up", "attention", nn.Embedding]).chosen) == ["body.2"]
    assert list(select_layers(net.body, "body.", include=["body.2", "0"]).chosen) == ["body.0", "body.2"]
    prepare(net, ["body.0"], QuantizationScheme())
    assert list(select_layers(net, include=[nn.Linear], exclude=["scaled", "normed", "attention"]).chosen) == [
        "body.0",
        "body.2",
    ]


@pytest.mark.parametrize("name", ["rnn", "scaled", "normed"])
def test_what_is_asked_for_and_cannot_be_raises(name):
    with pytest.raises(ValueError, match=rf"^{name}.* cannot be quantized: .* Pass exclude=\['{name}'\]"):
        select_layers(Everything(), include=[name])


def test_a_pattern_that_takes_only_layers_that_stay_float_names_them():
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "last_norm": nn.BatchNorm1d(4)})
    message = (
        r"include: '\*norm' matches only layers that cannot be quantized: norm \(LayerNorm .*last_norm \(BatchNorm1d"
    )
    for include in (["*norm"], ["body", "*norm"]):
        with pytest.raises(ValueError, match=message):
            select_layers(net, include=include)
    assert list(select_layers(net, include=["*"]).chosen) == ["body"]


def test_a_lazy_layer_raises():
    net = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"1 \(LazyLinear\) cannot be quantized: it is lazy .* run one forward pass"):
        select_layers(net)
    assert list(select_layers(net, exclude=["1"]).chosen) == ["0"]


def test_prepared_and_conformed_back():
    net = Everything()
    names = list(net.state_dict())
    parameters = dict(net.named_parameters())
    prepare(net, select_layers(net).chosen, QuantizationScheme(weight_bits=4))
    assert type(net.table) is QuantizedEmbedding
    assert type(net.body[0]) is QuantizedLinear
    assert all(parameters[name] is parameter for name, parameter in net.named_parameters())
    plan = plain_plan(net)
    twin = Everything()
    conform(twin, plan)
    assert type(twin.body[2]) is QuantizedLinear
    assert twin.body[2].weight_bits == 4
    twin.load_state_dict(net.state_dict())
    assert plain_plan(twin)["modules"] == plan["modules"]
    conform(net, EMPTY)
    assert list(net.state_dict()) == names
    assert type(net.body[0]) is nn.Linear
    assert "weight_bits" not in vars(net.body[0])


def test_a_plan_that_names_fewer_attributes_takes_the_others_back():
    net = nn.Sequential(nn.Linear(3, 3))
    prepare(net, ["0"], QuantizationScheme())
    plan = plain_plan(net)
    del plan["modules"]["0"]["attributes"]["output_relu"]
    conform(net, plan)
    assert not hasattr(net[0], "output_relu")


def test_prepared_twice_keeps_its_ranges_unless_the_observer_changes():
    net = nn.Sequential(nn.Linear(3, 3))
    prepare(net, ["0"], QuantizationScheme())
    net[0].input_batches.fill_(5)
    prepare(net, ["0"], QuantizationScheme(weight_bits=3))
    assert (net[0].weight_bits, int(net[0].input_batches)) == (3, 5)
    prepare(net, ["0"], QuantizationScheme(observer="histogram"))
    assert int(net[0].input_batches) == 0
    assert len(net[0].input_statistic) > 2
    prepare(net, ["0"], QuantizationScheme(activation_bits=None))
    assert list(net[0]._buffers) == []


def test_unknown_phase():
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="`phase` must be one of off, observe, fake_quantize, frozen, got 'on'"):
        set_phase(net, quantized_layers(net), "on")
