"""Splits: ranges of a tensor's channels that go different ways (chunk, split, a gated unit, slices).

torch-pruning numbers the parts of a split by the order in which it meets them, and shifts the bounds of slices wrongly.
Here every part is a node of its own, which says which of its source's channels it holds.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_optim import _upstream
from lightning_optim.modules import CONVOLUTIONS, EMBEDDINGS, TRANSPOSED

if TYPE_CHECKING:
    from lightning_optim.structured.groups import ChannelGroup

__all__ = ["Part", "SplitTracer", "blocks_of_parts", "map_parts", "with_counted_parts"]

_SPLITS = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
    if hasattr(owner, name)
}
_SLICES = {torch.narrow, Tensor.narrow, Tensor.__getitem__}
_CHANNELS_FIRST = (*CONVOLUTIONS, *TRANSPOSED, nn.GroupNorm, _upstream.NormBase)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, *EMBEDDINGS, nn.RNNBase)
_REARRANGED = re.compile(r"view|reshape|squeeze|select|unbind|expand|sum|mean|mm|attention")
_SLICE = "SliceBackward0"
_COUNT = re.compile(r"_?(c|c_|c\d|.*(ch|chs|channels?|dims?|features|width|hidden|planes|size|sizes|split|splits).*)")


class Part(nn.Module):
    """Some channels of a tensor: a node of the graph.

    Args:
        places: Which of the source's channels they are; None for a slice over another dimension.
        width: How many channels the source has.
        owner: Name of the module whose forward took them.
    """

    def __init__(self, places: range | None, width: int, owner: str) -> None:
        super().__init__()
        self.places = places
        self.width = width
        self.owner = owner


class SplitTracer(TorchFunctionMode):
    """While a forward pass runs, takes splits apart into slices and notes which modules are running.

    Attributes:
        owners: The module in which each slice was made, by its node of autograd's graph.
        inside: The modules that ran whenever a layer was called, or a parameter was used, outermost first; by the name
            of the layer or of the parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[Any, str] = {}
        self.inside: dict[str, tuple[str, ...]] = {}
        self._running: list[str] = [""]
        self._parameters: dict[nn.Parameter, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch; the parts of a split become slices."""
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if type(value) is nn.Parameter and value in self._parameters:
                self._use(self._parameters[value])
        if func is torch.nn.functional.glu and args and isinstance(args[0], Tensor):
            values, gates = self._slices(
                args[0], torch.chunk(args[0], 2, _dim(args[1:], kwargs, -1)), args[1:], kwargs, -1
            )
            return values * torch.sigmoid(gates)
        result = func(*args, **kwargs)
        if func in _SPLITS and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            return self._slices(args[0], result, args[2:], kwargs, 0)
        if func in _SLICES and isinstance(result, Tensor):
            self._note(result)
        return result

    def _slices(
        self, source: Tensor, parts: Iterable[Tensor], rest: tuple[Any, ...], kwargs: dict[str, Any], default: int
    ) -> tuple[Tensor, ...]:
        dim, start, slices = _dim(rest, kwargs, default), 0, []
        for part in parts:
            slices.append(source.narrow(dim, start, part.shape[dim]))
            start += part.shape[dim]
            self._note(slices[-1])
        return tuple(slices)

    def _note(self, result: Tensor) -> None:
        function = result.grad_fn
        while function is not None and function.name() == _SLICE and function not in self.owners:
            self.owners[function] = self._running[-1]
            function = function.next_functions[0][0]

    def _use(self, name: str) -> None:
        before = self.inside.get(name, self._running)
        self.inside[name] = tuple(running for running in before if running in self._running)

    def graph(self, known: Mapping[Any, nn.Module]) -> Any:
        """Return a graph of torch-pruning's whose slices are parts.

        Args:
            known: Other nodes of autograd's graph that are a module's step.
        """
        from torch_pruning import DependencyGraph

        tracer = self

        class Graph(DependencyGraph):  # type: ignore[misc]
            def _trace_computational_graph(
                self, module2node: Any, output: Any, gradfn2module: Any, reused: Any, visited: Any
            ) -> Any:
                gradfn2module.update(tracer.parts(output, gradfn2module))
                gradfn2module.update(known)
                return super()._trace_computational_graph(module2node, output, gradfn2module, reused, visited)

        _upstream.check(Graph)
        return Graph()

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Note which of a module's layers is running."""
        self._parameters = {parameter: name for name, parameter in module.named_parameters()}
        handles = []

        def enter(name: str) -> None:
            self._use(name)
            self._running.append(name)

        for name, layer in module.named_modules():
            handles.append(layer.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            handles.append(layer.register_forward_hook(lambda *_: (self._running.pop(), None)[1], always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def parts(self, output: Any, layers: dict[Any, nn.Module]) -> dict[Any, Part]:
        """Return the part that each slice above an output is.

        Args:
            output: An output of the model, with its graph.
            layers: Which layer made which node of autograd's graph.
        """
        found: dict[Any, Part] = {}
        waiting, seen = [output.grad_fn], set()
        while waiting:
            function = waiting.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            waiting += [source for source, _ in function.next_functions]
            if function.name() == _SLICE and function not in layers:
                part = self._part(function, layers)
                if part is not None:
                    found[function] = part
        return found

    def _part(self, function: Any, layers: dict[Any, nn.Module]) -> Part | None:
        """Return what a slice takes; None where the dimension of the channels cannot be told."""
        shape = list(function._saved_self_sym_sizes)
        dim = _signed(function._saved_dim) % len(shape)
        axis = 1 if len(shape) == 2 else _channel_axis(function.next_functions[0][0], len(shape), layers)
        if axis is None:
            return None
        places = range(*slice(function._saved_start, function._saved_end, function._saved_step).indices(shape[dim]))
        return Part(places if axis == dim else None, shape[axis], self.owners.get(function, ""))


def _dim(rest: tuple[Any, ...], kwargs: dict[str, Any], default: int) -> int:
    return int(kwargs.get("dim", rest[0] if rest else default))


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _channel_axis(function: Any, ndim: int, layers: dict[Any, nn.Module]) -> int | None:
    """Return which dimension of a node's output holds channels, from the layer that it comes from."""
    moves: list[Callable[[int], int]] = []
    while function is not None:
        layer = layers.get(function)
        axis = 1 if isinstance(layer, _CHANNELS_FIRST) else ndim - 1 if isinstance(layer, _CHANNELS_LAST) else None
        if axis is not None:
            for move in reversed(moves):
                axis = move(axis)
            return axis
        name = function.name().lower()
        if name.startswith("permute"):
            order = [_signed(dim) % ndim for dim in function._saved_dims]
            moves.append(order.index)
        elif name.startswith("transpose"):
            first, second = (_signed(dim) % ndim for dim in (function._saved_dim0, function._saved_dim1))
            moves.append({first: second, second: first, **{d: d for d in range(ndim) if d not in (first, second)}}.get)  # type: ignore[arg-type]
        elif _REARRANGED.search(name):
            return None
        sources = [source for source, _ in function.next_functions if source is not None]
        function = next((source for source in sources if "accumulate" not in source.name().lower()), None)
    return None


def map_parts(graph: Any) -> None:
    """Tell torch-pruning's graph which channels of its source each part holds."""
    for part, node in graph.module2node.items():
        if not isinstance(part, Part) or part.places is None:
            continue
        for dependency in node.dependencies:
            if any(dependency.target is source for source in node.inputs):
                dependency.index_mapping[0] = _to_source(part.places)
        for source in node.inputs:
            for dependency in source.dependencies:
                if dependency.target is node:
                    dependency.index_mapping[0] = _to_part(part.places)


def _to_source(places: range) -> Callable[[Any], list[Any]]:
    def mapped(indices: Any) -> list[Any]:
        if any(index.idx >= len(places) for index in indices):
            raise IndexError("channels change places between the parts of a split, as in a shuffle")
        return [index._replace(idx=places[index.idx]) for index in indices]

    return mapped


def _to_part(places: range) -> Callable[[Any], list[Any]]:
    return lambda indices: [index._replace(idx=places.index(index.idx)) for index in indices if index.idx in places]


def blocks_of_parts(group: Any) -> tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Return into how many equal blocks the splits of a group cut its channels, and the splits.

    A split of equal parts makes as many blocks; one of parts of 8 and 24 makes four. Then the proportions of the parts
    stay, whether a module counts them or takes halves of what comes.

    Args:
        group: torch-pruning's, of all outputs of its root.

    Returns:
        The number of blocks, and for each split the module that makes it and the sizes of its parts.
    """
    channels = len(group[0].idxs)
    bounds: dict[tuple[Any, str], set[int]] = {}
    for item in group:
        part = item.dep.target.module
        if not isinstance(part, Part) or part.places is None or part.places.step != 1 or part.width != channels:
            continue
        if all(root == part.places[index] for index, root in zip(item.idxs, item.root_idxs, strict=True)):
            source = item.dep.target.inputs[0]
            ends = {0, part.places.start, part.places.stop, part.width}
            bounds[source, part.owner] = bounds.get((source, part.owner), set()) | ends
    blocks, splits = 1, []
    for (_, owner), ends in bounds.items():
        ordered = sorted(ends)
        sizes = tuple(after - before for before, after in pairwise(ordered))
        if len(sizes) > 1:
            blocks = math.lcm(blocks, channels // math.gcd(*sizes))
            splits.append((owner, sizes))
    return blocks, tuple(splits)


def with_counted_parts(module: nn.Module, group: "ChannelGroup") -> "Iterator[ChannelGroup]":
    """Yield the group with the attributes that count the channels of its splits' parts, if there are some.

    They belong to the module that splits, are named like a width and equal the size of a part (``self.c``), or hold all
    sizes (a tuple). The check tells whether it is right that they follow.

    Args:
        module: The model.
        group: Channels of any layers.
    """
    counts: list[tuple[str, str, Any]] = []
    for owner, sizes in group.splits:
        share = {size: Fraction(group.channels, size) for size in (*sizes, group.channels)}
        for name, value in vars(module.get_submodule(owner)).items():
            if _COUNT.fullmatch(name) is None:
                continue
            if type(value) is int and value in share:
                counts.append((owner, name, share[value]))
            elif type(value) is tuple and value == sizes:
                counts.append((owner, name, tuple(share[size] for size in sizes)))
    if counts:
        yield replace(group, counts=tuple(dict.fromkeys(counts)))
