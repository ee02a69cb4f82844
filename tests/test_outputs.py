"""Outputs of every form are read the same way everywhere."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from helpers.marks import cells
from lightning_optim import DistillationModule, export_onnx, prune_channels, sensitivity
from lightning_optim.distillation.capture import tensor_of
from lightning_optim.export.session import ExportedModel
from lightning_optim.outputs import output_fields, output_tensors
from lightning_optim.quantization.graph import read_graph
from lightning_optim.target import ForwardInputs


@dataclasses.dataclass
class Record:
    logits: torch.Tensor
    hidden: object = None


class Pair(NamedTuple):
    logits: torch.Tensor
    hidden: object = None


class Plain:
    def __init__(self, logits, hidden=None):
        self.logits, self.hidden = logits, hidden


class Slotted:
    __slots__ = ("hidden", "logits", "unset")

    def __init__(self, logits, hidden=None):
        self.logits, self.hidden = logits, hidden


class Batch(list):
    pass


def as_dict(logits, hidden=None):
    return {"logits": logits, "hidden": hidden}


FORMS = {
    "dataclass": Record,
    "NamedTuple": Pair,
    "namespace": lambda logits, hidden=None: SimpleNamespace(logits=logits, hidden=hidden),
    "object": Plain,
    "dict": as_dict,
    "mapping": lambda logits, hidden=None: UserDict(as_dict(logits, hidden)),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_tensors_are_found_at_any_depth_and_in_order(make):
    first, second, third = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    inner = make(second, hidden=[None, "words", 3, third])
    assert [t.shape for t in output_tensors(make(first, hidden=(inner,)))] == [(1,), (2,), (3,)]
    assert list(output_fields(inner)) == ["logits", "hidden"]


@pytest.mark.parametrize("nothing", [None, 3, "words", torch.float32, nn.Linear(2, 2), Record, len, [], {}, ()])
def test_what_holds_no_output_gives_no_tensor(nothing):
    assert output_tensors(nothing) == []
    assert not output_fields(nothing)


def test_slots_subclasses_and_returns_of_torch_are_read():
    assert len(output_tensors(Slotted(torch.zeros(1), torch.zeros(2)))) == 2
    assert len(output_tensors(Batch([torch.zeros(1), Batch([torch.zeros(2)])]))) == 2
    assert len(output_tensors(torch.zeros(2, 2).max(1))) == 2
    assert len(output_tensors(OrderedDict(a=torch.zeros(1)))) == 1
    assert len(output_tensors(torch.distributions.Normal(torch.zeros(1), torch.ones(1)))) == 2
    assert output_fields(namedtuple("Point", "x y")(1, 2)) == {"x": 1, "y": 2}


def test_an_object_that_leads_back_to_itself_is_read_once():
    output = SimpleNamespace(logits=torch.zeros(1))
    output.parent = {"above": output}
    assert len(output_tensors(output)) == 1


def test_other_objects_stay_closed_where_asked():
    assert output_tensors(Plain(torch.zeros(1)), objects=False) == []
    assert len(output_tensors(Record(torch.zeros(1), hidden=SimpleNamespace(a=torch.zeros(2))), objects=False)) == 2


class Net(nn.Module):
    """A net whose features are returned: they may not lose channels."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        features = self.second(self.first(x).relu()).relu()
        return self.make(self.head(features), hidden=self.make(features))


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_a_feature_that_the_model_returns_keeps_its_channels(make):
    module = Net(make)
    report = prune_channels(module, torch.randn(4, 8))
    assert report.channels == {"first": (32, 16)}
    assert "change its shape" in report.left_out["second"]
    costs = sensitivity(module, lambda net: float(net(torch.ones(1, 8)) is not None), torch.randn(4, 8), ratios=[0.5])
    assert set(costs.scores) == {"first"}


@pytest.mark.parametrize("name", cells(list(FORMS), quick=["dataclass", "mapping"]))
def test_every_form_is_exported_under_its_names_with_its_values(tmp_path, name):
    module, x = Net(FORMS[name]).eval(), torch.randn(4, 8)
    report = export_onnx(module, tmp_path / "net.onnx", x)
    assert report.outputs[0] == "logits"
    expected = output_tensors(module(x))
    for ours, theirs in zip(expected, ExportedModel(tmp_path / "net.onnx")(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_every_form_teaches_and_has_features(make):
    output = make(torch.zeros(2, 4), hidden=torch.zeros(2, 8))
    module = DistillationModule(nn.Linear(2, 4), nn.Linear(2, 4), optimizer=torch.optim.SGD)
    assert module.get_logits(output).shape == tensor_of(output).shape == (2, 4)


def test_a_dataclass_without_logits_teaches_by_its_first_tensor():
    @dataclasses.dataclass
    class Scores:
        name: str
        scores: torch.Tensor

    module = DistillationModule(nn.Linear(2, 4), nn.Linear(2, 4), optimizer=torch.optim.SGD)
    assert module.get_logits(Scores("net", torch.zeros(2, 4))).shape == (2, 4)
    with pytest.raises(TypeError, match="no logits in an output of type str"):
        module.get_logits("words")


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_the_graph_behind_every_form_is_read(make):
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return make(self.other(self.norm(self.conv(x)).relu()))

    inputs = ForwardInputs((torch.zeros(2, 3, 8, 8),))
    facts = read_graph(Convolutions(), inputs, ["conv", "other"], ["conv", "other"])
    assert facts.batch_norms == {"conv": "norm"}
