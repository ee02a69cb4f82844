"""Experts of a mixture that are kept as 3-d parameters: all of them lose the same inner channels.

Which dimension is which is read from the shapes, and proven by the check, as for attention heads.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_optim.modules import expert_weights
from lightning_optim.structured.groups import ChannelGroup, Member
from lightning_optim.structured.numbers import numbers_of

__all__ = ["expert_proposals"]

_ALIGNED = 8
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
            multiple = _ALIGNED if inner % _ALIGNED == 0 else 1
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
