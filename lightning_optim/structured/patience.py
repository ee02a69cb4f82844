"""A limit to torch-pruning's walks through its graph."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Patience"]

READS_PER_NODE = 4
"""Walks that end took 1.1 (Swin), 0.6 (BERT) and fewer; a Llama block more than 50."""

INDICES_PER_CHANNEL = 8
"""Of the widest layer; no walk that ends finds more in a step."""


class Patience:
    """Ends a walk of torch-pruning 1.6.1 that goes round in circles.

    Where rotary embeddings cut halves of a head and join them the other way round, it finds new indices for the same
    layers for ever; where products of stacked vectors are flattened, more of them at every turn.
    """

    def __init__(self, graph: Any) -> None:
        self.limit = READS_PER_NODE * len(graph.module2node) + 500
        widths = (
            max(p.shape)
            for layer in graph.module2node
            if isinstance(layer, nn.Module)
            for p in layer.parameters(recurse=False)
            if p.ndim
        )
        self.most_indices = INDICES_PER_CHANNEL * max(widths, default=0) + 500
        for node in graph.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = _Mappings(dependency.index_mapping, self)
            node.dependencies = _Counted(node.dependencies, self)
        self.renew()

    def renew(self) -> None:
        """Begin another walk."""
        self.left = self.limit

    def spend(self, indices: int = 0) -> None:
        """Count a read that found some indices.

        Raises:
            RuntimeError: If there were too many.
        """
        self.left -= 1
        if self.left < 0 or indices > self.most_indices:
            raise RuntimeError("its walk through the graph does not end")


class _Counted(list[Any]):
    """A list whose reader may lose patience."""

    def __init__(self, items: Iterable[Any], patience: Patience) -> None:
        super().__init__(items)
        self.patience = patience

    def __iter__(self) -> Iterator[Any]:
        self.patience.spend()
        return super().__iter__()


class _Mappings(_Counted):
    """Index mappings whose results may not grow for ever."""

    def __iter__(self) -> Iterator[Any]:
        for mapping in list.__iter__(self):
            yield None if mapping is None else partial(self._mapped, mapping)

    def _mapped(self, mapping: Any, indices: Any) -> Any:
        found = mapping(indices)
        self.patience.spend(len(found))
        return found
