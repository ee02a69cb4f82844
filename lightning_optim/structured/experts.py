"""Experts of a mixture that are kept as 3-d parameters: all of them lose the same inner or the same outer channels.

Which dimension is which is read from the shapes, and proven by the check, as for attention heads. In the trace, experts
are one step through which the outer channels pass: they are those of the inputs and of the outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_optim._upstream import tree_flatten
from lightning_optim.modules import Experts, expert_weights
from lightning_optim.structured.cores import CoreNode, Step
from lightning_optim.structured.groups import ChannelGroup, Member
from lightning_optim.structured.numbers import numbers_of

__all__ = ["ALIGNED", "Outer", "cut_experts", "expert_proposals", "outer_dims", "outer_width"]

ALIGNED = 8
"""``torch.nn.functional.grouped_mm``, which multiplies all experts at once, takes rows of whole 16 bytes."""


def expert_proposals(module: nn.Module, name: str) -> Iterator[ChannelGroup]:
    """Yield the ways in which inner channels may leave the experts of a layer.

    The matrix that reads them (``down_proj``) has them as inputs; the one before it has them as outputs, once or twice
    (a gate and what it gates, one after the other or in turns).

    Args:
        module: The model.
        name: A layer that holds the experts' matrices, ``[experts, outputs, inputs]`` or the other way round.

    Yields:
        Candidates to be checked; none where the layer has no such pair of matrices.
    """
    layer = module.get_submodule(name)
    sizes = {}
    for leaf, inputs_first in expert_weights(layer).items():
        shape = layer._parameters[leaf].shape  # type: ignore[union-attr]
        sizes[leaf] = (shape[2], shape[1]) if inputs_first else (shape[1], shape[2])  # outputs, inputs
    dims = {leaf: (2, 1) if first else (1, 2) for leaf, first in expert_weights(layer).items()}
    for reader, (outer, inner) in reversed(sizes.items()):  # the matrix that reads comes last
        writers = [
            leaf
            for leaf, (outputs, inputs) in sizes.items()
            if leaf != reader and outputs in (inner, 2 * inner) and inputs == outer
        ]
        if not writers or inner < 2:
            continue
        for in_turns in (False, True):
            members = [Member(name, "in", tuple(range(inner)), tuple(range(inner)), (reader, dims[reader][1]))]
            for leaf in writers:
                members.append(_member(name, leaf, dims[leaf][0], sizes[leaf][0], inner, in_turns))
                members += _biases(layer, name, leaf, sizes[leaf][0], inner, in_turns)
            multiple = ALIGNED if inner % ALIGNED == 0 else 1
            group = ChannelGroup(name, inner, 1, tuple(members), proposed=True, multiple=multiple, least=multiple)
            yield from _with_numbers(module, group)
            if all(sizes[leaf][0] == inner for leaf in writers):
                break  # there is one order only


def _member(name: str, leaf: str, dim: int, size: int, inner: int, in_turns: bool) -> Member:
    root = [place * inner // size if in_turns else place % inner for place in range(size)]
    return Member(name, "out", tuple(range(size)), tuple(root), (leaf, dim))


def _biases(layer: nn.Module, name: str, leaf: str, size: int, inner: int, in_turns: bool) -> Iterator[Member]:
    """Yield the parameter that holds a bias for each output of each expert, ``[experts, outputs]``."""
    for key, parameter in layer._parameters.items():
        belongs = key.startswith(leaf) and key != leaf
        if belongs and parameter is not None and parameter.shape[1:] == (size,):
            yield _member(name, key, 1, size, inner, in_turns)


def _with_numbers(module: nn.Module, group: ChannelGroup) -> Iterator[ChannelGroup]:
    """Yield a group without and with the numbers that may count its channels."""
    counts: list[tuple[str, str, Any]] = [
        (layer, key, 1)
        for layer, key, value in numbers_of(module, [group.name])
        if value == group.channels and not key.startswith("hidden")
    ]
    if counts:
        yield replace(group, counts=tuple(counts))
    yield group


@dataclass(frozen=True)
class Outer:
    """A parameter of experts that has the outer channels.

    Attributes:
        leaf: Its name.
        dim: The dimension that holds them.
        side: ``"in"`` where they are inputs, else ``"out"``.
    """

    leaf: str
    dim: int
    side: str


def outer_dims(layer: nn.Module) -> list[Outer]:
    """Return where experts hold their outer channels: inputs of the first matrices, outputs of the last and its biases.

    Args:
        layer: Experts; of another layer nothing is returned.
    """
    order = expert_weights(layer)
    if len(order) < 2:
        return []
    *writers, reader = order
    found = [Outer(leaf, 1 if order[leaf] else 2, "in") for leaf in writers]
    found.append(Outer(reader, 2 if order[reader] else 1, "out"))
    width = layer.get_parameter(reader).shape[found[-1].dim]
    if any(layer.get_parameter(each.leaf).shape[each.dim] != width for each in found):
        return []
    for key, parameter in layer._parameters.items():
        if key.startswith(reader) and key != reader and parameter is not None and parameter.shape[1:] == (width,):
            found.append(Outer(key, 1, "out"))
    return found


def outer_width(layer: nn.Module) -> int | None:
    """Return how many outer channels experts have; None where it cannot be told."""
    found = outer_dims(layer)
    return layer.get_parameter(found[0].leaf).shape[found[0].dim] if found else None


@contextmanager
def cut_experts(module: nn.Module, nodes: dict[Any, nn.Module]) -> Iterator[None]:
    """Trace experts as one step from their inputs to their output; what chooses experts passes on no channel.

    Args:
        module: The model; its experts are watched inside.
        nodes: Filled with the steps: a node of autograd's graph -> the layer that it is a step of.
    """

    def cut(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> Any:
        received = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.grad_fn]
        width = outer_width(layer)
        hidden = next((leaf for leaf in received if leaf.shape[-1] == width), None)
        if hidden is None or not isinstance(output, Tensor) or output.shape != hidden.shape:
            return output
        choosing = [Step.apply(leaf.detach(), leaf) for leaf in received if leaf is not hidden]  # type: ignore[no-untyped-call]
        nodes.update({leaf.grad_fn: CoreNode() for leaf in choosing})
        step: Tensor = Step.apply(output.detach(), hidden, *choosing)  # type: ignore[no-untyped-call]
        nodes[step.grad_fn] = layer
        return step

    experts = [layer for layer in module.modules() if isinstance(layer, Experts) and outer_dims(layer)]
    handles = [layer.register_forward_hook(cut, with_kwargs=True) for layer in experts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
