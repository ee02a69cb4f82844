"""Facts of layers."""

import torch
from torch import nn

from lightning_optim.report.layers import against_reference, layer_facts


def test_facts_of_the_layers_that_hold_matrices():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Embedding(5, 4), nn.LSTM(4, 6), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight[:4] = 0
    net[4].half()
    facts = {each["layer"]: each for each in layer_facts(net)}
    assert list(facts) == ["0", "2", "3", "4"]
    assert [each["width"] for each in facts.values()] == [8, 4, 6, 2]
    assert [each["sparsity"] for each in facts.values()] == [0.5, 0, 0, 0]
    assert [each["bits"] for each in facts.values()] == [32, 32, 32, 16]
    assert facts["0"]["parameters"] == 3 * 8 * 9


def test_a_layer_without_width_or_without_its_like_has_none_kept():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(2, 2))

    facts = layer_facts(nn.Sequential(Own(), nn.Linear(2, 2)))
    assert facts[0]["width"] is None
    kept = against_reference(facts, layer_facts(nn.Sequential(Own())))
    assert [each["kept"] for each in kept] == [None, None]
    assert against_reference(facts, facts)[1]["kept"] == 1.0


def test_tied_weights_count_once_under_their_first_name():
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    net["head"].weight = net["embedding"].weight
    facts = layer_facts(net)
    assert [(each["layer"], each["parameters"]) for each in facts] == [("embedding", 20), ("hidden", 16)]
