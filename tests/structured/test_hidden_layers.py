"""Layers whose presence must not change what is found elsewhere, or that hide their weights."""

import pytest
import torch
import torchmetrics
from torch import nn

from helpers.nets import Net, images, sequences
from lightning_optim.structured.events import find_prunable
from lightning_optim.structured.prune import prune_channels
from lightning_optim.structured.selection import select_roots
from lightning_optim.target import as_forward_inputs


def with_layer(kind):
    """Two Linear layers and a layer of a kind that torch-pruning is told about."""
    layers = {"a": nn.Linear(32, 16), "b": nn.Linear(16, 12), "c": nn.Linear(12, 3)}
    kinds = {
        "LSTM": (nn.LSTM(16, 16, batch_first=True), lambda s, x: s.r(x)[0]),
        "GRU": (nn.GRU(16, 16, batch_first=True), lambda s, x: s.r(x)[0]),
        "EmbeddingBag": (nn.EmbeddingBag(10, 16), lambda s, x: x + s.r(torch.zeros(len(x), 3).long())[:, None]),
    }
    layer, call = kinds[kind]
    return Net(lambda s, x: s.c(s.b(call(s, s.a(x).relu())).relu()), r=layer, **layers)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "EmbeddingBag"])
@pytest.mark.parametrize("place", ["metric", "collection", "list"])
def test_a_metric_in_the_module_changes_nothing(kind, place):
    found = []
    for metric in (False, True):
        torch.manual_seed(0)
        module = with_layer(kind)
        if metric:
            accuracy = torchmetrics.classification.MulticlassAccuracy(3)
            places = {
                "metric": accuracy,
                "collection": torchmetrics.MetricCollection({"accuracy": accuracy}),
                "list": nn.ModuleList([accuracy]),
            }
            module.accuracy = places[place]
        report = find_prunable(module, as_forward_inputs(sequences()), *select_roots(module))
        found.append((report.groups, report.left_out))
    assert found[0] == found[1]
    assert "b" in found[0][0]


def weight_norm_with_hooks(layer):
    return nn.utils.weight_norm(layer)


PARAMETRIZED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm with hooks": weight_norm_with_hooks,
    "spectral_norm with hooks": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.parametrize("words", [{}, {"exclude": ["c"]}, {"include": ["b"]}, {"include": ["a", "b", "c"]}])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_parametrized_layers_keep_their_inputs_and_outputs(name, words):
    torch.manual_seed(0)
    module = nn.Sequential()
    for layer, conv in {
        "a": nn.Conv2d(3, 8, 3),
        "c": PARAMETRIZED[name](nn.Conv2d(8, 8, 3)),
        "b": nn.Conv2d(8, 8, 3),
        "out": nn.Conv2d(8, 2, 1),
    }.items():
        module.add_module(layer, conv)
    report = prune_channels(module, images(), **words)
    assert set(report.channels) == {"b"}
    assert "parametriz" in report.left_out["c"] or words.get("exclude") or "c" not in words.get("include", "c")
    assert "not in include" in report.left_out["a"] or "c is parametrized" in report.left_out["a"]
    assert module.c(torch.ones(1, 8, 4, 4)).shape == (1, 8, 2, 2)
    assert module.a.out_channels == 8


def test_a_layer_that_breaks_is_named():
    """A buffer over positions and channels says nothing of which dimension is which."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(6, 16))

        def forward(self, x):
            return x + self.table

    module = nn.Sequential(nn.Linear(32, 16), Positions(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    report = prune_channels(module, sequences())
    assert set(report.channels) == {"2"}
    assert report.left_out["0"].startswith("the forward pass fails afterwards in 1 (")


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_recurrent_layer_in_a_part_of_the_model_runs_on_after_a_group_was_tried(kind):
    module = nn.Sequential(with_layer(kind))
    assert "0.a" in find_prunable(module, as_forward_inputs(sequences()), *select_roots(module)).groups
