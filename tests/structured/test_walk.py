"""Walks through torch-pruning's graph."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch_pruning
from torch import nn

from lightning_optim.structured.walk import Walker


@dataclass(eq=False)
class Node:
    module: nn.Module
    dependencies: list = field(default_factory=list)


def graph_of(mapping):
    """Return a graph of two layers, each of which makes the other lose channels."""
    pruner = SimpleNamespace(prune_out_channels=lambda *_: None)
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    nodes = [Node(layer) for layer in layers]
    for source, target in (nodes, nodes[::-1]):
        handler = pruner.prune_out_channels
        dependency = torch_pruning.dependency.Dependency(handler, handler, source, target)
        dependency.index_mapping[0] = mapping
        source.dependencies.append(dependency)
    graph = SimpleNamespace(
        module2node=dict(zip(layers, nodes, strict=True)),
        get_pruner_of_module=lambda _: pruner,
        is_out_channel_pruning_fn=lambda _: True,
    )
    return graph, layers


def test_a_walk_that_goes_round_in_a_circle_ends_where_nothing_is_new():
    graph, layers = graph_of(lambda indices: [index._replace(idx=3 - index.idx) for index in indices])
    items = Walker(graph, {}).walk(layers[0], [0])
    assert [(item.dep.target.module, item.idxs, item.root_idxs) for item in items] == [
        (layers[0], [0], [0]),
        (layers[1], [3], [0]),
    ]


@pytest.mark.parametrize(
    "mapping",
    [
        lambda indices: [index._replace(idx=index.idx + 1) for index in indices],
        lambda indices: [*indices, *indices],
    ],
)
def test_a_walk_that_does_not_end_is_ended(mapping):
    graph, layers = graph_of(mapping)
    with pytest.raises(RuntimeError, match="walk through the graph does not end"):
        Walker(graph, {}).walk(layers[0], [0])


def test_layers_that_hold_one_tensor_lose_the_same_entries_of_it():
    graph, layers = graph_of(lambda indices: [])
    items = Walker(graph, {(layers[0], True): [(layers[1], True)]}).walk(layers[0], [1, 2])
    assert [(item.dep.target.module, item.idxs) for item in items] == [(layers[0], [1, 2]), (layers[1], [1, 2])]
