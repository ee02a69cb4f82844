"""Layers that the example inputs do not reach are found before anything is removed."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from helpers.models import Classifier, fit, new
from helpers.nets import Net, flat, images
from lightning_optim import ChannelPruning, prune_channels, sensitivity
from lightning_optim.structured.events import find_prunable
from lightning_optim.structured.selection import select_roots
from lightning_optim.structured.traced import TracedModel
from lightning_optim.structured.unreached import open_ends, unreached_layers
from lightning_optim.target import as_forward_calls


class Trunk(nn.Module):
    """A trunk with an optional input and a second head."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
        self.condition = nn.Linear(5, 24)
        self.second = nn.Linear(24, 2)
        self.head = nn.Linear(24, 3)

    def forward(self, x, condition=None, second=False):
        h = self.trunk(x)
        if condition is not None:
            h = h + self.condition(condition)
        return (self.head(h), self.second(h)) if second else self.head(h)


X, CONDITION = torch.randn(4, 8), torch.randn(4, 5)


def test_a_group_that_an_unreached_layer_may_read_stays_whole():
    module = Trunk()
    report = prune_channels(module, X)
    assert set(report.channels) == {"trunk.0"}
    assert "may be read by condition, not reached by the example inputs" in report.left_out["trunk.2"]
    assert report.left_out["second"] == report.left_out["condition"] == "not reached by the example inputs"
    for inputs in ({}, {"condition": CONDITION}, {"second": True}):
        module(X, **inputs)


def test_several_example_inputs_reach_every_layer():
    module = Trunk()
    calls = [X, (X, CONDITION), {"x": X, "second": True}]
    report = prune_channels(module, calls, scope="layer")
    assert report.channels == {"trunk.0": (32, 16), "trunk.2": (24, 12)}
    assert module.second.in_features == module.condition.out_features == 12
    assert not [reason for reason in report.left_out.values() if "not reached" in reason]
    for inputs in ({}, {"condition": CONDITION}, {"second": True}):
        module(X, **inputs)
    costs = sensitivity(Trunk(), lambda net: float(net(X, CONDITION).mean()), calls, ratios=[0.5])
    assert set(costs.scores) == {"trunk.0", "trunk.2"}


def test_each_of_several_calls_is_checked():
    """The channels are right in one call and permuted in the other."""

    def forward(s, x, flip=False):
        y = s.a(x).relu()
        return s.b(y.flip(-1) if flip else y)

    module = Net(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 3))
    assert prune_channels(Net(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 3)), X).channels
    with pytest.raises(ValueError, match=r"a \(.*(differs from setting to zero|walk)"):
        prune_channels(module, [X, (X, True)])


def test_without_the_check_nothing_is_left_whole_for_it():
    report = prune_channels(Trunk(), X, check=False)
    assert set(report.channels) == {"trunk.0", "trunk.2"}
    assert report.left_out["second"] == "not reached by the example inputs"


def test_no_example_is_refused():
    with pytest.raises(ValueError, match="the inputs of one call or more, got an empty list"):
        prune_channels(Trunk(), [])


def unreached(module, inputs):
    inputs = as_forward_calls(inputs)
    return unreached_layers(module, inputs, TracedModel(module, inputs))


def report_of(module, inputs):
    return find_prunable(module, as_forward_calls(inputs), *select_roots(module))


def test_layers_that_only_training_calls_are_reached_and_checked():
    def forward(s, x):
        y = s.a(x).relu()
        return (s.b(y), s.aux(y)) if s.training else s.b(y)

    module = Net(forward, a=nn.Linear(8, 16), aux=nn.Linear(16, 2), b=nn.Linear(16, 3))
    assert unreached(module, X) == []
    assert "training fails afterwards" in report_of(module, X).left_out["a"]


def test_a_norm_of_another_domain_and_a_flattened_head_stay_what_they_fit():
    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 9, 3, padding=1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(9), nn.BatchNorm2d(9)])
            self.other, self.third = nn.Conv2d(9, 11, 1), nn.Conv2d(11, 7, 1)
            self.flattened = nn.Linear(11 * 64, 2)
            self.tail = nn.Sequential(*flat(7 * 64))

        def forward(self, x, domain=0):
            return self.tail(self.third(self.other(self.norms[domain](self.conv(x)).relu()).relu()).relu())

    report = report_of(Domains(), images())
    assert set(report.groups) == {"third"}
    assert "may be read by norms.1" in report.left_out["conv"]
    assert "may be read by flattened" in report.left_out["other"]
    both = report_of(Domains(), [images(), (images(), 1)])
    assert set(both.groups) == {"conv", "third"}


def test_a_head_on_a_concatenation_keeps_all_that_may_be_in_it():
    module = Net(
        lambda s, x: s.c(s.b(s.a(x).relu()).relu()),
        a=nn.Linear(8, 32),
        b=nn.Linear(32, 20),
        both=nn.Linear(52, 2),
        c=nn.Linear(20, 3),
    )
    report = report_of(module, X)
    assert not report.groups
    assert all("may be read by both" in report.left_out[name] for name in ("a", "b"))


def test_a_whole_network_beside_the_model_holds_nothing_back():
    """A teacher or a discriminator reads the inputs of its own, whatever its widths inside."""
    student = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    module = Net(lambda s, x: s.student(x), teacher=teacher, student=student)
    (part,) = open_ends(module, unreached(module, X))
    assert (part.name, part.reads, part.writes) == ("teacher", {8}, {4})
    assert set(report_of(module, X).groups) == {"student.0", "student.2"}


def test_weights_read_without_a_call_are_reached():
    module = Net(
        lambda s, x: s.b(torch.nn.functional.linear(x, s.a.weight).relu() + s.c(x)),
        a=nn.Linear(8, 16, bias=False),
        c=nn.Linear(8, 16),
        b=nn.Linear(16, 3),
    )
    assert unreached(module, X) == []


def test_a_model_of_no_layers_and_outputs_that_lead_to_none_are_told_apart():
    with pytest.raises(ValueError, match="has no Linear, convolution or embedding layer"):
        prune_channels(nn.ReLU(), X)

    def sampled(y):
        return torch.distributions.Normal(y, 1.0).sample()

    for give, reason in (
        (lambda y: y.argmax(-1), "returns only int64 tensors"),
        (sampled, "without a gradient \\(detached, sampled, or computed under no_grad\\)"),
        (lambda y: y.detach(), "without a gradient"),
        (lambda y: "words", "returns no tensor"),
    ):
        module = Net(lambda s, x, give=give: give(s.b(s.a(x))), a=nn.Linear(8, 16), b=nn.Linear(16, 3))
        with pytest.raises(ValueError, match=reason):
            prune_channels(module, X)


class Validated(Classifier):
    """A head that only validation uses."""

    def __init__(self):
        super().__init__()
        self.probe = nn.Linear(self.net[0].out_features, 2)

    def validation_step(self, batch, index):
        self.probe(self.net[0](batch[0]))


def test_a_fit_refuses_at_its_start_what_only_validation_reads(tmp_path):
    module = Validated()
    with pytest.raises(MisconfigurationException, match="may be read by probe, not reached by the example inputs"):
        fit(tmp_path, module, ChannelPruning(start=1, end=3, events=1), max_epochs=1)
    assert module.net[0].out_features == new().net[0].out_features


def test_a_fit_takes_several_example_inputs(tmp_path):
    module = new()
    x = torch.zeros(2, 12)
    callback = ChannelPruning(start=1, end=3, events=1, example_inputs=[x, (x,)])
    fit(tmp_path, module, callback, max_epochs=1)
    assert module.net[0].out_features < new().net[0].out_features
