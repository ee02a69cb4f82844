"""Walks through torch-pruning's graph: from some outputs of a layer to everything that loses channels with them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lightning_optim.structured.groups import is_root, outputs_of

__all__ = ["Item", "Side", "Walker"]

READS_PER_NODE = 4
"""Walks that end took 1.1 (Swin), 0.6 (BERT) and fewer."""

INDICES_PER_CHANNEL = 8
"""Of the widest layer; no walk that ends finds more in a step."""


Side = tuple[nn.Module, bool]
"""A layer, and whether its outputs are meant, or else its inputs."""


class _Index(NamedTuple):
    """A channel, by the names that torch-pruning's mappings read."""

    idx: int
    root_idx: int


@dataclass(frozen=True)
class Item:
    """What one node of the graph loses.

    Attributes:
        dep: torch-pruning's dependency, whose target is the node and whose handler removes the channels.
        idxs: The node's own channels.
        root_idxs: The channel of the layer where the walk began that takes each of them along.
    """

    dep: Any
    idxs: list[int]
    root_idxs: list[int]


class Walker:
    """Follows dependencies as ``DependencyGraph.get_pruning_group`` of torch-pruning 1.6.1 does, in linear time.

    torch-pruning compares every step with all steps before it, and computes the index mappings of the whole graph
    again for every walk. The graph walked here is never pruned, so its mappings stay. A walk that goes round in circles
    ends with an error: where halves of a head change places, or products of stacked vectors are flattened, new indices
    are found for the same layers for ever.

    Args:
        graph: torch-pruning's graph.
        ties: A layer and whether its outputs are meant -> the same of layers that hold the same tensor, and lose the
            same entries of it.
    """

    def __init__(self, graph: Any, ties: Mapping[Side, Sequence[Side]]) -> None:
        self.graph = graph
        self.ties = ties
        widths = (
            max(parameter.shape)
            for layer in graph.module2node
            if isinstance(layer, nn.Module)
            for parameter in layer.parameters(recurse=False)
            if parameter.ndim
        )
        self.most_reads = READS_PER_NODE * len(graph.module2node) + 500
        self.most_indices = INDICES_PER_CHANNEL * max(widths, default=0) + 500

    def walk(self, layer: nn.Module, channels: Iterable[int]) -> list[Item]:
        """Return what leaves with some outputs of a layer; the first item is the layer itself.

        Raises:
            RuntimeError: If the walk does not end.
        """
        node = self.graph.module2node[layer]
        begin = [_Index(channel, channel) for channel in sorted(channels)]
        first = self._at((layer, True), node)
        handler = first.handler
        steps: list[tuple[Any, Sequence[Any]]] = [(first, begin)]
        seen = {(node, handler, tuple(begin))}
        waiting: list[tuple[Any, Sequence[Any]]] = [(first, begin)]
        left = self.most_reads
        while waiting:
            dependency, indices = waiting.pop()
            left -= 1
            if left < 0:
                raise RuntimeError("its walk through the graph does not end")
            for following in self._following(dependency):
                if self._is_broadcast(following):
                    continue
                reached = self._mapped(following, indices)
                key = (following.target, following.handler, tuple(reached))
                if reached and key not in seen:
                    seen.add(key)
                    steps.append((following, reached))
                    waiting.append((following, reached))
        return _merged(steps)

    def _at(self, side: Side, source: Any) -> Any:
        """Return the dependency that enters the graph at a layer."""
        from torch_pruning.dependency import Dependency

        layer, outputs = side
        pruner = self.graph.get_pruner_of_module(layer)
        handler = pruner.prune_out_channels if outputs else pruner.prune_in_channels
        return Dependency(handler, handler, source=source, target=self.graph.module2node[layer])

    def _following(self, dependency: Any) -> Iterator[Any]:
        for following in dependency.target.dependencies:
            if following.is_triggered_by(dependency.handler):
                yield following
        side = dependency.target.module, self.graph.is_out_channel_pruning_fn(dependency.handler)
        for tied in self.ties.get(side, ()):
            yield self._at(tied, dependency.target)

    def _is_broadcast(self, dependency: Any) -> bool:
        """Tell whether a dependency leads to the one output of a layer, such as a gate of all channels."""
        layer = dependency.target.module
        outputs = isinstance(layer, nn.Module) and self.graph.is_out_channel_pruning_fn(dependency.handler)
        return outputs and is_root(layer) and outputs_of(layer) == 1

    def _mapped(self, dependency: Any, indices: Sequence[Any]) -> Sequence[Any]:
        for mapping in dependency.index_mapping:
            if mapping is not None:
                indices = mapping(indices)
                if len(indices) > self.most_indices:
                    raise RuntimeError("its walk through the graph does not end")
        return indices


def _merged(steps: Iterable[tuple[Any, Sequence[Any]]]) -> list[Item]:
    """Return one item for each node and side, with every channel once."""
    items: dict[tuple[Any, Any], tuple[Any, dict[int, int]]] = {}
    for dependency, indices in steps:
        _, roots = items.setdefault((dependency.target, dependency.handler), (dependency, {}))
        for index in indices:
            roots.setdefault(index.idx, index.root_idx)
    return [Item(dependency, list(roots), list(roots.values())) for dependency, roots in items.values()]
